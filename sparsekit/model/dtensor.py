"""Tensors that are spread over processes, handled without importing what makes them: that takes half a second."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor: where nobody has imported their module, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(whole: Tensor, like: DTensor) -> Tensor:
    """This process's part of a tensor, laid out as another is, without asking the other processes.

    From the last dimension of the mesh to the first, as each division is made of what those after it have left: so
    FSDP2 lays out what tensor parallelism has divided already (a strided shard).
    """
    mesh, here = like.device_mesh, like.device_mesh.get_coordinate()
    assert here is not None, "this process is in the mesh of its model"
    for dim in reversed(range(mesh.ndim)):
        placement: Any = like.placements[dim]
        if not placement.is_replicate():
            parts = whole.chunk(mesh.size(dim), placement.dim)
            empty = whole.narrow(placement.dim, 0, 0)
            whole = parts[here[dim]] if here[dim] < len(parts) else empty
    return whole
