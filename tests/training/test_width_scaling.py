"""muP: learning rates by width, and that with them a step does the same to models of any width."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_optimizers import optimizer_of, told
from torch import Tensor

from sparsekit.errors import SpecError
from sparsekit.model.build import build_model


def width_model(width: int, **more: Any) -> dict[str, Any]:
    """Wider by heads, not by head_dim; no random logits at first, in which changes at small widths would drown."""
    return {
        "d_model": width, "n_layers": 2, "vocab_size": 64, "max_seq_len": 16,
        "init": {"type": "mup", "base_width": 32, "std": 32**-0.5, "roles": {"head": 0.0}},
        "block": {
            "attention": {"type": "mha", "n_heads": width // 8, "head_dim": 8},
            "ffn": {"type": "swiglu", "d_ff": 2 * width},
        },
        **more,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_learning_rates_by_width(name: str) -> None:
    model = build_model(width_model(128))
    scaled = {"width_scaling": {"base_d_model": 32}, "groups": {"layers.0.ffn.up.*": {"lr": 7.0}}}
    found = told(model, optimizer_of(name, model, lr=1.0, **scaled), "lr")
    for key, lr in found.items():
        if key == "layers.0.ffn.up.weight":
            assert lr == 7.0  # what is said is taken as it is
        elif key == "embedding.weight" or "norm" in key:
            assert lr == 1.0
        else:
            ratio = 32 / (256 if "down" in key else 128)
            assert lr == pytest.approx(math.sqrt(ratio) if name == "muon" and key != "head.weight" else ratio)
    original = told(model, optimizer_of("muon", model, lr=1.0, scale="original", **scaled), "lr")
    assert {lr for key, lr in original.items() if key.startswith("layers.1")} == {1.0}


def change(width: int, slot: dict[str, Any], steps: int = 4) -> tuple[float, float]:
    """By how much some steps change the last layer's output and the logits, root mean square over all entries."""
    model = build_model(width_model(width))
    optimizer = optimizer_of(model=model, **{"name" if key == "type" else key: slot[key] for key in slot})
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))

    def look() -> list[Tensor]:
        kept: list[Tensor] = []
        handle = model.layers[-1].register_forward_hook(lambda _, __, out: kept.append(out[0].detach()))
        kept.append(model(ids).detach())
        handle.remove()
        return kept

    before = look()
    for _ in range(steps):
        logits = model(ids)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    hidden, logits = (float((a - b).square().mean().sqrt()) for a, b in zip(before, look(), strict=True))
    return hidden, logits


@pytest.mark.parametrize(
    ("slot", "grows"),
    [
        ({"type": "adamw", "lr": 0.01, "weight_decay": 0.0}, (3.0, 3.0)),
        ({"type": "lion", "lr": 0.01, "weight_decay": 0.0}, (3.0, 3.0)),
        ({"type": "muon", "lr": 0.02, "weight_decay": 0.0}, (1.9, 3.0)),
        # whose matrices want no scaling; only the head's rate does
        ({"type": "muon", "lr": 0.1, "adamw_lr": 0.01, "weight_decay": 0.0, "scale": "original"}, (1.2, 3.0)),
    ],
)
def test_steps_change_activations_alike_at_every_width(slot: dict[str, Any], grows: tuple[float, float]) -> None:
    """muP's coordinate check, over widths 32 to 256; without scaled learning rates the wide model moves far more."""
    scaled = [change(width, {**slot, "width_scaling": {"base_d_model": 32}}) for width in (32, 64, 128, 256)]
    plain = [change(width, slot) for width in (32, 256)]
    for i in (0, 1):
        sizes = [moved[i] for moved in scaled]
        assert max(sizes) / min(sizes) < 1.5, (i, sizes)
        assert plain[1][i] / plain[0][i] > grows[i], (i, plain)


def test_a_tied_table_needs_scaled_logits() -> None:
    scaling = {"width_scaling": {"base_d_model": 32}}
    with pytest.raises(SpecError) as error:
        optimizer_of("adamw", build_model(width_model(128, tie_embeddings=True)), **scaling)
    assert str(error.value) == (
        "train.optimizer.width_scaling: a tied table is read and written at one learning rate, so the logits must be "
        "scaled; set model.logit_scale to 32/128 = 0.25"
    )
    optimizer_of("adamw", build_model(width_model(128, tie_embeddings=True, logit_scale=0.25)), **scaling)
    optimizer_of("adamw", build_model(width_model(32, tie_embeddings=True)), **scaling)
