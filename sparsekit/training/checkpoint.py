"""A run's state on disk: safetensors and JSON, never a pickle; written whole or not at all; kept by policy."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsekit.errors import CheckpointError
from sparsekit.files import folder_written_whole, read_object, verify, write_json
from sparsekit.model.targets import CHECKPOINTS, MODEL, SPEC, TOKENIZER, Run, load_weights
from sparsekit.spec.load import MAY_CHANGE, dump
from sparsekit.spec.merge import differences
from sparsekit.spec.run import KeepSpec, RunSpec

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all of its state that is neither weights nor optimizer nor random numbers."""

    step: int = 0
    sequences: int = 0  # position in the data's endless order
    tokens: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None


def save(
    run: Run,
    spec: RunSpec,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    data: dict[str, Any],
) -> Path:
    """Writes a checkpoint of everything a resume needs; ``data`` identifies the text it was trained on.

    Raises:
        CheckpointError: a weight is not finite; such a checkpoint is never written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    bad = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise CheckpointError(f"step {progress.step}: weight {bad} is not finite, so no checkpoint is written")
    folder = run.folder / CHECKPOINTS / f"step-{progress.step:08d}"
    state = {"format": FORMAT, "progress": vars(progress), "data": data}
    with folder_written_whole(folder) as here:
        save_file(weights, here / MODEL)
        save_file(_optimizer_tensors(model, optimizer) | _random_state(), here / OPTIMIZER)
        write_json(here / STATE, state)
        write_json(here / SPEC, dump(spec))
        if (run.folder / TOKENIZER).exists():
            shutil.copyfile(run.folder / TOKENIZER, here / TOKENIZER)
    return folder


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer, data: dict[str, Any]) -> Progress:
    """Puts back what :func:`save` wrote, random numbers included.

    Raises:
        CheckpointError: the checkpoint is damaged, or was trained on other text.
    """
    verify(folder)
    state = read_object(folder / STATE)
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder}: has format {state['format']}, this version reads {FORMAT}")
    changed = differences(state["data"], data)
    if changed:
        told = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
        raise CheckpointError(f"{folder}: the text has changed since ({told}); start over with --resume never")
    load_weights(model, folder / MODEL)
    try:
        tensors = load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / OPTIMIZER}: cannot be read ({error})") from None
    _restore_optimizer(model, optimizer, tensors)
    _restore_random_state(tensors)
    return Progress(**state["progress"])


def demand_same_spec(folder: Path, spec: RunSpec) -> None:
    """Refuses a checkpoint of another spec; what does not touch trained weights may differ.

    Raises:
        CheckpointError: with the differences.
    """
    changed = {
        path: values
        for path, values in differences(read_object(folder / SPEC), dump(spec)).items()
        if not any(path == free or path.startswith(f"{free}.") for free in MAY_CHANGE)
    }
    if changed:
        told = [f"{path} was {old}, is {new}" for path, (old, new) in changed.items()]
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        raise CheckpointError(
            f"{folder}: is a checkpoint of another spec ({'; '.join(told[:3])}{more}); "
            f"give another --out, or --resume never"
        )


def newest_whole(run: Run) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if any, and a line for each newer one that is damaged."""
    damaged: list[str] = []
    for folder in reversed(run.checkpoints):
        try:
            verify(folder)
            return folder, damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def clear_unfinished(run: Run) -> None:
    """Removes what a kill left of a checkpoint that was being written."""
    for folder in (run.folder / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(folder)


def prune(run: Run, keep: KeepSpec, progress: Progress) -> None:
    """Removes the checkpoints that the policy does not keep."""
    newest = run.checkpoints[-keep.last :]
    for folder in run.checkpoints:
        step = int(folder.name.removeprefix("step-"))
        wanted = folder in newest or (keep.every is not None and step % keep.every == 0)
        if not wanted and not (keep.best and step == progress.best_step):
            shutil.rmtree(folder)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<state>/<parameter>``; every leaf must be a tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {}
    for parameter, states in optimizer.state.items():
        for key, value in states.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} is a {type(value).__name__}; only tensors can be saved")
            tensors[f"{key}/{names[id(parameter)]}"] = value.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        key, _, parameter = name.partition("/")
        if parameter in parameters:
            target = parameters[parameter]
            # fused optimizers keep their step count beside the parameter
            optimizer.state[target][key] = tensor.to(target.device)


def _random_state() -> dict[str, Tensor]:
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_state(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
