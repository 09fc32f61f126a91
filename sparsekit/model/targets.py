"""What a command can be pointed at: a spec, a run folder, or a checkpoint folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekit.errors import CheckpointError, SparsekitError, SpecError
from sparsekit.files import verify
from sparsekit.model.build import build_model
from sparsekit.model.decoder import Decoder
from sparsekit.model.weights import WEIGHTS, load_weights
from sparsekit.spec.load import load_spec
from sparsekit.spec.run import RunSpec

SPEC, TOKENIZER, METRICS, CHECKPOINTS = "spec.json", "tokenizer.json", "metrics.jsonl", "checkpoints"


@dataclass(frozen=True)
class Run:
    """A run's folder: everything that later steps know of it."""

    folder: Path

    @property
    def spec(self) -> RunSpec:
        return load_spec(self.folder / SPEC)

    @property
    def checkpoints(self) -> list[Path]:
        """The whole checkpoints' folders, oldest first."""
        found = (self.folder / CHECKPOINTS).glob("step-*")
        return sorted(folder for folder in found if folder.name.removeprefix("step-").isdigit())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far; a row that a kill cut short is left out.

        Raises:
            CheckpointError: another one is damaged.
        """
        return read_rows(self.folder / METRICS)


def newest_whole(run: Run) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if there is any at all, and a line for each newer one that is damaged.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    damaged: list[str] = []
    for folder in reversed(run.checkpoints):
        try:
            verify(folder)
            return folder, damaged
        except CheckpointError as error:
            damaged.append(str(error).removesuffix("; use an earlier checkpoint"))
    if damaged:
        told = f"{run.folder}: none of its checkpoints is whole ({damaged[0]})"
        raise CheckpointError(f"{told}; start over with --resume never")
    return None, damaged


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What was written into a file row by row, each a JSON object with its ``step``; of no file, nothing.

    The last row is left out where a kill cut it short.

    Raises:
        CheckpointError: another row is damaged.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                rows.append({**row, "step": int(row["step"])})
            except (ValueError, TypeError, KeyError):
                raise CheckpointError(f"{path}:{number}: is damaged; mend the line, or remove it") from None
    return rows


@dataclass(frozen=True)
class Target:
    """A resolved TARGET: its spec and, unless it is a bare spec, where its weights and tokenizer are.

    ``verified`` says that the checkpoint was found whole.
    """

    spec: RunSpec
    checkpoint: Path | None = None
    tokenizer_file: Path | None = None
    verified: bool = False

    def tokenizer(self) -> Any:
        """The tokenizer the model was trained with.

        Raises:
            SpecError: a bare spec whose tokenizer has yet to be trained.
        """
        choice = self.spec.data.tokenizer
        if self.tokenizer_file is not None:
            return choice.cls.load(choice.params, self.tokenizer_file)
        return choice.cls(choice.params)


def resolve(target: str | Path | Run, overrides: Sequence[str] = (), *, weights: bool = False) -> Target:
    """What a TARGET means.

    A run folder stands for its newest checkpoint; where its ``weights`` are wanted, for the newest that is whole.

    Raises:
        SpecError: nothing is there, or the spec has a mistake.
        CheckpointError: a run folder without a checkpoint, or without the whole one that is wanted.
    """
    path = target.folder if isinstance(target, Run) else Path(target)
    if not path.is_dir():
        return Target(load_spec(path, overrides))
    if not (path / SPEC).exists():
        raise SpecError([f"{path}: is neither a run nor a checkpoint (it holds no {SPEC})"])
    if not (path / WEIGHTS).is_dir() and not (path / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{path}: holds no weights ({WEIGHTS} is missing)")
    of_run = not (path / WEIGHTS).is_dir()
    if of_run:
        run = Run(path)
        if not run.checkpoints:
            raise CheckpointError(f"{path}: the run has no checkpoint yet")
        path = _newest_whole(run) if weights else run.checkpoints[-1]
    tokenizer = path / TOKENIZER
    try:
        spec = load_spec(path / SPEC, overrides)
    except SpecError:
        verify(path)  # is it that the file has changed?
        raise
    return Target(spec, path, tokenizer if tokenizer.exists() else None, verified=of_run and weights)


def _newest_whole(run: Run) -> Path:
    """Of a run that has checkpoints; those passed over are told."""
    found, damaged = newest_whole(run)
    assert found is not None, "it has some, and none is whole is an error"
    for line in damaged:
        print(f"{line}; passed over for {found}", file=sys.stderr)
    return found


def dtype_of(given: str | torch.dtype) -> torch.dtype:
    """A floating-point type, also by name as ``--dtype`` gives it.

    Raises:
        SparsekitError: there is none of that name.
    """
    found = given if isinstance(given, torch.dtype) else getattr(torch, given, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        told = f"--dtype {given}: no such floating-point type"
        raise SparsekitError(f"{told}; give float32, bfloat16, float16 or float64")
    return found


def load_model(
    target: str | Path | Run | Target, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """The model of a TARGET, in evaluation mode: a checkpoint's weights, or fresh ones for a bare spec.

    The weights come in ``dtype``, whatever the precision that they were trained in.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit its spec.
    """
    target = target if isinstance(target, Target) else resolve(target, weights=True)
    if target.checkpoint is None:
        return build_model(target.spec, seed=target.spec.train.seed, device=device, dtype=dtype).eval()
    if not target.verified:
        verify(target.checkpoint)
    model = build_model(target.spec, device=device, dtype=dtype)
    load_weights(model, target.checkpoint / WEIGHTS)
    return model.eval()
