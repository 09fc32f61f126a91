"""A model laid out over the processes that train it: one function, one order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsekit.errors import SpecError
from sparsekit.model.build import materialise
from sparsekit.model.decoder import Decoder
from sparsekit.spec.run import ParallelSpec, RunSpec
from sparsekit.training.distributed import World
from sparsekit.training.recompute import recompute

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_sizes(parallel: ParallelSpec, n_processes: int) -> None:
    """Whether so many processes can be laid out as a spec says.

    Raises:
        SpecError: they cannot.
    """
    tensor, expert = parallel.tensor, parallel.expert
    if n_processes % tensor:
        told = f"{tensor} does not divide the number of processes, {n_processes}"
        raise SpecError([f"parallel.tensor: {told}; start a multiple of {tensor} with torchrun, or set it to 1"])
    n_data = n_processes // tensor
    if n_data % expert:
        counted = "" if tensor == 1 else f" (of {n_processes}, {tensor} share each batch)"
        told = f"{expert} does not divide the number of processes that read different data, {n_data}{counted}"
        mend = f"start a multiple of {expert * tensor} with torchrun, or set it to 1"
        raise SpecError([f"parallel.expert: {told}; {mend}"])


def parallelise(model: Decoder, spec: RunSpec, world: World) -> None:
    """Lays a model on the meta device out over all processes, in place, and fills it with its first weights.

    In this order: layers and experts are divided, layers recompute, are compiled, and are sharded; then each process
    allocates and fills what it holds. Gradients are averaged over the processes that read different data: after every
    micro-batch where they are sharded ("fsdp"), so that no process keeps them whole, and after a step's last where
    they are whole anyway ("ddp").

    In precision bf16 layers are gathered in bfloat16, which is what their matrix products would round them to, and
    gradients are averaged in float32; norms' weights in layers are rounded too, the stream of activations is not.

    Raises:
        SpecError: the processes cannot be laid out so, or a layer cannot be divided.

    Source: Zhao et al. 2023, arXiv 2304.11277 (FSDP); per-parameter sharding as in PyTorch's fully_shard
    """
    parallel, settings = spec.parallel, spec.train
    layout = Layout(parallel, world) if world.size > 1 else None
    if layout is not None:
        layout.divide(model)
    recompute(model, parallel.activation_checkpoint)
    if settings.compile == "model":
        model.compile()
    elif settings.compile:
        for layer in model.layers:
            layer.compile()
    if layout is not None and world.data_size > 1:
        layout.shard(model, settings.precision)
    materialise(model, settings.seed, world.device)
    if layout is not None:
        layout.division.install()


class Layout:
    """The processes as a mesh, (data, tensor), and for experts as (data / expert, expert, tensor)."""

    def __init__(self, parallel: ParallelSpec, world: World):
        from sparsekit.training.tensor_parallel import Division

        self.parallel, self.world, self.division = parallel, world, Division()
        self.experts: list[nn.Module] = []
        self.mesh = self._make_mesh(world.data_size, {"tensor": parallel.tensor})
        if parallel.expert > 1:
            sizes = {"expert": parallel.expert, "tensor": parallel.tensor}
            self.expert_mesh = self._make_mesh(world.data_size // parallel.expert, sizes)

    def _make_mesh(self, n_data: int, sizes: dict[str, int]) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        # whole on each of "copies", sharded over "data"
        data = {"copies": n_data, "data": 1} if self.parallel.data == "ddp" else {"data": n_data}
        dims = {**data, **{name: size for name, size in sizes.items() if size > 1}}
        return init_device_mesh(self.world.device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))

    def divide(self, model: Decoder) -> None:
        """Tensor and expert parallelism."""
        meshes: dict[str, DeviceMesh] = {}
        if self.parallel.expert > 1:
            from sparsekit.training.expert_parallel import divide_experts

            meshes["expert"] = self.expert_mesh
            self.experts = divide_experts(model, self.expert_mesh["expert"], self.division)
        if self.parallel.tensor > 1:
            from sparsekit.training.tensor_parallel import divide_layers

            meshes["tensor"] = self.mesh
            divide_layers(model, self.mesh["tensor"], self.division)
        self.division.divide(meshes)

    def shard(self, model: Decoder, precision: str) -> None:
        """FSDP2, layer by layer; over one process in "data" that is what DDP does."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        dims = ("copies", "data") if self.parallel.data == "ddp" else ("data",)
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = narrow if precision == "bf16" else wide
        again = self.parallel.reshard_after_forward
        for experts in self.experts:
            fully_shard(experts, mesh=self.expert_mesh[dims], mp_policy=policy, reshard_after_forward=again)
            _unseen_by_modes(experts)
        for layer in model.layers:
            fully_shard(layer, mesh=self.mesh[dims], mp_policy=policy, reshard_after_forward=again)
        fully_shard(model, mesh=self.mesh[dims], mp_policy=wide)


def _unseen_by_modes(module: nn.Module) -> None:
    """Keeps what FSDP does around a module inside a layer from selective recomputation, which compares operators.

    FSDP gathers in the forward and finds gathered in the backward, so these operators differ from one to the other.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    def unseen(hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return hook(*args, **kwargs)

        return call

    hooks: Any
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in hooks.items():
            hooks[key] = unseen(hook)


def last_micro_batch(model: nn.Module, parallel: ParallelSpec, last: bool) -> None:
    """Says before a micro-batch whether it is a step's last, for gradients that are averaged then only."""
    from torch.distributed.fsdp import FSDPModule

    if parallel.data == "ddp" and isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def group_by_mesh(optimizer: torch.optim.Optimizer) -> None:
    """Splits an optimizer's groups so that each holds what lies on one mesh, as one fused update demands."""
    groups = []
    for group in optimizer.param_groups:
        by_mesh: dict[Any, list[Any]] = {}
        for parameter in group["params"]:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
        groups += [{**group, "params": parameters} for parameters in by_mesh.values()]
    optimizer.param_groups[:] = groups
