"""Activation sparsity as an intervention: what is calibrated on a model, installed in it, and taken out again."""
