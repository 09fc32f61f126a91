"""Kills and signals at the worst moment, in processes of their own: nothing that was saved is lost."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import Crew, finished, leftovers, reached, resumption, start, steps
from test_resume import assert_same_run, rows

from sparsekit import files
from sparsekit.files import MANIFEST, verify
from sparsekit.model.targets import Run
from sparsekit.spec.load import validate
from sparsekit.training import checkpoint
from sparsekit.training.run import train


def at_seal(step: int, number: int, after: bool) -> None:
    """Sends this process a signal while the checkpoint of a step is sealed: when all is written, or all but named."""
    real, name = files.seal, f".step-{step:08d}.tmp"

    def seal(temporary: Path, path: Path) -> None:
        if temporary.name == name and not after:
            os.kill(os.getpid(), number)
        real(temporary, path)
        if temporary.name == name and after:
            os.kill(os.getpid(), number)

    checkpoint.seal = seal


def at_rename(step: int, number: int) -> None:
    """Just before the checkpoint of a step gets its name, its manifest written."""
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == f"step-{step:08d}":
            os.kill(os.getpid(), number)
        real(source, target)

    os.replace = replace


def at_prune(name: str, number: int) -> None:
    """When a checkpoint that is not kept has been half removed."""
    real = shutil.rmtree

    def rmtree(path: Any, *rest: Any, **more: Any) -> None:
        if Path(path).name == f".{name}.tmp" and (Path(path) / MANIFEST).exists():
            (Path(path) / MANIFEST).unlink()
            os.kill(os.getpid(), number)
        real(path, *rest, **more)

    shutil.rmtree = rmtree


def in_evaluation(number: int) -> None:
    """At the first batch of the first evaluation."""
    from sparsekit.training.evaluation import Evaluation

    real, sent = Evaluation._loss, []

    def loss(self: Evaluation, *arguments: Any) -> float | None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return real(self, *arguments)

    Evaluation._loss = loss


def never_over() -> None:
    """Has a checkpoint saved during evaluation, and refuses to write over it: a kill would leave neither."""
    in_evaluation(signal.SIGUSR1)
    real = files.seal

    def seal(temporary: Path, path: Path) -> None:
        if path.exists():
            raise OSError(f"{path} is there")
        real(temporary, path)

    checkpoint.seal = seal


def before_the_first_step(number: int) -> None:
    from sparsekit.training import trainer

    real = trainer.load_data

    def load_data(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments)

    trainer.load_data = load_data


def told_by(crew: Crew, code: int) -> list[str]:
    assert crew.wait() == [code], crew.told
    return crew.told[0].splitlines()


@pytest.mark.parametrize(
    ("moment", "saved"),
    [
        (partial(at_seal, 6, signal.SIGKILL, False), [3]),
        (partial(at_seal, 6, signal.SIGKILL, True), [3, 6]),
        (partial(at_rename, 6, signal.SIGKILL), [3]),
        (partial(at_prune, "step-00000003", signal.SIGKILL), [6, 9]),
    ],
    ids=["all written", "named", "about to be named", "removing an old one"],
)
def test_a_kill_inside_a_save(saving: dict[str, Any], tmp_path: Path, moment: Any, saved: list[int]) -> None:
    if moment.func is at_prune:
        saving["train"]["keep"] = {"last": 2, "best": False}
    whole = train(validate(saving), out=tmp_path / "whole")
    part = Run(tmp_path / "part")
    assert told_by(start(saving, part.folder, prepare=moment), -signal.SIGKILL) == []
    assert steps(part) == saved
    for folder in part.checkpoints:
        verify(folder)
    assert leftovers(part) or moment.args[-1] is True
    assert told_by(start(saving, part.folder), 0) == [resumption(part, saved[-1])]
    assert leftovers(part) == []
    assert steps(part) == steps(whole)
    assert_same_run(whole, part)


@pytest.mark.parametrize("moment", [
    partial(at_seal, 9, signal.SIGKILL, False), partial(at_seal, 9, signal.SIGKILL, True),
    partial(at_prune, "past-step-00000009", signal.SIGKILL),
], ids=["before it is overtaken", "overtaken", "half removed"])  # fmt: skip
def test_a_checkpoint_put_aside_stays_until_it_is_overtaken(
    saving: dict[str, Any], tmp_path: Path, moment: Any
) -> None:
    whole = train(validate(saving), out=tmp_path / "whole")
    part = Run(Path(shutil.copytree(whole.folder, tmp_path / "part")))
    for folder in part.checkpoints[2:]:
        (folder / "state.json").unlink()
    *lines, last = told_by(start(saving, part.folder, prepare=moment), -signal.SIGKILL)
    assert last == resumption(part, 6)
    assert [line.partition(": ")[0] for line in lines] == [
        f"{part.folder}/checkpoints/step-{step:08d}/state.json" for step in (12, 9)
    ]
    assert all(line.endswith("; passed over") for line in lines)
    aside = {path.name for path in (part.folder / "checkpoints").glob("past-*")}
    assert aside == {"past-step-00000012"} | ({"past-step-00000009"} if moment.func is at_seal else set())
    assert steps(part) == ([3, 6] if moment.args[-1] is False else [3, 6, 9])
    for folder in part.checkpoints:
        verify(folder)
    resumed = resumption(part, steps(part)[-1])
    assert told_by(start(saving, part.folder), 0) == [resumed]
    assert sorted(path.name for path in (part.folder / "checkpoints").iterdir()) == [
        path.name for path in whole.checkpoints
    ]
    assert_same_run(whole, part)


def test_two_runs_in_one_folder(saving: dict[str, Any], tmp_path: Path) -> None:
    """The second is refused at once, whatever it would do with the folder; a killed one is in nobody's way."""
    saving["train"] |= {"max_steps": 4000, "checkpoint_every": 50}
    run = Run(tmp_path / "run")
    first = start(saving, run.folder)
    first.until(lambda: bool(run.checkpoints))
    other = tmp_path / "other"  # name of it
    other.symlink_to(run.folder)
    for resume in ("auto", "never", str(run.folder)):
        (line,) = told_by(start(saving, other, arguments=("--resume", resume)), 2)
        assert re.fullmatch(
            f"error: {other}: process {first.processes[0].pid} on .+ is training into it; "
            "wait for its end, or give another --out",
            line,
        )
    assert not list(tmp_path.glob("*.old-*"))
    first.send(signal.SIGKILL)
    assert told_by(first, -signal.SIGKILL) == []
    last = steps(run)[-1]
    saving["train"]["max_steps"] = last
    assert told_by(start(saving, run.folder), 0)[0].startswith(f"{run.folder}: already finished, at step {last}; ")


def test_a_stop_before_the_first_step(saving: dict[str, Any], tmp_path: Path) -> None:
    part = Run(tmp_path / "part")
    crew = start(saving, part.folder, prepare=partial(before_the_first_step, signal.SIGTERM))
    assert told_by(crew, 0) == [f"{part.folder}: stopped before the first step"]
    assert part.checkpoints == [] and part.metrics == []
    whole = train(validate(saving), out=tmp_path / "whole")
    assert_same_run(whole, train(validate(saving), out=part.folder))


@pytest.mark.parametrize("step", [5, 12])
def test_a_stop_during_evaluation(saving: dict[str, Any], tmp_path: Path, step: int) -> None:
    """It is given up at once and made up for by the resumed run, so that the two legs are the whole run."""
    saving["train"] |= {"checkpoint_every": None, "eval_every": step}
    whole = train(validate(saving), out=tmp_path / "whole")
    part = Run(tmp_path / "part")
    crew = start(saving, part.folder, prepare=partial(in_evaluation, signal.SIGTERM))
    assert told_by(crew, 0) == [f"{part.folder}: stopped and saved at step {step}"]
    assert steps(part) == [step] and "val_loss" not in part.metrics[-1]
    assert told_by(start(saving, part.folder), 0) == [resumption(part, step)]
    if step < 12:
        assert_same_run(whole, part)
    else:  # no step is left after which to save again
        assert rows(whole) == rows(part)
        finish = "; raise train.max_steps to go on, or start over with --resume never"
        assert told_by(start(saving, part.folder), 0) == [f"{part.folder}: already finished, at step 12{finish}"]
    saving["train"]["max_steps"] = 14
    for run in (whole, part):
        train(validate(saving), out=run.folder)
    assert_same_run(whole, part)


def test_a_stop_during_a_save(saving: dict[str, Any], tmp_path: Path) -> None:
    whole = train(validate(saving), out=tmp_path / "whole")
    part = Run(tmp_path / "part")
    crew = start(saving, part.folder, prepare=partial(at_seal, 6, signal.SIGTERM, False))
    line = told_by(crew, 0)
    assert len(line) == 1 and line[0].startswith(f"{part.folder}: stopped and saved at step ")
    assert steps(part)[:2] == [3, 6] and leftovers(part) == []
    assert_same_run(whole, train(validate(saving), out=part.folder))


def test_usr1_saves_and_goes_on(saving: dict[str, Any], tmp_path: Path) -> None:
    saving["train"] |= {"checkpoint_every": None, "eval_every": 5, "keep": {"best": False}}
    whole = train(validate(saving), out=tmp_path / "whole")
    part = Run(tmp_path / "part")
    assert told_by(start(saving, part.folder, prepare=partial(in_evaluation, signal.SIGUSR1)), 0) == []
    assert steps(part) == [5, 12]
    assert_same_run(whole, part)
    twice = start(saving | {"train": saving["train"] | {"checkpoint_every": 5}}, tmp_path / "twice", prepare=never_over)
    assert told_by(twice, 0) == []  # where a save is due anyway, once is enough
    again = Run(tmp_path / "again")  # what was saved in the midst of an evaluation can be gone on from, too
    shutil.copytree(part.folder, again.folder)
    shutil.rmtree(again.checkpoints[-1])
    train(validate(saving), out=again.folder)
    assert_same_run(whole, again)


def test_usr1_before_the_first_step(saving: dict[str, Any], tmp_path: Path) -> None:
    saving["train"] |= {"checkpoint_every": None}
    crew = start(saving, tmp_path / "run", prepare=partial(before_the_first_step, signal.SIGUSR1))
    assert told_by(crew, 0) == []
    assert steps(Run(tmp_path / "run")) == [1, 12]


def test_random_kills(saving: dict[str, Any], tmp_path: Path) -> None:
    """A short form of benchmarks/faults.py."""
    saving["train"] |= {"max_steps": 60, "checkpoint_every": 4, "schedule": "constant", "eval_every": 10}
    saving["train"]["keep"] = {"last": 2}
    whole, part = Run(tmp_path / "whole"), Run(tmp_path / "part")
    finished(saving, whole.folder)
    choose = random.Random(1)
    for _ in range(5):
        begun = reached(part)
        crew = start(saving, part.folder)
        wanted = min(59, begun + choose.randrange(1, 9))
        crew.until(lambda wanted=wanted: reached(part) >= wanted)
        if choose.random() < 0.5:
            crew.until(lambda: any(part.folder.glob("checkpoints/.*.tmp")), timeout=5)
        crew.send(choose.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        assert crew.wait()[0] in (-signal.SIGKILL, 0), crew.told
    finished(saving, part.folder)
    assert_same_run(whole, part)
