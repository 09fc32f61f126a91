"""A run small enough to be repeated many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

WORDS = ["it", "is", "a", "truth", "universally", "acknowledged", "that", "single", "man", "in", "possession", "of"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder with a text to train on and one to validate on."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, length in (("train.txt", 3000), ("validation.txt", 200)):
        words = [WORDS[(i * i + 3 * i // 7) % len(WORDS)] for i in range(length)]
        (folder / name).write_text(" ".join(words))
    return folder


@pytest.fixture
def raw(text: Path) -> dict[str, Any]:
    """A run spec of seconds: two layers, a mixture of experts among them, four micro-batches a step in pairs."""
    return {
        "name": "small",
        "model": {
            "d_model": 16,
            "n_layers": 2,
            "vocab_size": 257,
            "max_seq_len": 16,
            "block": {
                "attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2},
                "ffn": {"type": "swiglu", "d_ff": 24},
            },
            "layers": {"1": {"ffn": {"type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 16}}}},
        },
        "data": {
            "source": {
                "type": "text",
                "path": str(text / "train.txt"),
                "validation_path": str(text / "validation.txt"),
            }
        },
        "train": {
            "max_steps": 12,
            "global_batch_tokens": 128,
            "micro_batch_size": 4,
            "optimizer": {"type": "adamw", "lr": 1e-2},
            "schedule": {"type": "cosine", "warmup_steps": 3},
            "log_every": 1,
            "callbacks": [],
        },
    }


@pytest.fixture
def saving(raw: dict[str, Any]) -> dict[str, Any]:
    """The small run, saving every third of its twelve steps and keeping all; its router draws random numbers."""
    raw["model"]["layers"]["1"]["ffn"]["router"] = {"type": "top_k", "k": 2, "jitter": 0.1}
    raw["train"] |= {"checkpoint_every": 3, "keep": {"last": 10}}
    return raw
