"""A run that is stopped and goes on is the run that never stopped, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsekit import files
from sparsekit import spec as specs
from sparsekit.errors import CheckpointError
from sparsekit.model.targets import Run
from sparsekit.model.weights import WEIGHTS, read, stored
from sparsekit.registry import registry
from sparsekit.spec.load import validate
from sparsekit.training.callbacks import Callback
from sparsekit.training.checkpoint import RANDOM, STATE
from sparsekit.training.distributed import STOP
from sparsekit.training.run import train
from sparsekit.training.trainer import Trainer


class StopAt(Callback):
    """Asks to stop after a step, as a signal would."""

    class Params(Callback.Params):
        step: int

    def on_step(self, trainer: Trainer) -> None:
        if trainer.progress.step == self.params.step:
            trainer.agreement.ask(STOP)


@pytest.fixture(autouse=True)
def stop_at() -> Any:
    registry("callback").register("stop_at")(StopAt)
    yield
    registry("callback").unregister("stop_at")


def rows(run: Run) -> list[dict[str, Any]]:
    """What was logged, but for speed and memory."""
    machine = ("tokens_per_second", "data_wait", "memory_resident_gib")
    return [{k: v for k, v in row.items() if k not in machine} for row in run.metrics]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds of model and optimizer, whole, and the random numbers."""
    found = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in stored(folder / WEIGHTS).items()}
    read(folder / WEIGHTS, found)
    return found | load_file(folder / RANDOM)


def assert_same_run(left: Run, right: Run) -> None:
    assert rows(left) == rows(right)
    a, b = (tensors(run.checkpoints[-1]) for run in (left, right))
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    states = [json.loads((run.checkpoints[-1] / STATE).read_text()) for run in (left, right)]
    assert states[0] == states[1]


def with_stop(raw: dict[str, Any], step: int) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["train"]["callbacks"] = [{"type": "stop_at", "step": step}]
    return raw


@pytest.mark.parametrize("stops", [[1], [6], [3, 7, 11]])
def test_stopped_equals_undisturbed(raw: dict[str, Any], tmp_path: Path, stops: list[int]) -> None:
    whole = train(validate(raw), out=tmp_path / "whole")
    for step in stops:
        part = train(validate(with_stop(raw, step)), out=tmp_path / "part")
        assert part.metrics[-1]["step"] == step
        assert part.checkpoints[-1].name == f"step-{step:08d}"
    part = train(validate(raw), out=tmp_path / "part")
    assert part.metrics[-1]["step"] == 12
    assert_same_run(whole, part)


def test_longer_run_goes_on_from_a_finished_one(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"]["schedule"] = "constant"
    whole = train(validate(raw), out=tmp_path / "whole")
    raw["train"]["max_steps"] = 6
    train(validate(raw), out=tmp_path / "part")
    raw["train"]["max_steps"] = 12
    part = train(validate(raw), out=tmp_path / "part")
    # the first leg's end was evaluated, which the whole run was not
    for row in part.metrics:
        if row["step"] == 6:
            assert row.pop("val_loss") > 0
    assert [row["loss"] for row in whole.metrics] == [row["loss"] for row in part.metrics]
    weights = [tensors(run.checkpoints[-1]) for run in (whole, part)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_rows_past_the_checkpoint_are_dropped(raw: dict[str, Any], tmp_path: Path) -> None:
    whole = train(validate(raw), out=tmp_path / "whole")
    part = train(validate(with_stop(raw, 6)), out=tmp_path / "part")
    with (part.folder / "metrics.jsonl").open("a") as stream:  # logged after the checkpoint, then killed mid-row
        stream.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    assert_same_run(whole, train(validate(raw), out=tmp_path / "part"))


def test_finished_run_is_left_alone(raw: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    run = train(validate(raw), out=tmp_path / "run")
    before = (run.checkpoints[-1] / STATE).stat().st_mtime_ns
    train(validate(raw), out=tmp_path / "run")
    assert "already finished, at step 12" in capsys.readouterr().err
    assert (run.checkpoints[-1] / STATE).stat().st_mtime_ns == before


def test_never_moves_the_earlier_run_aside(raw: dict[str, Any], tmp_path: Path) -> None:
    train(validate(with_stop(raw, 4)), out=tmp_path / "run")
    fresh = train(validate(raw), out=tmp_path / "run", resume="never")
    assert [row["step"] for row in fresh.metrics] == list(range(1, 13))
    assert Run(tmp_path / "run.old-1").metrics[-1]["step"] == 4


def test_explicit_checkpoint(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"]["checkpoint_every"] = 4
    raw["train"]["keep"] = {"last": 10}
    whole = train(validate(raw), out=tmp_path / "whole")
    assert [path.name for path in whole.checkpoints] == ["step-00000004", "step-00000008", "step-00000012"]
    again = train(validate(raw), out=tmp_path / "again", resume=str(whole.checkpoints[0]))
    assert rows(again) == rows(whole)[4:]


def test_other_spec_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    train(validate(with_stop(raw, 4)), out=tmp_path / "run")
    other = copy.deepcopy(raw)
    other["model"]["block"]["ffn"]["d_ff"] = 32
    with pytest.raises(CheckpointError, match=r"another spec \(model.block.ffn.d_ff was 24, is 32\)"):
        train(validate(other), out=tmp_path / "run")


def test_free_fields_may_change(raw: dict[str, Any], tmp_path: Path) -> None:
    train(validate(with_stop(raw, 4)), out=tmp_path / "run")
    raw["train"] |= {"log_every": 3, "checkpoint_every": 5, "eval_every": 6}
    assert train(validate(raw), out=tmp_path / "run").metrics[-1]["step"] == 12


def test_what_costs_memory_or_time_may_change(raw: dict[str, Any], tmp_path: Path) -> None:
    """The same run but for the order in which numbers are added up."""
    whole = train(validate(raw), out=tmp_path / "whole")
    train(validate(with_stop(raw, 6)), out=tmp_path / "part")
    raw["train"] |= {"objective": {"type": "next_token", "chunk_tokens": 7}, "deterministic": True}
    raw["parallel"] = {"activation_checkpoint": "full"}
    raw["model"]["block"]["attention"]["kernel"] = "eager"
    raw["model"]["layers"]["1"]["ffn"]["dispatch"] = "loop"
    part = train(validate(raw), out=tmp_path / "part")
    assert [row["loss"] for row in part.metrics] == pytest.approx([row["loss"] for row in whole.metrics], rel=1e-5)


def test_changed_text_is_refused(raw: dict[str, Any], tmp_path: Path, text: Path) -> None:
    train(validate(with_stop(raw, 4)), out=tmp_path / "run")
    (text / "train.txt").write_text((text / "train.txt").read_text() + " more")
    with pytest.raises(CheckpointError, match="the text has changed"):
        train(validate(raw), out=tmp_path / "run")


def test_falls_back_to_the_newest_whole_checkpoint(raw: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    raw["train"]["checkpoint_every"] = 4
    whole = train(validate(raw), out=tmp_path / "whole")
    part = train(validate(with_stop(raw, 8)), out=tmp_path / "part")
    broken = max((part.checkpoints[-1] / WEIGHTS).iterdir())
    broken.write_bytes(broken.read_bytes()[:-100])
    resumed = train(validate(raw), out=tmp_path / "part")
    assert "going on from" in capsys.readouterr().err
    assert_same_run(whole, resumed)


def test_a_resume_hashes_each_file_once(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw["train"]["checkpoint_every"] = None
    part = train(validate(with_stop(raw, 6)), out=tmp_path / "part")
    (folder,) = part.checkpoints
    hashed: list[Path] = []
    real = files._sha256
    monkeypatch.setattr(files, "_sha256", lambda path: hashed.append(path) or real(path))

    def fit(trainer: Trainer) -> None:
        raise RuntimeError("begun")

    monkeypatch.setattr(Trainer, "fit", fit)
    for resume in ("auto", str(folder), str(part.folder)):
        hashed.clear()
        with pytest.raises(RuntimeError, match="begun"):
            train(validate(raw), out=part.folder, resume=resume)
        assert sorted(hashed) == sorted(p for p in folder.rglob("*") if p.is_file() and p.name != files.MANIFEST)


def test_nothing_is_mixed_into_a_run(raw: dict[str, Any], tmp_path: Path) -> None:
    one, two = (train(validate(with_stop(raw, step)), out=tmp_path / str(step)) for step in (4, 6))
    with pytest.raises(CheckpointError) as told:
        train(validate(raw), out=two.folder, resume=str(one.checkpoints[0]))
    assert str(told.value) == (
        f"{two.folder}: holds checkpoints of its own, which would be mixed with what begins at {one.checkpoints[0]}; "
        "go on from them with --resume auto, or give another --out"
    )


def test_same_seed_same_run_and_another_seed_another(raw: dict[str, Any], tmp_path: Path) -> None:
    runs = [train(validate(raw), out=tmp_path / name) for name in "ab"]
    assert_same_run(*runs)
    raw["train"]["seed"] = 1
    other = train(validate(raw), out=tmp_path / "c")
    assert rows(other)[-1]["loss"] != rows(runs[0])[-1]["loss"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(raw: dict[str, Any], tmp_path: Path, number: int) -> None:
    """In a process of its own: a polite signal saves and exits with 0, a kill costs the steps since the checkpoint."""
    raw["train"] |= {"max_steps": 60, "checkpoint_every": 10, "schedule": "constant"}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(raw))
    whole = train(validate(raw), out=tmp_path / "whole")
    command = [sys.executable, "-m", "sparsekit.cli", "train", str(path), "--out", str(tmp_path / "part")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    part = Run(tmp_path / "part")
    deadline = time.monotonic() + 120
    while not part.checkpoints and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0, errors
        assert "stopped and saved" in errors or part.metrics[-1]["step"] == 60
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_same_run(whole, part)


def test_params_are_ours() -> None:
    assert issubclass(StopAt.Params, specs.Params)
