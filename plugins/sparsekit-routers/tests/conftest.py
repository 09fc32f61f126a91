"""One component alone, in float64, with weights of some size; and a run of a spec of this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.components.contracts import Build
from sparsekit.model.build import initialise
from sparsekit.model.targets import Run
from sparsekit.spec import Slot
from sparsekit.spec.load import validate
from sparsekit.training.trainer import Trainer

SPECS = Path(__file__).parents[1] / "specs"


@pytest.fixture
def component() -> Callable[..., Any]:
    """``component("ffn", {"type": "smear", ...}, facts={...})``: built alone, every parameter random."""

    def make(kind: str, slot: Any, d_model: int = 6, max_seq_len: int = 64, **facts: Any) -> Any:
        init = Slot("init").validate({"type": "normal", "std": 0.4})
        build = Build(d_model, max_seq_len, 0, 3, Slot("linear").validate("plain"), init)
        with torch.device("meta"):
            module = build.child(Slot(kind).validate(slot), **facts)
        module = module.double().to_empty(device="cpu")
        initialise(module, seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():  # what starts at 0 or 1 too
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return module

    return make


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """Normal numbers in float64, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trainer]:
    """``trained("monet", **changes)``: the trainer of specs/monet.json after its run, on a text of its own."""

    def train(name: str, steps: int = 50, **model: Any) -> Trainer:
        words = ("it", "is", "a", "truth", "acknowledged", "that", "one", "man", "in", "want", "of", "good")
        text = "\n".join(words[(i * i + 3 * i // 7) % len(words)] for i in range(4000))
        (tmp_path / "text.txt").write_text(text)
        raw = json.loads((SPECS / f"{name}.json").read_text())
        raw["model"] |= {"max_seq_len": 32, **model}
        raw["data"] = {"source": {"type": "text", "path": str(tmp_path / "text.txt")}}
        raw["train"] |= {"device": "cpu", "callbacks": [], "log_every": 1, "eval_tokens": 128, "micro_batch_size": 2}
        raw["train"]["max_steps"] = steps
        trainer = Trainer(validate(raw), Run(tmp_path / "run"))
        trainer.fit()
        return trainer

    return train
