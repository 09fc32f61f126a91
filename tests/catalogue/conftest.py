"""The catalogue as a whole: every entry in a tiny model, and a text to train on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekit.checks import EXAMPLES, Subject
from sparsekit.registry import registry

WORDS = ["it", "is", "a", "truth", "universally", "acknowledged", "that", "single", "man", "in", "possession", "of"]


def example(kind: str, name: str) -> dict[str, Any]:
    """A slot with an example for every required parameter."""
    fields = registry(kind).get(name).Params.model_fields
    return {"type": name} | {field: EXAMPLES[field] for field, info in fields.items() if info.is_required()}


def model_with(kind: str, name: str, **params: Any) -> dict[str, Any]:
    """A tiny model of two layers, for bytes, with an entry in its slot; it may leak where the entry says so."""
    subject = Subject(kind, name, registry(kind).get(name), {**example(kind, name), **params}, None)
    return copy.deepcopy({**subject.spec(), "vocab_size": 257})


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text to train on and one to validate on."""
    folder = tmp_path_factory.mktemp("text")
    for name, length in (("train.txt", 2000), ("validation.txt", 50)):
        (folder / name).write_text(" ".join(WORDS[(i * i + 3 * i // 7) % len(WORDS)] for i in range(length)))
    return folder


@pytest.fixture(scope="session")
def run_of(text: Path) -> Callable[..., dict[str, Any]]:
    """``run_of(model, max_steps=...)``: a run spec of seconds."""

    def make(model: dict[str, Any], **train: Any) -> dict[str, Any]:
        paths = {"path": str(text / "train.txt"), "validation_path": str(text / "validation.txt")}
        optimizer = {"type": "adamw", "lr": 1e-2}
        settings = {"micro_batch_size": 4, "optimizer": optimizer, "schedule": "constant", "log_every": 1}
        settings |= {"device": "cpu", "callbacks": [], "eval_tokens": 64, **train}
        return {"name": "tiny", "model": model, "data": {"source": {"type": "text", **paths}}, "train": settings}

    return make
