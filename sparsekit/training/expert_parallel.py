"""Experts divided among processes: each holds E / n of every mixture's, and is sent the tokens that chose those.

Shapes: R processes, E experts, L experts of one process, M rows (a token that visits an expert), P rows that arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from sparsekit.components.contracts import ExpertGroups, FeedForward, ForwardContext, Linear, compute_dtype
from sparsekit.errors import SpecError
from sparsekit.model.decoder import Decoder
from sparsekit.training.tensor_parallel import Division, own_tensors


def divide_experts(model: Decoder, mesh: DeviceMesh, division: Division) -> list[nn.Module]:
    """Divides the experts of every mixture among the processes of a mesh of one dimension.

    Returns:
        The modules that hold them.

    Raises:
        SpecError: there are none, or they cannot be divided among so many.

    Source: Lepikhin et al. 2020, arXiv 2006.16668, sec. 3.2
    """
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        if not isinstance(module, FeedForward):
            continue
        try:
            experts = module.stacked_experts()
            if experts is not None:
                _divide(experts, mesh, division)
                found.append(experts)
        except ValueError as error:
            raise SpecError([f"parallel.expert: {mesh.size()} processes cannot share {name}: {error}"]) from None
    if not found:
        raise SpecError(["parallel.expert: the model has no experts to divide; leave it at 1"])
    return found


def _divide(experts: nn.Module, mesh: DeviceMesh, division: Division) -> None:
    def share_gradient(part: Tensor) -> Tensor:
        # it is that of the tokens of all these processes, and what follows averages over the others alone
        shared: Tensor = _GradientShare.apply(part, mesh.size())  # type: ignore[no-untyped-call]
        return shared

    stacks = [module for module in experts.modules() if isinstance(module, Linear)]
    for module in stacks:
        assert module.n_experts is not None, "a stack of experts is built with their number"
        if module.n_experts % mesh.size():
            raise ValueError(f"n_experts ({module.n_experts}) cannot be divided by {mesh.size()}")
        for name, tensor in own_tensors(module).items():
            if tensor.ndim and tensor.shape[0] == module.n_experts:
                division.cut(module, name, 0, "expert", mesh.size())
                if isinstance(tensor, nn.Parameter):
                    division.read(module, name, share_gradient)
    experts.forward = Exchange(experts.forward, mesh)


class _GradientShare(torch.autograd.Function):
    """x, whose gradient is divided by n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.n, None


class Exchange:
    """y[m] = FFN_e(m)(x[m]) for rows sorted by expert, each computed where its expert is.

    Rows go to their experts' processes and come back; how many, only the host can say, and it is asked once.
    """

    def __init__(self, compute: Callable[[Tensor, ForwardContext], Tensor], mesh: DeviceMesh):
        self.compute, self.mesh = compute, mesh

    def __call__(self, x_MD: Tensor, context: ForwardContext) -> Tensor:
        groups = context.groups
        assert groups is not None and groups.offsets_E is not None, "a mixture sorts its rows by expert"
        n_processes, group = self.mesh.size(), self.mesh.get_group()
        counts_E = groups.offsets_E.diff(prepend=groups.offsets_E.new_zeros(1))
        sent_RL = counts_E.view(n_processes, -1)
        received_RL = all_to_all_single(counts_E, None, None, group).view_as(sent_RL)
        sends, receives = torch.stack((sent_RL.sum(1), received_RL.sum(1))).tolist()
        n_sent = sum(sends)

        x_MD = x_MD.to(compute_dtype(x_MD.device, x_MD.dtype))
        arrived_PD = all_to_all_single_autograd(x_MD[:n_sent], receives, sends, group)
        # they come by process and then by expert, and are wanted by expert
        local_R_L = torch.arange(sent_RL.shape[1], device=x_MD.device).repeat(n_processes)
        expert_P = local_R_L.repeat_interleave(received_RL.flatten(), output_size=sum(receives))
        order_P = expert_P.argsort(stable=True)
        back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(order_P.shape[0], device=x_MD.device))
        offsets_L = received_RL.sum(0).cumsum(0).to(torch.int32)
        y_PD = self.compute(arrived_PD[order_P], replace(context, groups=ExpertGroups(offsets_L), ids_BT=None))
        y_MD = all_to_all_single_autograd(y_PD[back_P], sends, receives, group)
        return F.pad(y_MD, (0, 0, 0, x_MD.shape[0] - n_sent))  # rows of no expert
