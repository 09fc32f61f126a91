"""Named tensors in a folder of safetensors shards, as torch.distributed.checkpoint lays them out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparsekit.errors import CheckpointError

WEIGHTS = "weights"  # the folder of a checkpoint that holds them
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


def stored(folder: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of every tensor in a folder of shards, from their headers alone.

    Raises:
        CheckpointError: a shard is damaged.
    """
    try:
        metadata = _reader(folder).read_metadata()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from None
    return {name: (list(found.size), found.properties.dtype) for name, found in metadata.state_dict_metadata.items()}


def read(folder: Path, targets: Mapping[str, Tensor], process_group: Any = None) -> None:
    """Fills tensors in place by name, each rank its own shards, whatever the number of ranks that wrote them.

    Nothing but safetensors is opened, so no code is run.

    Raises:
        CheckpointError: a shard is damaged.
    """
    from torch.distributed.checkpoint.state_dict_loader import load

    alone_is_meant()
    try:
        load(dict(targets), storage_reader=_reader(folder), process_group=process_group, no_dist=not process_group)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from None


def alone_is_meant() -> None:
    """Silences torch's warning that a process without others saves and loads alone, in its threads too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def load_weights(model: nn.Module, folder: Path, process_group: Any = None) -> None:
    """Reads a model's parameters and persistent buffers.

    Raises:
        CheckpointError: a shard is damaged, or the tensors are not the model's.
    """
    found = stored(folder)
    wanted = {MODEL_PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    ours = [name for name in found if name.startswith(MODEL_PREFIX)]
    for name in [*wanted, *(name for name in ours if name not in wanted)]:
        told = name.removeprefix(MODEL_PREFIX)
        if name not in found or name not in wanted:
            where = "the checkpoint" if name not in found else "the spec"
            raise CheckpointError(f"{folder}: {told} is missing from {where}; is it a checkpoint of another spec?")
        if found[name][0] != list(wanted[name].shape):
            shapes = f"{found[name][0]}, but the spec says {list(wanted[name].shape)}"
            raise CheckpointError(f"{folder}: {told} is {shapes}; is it a checkpoint of another spec?")
    read(folder, {name: tensor.detach() for name, tensor in wanted.items()}, process_group)
