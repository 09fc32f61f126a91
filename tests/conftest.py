"""What all tests share: one thread (two test processes share two cores), and a tiny model to write variations of."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Others use the machine too, so that no time limit of an example says anything; in CI all runs try the same examples.
settings.register_profile("sparsekit", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("sparsekit")

ATTENTION = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}
FFN = {"type": "swiglu", "d_ff": 48}
MOE = {"type": "moe", "n_experts": 4, "router": {"type": "top_k", "k": 2}, "expert": {"type": "swiglu", "d_ff": 24}}


@pytest.fixture
def tiny() -> Callable[..., dict[str, Any]]:
    """``tiny(attention=..., ffn=..., d_model=...)``: a model dict, block fields and model fields told apart."""

    def make(**changes: Any) -> dict[str, Any]:
        block: dict[str, Any] = {"attention": ATTENTION, "ffn": FFN}
        model: dict[str, Any] = {"d_model": 32, "n_layers": 2, "vocab_size": 64, "max_seq_len": 32}
        for name, value in changes.items():
            (block if name in ("attention", "ffn", "norm", "residual") else model)[name] = value
        return copy.deepcopy({"block": block, **model})

    return make


@pytest.fixture
def moe() -> Callable[..., dict[str, Any]]:
    """``moe(n_experts=8, ...)``: a mixture-of-experts slot."""
    return lambda **changes: copy.deepcopy({**MOE, **changes})
