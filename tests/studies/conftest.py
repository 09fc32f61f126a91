"""A study of seconds, and runs whose results are written by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsekit.studies.plan import Plan, PlannedRun, expand
from sparsekit.studies.spec import load_study
from sparsekit.studies.stages import METRICS, TRAIN, Stage, note_done, stages

HEADS, LAYERS = "model.block.attention.n_kv_heads", "model.n_layers"
RAW: dict[str, Any] = {
    "name": "small",
    "question": "Does sharing keys damp variance?",
    "base": {
        "model": {
            "d_model": 16, "n_layers": 2, "vocab_size": 257, "max_seq_len": 16,
            "block": {
                "attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 4}, "ffn": {"type": "swiglu", "d_ff": 24},
            },
        },
        "data": {"source": "embedded"},
        "train": {
            "max_steps": 6, "global_batch_tokens": 64, "micro_batch_size": 4, "eval_tokens": 256, "log_every": 1,
            "checkpoint_every": 2, "callbacks": [], "optimizer": {"type": "adamw", "lr": 1e-2},
        },
    },
    "axes": {HEADS: [4, 1]},
    "seeds": [0, 1],
    "probes": ["variance"],
    "probe_on": {"sequences": 4, "seq_len": 16},
    "launch": {"threads": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are remembered for one test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def raw() -> dict[str, Any]:
    return copy.deepcopy(RAW)


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """``planned(raw, *overrides)``: the plan of a study that lies in the test's folder."""

    def plan(raw: Mapping[str, Any], *overrides: str) -> Plan:
        path = tmp_path / "small.json"
        path.write_text(json.dumps(raw))
        return expand(load_study(path, overrides, tmp_path / "out"))

    return plan


Tell = Callable[[PlannedRun], Mapping[str, Any]]


@pytest.fixture
def done() -> Callable[..., None]:
    """``done(plan, tell)``: as if every run (of those that ``tell`` says anything of) were done.

    ``tell(run)`` has ``val_loss`` and a probe's ``scalars`` and ``per_layer``, all of which a real run has too.
    """

    def write(plan: Plan, tell: Tell) -> None:
        for run in plan.distinct:
            told = tell(run)
            if not told:
                continue
            (run.folder / "probes").mkdir(parents=True)
            (run.folder / "spec.json").write_text(json.dumps(run.resolved))
            logged = told.get("rows") or [{"step": 6, "tokens": 384, "val_loss": told.get("val_loss", 1.0)}]
            (run.folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in logged))
            note_done(run.folder, Stage(TRAIN, {}), run.folder / METRICS, step=6, tokens=384, tokens_per_second=100.0)
            for stage in stages(plan)[1:]:
                path = run.folder / "probes" / f"{stage.of}-step-00000006.json"
                found = {name: told.get(name, {}) for name in ("scalars", "intervals", "per_layer", "meta")}
                path.write_text(json.dumps(found))
                note_done(run.folder, stage, path)

    return write
