"""What this package checks of itself: the contract of its kind, and what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsekit import load_spec, train
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("callback", "new_part")


def spec(loss: float, steps: int, text: Path) -> Any:
    text.write_text("one two three four five six seven\n" * 200)
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 16}}
    model = {"d_model": 16, "n_layers": 1, "vocab_size": 257, "max_seq_len": 16, "block": block}
    settings: dict[str, Any] = {"max_steps": steps, "log_every": 1, "eval_tokens": 64, "optimizer": {"lr": 0.01}}
    settings |= {"schedule": "constant", "device": "cpu", "checkpoint_every": None}
    settings |= {"callbacks": [{"type": "new_part", "loss": loss}]}
    return load_spec({"model": model, "data": {"source": {"type": "text", "path": str(text)}}, "train": settings})


def test_the_first_step_at_that_loss_is_kept(tmp_path: Path) -> None:
    run = train(spec(4.0, 30, tmp_path / "text.txt"), out=tmp_path / "run")
    first = next(row for row in run.metrics if row["loss"] <= 4.0)
    told = json.loads((run.folder / "new_part.json").read_text())
    assert told == {name: first[name] for name in ("step", "tokens", "loss")}
    train(spec(4.0, 40, tmp_path / "text.txt"), out=tmp_path / "run")
    assert json.loads((run.folder / "new_part.json").read_text()) == told, "a run that goes on keeps it"


def test_a_loss_that_was_not_reached_leaves_no_file(tmp_path: Path) -> None:
    run = train(spec(0.001, 2, tmp_path / "text.txt"), out=tmp_path / "run")
    assert not (run.folder / "new_part.json").exists()
