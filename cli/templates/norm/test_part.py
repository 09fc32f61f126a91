"""What this package checks of itself: the contract of its kind, and its own formula."""

from __future__ import annotations

import torch
from sparsekit import build_model
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("norm", "new_part")


def test_formula() -> None:
    block = {
        "norm": {"type": "new_part", "eps": 0.25},
        "attention": {"type": "mha", "n_heads": 2},
        "ffn": {"type": "swiglu", "d_ff": 6},
    }
    model = build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 4, "block": block}).double()
    norm = model.layers[0].residual.ffn_norm
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8))
    for x in torch.randn(3, 8, dtype=torch.float64):
        size = sum(abs(float(value)) for value in x) / 8
        torch.testing.assert_close(norm(x), torch.arange(8) * x / (size + 0.25))
