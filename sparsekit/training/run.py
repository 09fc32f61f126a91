"""From a run spec to a run folder: where to begin, and then training."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsekit.errors import CheckpointError
from sparsekit.files import sole, verify, writable
from sparsekit.model.targets import SPEC, TOKENIZER, Run, newest_whole, resolve
from sparsekit.model.weights import WEIGHTS
from sparsekit.spec.run import RunSpec
from sparsekit.training import checkpoint
from sparsekit.training.distributed import Agreement, World, joined, listening
from sparsekit.training.trainer import Trainer

LOGS = ("*.log", "*.out", "*.err")  # which a shell or a scheduler may put into a run's folder before it begins


def train(spec: RunSpec, *, out: str | Path | None = None, resume: str = "auto") -> Run:
    """Trains a model from a spec into a run folder; under torchrun, together with the other processes.

    Args:
        spec: what to train.
        out: the run folder; by default ``runs/<name>``.
        resume: "auto" goes on from the folder's newest whole checkpoint if there is one; "never" starts over, and
            moves an earlier run aside; a path goes on from that checkpoint.

    Raises:
        SparsekitError: a mistake of the user's, in one line.
    """
    run = Run(Path(out) if out is not None else Path("runs") / spec.name)
    keeps = writable(run.folder, lambda: bool(run.checkpoints))
    with keeps, _repeatable(spec.train.deterministic), joined(spec.train.device) as world:
        agreement = Agreement(world)
        # listening from here on, so that a signal while text is read is heard too
        with listening(agreement), contextlib.ExitStack() as held:
            start = world.from_main(lambda: _starting_point(run, spec, resume, held))
            trainer = Trainer(spec, run, world, agreement)
            try:
                if start is not None:
                    trainer.restore(start)
                elif spec.init_from is not None:
                    trainer.begin_with(world.from_main(lambda: _whole(str(spec.init_from))))
                if trainer.finished:
                    _say(
                        world,
                        f"{run.folder}: already finished, at step {trainer.progress.step}; "
                        f"raise train.max_steps to go on, or start over with --resume never",
                    )
                else:
                    if start is not None:
                        _say(world, f"{run.folder}: going on from step {trainer.progress.step} ({start})")
                    trainer.fit()
            finally:
                trainer.close()
    return run


@contextlib.contextmanager
def _repeatable(wanted: bool) -> Iterator[None]:
    """With torch's deterministic algorithms, as a GPU's fastest ones add in an order that differs from run to run."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads when it starts
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # costs time, and nothing here reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def _say(world: World, line: str) -> None:
    if world.is_main:
        print(line, file=sys.stderr)


def _starting_point(run: Run, spec: RunSpec, resume: str, held: contextlib.ExitStack) -> Path | None:
    """The checkpoint to go on from, whole, or None for a fresh start in a folder that holds no other run.

    While ``held`` is open, no other process trains into the folder.
    """
    _demand_a_runs_folder(run.folder)
    held.enter_context(sole(run.folder))
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint; give a checkpoint's folder, a run's, auto or never")
        if run.checkpoints and not path.resolve().is_relative_to(run.folder.resolve()):
            told = f"{run.folder}: holds checkpoints of its own, which would be mixed with what begins at {path}"
            raise CheckpointError(f"{told}; go on from them with --resume auto, or give another --out")
        if path.name.startswith("step-"):
            verify(path)
            found: Path | None = path
        else:
            found, _ = newest_whole(Run(path))
            if found is None:
                raise CheckpointError(f"{path}: holds no checkpoint")
    elif resume == "never":
        if (run.folder / SPEC).exists():
            _move_aside(run.folder)
            held.enter_context(sole(run.folder))  # what is held already has moved
        found = None
    else:
        found, damaged = newest_whole(run)
        for line in damaged:
            print(f"{line}; passed over", file=sys.stderr)
    if found is not None:
        checkpoint.demand_same_spec(found, spec)
    else:
        (run.folder / TOKENIZER).unlink(missing_ok=True)  # of a run that never came to save anything
        if spec.init_from is not None:
            _take_tokenizer(run, spec)
    return found


def _whole(folder: str) -> Path:
    """The checkpoint that a folder stands for, found whole."""
    target = resolve(folder, weights=True)
    assert target.checkpoint is not None, "a folder is no spec"
    if not target.verified:
        verify(target.checkpoint)
    return target.checkpoint


def _take_tokenizer(run: Run, spec: RunSpec) -> None:
    """The one that belongs to the weights, and not another that is learnt from the new text by the same rule."""
    if not Path(str(spec.init_from)).is_dir():
        raise CheckpointError(f"init_from: {spec.init_from}: no such folder")
    begun = resolve(str(spec.init_from), weights=True)
    if begun.tokenizer_file is not None and begun.spec.data.tokenizer == spec.data.tokenizer:
        run.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(begun.tokenizer_file, run.folder / TOKENIZER)


def _demand_a_runs_folder(folder: Path) -> None:
    """Refuses to mix a run with other things."""
    if (folder / WEIGHTS).is_dir() and (folder / SPEC).exists():
        told = f"{folder}: is a checkpoint, not a run's folder"
        raise CheckpointError(f"{told}; give another --out, and --resume {folder} to go on from it")
    if (folder / SPEC).exists() or not folder.is_dir():
        return
    expected = {TOKENIZER, *(path.name for pattern in LOGS for path in folder.glob(pattern))}
    strangers = sorted({path.name for path in folder.glob("[!.]*")} - expected)
    if strangers:
        raise CheckpointError(f"{folder}: holds {strangers[0]} and no run; give another --out")


def _move_aside(folder: Path) -> None:
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    aside = folder.with_name(f"{folder.name}.old-{number}")
    folder.rename(aside)
    print(f"{folder}: an earlier run was moved to {aside}", file=sys.stderr)
