"""What this package checks of itself: the contract of its kind, and its own formula."""

from __future__ import annotations

import pytest
import torch
from sparsekit import build_model, probe
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("probe", "new_part")


def test_formula() -> None:
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 12}}
    model = build_model({"d_model": 8, "n_layers": 2, "vocab_size": 11, "max_seq_len": 6, "block": block}).eval()
    streams: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, output: streams.extend((args[0], output[0])))
    ids = torch.arange(24).view(4, 6) % 11
    with torch.no_grad():
        model(ids)
    wanted = []
    for before, after in zip(streams[::2], streams[1::2], strict=True):
        tokens = zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
        steps = [float((y - x).norm() / x.norm()) ** 2 for x, y in tokens]
        wanted.append(sum(steps) / len(steps))
    result = probe(model, "new_part:p=2.0", ids)["new_part"]
    assert result.per_layer["step"].tolist() == pytest.approx(wanted, rel=1e-5)
    assert result.scalars["step"] == pytest.approx(sum(wanted) / 2, rel=1e-5)
