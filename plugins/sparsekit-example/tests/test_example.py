"""What every plug-in can check of itself: the contract, and its own formula."""

from __future__ import annotations

import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.build import build_model
from sparsekit.testing import check_component


def test_contracts() -> None:
    check_component("ffn", "maxout")
    check_component("norm", "scale_norm")


def test_formulas() -> None:
    model = build_model(
        {
            "d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 4,
            "block": {
                "norm": "scale_norm",
                "attention": {"type": "mha", "n_heads": 2},
                "ffn": {"type": "maxout", "d_ff": 6},
            },
        }
    ).double()  # fmt: skip
    ffn, norm = model.layers[0].ffn, model.layers[0].residual.ffn_norm
    x = torch.randn(3, 8, dtype=torch.float64)
    for row, y in zip(x, ffn(x, ForwardContext()), strict=True):
        hidden = [max(a @ row, b @ row) for a, b in zip(ffn.gate.weight, ffn.up.weight, strict=True)]
        assert torch.allclose(y, ffn.down.weight @ torch.stack(hidden), rtol=1e-12)
    for row, y in zip(x, norm(x), strict=True):
        assert torch.allclose(y, row * norm.scale / sum(v**2 for v in row) ** 0.5, rtol=1e-12)
