"""What a command can be pointed at: a spec, a run folder, or a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekit.errors import CheckpointError, SpecError
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
        return sorted((self.folder / CHECKPOINTS).glob("step-*"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far; a row that a kill cut short is left out."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class Target:
    """A resolved TARGET: its spec and, unless it is a bare spec, where its weights and tokenizer are."""

    spec: RunSpec
    checkpoint: Path | None = None
    tokenizer_file: Path | None = None

    def tokenizer(self) -> Any:
        """The tokenizer the model was trained with.

        Raises:
            SpecError: a bare spec whose tokenizer has yet to be trained.
        """
        choice = self.spec.data.tokenizer
        if self.tokenizer_file is not None:
            return choice.cls.load(choice.params, self.tokenizer_file)
        return choice.cls(choice.params)


def resolve(target: str | Path | Run, overrides: Sequence[str] = ()) -> Target:
    """What a TARGET means.

    A run folder stands for its newest checkpoint.

    Raises:
        SpecError: nothing is there, or the spec has a mistake.
        CheckpointError: a run folder without a checkpoint.
    """
    path = target.folder if isinstance(target, Run) else Path(target)
    if not path.is_dir():
        return Target(load_spec(path, overrides))
    if not (path / SPEC).exists():
        raise SpecError([f"{path}: is neither a run nor a checkpoint (it holds no {SPEC})"])
    if not (path / WEIGHTS).is_dir() and not (path / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{path}: holds no weights ({WEIGHTS} is missing)")
    if not (path / WEIGHTS).is_dir():
        checkpoints = Run(path).checkpoints
        if not checkpoints:
            raise CheckpointError(f"{path}: the run has no checkpoint yet")
        path = checkpoints[-1]
    tokenizer = path / TOKENIZER
    try:
        spec = load_spec(path / SPEC, overrides)
    except SpecError:
        verify(path)  # is it that the file has changed?
        raise
    return Target(spec, path, tokenizer if tokenizer.exists() else None)


def load_model(
    target: str | Path | Run | Target, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """The model of a TARGET, in evaluation mode: a checkpoint's weights, or fresh ones for a bare spec.

    The weights come in ``dtype``, whatever the precision that they were trained in.

    Raises:
        CheckpointError: the checkpoint is damaged or does not fit its spec.
    """
    target = target if isinstance(target, Target) else resolve(target)
    if target.checkpoint is None:
        return build_model(target.spec, seed=target.spec.train.seed, device=device, dtype=dtype).eval()
    verify(target.checkpoint)
    model = build_model(target.spec, device=device, dtype=dtype)
    load_weights(model, target.checkpoint / WEIGHTS)
    return model.eval()
