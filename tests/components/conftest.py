"""One component alone, in float64, with weights of some size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparsekit.testing import component_alone


@pytest.fixture
def component() -> Callable[..., Any]:
    """``component("ffn", {"type": "swiglu", ...}, facts={...})``."""
    return component_alone


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """Normal numbers in float64, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
