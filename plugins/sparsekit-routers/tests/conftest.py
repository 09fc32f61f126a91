"""One component alone, in float64, with weights of some size; and a run of a spec of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.testing import component_alone, short_run
from sparsekit.training.trainer import Trainer

SPECS = Path(__file__).parents[1] / "specs"


@pytest.fixture
def component() -> Callable[..., Any]:
    """``component("ffn", {"type": "smear", ...})``."""

    def make(kind: str, slot: Any, d_model: int = 6, max_seq_len: int = 64, **facts: Any) -> Any:
        return component_alone(kind, slot, d_model, max_seq_len, facts=facts, n_layers=3, std=0.4)

    return make


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """Normal numbers in float64, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trainer]:
    """``trained("monet", **changes)``: the trainer of specs/monet.json after its run."""
    return lambda name, **changes: short_run(SPECS / f"{name}.json", tmp_path, **changes)
