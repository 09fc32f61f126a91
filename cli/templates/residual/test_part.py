"""What this package checks of itself: the contract of its kind, and its own formula."""

from __future__ import annotations

import torch
from sparsekit import build_model
from sparsekit.components.contracts import ForwardContext
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("residual", "new_part")


def test_formula() -> None:
    block = {
        "residual": {"type": "new_part", "start": 0.5},
        "attention": {"type": "mha", "n_heads": 2},
        "ffn": {"type": "swiglu", "d_ff": 6},
    }
    model = build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 4, "block": block}).double()
    layer, context = model.layers[0], ForwardContext()
    with torch.no_grad():
        layer.residual.b_D.copy_(torch.arange(8))
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    got, state = layer.residual(x, {}, context, layer.attention, layer.ffn)
    h = x + 0.5 * layer.attention(layer.residual.attention_norm(x), context)
    torch.testing.assert_close(got, h + torch.arange(8) * layer.ffn(layer.residual.ffn_norm(h), context))
    assert state == {}
