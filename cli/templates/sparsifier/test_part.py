"""What this package checks of itself: the contract of its kind, and its own formula."""

from __future__ import annotations

import torch
from sparsekit import build_model
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered
from sparsekit.sparsifiers.choose import make
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("sparsifier", "new_part")


def test_formula() -> None:
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "mlp", "d_ff": 20}}
    model = build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 6, "block": block}).eval()
    ids = torch.arange(24).view(4, 6) % 11
    read: list[torch.Tensor] = []
    down = model.layers[0].ffn.down
    handle = down.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    limit = 0.5 * (read[0] ** 2).mean() ** 0.5
    calibration = make("new_part:factor=0.5").calibrate(layered(model), Tokens.of(ids))
    torch.testing.assert_close(calibration.limits[0, "down"].threshold, limit)
    wanted = down.weight @ torch.where(read[0].abs() > limit, read[0], 0)[..., None]
    written: list[torch.Tensor] = []
    with torch.no_grad(), calibration.install(model):
        down.register_forward_hook(lambda module, args, output: written.append(output))
        model(ids)
    torch.testing.assert_close(written[0], wanted.detach()[..., 0])
