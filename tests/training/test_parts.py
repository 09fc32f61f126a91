"""Schedules against their formulas, the optimizer's groups, checkpoints on disk, the metrics file."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.errors import CheckpointError, SparsekitError
from sparsekit.files import LOCK, MANIFEST, seal, sole, verify, written_whole
from sparsekit.model.build import build_model
from sparsekit.model.targets import Run, load_model, resolve
from sparsekit.model.weights import WEIGHTS
from sparsekit.spec.load import validate
from sparsekit.spec.slot import Params
from sparsekit.training import schedules
from sparsekit.training.checkpoint import RANDOM, STATE, Progress, Saver
from sparsekit.training.distributed import World
from sparsekit.training.metrics import MetricsLog
from sparsekit.training.optimizers import AdamW
from sparsekit.training.run import train

# ---- schedules ----


def make(cls: type, **params: Any) -> Any:
    return cls(cls.Params(**params))  # type: ignore[attr-defined]


@given(st.sampled_from(["Constant", "Cosine", "WarmupStableDecay"]), st.integers(0, 20), st.integers(1, 200))
def test_factors_stay_in_bounds(name: str, warmup: int, total: int) -> None:
    schedule = make(getattr(schedules, name), warmup_steps=warmup)
    factors = [schedule.factor(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    for step in range(min(warmup, total)):
        assert factors[step] == pytest.approx((step + 1) / warmup)
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)


def test_cosine_by_the_formula() -> None:
    schedule = make(schedules.Cosine, warmup_steps=10, final=0.2)
    for step in (10, 35, 60, 109):
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert schedule.factor(step, 110) == pytest.approx(expected, rel=1e-12)


def test_wsd_decays_over_its_last_share_only() -> None:
    schedule = make(schedules.WarmupStableDecay, warmup_steps=10, decay_share=0.25, final=0.1)
    factors = [schedule.factor(step, 110) for step in range(110)]
    assert factors[10:86] == [1.0] * 76
    for step in range(85, 110):
        assert factors[step] == pytest.approx(0.1 + 0.9 * (110 - step) / 25)


# ---- optimizer ----

MODEL_DICT: dict[str, Any] = {
    "d_model": 16, "n_layers": 1, "vocab_size": 32, "max_seq_len": 8,
    "block": {
        "norm": "layernorm",
        "attention": {"type": "mha", "n_heads": 2, "bias": True, "qk_norm": "rmsnorm"},
        "ffn": {"type": "moe", "n_experts": 3, "expert": {"type": "mlp", "d_ff": 8, "bias": True}},
    },
}  # fmt: skip


def test_only_matrices_decay() -> None:
    model = build_model(MODEL_DICT)
    optimizer = make(AdamW, weight_decay=0.3).build(model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    told = {name: decay[id(p)] for name, p in model.named_parameters()}
    decayed = {name for name, value in told.items() if value == 0.3}
    matrices = [f"attention.{x}" for x in "qkvo"] + ["ffn.experts.up", "ffn.experts.down", "ffn.router.gate"]
    assert decayed == {f"layers.0.{name}.weight" for name in matrices} | {"head.weight"}
    assert all(value == 0.0 for name, value in told.items() if name not in decayed)
    everything = make(AdamW, weight_decay=0.3, decay="all").build(model)
    assert {group["weight_decay"] for group in everything.param_groups} == {0.3}


def test_tied_embedding_is_one_parameter_and_not_decayed() -> None:
    model = build_model(MODEL_DICT | {"tie_embeddings": True})
    optimizer = make(AdamW).build(model)
    groups = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert groups[id(model.embedding.weight)] == 0.0
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)


# ---- files ----


def test_nothing_is_left_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for _ in range(2):
        with sole(folder):
            told = (
                f"{re.escape(str(folder))}: process {os.getpid()} on .+ is training into it; wait for its end, or give"
            )
            with pytest.raises(SparsekitError, match=told), sole(folder):
                pass
        assert [path.name for path in folder.iterdir()] == [LOCK]


HOLDER = """
import os, sys, time
from pathlib import Path
from sparsekit.files import sole
with sole(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)  # the child itself, which has let go by now
    time.sleep(60)
"""


def test_a_killed_process_holds_no_folder_though_a_child_of_it_lives(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(SparsekitError, match=f"process {holder.pid} on"), sole(tmp_path):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is there
        with sole(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_where_there_are_no_locks_a_run_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole(tmp_path):
        pass
    line = f"warning: {tmp_path}: cannot be locked (No locks available); see that no other process trains into it\n"
    assert capsys.readouterr().err == line


def test_a_folder_is_held_against_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "x").write_bytes(b"0123456789")
    (tmp_path / "new" / "deep" / "y.safetensors").write_bytes(b"0")
    seal(tmp_path / "new", folder)
    verify(folder)
    (folder / "deep" / "z.safetensors").write_bytes(b"0")
    with pytest.raises(CheckpointError, match=r"z\.safetensors: was not written with the checkpoint; remove it"):
        verify(folder)
    (folder / "deep" / "z.safetensors").unlink()
    (folder / "x").write_bytes(b"01234")
    with pytest.raises(CheckpointError, match="has 5 bytes where 10 were written"):
        verify(folder)
    (folder / "x").write_bytes(b"0123456788")
    with pytest.raises(CheckpointError, match="its hash differs"):
        verify(folder)
    (folder / "x").unlink()
    with pytest.raises(CheckpointError, match="is missing from the checkpoint"):
        verify(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(folder)


# ---- checkpoints ----


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


SHARDS = [f"{WEIGHTS}/shard-00001-model-0000{i}-of-00002.safetensors" for i in (1, 2)]  # the model's, the optimizer's


@pytest.mark.parametrize("name", [*SHARDS, RANDOM, STATE, "spec.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_refused(raw: dict[str, Any], tmp_path: Path, name: str, damage: str) -> None:
    raw["train"]["max_steps"] = 1
    run = train(validate(raw), out=tmp_path / "run")
    path = run.checkpoints[-1] / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-7])
    raw["train"]["max_steps"] = 2
    with pytest.raises(CheckpointError) as error:
        train(validate(raw), out=tmp_path / "run")
    assert name in one_line(error)


def test_round_trip(raw: dict[str, Any], tmp_path: Path) -> None:
    run = train(validate(raw), out=tmp_path / "run")
    for target in (run, run.folder, run.checkpoints[-1], str(run.folder)):
        model = load_model(target)
        weights = [dict(model.state_dict())]
    ids = torch.arange(16)[None]
    assert torch.equal(model(ids), load_model(run)(ids))
    assert resolve(run).spec.model == validate(raw).model
    assert not any("cos" in name for name in weights[0])  # what is worked out is not saved


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path, raw: dict[str, Any]) -> None:
    spec = validate(raw)
    model = build_model(spec)
    optimizer = make(AdamW).build(model)
    with torch.no_grad():
        model.layers[1].attention.q.weight[3, 3] = math.inf  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.q\.weight is not finite"):
        Saver(Run(tmp_path), spec, World(torch.device("cpu"))).start(model, optimizer, Progress(step=5), {}, {})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_of_another_model_are_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    run = train(validate(raw), out=tmp_path / "run")
    folder = run.checkpoints[-1]
    spec = json.loads((folder / "spec.json").read_text())
    spec["model"]["block"]["ffn"]["d_ff"] = 32
    changed = folder.with_name("changed")
    shutil.copytree(folder, changed, ignore=shutil.ignore_patterns(MANIFEST))
    (changed / "spec.json").write_text(json.dumps(spec))
    seal(changed, folder)
    with pytest.raises(CheckpointError) as error:
        load_model(run)
    assert "another spec" in one_line(error)


# ---- metrics ----


def test_metrics_are_there_at_once_and_cut_at_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, after_step=0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1 / step})
            assert Run(tmp_path).metrics[-1] == {"step": step, "loss": 1 / step}
    with MetricsLog(tmp_path, after_step=2):
        pass
    assert [row["step"] for row in Run(tmp_path).metrics] == [1, 2]


def test_params_base() -> None:
    assert issubclass(AdamW.Params, Params)
