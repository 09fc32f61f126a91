"""From gradients to an update that is applied whole, or not at all where it would not be finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparsekit.components.contracts import Component
from sparsekit.model.dtensor import is_dtensor
from sparsekit.training.distributed import World


class Gradients:
    """The gradients of a model's parameters: their norms and their clipping.

    Parameters may be sharded over different meshes: each rank adds up the squares of what it holds, each over the
    number of ranks that hold the same. Nothing here makes the host wait for the device.
    """

    def __init__(self, model: nn.Module, world: World):
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.world = world
        share = [1.0 / copies(p, world.size) for _, p in self.named]
        self._shares = dict(
            zip([name for name, _ in self.named], torch.tensor(share, device=world.device), strict=True)
        )

    @property
    def names(self) -> list[str]:
        """Of the parameters that have a gradient."""
        return [name for name, parameter in self.named if parameter.grad is not None]

    def squares(self) -> Tensor:
        """The squared norm of each of these gradients, [names], float32 or wider, of this rank: to be summed."""
        gradients = self._local()
        norms = torch._foreach_norm(gradients, 2, dtype=torch.promote_types(gradients[0].dtype, torch.float32))
        return torch.stack(norms).square() * torch.stack([self._shares[name] for name in self.names])

    def parameter_squares(self) -> Tensor:
        """The squared norm of all parameters, this rank's part."""
        parameters = [local(parameter.detach()) for _, parameter in self.named]
        norms = torch._foreach_norm(parameters, 2, dtype=torch.promote_types(parameters[0].dtype, torch.float32))
        shares = torch.stack([self._shares[name] for name, _ in self.named])
        return (torch.stack(norms).square() * shares).sum()

    def _local(self) -> list[Tensor]:
        return [local(p.grad) for _, p in self.named if p.grad is not None]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def copies(tensor: Tensor, n_ranks: int) -> int:
    """How many of all ranks hold the same part of a tensor, or the same tensor."""
    if not is_dtensor(tensor):
        return n_ranks
    mesh = tensor.device_mesh
    return n_ranks // math.prod(mesh.size(i) for i, p in enumerate(tensor.placements) if not p.is_replicate())


def clip_factor(norm: Tensor, limit: float | None) -> Tensor:
    """By which gradients of a norm are multiplied so that it is at most limit: min(1, limit / (norm + 1e-6))."""
    return torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def masked_step(optimizer: torch.optim.Optimizer, bad: Tensor, factor: Tensor) -> None:
    """One step of an optimizer, of which nothing remains where ``bad`` is true: neither in weights nor in its state.

    torch's fused optimizers do that themselves (``found_inf``); of others all that they write is copied first.

    Args:
        bad: a boolean on the device that trains; nobody waits for it.
        factor: by which gradients are multiplied first, which fused optimizers do as they read them.
    """
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if fused:
        optimizer.grad_scale = factor.reciprocal().float()  # type: ignore[attr-defined]  # they divide by it
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
    if getattr(optimizer, "takes_found_inf", fused):
        optimizer.found_inf = bad.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        if fused:
            del optimizer.grad_scale  # type: ignore[attr-defined]
        return
    before = {id(tensor): local(tensor).clone() for tensor in written(optimizer)}
    optimizer.step()
    for tensor in written(optimizer):
        now = local(tensor)
        old = before.get(id(tensor), torch.zeros_like(now))  # what this step made began at zero
        now.copy_(torch.where(bad, old, now))


@torch.no_grad()
def masked_after_step(module: Component, counted: Mapping[str, Tensor], bad: Tensor) -> None:
    """What a component moves by rule after a step, of which nothing remains where ``bad`` is true."""
    before = [buffer.clone() for buffer in module.buffers(recurse=False)]
    module.after_step(counted)
    for buffer, old in zip(module.buffers(recurse=False), before, strict=True):
        buffer.copy_(torch.where(bad, old, buffer))


def written(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors that a step may change."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            yield from (t for t in optimizer.state.get(parameter, {}).values() if isinstance(t, Tensor))
