"""From a run spec to a run folder: where to begin, and then training."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sparsekit.errors import CheckpointError, SparsekitError
from sparsekit.files import verify
from sparsekit.model.targets import SPEC, TOKENIZER, Run
from sparsekit.spec.run import RunSpec
from sparsekit.training import checkpoint
from sparsekit.training.distributed import Agreement, World, joined, listening
from sparsekit.training.trainer import Trainer

UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
}  # fmt: skip


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
    with _writable(run.folder), _repeatable(spec.train.deterministic), joined(spec.train.device) as world:
        agreement = Agreement(world)
        with listening(agreement):  # from here on, so that a signal while text is read is heard too
            start = world.from_main(lambda: _starting_point(run, spec, resume))
            trainer = Trainer(spec, run, world, agreement)
            try:
                if start is not None:
                    trainer.restore(start)
                if trainer.finished:
                    _say(
                        world,
                        f"{run.folder}: already finished, at step {trainer.progress.step}; "
                        f"raise train.max_steps to go on, or start over with --resume never",
                    )
                else:
                    trainer.fit()
            finally:
                trainer.close()
    return run


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        mend = "make room or give another --out; what was saved is whole, and training goes on from there"
        raise SparsekitError(f"{folder}: cannot be written ({checkpoint.reason_of(error)}); {mend}") from None


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


def _starting_point(run: Run, spec: RunSpec, resume: str) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start in a folder that holds no other run."""
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint; give a checkpoint's folder, a run's, auto or never")
        if path.name.startswith("step-"):
            verify(path)
            found: Path | None = path
        else:
            found, damaged = checkpoint.newest_whole(Run(path))
            if found is None:
                raise CheckpointError(damaged[0] if damaged else f"{path}: holds no checkpoint")
    elif resume == "never":
        if (run.folder / SPEC).exists():
            _move_aside(run.folder)
        found = None
    else:
        found, damaged = checkpoint.newest_whole(run)
        if found is None and damaged:
            raise CheckpointError(damaged[0])
        for line in damaged:
            print(f"{line}; going on from {found}", file=sys.stderr)
    if found is not None:
        checkpoint.demand_same_spec(found, spec)
    else:
        (run.folder / TOKENIZER).unlink(missing_ok=True)  # of a run that never came to save anything
    return found


def _move_aside(folder: Path) -> None:
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    aside = folder.with_name(f"{folder.name}.old-{number}")
    folder.rename(aside)
    print(f"{folder}: an earlier run was moved to {aside}", file=sys.stderr)
