"""What this package checks of itself: the contract of its kind, and its own formula."""

from __future__ import annotations

import torch
from sparsekit import build_model
from sparsekit.components.contracts import ForwardContext
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("ffn", "new_part")


def test_formula() -> None:
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "new_part", "d_ff": 6}}
    model = build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 4, "block": block}).double()
    ffn = model.layers[0].ffn
    gate, up, down = (linear.weight for linear in (ffn.gate, ffn.up, ffn.down))
    for x in torch.randn(3, 8, dtype=torch.float64):
        wanted = sum(down[:, i] * (gate[i] @ x) * (up[i] @ x) for i in range(6))
        torch.testing.assert_close(ffn(x, ForwardContext()), wanted)
