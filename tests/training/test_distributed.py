"""Two processes that train together over gloo: the same run as one, and whatever befalls one of them."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Crew, finished, free_port, reached, start, steps
from test_faults import limit_files, wait_for_save
from test_kills import in_evaluation
from test_resume import assert_same_run, rows, tensors

from sparsekit.errors import DataError
from sparsekit.files import verify
from sparsekit.model.accounting import describe
from sparsekit.model.targets import Run
from sparsekit.spec.load import validate
from sparsekit.training.run import train


@pytest.fixture
def pair(raw: dict[str, Any]) -> dict[str, Any]:
    """Two micro-batches a step, one for each of two processes: either way the same partition."""
    raw["train"] |= {"schedule": "constant", "checkpoint_every": 4, "keep": {"last": 10}}
    raw["train"]["optimizer"]["lr"] = 3e-3
    return raw


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """What two processes do with a spec if nothing befalls them, by spec."""
    return {}


def assert_close_runs(left: Run, right: Run) -> None:
    """The same but for the order in which numbers were added up."""
    for a, b in zip(rows(left), rows(right), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (a["step"], key)
    weights = [tensors(run.checkpoints[-1]) for run in (left, right)]
    for name in weights[0]:
        if name.startswith("model."):
            torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)


def witness(folder: Path) -> None:
    """Notes down which windows each update was made of, by rank."""
    from sparsekit.training import trainer

    real = trainer.Trainer.step

    def step(self: Any, *arguments: Any, **more: Any) -> Any:
        told = real(self, *arguments, **more)
        number, batches = self._recent[-1]
        windows = [row for batch in batches for row in batch.tokens_BT1.tolist()]
        folder.mkdir(exist_ok=True)
        with (folder / f"{number:04d}-{self.world.rank}.json").open("x") as stream:  # no step twice
            json.dump(windows, stream)
        return told

    trainer.Trainer.step = step


def test_one_and_two_processes_train_alike_and_take_over_from_each_other(pair: dict[str, Any], tmp_path: Path) -> None:
    one = train(validate(pair), out=tmp_path / "one")
    two, turns = Run(tmp_path / "two"), Run(tmp_path / "turns")
    finished(pair, two.folder, 2)
    assert [row["step"] for row in rows(two)] == list(range(1, 13))
    assert_close_runs(one, two)
    for n, until in ((1, 4), (2, 9), (1, 12)):
        leg = copy.deepcopy(pair)
        leg["train"]["max_steps"] = until
        finished(leg, turns.folder, n, partial(witness, tmp_path / "seen"))
    assert [row["step"] for row in rows(turns)] == list(range(1, 13))
    for name in ("loss", "grad_norm", "load_balance_loss"):
        assert [row[name] for row in rows(turns)] == pytest.approx([row[name] for row in rows(one)], rel=1e-5)
    loader: Any = _loader(pair)
    for step in range(12):
        seen = [json.loads(path.read_text()) for path in sorted((tmp_path / "seen").glob(f"{step + 1:04d}-*.json"))]
        assert len(seen) == (2 if 4 <= step < 9 else 1)
        assert [window for windows in seen for window in windows] == loader.batch(step * 8, 8).tokens_BT1.tolist()


def _loader(raw: dict[str, Any]) -> Any:
    from sparsekit.data.dataset import load_data

    spec = validate(raw)
    return load_data(spec.data).loader(spec.seq_len, spec.train.seed, 4)


def test_a_signal_to_one_of_two(pair: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM to rank 1 alone, while it trains: both save and end; the resumed run is the undisturbed one."""
    pair["train"]["max_steps"] = 40
    pair["model"]["layers"]["1"]["ffn"]["router"] = {"type": "top_k", "k": 2, "jitter": 0.1}  # random on each rank
    whole, part = Run(tmp_path / "whole"), Run(tmp_path / "part")
    finished(pair, whole.folder, 2)
    crew = start(pair, part.folder, 2)
    crew.until(lambda: reached(part) >= 6)
    crew.send(signal.SIGTERM, rank=1)
    assert crew.wait() == [0, 0], crew.told
    last = reached(part)
    assert crew.told == [f"{part.folder}: stopped and saved at step {last}\n", ""]
    assert 6 <= last < 40 and steps(part)[-1] == last
    finished(pair, part.folder, 2)
    assert_same_run(whole, part)


def only(rank: int, prepare: Any) -> None:
    if os.environ["RANK"] == str(rank):
        prepare()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_evaluation(pair: dict[str, Any], tmp_path: Path, number: int) -> None:
    """To rank 1 alone; the evaluation takes several rounds, in which all agree to stop or to save."""
    pair["train"] |= {"checkpoint_every": None, "eval_every": 5, "keep": {"best": False}}
    whole, part = Run(tmp_path / "whole"), Run(tmp_path / "part")
    crew = start(pair, part.folder, 2, partial(only, 1, partial(in_evaluation, number)))
    assert crew.wait() == [0, 0], crew.told
    assert steps(part) == ([5] if number == signal.SIGTERM else [5, 12])
    if number == signal.SIGTERM:
        finished(pair, part.folder, 2)
    finished(pair, whole.folder, 2)
    assert_same_run(whole, part)


def test_a_rank_that_dies(pair: dict[str, Any], tmp_path: Path) -> None:
    """The other ends with a line soon after, and what was saved is whole."""
    pair["train"]["max_steps"] = 4000
    run = Run(tmp_path / "run")
    for dying in (0, 1):
        crew = start(pair, run.folder, 2)
        goal = steps(run)[-1] + 4 if steps(run) else 4
        crew.until(lambda goal=goal: bool(run.checkpoints) and steps(run)[-1] >= goal)
        crew.send(signal.SIGKILL, rank=dying)
        codes = crew.wait(20)
        assert codes == ([-signal.SIGKILL, 1] if dying == 0 else [1, -signal.SIGKILL]), crew.told
        lines = crew.told[1 - dying].splitlines()
        assert re.fullmatch(
            rf"error: rank {1 - dying}: another process of this run has ended or is out of reach \(.+\); "
            "see what it wrote, and train again to go on from the newest checkpoint",
            lines[-1],
        ), lines
        assert all(line.startswith("warning: ") or ": going on from step " in line for line in lines[:-1])
        for folder in run.checkpoints:
            verify(folder)


def dies_early() -> None:
    from sparsekit.training import distributed

    distributed.JOINING = timedelta(seconds=3)
    only(1, lambda: os._exit(7))


def test_a_rank_that_dies_before_it_has_joined(pair: dict[str, Any], tmp_path: Path) -> None:
    """Without torchrun nobody would tell the others."""
    crew = start(pair, tmp_path / "run", 2, dies_early)
    assert crew.wait(30) == [1, 7]
    assert re.fullmatch(
        r"error: rank 0: the 2 processes of this run have not come together \(.*1/2 clients joined\.\); "
        "see what the others wrote, and start all again\n",
        crew.told[0],
    ), crew.told


def nowhere() -> None:
    del os.environ["MASTER_ADDR"]


def test_an_environment_that_does_not_say_where_to_meet(pair: dict[str, Any], tmp_path: Path) -> None:
    crew = start(pair, tmp_path / "run", 2, nowhere)
    assert crew.wait(30) == [2, 2]
    for told in crew.told:
        assert told.startswith("error: ") and "MASTER_ADDR expected, but not set; start with torchrun, or set " in told
        assert told.count("\n") == 1


def weigh(path: Path) -> None:
    """Notes down how many bytes of weights and of optimizer state a rank holds when it has trained."""
    from sparsekit.training import trainer
    from sparsekit.training.gradients import local

    real = trainer.Trainer.fit

    def fit(self: Any) -> None:
        real(self)
        parameters = list(self.model.parameters())
        moments = [s for p in parameters for s in self.optimizer.state[p].values() if s.ndim]
        told = [sum(local(tensor).nbytes for tensor in tensors) for tensors in (parameters, moments)]
        path.with_suffix(f".{self.world.rank}").write_text(json.dumps(told))

    trainer.Trainer.fit = fit


@pytest.mark.parametrize(
    ("parallel", "n"), [({"tensor": 2}, 2), ({"expert": 2}, 2), ({"expert": 2, "data": "ddp"}, 2)], ids=str
)
def test_describe_tells_what_a_process_holds(
    pair: dict[str, Any], tmp_path: Path, parallel: dict[str, Any], n: int
) -> None:
    pair["parallel"] = parallel
    pair["train"] |= {"max_steps": 1, "eval_tokens": 16, "checkpoint_every": None}
    told = describe(validate(pair))
    assert told.processes == n
    finished(pair, tmp_path / "run", n, partial(weigh, tmp_path / "bytes"))
    held = [json.loads((tmp_path / f"bytes.{rank}").read_text()) for rank in range(n)]
    assert [told.weight_bytes, told.optimizer_bytes] == [max(sizes) for sizes in zip(*held, strict=True)]


def small_files(begin: int, end: int) -> None:
    """A disk with no room left while steps begin … end - 1 are taken."""
    from sparsekit.training import trainer

    real = trainer.Trainer.step

    def step(self: Any, *arguments: Any, **more: Any) -> Any:
        told = real(self, *arguments, **more)
        if self.progress.step == begin:
            wait_for_save(self)
            limit_files(12000)
        if self.progress.step == end:
            wait_for_save(self)
            limit_files(None)
        return told

    trainer.Trainer.step = step


@pytest.mark.parametrize("rank", [0, 1])
def test_no_room_on_one_ranks_disk(pair: dict[str, Any], tmp_path: Path, rank: int) -> None:
    pair["train"] |= {"log_every": 100}
    run = Run(tmp_path / "run")
    crew = finished(pair, run.folder, 2, partial(only, rank, partial(small_files, 4, 5)))
    assert crew.told[1] == ""
    assert re.fullmatch(
        rf"warning: {run.folder}: the checkpoint of step 4 could not be written \(.*File too large[^;]*\); "
        "no checkpoint was saved before\n",
        crew.told[0],
    ), crew.told
    assert steps(run) == [8, 12]
    fails = start(pair, tmp_path / "last", 2, partial(only, rank, partial(small_files, 12, 1000)))
    assert fails.wait() == [2, 2], fails.told
    assert steps(Run(tmp_path / "last")) == [4, 8]
    assert "the checkpoint of step 12 could not be written (" in fails.told[0] and fails.told[1] == ""


def fail_once(step: int) -> None:
    """Of a step's checkpoint, the first to be sealed finds the disk full; which rank 0 alone gets to know."""
    from sparsekit.training import checkpoint

    real, failed = checkpoint.seal, []

    def seal(temporary: Path, path: Path) -> None:
        if path.name == f"step-{step:08d}" and not failed:
            failed.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(temporary, path)

    checkpoint.seal = seal


def test_a_last_save_is_tried_again_by_all(pair: dict[str, Any], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    crew = finished(pair, run.folder, 2, partial(fail_once, 12))
    assert "the checkpoint of step 12 could not be written (No space left on device)" in crew.told[0]
    assert steps(run) == [4, 8, 12]
    verify(run.checkpoints[-1])


def one_line(crew: Crew) -> str:
    """The error of a crew that all ends with 2, told once."""
    assert crew.wait() == [2, 2], crew.told
    lines = "".join(crew.told).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def spoil(step: int) -> None:
    """An infinite weight on rank 1, as of a computation that went wrong there."""
    from sparsekit.training import trainer

    real = trainer.Trainer.step

    def spoiling(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.progress.step + 1 == step:
            with torch.no_grad():
                self.model.get_parameter("layers.1.attention.o.weight").to_local().fill_(torch.inf)
        return real(self, *arguments, **more)

    trainer.Trainer.step = spoiling


def hide_a_file() -> None:
    """Text that lies on the other rank's machine alone."""
    from sparsekit.training import trainer

    def load_data(*arguments: Any) -> Any:
        raise DataError("text.txt: no such file")

    trainer.load_data = load_data


def test_mistakes_are_told_once(pair: dict[str, Any], tmp_path: Path) -> None:
    def told(changes: dict[str, Any], **how: Any) -> str:
        raw = copy.deepcopy(pair)
        for path, value in changes.items():
            section, _, field = path.partition(".")
            raw[section][field] = value
        return one_line(start(raw, tmp_path / "run", 2, **how))

    assert told({"train.max_step": 3}).startswith("error: train: unknown key 'max_step' (did you mean 'max_steps'?)")
    assert told({"train.device": "quantum"}).startswith("error: train.device: 'quantum' cannot be used (")
    assert told({"train.global_batch_tokens": 64}) == (
        "error: train.global_batch_tokens: 64 is not a multiple of 128, a micro-batch on each process"
    )
    missing = str(tmp_path / "missing.txt")
    assert missing in told({"data.source": {"type": "text", "path": missing}})
    nowhere = tmp_path / "step-00000001"
    line = told({}, arguments=("--resume", str(nowhere)))
    assert line == f"error: {nowhere}: no such checkpoint; give a checkpoint's folder, a run's, auto or never"
    assert told({}, prepare=partial(only, 1, hide_a_file)) == "error: text.txt: no such file"
    line = told({}, prepare=partial(only, 1, partial(spoil, 3)))
    assert line.startswith("error: step 3: rank 0: loss nan, first in layers.1.attention.o: training has diverged (")


def test_a_stream_refuses_another_number_of_processes(pair: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torchdata")
    source = pair["data"]["source"]
    Path(source["path"]).write_text("\n#\n".join(f"document {i} of some length" for i in range(100)))
    source["separator"], pair["data"]["streaming"] = "#", {"buffer": 8}
    run = Run(tmp_path / "run")
    for until, n in ((4, 2), (6, 2)):
        pair["train"]["max_steps"] = until
        finished(pair, run.folder, n)
    before = (run.checkpoints[-1] / "manifest.json").read_bytes()
    pair["train"]["max_steps"] = 8
    crew = start(pair, run.folder, 1)
    assert crew.wait() == [2], crew.told
    assert crew.told[0].count("\n") == 1 and "sparsekit tokenize" in crew.told[0]
    assert (run.checkpoints[-1] / "manifest.json").read_bytes() == before


# torchrun itself


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a rank is killed", "all are signalled"])
def test_torchrun(pair: dict[str, Any], tmp_path: Path, how: str) -> None:
    """It starts all ranks again when one dies; and a signal that comes to it and to them is one request."""
    pair["train"] |= {"max_steps": 300, "checkpoint_every": 20, "keep": {"last": 2}}
    whole, part = Run(tmp_path / "whole"), Run(tmp_path / "part")
    finished(pair, whole.folder, 2)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(pair))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2",
               "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--monitor-interval", "0.1",
               "-m", "sparsekit.cli", "train", str(spec), "--out", str(part.folder)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(command, env=environment, stderr=log)
        try:
            for at in (60, 140) if how == "a rank is killed" else (60,):
                waiting = Crew(part.folder, [], [])
                waiting.until(lambda at=at: reached(part) >= at)
                if how == "a rank is killed":
                    os.kill(children(agent.pid)[-1], signal.SIGKILL)
                else:
                    for pid in (*children(agent.pid), agent.pid):
                        os.kill(pid, signal.SIGTERM)
            agent.wait(120)
        finally:
            for pid in (*children(agent.pid), agent.pid) if agent.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
    told = (tmp_path / "log").read_text()
    if how == "a rank is killed":
        assert agent.returncode == 0, told
    else:
        assert f"stopped and saved at step {steps(part)[-1]}" in told, told
        assert 60 <= steps(part)[-1] < 300
        finished(pair, part.folder, 2)
    assert_same_run(whole, part)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
