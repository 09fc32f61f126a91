"""Layers divided among processes that share each batch: every process holds a part of the projections.

A component says by :meth:`Component.split` how n processes can share it such that their outputs add up. From that alone
follows the rest: what enters it gets the sum of the processes' gradients, what leaves it is summed, and so are the
gradients of what is whole on each. The component itself computes as ever, on a narrower layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from sparsekit.components.contracts import Component, ForwardContext, Linear
from sparsekit.errors import SpecError
from sparsekit.model.decoder import Decoder

Read = Callable[[Tensor], Tensor]
Key = tuple[nn.Module, str]  # a module's own tensor


class Division:
    """Which tensors are divided among processes, and what a module reads in place of them.

    A module keeps a DTensor and computes with this process's part of it. All is noted first, as two kinds of
    parallelism may divide one tensor; then tensors are divided (:meth:`divide`), and read as parts once they hold their
    values (:meth:`install`).
    """

    def __init__(self) -> None:
        self._cuts: dict[Key, dict[str, int]] = {}
        self._reads: dict[nn.Module, dict[str, list[Read]]] = {}

    def cut(self, module: nn.Module, name: str, dim: int, among: str, n: int) -> None:
        """Divides a module's own tensor along a dimension among the n processes of a dimension of the mesh.

        Raises:
            ValueError: the parts would not be equal.
        """
        tensor = own_tensors(module)[name]
        if tensor.shape[dim] % n:
            raise ValueError(f"{name} {list(tensor.shape)} cannot be divided by {n} in dimension {dim}")
        cuts = self._cuts.setdefault((module, name), {})
        if not cuts:
            self.read(module, name, own_part)
        cuts[among] = dim

    def read(self, module: nn.Module, name: str, read: Read) -> None:
        """Has a module read ``read(tensor)`` in place of its own tensor, or of what was to be read before."""
        self._reads.setdefault(module, {}).setdefault(name, []).append(read)

    def divide(self, meshes: Mapping[str, DeviceMesh]) -> None:
        """Makes DTensors of what was noted.

        Args:
            meshes: for each kind of parallelism the mesh that has a dimension of its name; of a tensor that several
                divide, the first one's counts.
        """
        for (module, name), dims in self._cuts.items():
            names = tuple(kind for kind in meshes if kind in dims)
            mesh = meshes[names[0]][names]
            tensors: Any = module._parameters if name in module._parameters else module._buffers
            whole = tensors[name]
            shards = [Shard(dims[kind]) for kind in names]
            divided = distribute_tensor(whole.detach(), mesh, shards, src_data_rank=None)
            parameter = isinstance(whole, nn.Parameter)
            tensors[name] = nn.Parameter(divided, whole.requires_grad) if parameter else divided

    def install(self) -> None:
        """From here on ``module.<name>`` is what was noted to be read in place of the tensor of that name."""
        for module, reads in self._reads.items():
            properties = {name: _property(name, steps) for name, steps in reads.items()}
            module.__class__ = type(type(module).__name__, (type(module),), properties)


def _property(name: str, steps: list[Read]) -> property:
    def fetch(module: nn.Module) -> Tensor:
        kept = module._parameters if name in module._parameters else module._buffers
        tensor = kept[name]
        assert tensor is not None, f"{name} was there when the model was laid out"
        if not is_sharded(tensor):
            for step in steps:
                tensor = step(tensor)
        return tensor

    return property(fetch)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is spread over the processes of a data dimension, as outside of its layer's call."""
    return isinstance(tensor, DTensor) and "data" in (tensor.device_mesh.mesh_dim_names or ())


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, but for counters."""
    counters = getattr(module, "counters", ())
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in own.items() if name not in counters}


def divide_layers(model: Decoder, mesh: DeviceMesh, division: Division) -> None:
    """Divides every attention and feed-forward among the processes of a mesh of one dimension.

    Embedding, head and norms stay whole on each.

    Raises:
        SpecError: a layer cannot be divided among so many, with the reason.

    Source: Shoeybi et al. 2019, arXiv 1909.08053, sec. 3
    """
    for index, layer in enumerate(model.layers):
        for place in ("attention", "ffn"):
            component = getattr(layer, place)
            name = f"layers.{index}.{place}"
            try:
                if component.stateful:
                    raise ValueError("what it hands on to the next layer cannot be divided")
                _divide(component, component.split(mesh.size()), mesh, division)
            except ValueError as error:
                raise SpecError([f"parallel.tensor: {mesh.size()} processes cannot share {name}: {error}"]) from None


def _divide(component: Component, parts: Mapping[str, int], mesh: DeviceMesh, division: Division) -> None:
    remaining = dict(parts)
    n = mesh.size()

    def whole(tensor: Tensor) -> Tensor:
        return spread(tensor, mesh)

    def share_of_whole(tensor: Tensor) -> Tensor:
        return spread(tensor, mesh) / n

    for path, module in component.named_modules():
        dim = remaining.pop(path, None)
        if dim is not None:
            if not isinstance(module, Linear) or not vars(type(module)).get("divisible", False):
                raise ValueError(f"{type(module).__name__} ({path}) does not say that it can be divided")
            for name, tensor in own_tensors(module).items():
                if tensor.shape == module.weight.shape:  # a mask too
                    division.cut(module, name, module.weight.ndim - 2 + dim, "tensor", n)
            if module.bias is not None and dim == 0:
                division.cut(module, "bias", module.bias.ndim - 1, "tensor", n)
            elif module.bias is not None:
                division.read(module, "bias", share_of_whole)
            continue
        for name, tensor in own_tensors(module).items():
            dim = remaining.pop(f"{path}.{name}" if path else name, None)
            if dim is not None:
                division.cut(module, name, dim, "tensor", n)
            elif isinstance(tensor, nn.Parameter):
                division.read(module, name, whole)
    if remaining:
        raise ValueError(f"it would divide {', '.join(remaining)}, which it does not have")

    def enter(module: nn.Module, inputs: tuple[Tensor, ForwardContext]) -> tuple[Tensor, ForwardContext]:
        x, context = inputs
        # auxiliary losses, which each process works out whole, must not count n times
        context = (
            replace(context, loss_scale=context.loss_scale / n) if isinstance(context, ForwardContext) else context
        )
        return spread(x, mesh), context

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return joined(output, mesh)

    component.register_forward_pre_hook(enter)
    component.register_forward_hook(leave)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, through which its gradient flows back into the part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, alike on each process; in the backward the gradients that the processes come to are summed."""
    whole: list[Placement] = [Replicate()]
    local: Tensor = DTensor.from_local(x, mesh, whole, run_check=False).to_local(grad_placements=[Partial()])
    return local


def joined(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the processes' x; in the backward each gets the sum's gradient."""
    local: Tensor = (
        DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()
    )
    return local
