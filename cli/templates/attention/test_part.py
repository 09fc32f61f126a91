"""What this package checks of itself: the contract of its kind, and its own formula."""

from __future__ import annotations

from typing import Any

import torch
from sparsekit import build_model
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("attention", "new_part")


def model(attention: str) -> Any:
    block = {"attention": {"type": attention, "n_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 12}}
    return build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 6, "block": block}).double()


def test_formula() -> None:
    """Gains are multi-head attention with the columns of its output projection scaled, a head's by its gain."""
    ours, plain = model("new_part"), model("mha")
    gain = torch.tensor([0.5, -2.0], dtype=torch.float64)
    with torch.no_grad():
        ours.layers[0].attention.gain_H.copy_(gain)
        weights = {name: tensor for name, tensor in ours.state_dict().items() if not name.endswith("gain_H")}
        plain.load_state_dict(weights)
        plain.layers[0].attention.o.weight.mul_(gain.repeat_interleave(4))
    ids = torch.arange(12).view(2, 6) % 11
    torch.testing.assert_close(ours(ids), plain(ids))
