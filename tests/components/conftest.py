"""One component alone, in float64, with weights of some size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsekit.components.contracts import Build
from sparsekit.model.build import initialise
from sparsekit.spec import Slot


@pytest.fixture
def component() -> Callable[..., Any]:
    """``component("ffn", {"type": "swiglu", ...}, facts={...})``: built alone, every parameter random."""

    def make(
        kind: str,
        slot: Any,
        d_model: int = 16,
        max_seq_len: int = 32,
        facts: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
        layer_index: int = 0,
        n_layers: int = 2,
        linear: Any = "plain",
    ) -> Any:
        init = Slot("init").validate({"type": "normal", "std": 0.3})
        build = Build(d_model, max_seq_len, layer_index, n_layers, Slot("linear").validate(linear), init)
        with torch.device("meta"):
            module = build.child(Slot(kind).validate(slot), **(facts or {}))
        module = module.to(dtype).to_empty(device="cpu")
        initialise(module, seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():  # what starts at 0 or 1 too
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        return module

    return make


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """Normal numbers in float64, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
