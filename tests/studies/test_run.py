"""Studies that run: what is missing is done once, whatever stops them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekit.errors import SparsekitError
from sparsekit.files import sole
from sparsekit.model.targets import Run
from sparsekit.studies import study as whole
from sparsekit.studies import work
from sparsekit.studies.conduct import PATIENCE, chosen_runs, conduct, in_words, states_of
from sparsekit.studies.estimate import reckon
from sparsekit.studies.plan import Plan, expand
from sparsekit.studies.slurm import parsed, submit
from sparsekit.studies.spec import load_study
from sparsekit.studies.stages import DONE, METRICS, OWN, read_small, stages, state
from sparsekit.studies.study import finish, prepare, study

from .conftest import HEADS, RAW

Planned = Callable[..., Plan]
SECONDS = 60.0  # on a machine that others use too
TABLES = ("table.csv", "comparisons.csv", "claims.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a study that came to its end in one go; copied by who changes it."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "small.json"
    path.write_text(json.dumps(RAW))
    study(path, out=folder / "out", report=False, tell=lambda _: None)
    yield folder / "out"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def written(folder: Path) -> dict[Path, int]:
    """When each file of the runs was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/**/*") if path.is_file() and path.name != ".lock"}


def told_by(plan: Plan, **more: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    prepare(plan, plan.distinct)
    runs = chosen_runs(plan, more.pop("only", None))
    return conduct(plan, runs, more.get("jobs", 1), more.get("devices", []), lines.append), lines


def test_a_study_comes_to_its_end(finished: Path, planned: Planned, raw: dict[str, Any]) -> None:
    plan = expand(load_study(finished))
    assert {state.status for state in states_of(plan).values()} == {"done"}
    for run in plan.runs:
        metrics = Run(run.folder).metrics
        assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
        assert json.loads((run.folder / "spec.json").read_text()) == run.resolved
        probe = json.loads((run.folder / "probes/variance-step-00000006.json").read_text())
        assert probe["meta"]["sequences"] == 4
        value = next(
            line
            for line in (finished / "table.csv").read_text().splitlines()
            if f'"{run.id}"' in line and "val_loss" in line
        )
        assert value.split(",")[-3] == repr(metrics[-1]["val_loss"])


def test_what_is_finished_is_not_run_again(copied: Path) -> None:
    before, text = written(copied), tables(copied)
    outcome, lines = told_by(expand(load_study(copied)))
    assert (outcome.done, outcome.failed, lines) == ([], {}, [])
    finish(expand(load_study(copied)), report=False)
    assert written(copied) == before
    assert tables(copied) == text


def test_a_probe_that_comes_later_runs_alone(copied: Path) -> None:
    before = written(copied)
    more = ['probes=["variance",{"type":"permutation","pairs":"adjacent"},"expert_load"]']
    results = study(copied, overrides=more, report=False, tell=lambda _: None)
    after = written(copied)
    new = {path.name for path in after.keys() - before.keys()}
    assert {"permutation-step-00000006.json", "expert_load-step-00000006.json"} <= new
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed <= {DONE, "train.log"}
    assert "permutation/permutation" in {row["measure"] for row in results.summary.comparisons}
    assert any(remark.startswith("expert_load: not applicable: ") for remark in results.summary.remarks)
    assert results.missing == 0, "what cannot be measured is not asked for again and again"


def test_more_seeds_and_values_run_alone(copied: Path, raw: dict[str, Any]) -> None:
    before = written(copied)
    plan = expand(load_study(copied, ["seeds=[0,1,2]", f"axes.{HEADS}=[4,1,2]"]))
    outcome, _ = told_by(plan, jobs=2, only="*seed=2")
    assert sorted(outcome.done) == [f"n_kv_heads={h},seed=2" for h in (1, 2, 4)]
    assert {path: written(copied)[path] for path in before} == before
    assert {run.id for run in plan.runs if states_of(plan)[run.folder].missing} == {
        f"n_kv_heads=2,seed={s}" for s in (0, 1)
    }


def test_a_folder_of_another_spec_is_refused_whole(copied: Path) -> None:
    before = written(copied)
    plan = expand(load_study(copied, ["base.train.optimizer.lr=0.5"]))
    with pytest.raises(SparsekitError) as error:
        told_by(plan)
    assert str(error.value) == (
        f"{copied}/n_kv_heads=4,seed=0: holds a run of another spec (train.optimizer.lr: 0.01 there, 0.5 planned) "
        "(and 3 more); give another --out"
    )
    assert written(copied) == before
    assert {state.status for state in states_of(plan).values()} == {"differs"}


def test_where_a_run_runs_makes_no_other_run_of_it(copied: Path) -> None:
    plan = expand(load_study(copied, ['base.train.device="cpu"', "base.train.checkpoint_every=null"]))
    assert {state.status for state in states_of(plan).values()} == {"done"}


def test_a_run_that_fails_stops_no_other(raw: dict[str, Any], planned: Planned) -> None:
    raw["axes"] = {"train.optimizer.lr": [1e30, 0.01]}
    raw["base"]["train"] |= {"max_grad_norm": None, "schedule": "constant", "checkpoint_every": 100}
    plan = planned(raw, "seeds=[0]", "probes=[]")
    for _ in range(2):  # it is tried again
        outcome, lines = told_by(plan)
        assert list(outcome.failed) == ["lr=1e+30,seed=0"]
        assert "training has diverged" in next(iter(outcome.failed.values()))
        assert "failed after" in lines[0]
    assert [states_of(plan)[run.folder].status for run in plan.runs] == ["failed", "done"]
    results = finish(plan, report=False)
    assert list(results.failed) == [plan.runs[0].id]
    log = (plan.runs[0].folder / "train.log").read_text()
    assert log.count("Traceback") == 2


def test_a_probe_that_fails_takes_no_other_with_it(raw: dict[str, Any], planned: Planned) -> None:
    raw["probe_on"] = {"sequences": 4, "seq_len": 16}
    raw["probes"] = ["variance", {"type": "permutation", "pairs": "adjacent"}]
    plan = planned(raw, "seeds=[0]")
    plan = expand(plan.study)
    run = plan.runs[0]
    job = work.Job(run.folder, run.resolved, tuple(stages(plan)), "", 1, 1)
    real = work._probe

    def broken(job: work.Job, group: Any) -> None:
        if any(stage.of == "variance" for stage in group):
            raise ValueError("out of luck\nindeed")
        real(job, group)

    work._probe = broken
    try:
        assert work.do(job) == 1
    finally:
        work._probe = real
    now = state(run, stages(plan))
    assert [stage.name for stage in now.missing] == ["probe variance"]
    assert now.failed == "probe variance: ValueError: out of luck"
    assert work.do(job) == 0
    assert state(run, stages(plan)).status == "done"
    assert state(run, stages(plan)).failed == ""


def test_tasks_are_evaluated_at_the_end(raw: dict[str, Any], tmp_path: Path) -> None:
    here = Path(__file__).parents[2] / "specs/tasks"
    raw["evaluate"] = {"tasks": ["austen_arc"], "include_path": os.path.relpath(here, tmp_path), "limit": 4}
    raw["axes"], raw["seeds"], raw["probes"] = {}, [0], []
    path = tmp_path / "small.json"
    path.write_text(json.dumps(raw))
    results = study(path, out=tmp_path / "out", report=False, tell=lambda _: None)
    assert results.missing == 0
    rows = (tmp_path / "out/table.csv").read_text()
    assert "eval/austen_arc/acc," in rows
    assert "eval/austen_arc/acc_norm," in rows


def test_who_finds_a_run_taken_leaves_it(copied: Path) -> None:
    plan = expand(load_study(copied, ["seeds=[7]"]))
    lines: list[str] = []
    held = plan.runs[0].folder
    done_by_others: list[float] = []

    def tell(line: str) -> None:
        lines.append(line)
        if "another process has it" in line:
            done_by_others.append(time.monotonic())

    with sole(held / OWN):
        process = _elsewhere(plan, tell)
        deadline = time.monotonic() + SECONDS
        while not done_by_others and time.monotonic() < deadline:
            time.sleep(0.01)
        assert done_by_others
        assert not (held / METRICS).exists(), "nobody else trained it"
    process.join(SECONDS)
    assert not process.is_alive()
    assert [state.status for state in states_of(plan).values()] == ["done", "done"]
    assert time.monotonic() - done_by_others[0] >= PATIENCE


def _elsewhere(plan: Plan, tell: Callable[[str], None]) -> Any:
    import threading

    thread = threading.Thread(target=lambda: conduct(plan, plan.runs, 1, [], tell), daemon=True)
    thread.start()
    return thread


# --- whole commands


def command(path: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sparsekit.cli", "study", str(path), "--out", str(out), "--no-report", *more]


def begun(path: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(path, out, *more), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def until(process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def alive(folder: Path) -> list[str]:
    """The runs whose process still lives, by the locks that are held."""
    found = []
    for own in folder.glob(f"*/{OWN}"):
        try:
            with sole(own):
                pass
        except SparsekitError:
            found.append(own.parent.name)
    return found


@pytest.fixture
def path(tmp_path: Path, raw: dict[str, Any]) -> Path:
    found = tmp_path / "small.json"
    found.write_text(json.dumps(raw))
    return found


def test_a_signal_saves_and_the_same_command_goes_on(path: Path, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "out"
    process = begun(path, out, "--jobs", "2")
    until(process, lambda: len(list(out.glob("*/metrics.jsonl"))) == 2)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "small: 4 runs to do; about" in told
    assert f"what each is at: {out}/RUN/train.log" in told
    assert "the same command goes on (" in told.splitlines()[-1]
    assert alive(out) == []
    process = begun(path, out, "--jobs", "2")
    shown, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, told
    assert "written: " in shown
    assert tables(out) == tables(finished)


@pytest.mark.slow
def test_runs_end_when_their_study_is_killed(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begun(path, out, "--set", "base.train.max_steps=100000", "--set", "base.train.checkpoint_every=1000")
    until(process, lambda: any(out.glob("*/metrics.jsonl")) and bool(alive(out)))
    process.kill()
    process.communicate()
    deadline = time.monotonic() + SECONDS
    while alive(out):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (log,) = out.glob("*/train.log")
    assert "stopped and saved at step" in log.read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_costs_itself(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begun(path, out, "--set", "base.train.max_steps=60", "--only", "*seed=0")
    first = out / "n_kv_heads=4,seed=0"
    until(process, lambda: (first / METRICS).exists() and (first / METRICS).stat().st_size > 0)
    pid = int((first / OWN / ".lock").read_text().split()[1])
    os.kill(pid, signal.SIGKILL)
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "n_kv_heads=4,seed=0: failed after" in told
    assert "the process was ended by SIGKILL, as the system does where memory is short" in told
    assert "n_kv_heads=1,seed=0: done in" in told


def killed_until_done(path: Path, out: Path, draw: Callable[[], float], kills: int) -> None:
    """Kills a study's command so many times, each some seconds after it began; then lets it end."""
    for _ in range(kills):
        process = begun(path, out, "--jobs", "2")
        try:
            process.wait(draw())
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    process = begun(path, out, "--jobs", "2")
    _, told = process.communicate(timeout=4 * SECONDS)
    assert process.returncode == 0, told


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_a_killed_study_ends_with_the_same_table(path: Path, tmp_path: Path, finished: Path, number: int) -> None:
    import random

    draw = random.Random(number)
    killed_until_done(path, tmp_path / "out", lambda: draw.uniform(3.0, 12.0), 3)
    assert tables(tmp_path / "out") == tables(finished)


def test_the_plan_and_the_results_as_json(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsekit.cli import app

    app(["study", str(finished), "--plan", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(finished)
    assert [row["status"] for row in told["runs"]] == ["done"] * 4
    assert told["cost"]["left"] == 0
    app(["study", str(finished), "--collect", "--no-report", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["missing"] == 0


def test_a_time_is_told_as_one_would_say_it() -> None:
    times = (41.2, 600.0, 3.5 * 3600, 3.26 * 86400, 115_810 * 86400.0)
    assert [in_words(seconds) for seconds in times] == ["41 s", "10 min", "3.5 h", "3.3 days", "317 years"]


def test_time_is_reckoned_from_finished_runs(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsekit.cli import app

    told = [read_small(path / OWN / DONE)["train"]["tokens_per_second"] for path in copied.glob("n_kv*")]
    app(["study", str(copied), "--plan", "--json", "--set", "seeds=[0,1,2,3]"], standalone_mode=False)
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["left"] == pytest.approx(cost["flops"] / 2)
    assert "from 4 finished runs of this study" in cost["how"]
    plan = expand(load_study(copied))
    speeds = sorted(speed * plan.runs[0].flops_per_token for speed in told)
    assert cost["left"] / cost["seconds"] == pytest.approx(speeds[2], rel=0.2)


def test_time_on_a_gpu_is_reckoned_from_widths(raw: dict[str, Any], planned: Planned) -> None:
    """Narrow models reach less of a GPU than wide ones."""
    raw["axes"], raw["seeds"] = {"model.d_model": [256, 4096]}, [0]
    plan = dataclasses.replace(planned(raw), device="a GPU", peak_flops=1e15)
    told = reckon(plan, states_of(plan), jobs=3, n_devices=2)
    narrow, wide = (run.flops for run in plan.runs)
    assert narrow is not None and wide is not None
    assert told.seconds == pytest.approx((narrow / 0.075 + wide / 0.45) / 2e15)
    assert told.how == f"at {(narrow + wide) / told.seconds / 2e15:.0%} of the peak of 2 x a GPU, 1e+15 FLOP/s"


@pytest.mark.slow
def test_a_run_of_two_processes(raw: dict[str, Any], planned: Planned) -> None:
    plan = planned(raw, "seeds=[0]", "axes={}", "launch.nproc=2", "base.train.micro_batch_size=2")
    outcome, _ = told_by(plan)
    assert (outcome.done, outcome.failed) == (["seed=0"], {})
    assert Run(plan.runs[0].folder).metrics[-1]["step"] == 6
    assert {state.status for state in states_of(plan).values()} == {"done"}


# --- SLURM


def test_slurm_options() -> None:
    assert parsed("partition=a100,time=120,gpus=1") == {"partition": "a100", "time": 120, "gpus": 1}
    with pytest.raises(SparsekitError, match="expected name=value,name=value"):
        parsed("a100")


@pytest.mark.slow
def test_an_array_does_what_is_missing(copied: Path) -> None:
    shutil.rmtree(copied / "n_kv_heads=1,seed=0")
    plan = expand(load_study(copied, ["seeds=[0,1,2]"]))
    jobs = submit(plan, plan.distinct, "cluster=local,time=5")
    assert sorted(job.result() for job in jobs) == ["done"] * 3
    assert {state.status for state in states_of(plan).values()} == {"done"}
    assert submit(plan, plan.distinct, "cluster=local,time=5") == []
    assert finish(plan, report=False).missing == 0


@pytest.mark.slow
def test_a_task_that_fails_says_so(raw: dict[str, Any], planned: Planned) -> None:
    raw["base"]["train"] |= {"max_grad_norm": None, "schedule": "constant", "optimizer": {"type": "adamw", "lr": 1e30}}
    plan = planned(raw, "seeds=[0]", "axes={}", "probes=[]")
    (job,) = submit(plan, plan.distinct, "cluster=local,time=5")
    assert "failed; its .study/failed.json says why" in str(job.exception())
    assert "diverged" in state(plan.runs[0], stages(plan)).failed


def test_without_slurm_a_line_says_so(raw: dict[str, Any], planned: Planned) -> None:
    plan = planned(raw)
    with pytest.raises(SparsekitError) as error:
        submit(plan, plan.distinct, "partition=a")
    assert str(error.value).startswith("--slurm partition=a: ")
    assert len(str(error.value).splitlines()) == 1


# --- packages


@pytest.mark.parametrize(
    ("package", "told"),
    [
        ("scipy", "a study's intervals need scipy: pip install 'sparsekit[studies]'"),
        ("pyarrow", "a study's table.parquet need pyarrow: pip install 'sparsekit[studies]'"),
        ("lm_eval", "evaluate needs the package lm_eval: pip install 'sparsekit[eval]'"),
    ],
)
def test_a_missing_package_is_told_before_anything_runs(
    raw: dict[str, Any], planned: Planned, monkeypatch: pytest.MonkeyPatch, package: str, told: str
) -> None:
    real = whole.importlib.util.find_spec
    monkeypatch.setattr(whole.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    plan = planned(raw | {"evaluate": {"tasks": ["x"]}})
    with pytest.raises(SparsekitError) as error:
        prepare(plan, plan.distinct)
    assert str(error.value) == told
    assert not plan.study.folder.exists()
