"""Mixtures of experts whose routing is not a top-k: soft, sampled, merged, repeated, factored, with momentum."""
