"""A mixture of SwiGLU experts with passes over rows inside its products, for training in bfloat16 on a GPU.

Forward, one product gathers the tokens that it reads and ends in w silu(g) u: a row's weight is multiplied into its
neurons, since w W_down h = W_down (w h). So neither gathered tokens nor the experts' outputs are kept for backward, and
the weight's gradient, dw = silu(g) u . (W_down^T dy), comes with those of g and u. Backward, both products that lead to
a token are one sum. What torch's grouped_mm does faster, the other products, it does; what was measured, beside it, is
in benchmarks/RESULTS.md.

Source: Tan et al. 2024, arXiv 2403.08245 (gathers inside grouped products); Guo et al. 2025, arXiv 2512.14080 (what
need not be kept)
"""

from __future__ import annotations

import functools
import importlib
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import FeedForward, Routing, compute_dtype, constant
from sparsekit.components.sorted_rows import summed

STEP = 64  # both widths are multiples of it
MOST = 1024  # experts
SHARED_MEMORY = 227 * 1024  # bytes of it that a program may take: data centres' GPUs from Hopper on have that


def weights_of(experts: FeedForward, x_ND: Tensor, routing: Routing) -> list[Tensor] | None:
    """(gate, up, down) of experts that this module can compute as they are, in the type that it computes in.

    None where they are another feed-forward, anything listens to their parts or stands in for them (hooks, other
    forwards, weights that are spread over processes), entries of the routing are unused or tokens have unequally many,
    or device or type are not what the kernels are for.
    """
    if not able(x_ND) or routing.token_M is not None or not routing.complete:
        return None
    dtype, linears = compute_dtype(x_ND.device, x_ND.dtype), experts.silu_gated()
    if dtype != torch.bfloat16 or not x_ND.shape[0] or linears is None:
        return None
    sizes = linears[0].weight.shape
    if len(sizes) != 3 or sizes[0] > MOST or any(side % STEP for side in sizes[1:]):
        return None
    if any(_listened_to(module) for module in experts.modules()):
        return None
    weights = [linear.only_weight() for linear in linears]
    if any(type(one) not in (Tensor, nn.Parameter) for one in weights):  # none, or of some other kind, as a DTensor
        return None
    return [weight.to(dtype) for weight in cast(list[Tensor], weights)]


def _listened_to(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    ) or "forward" in vars(module)


def able(x_ND: Tensor) -> bool:
    """Whether the kernels run where x is."""
    return x_ND.is_cuda and _able(x_ND.device.index or 0)


@constant
def _able(device: int) -> bool:
    return _able_once(device)


@functools.cache
def _able_once(device: int) -> bool:
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < SHARED_MEMORY:
        return False
    importlib.import_module("sparsekit.components.expert_kernels")  # makes the operators known
    return True


def fused(x_ND: Tensor, routing: Routing, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """For each token the weighted sum of its experts' outputs, and the end of each expert's rows, [E].

    Args:
        x_ND: tokens.
        routing: every entry is used, and every token has equally many.
        weights: gate and up [E, F, D], down [E, D, F].

    Returns:
        [N, D] in the wider type of tokens and weights; int32 offsets.
    """
    weight_NS = routing.weight_M.view(x_ND.shape[0], -1)
    n_experts, expert_M = weights[0].shape[0], routing.expert_M.contiguous()
    order_M, row_M, offsets_E, tiles_4T = torch.ops.sparsekit.experts_sort(expert_M, n_experts)
    x = x_ND.to(weights[0].dtype).contiguous()
    stacks = (weight.contiguous() for weight in weights)
    y_ND: Tensor = _Fused.apply(  # type: ignore[no-untyped-call]
        x, weight_NS.contiguous(), *stacks, order_M, row_M.view_as(weight_NS), offsets_E, tiles_4T
    )
    return y_ND, offsets_E


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_NS: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor,
        order_M: Tensor, row_NS: Tensor, offsets_E: Tensor, tiles_4T: Tensor,
    ) -> Tensor:  # fmt: skip
        g_MF, u_MF, h_MF = torch.ops.sparsekit.experts_up(x_ND, weight_NS, order_M, tiles_4T, gate_EFD, up_EFD)
        y_MD = torch.ops.sparsekit.experts_down(h_MF, tiles_4T, down_EDF)
        ctx.save_for_backward(
            x_ND, weight_NS, gate_EFD, up_EFD, down_EDF, order_M, row_NS, offsets_E, tiles_4T, g_MF, u_MF, h_MF
        )
        return summed(y_MD, None, row_NS, torch.promote_types(x_ND.dtype, weight_NS.dtype))

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_ND, weight_NS, gate_EFD, up_EFD, down_EDF, order_M, row_NS, offsets_E, tiles_4T, g_MF, u_MF, h_MF
        ) = ctx.saved_tensors  # fmt: skip
        dy_MD = torch.ops.sparsekit.experts_spread(dy_ND.to(x_ND.dtype).contiguous(), row_NS)
        dh_MF = F.grouped_mm(dy_MD, down_EDF, offs=offsets_E)
        ddown_EDF = F.grouped_mm(dy_MD.T, h_MF, offs=offsets_E)
        dg_MF, du_MF, dweight_NS = torch.ops.sparsekit.experts_act_back(dh_MF, weight_NS, order_M, g_MF, u_MF)
        dx_MD = torch.ops.sparsekit.experts_up_back(dg_MF, du_MF, tiles_4T, gate_EFD, up_EFD)
        x_MD = torch.ops.sparsekit.experts_spread(x_ND, row_NS)
        dgate_EFD = F.grouped_mm(dg_MF.T, x_MD, offs=offsets_E)
        dup_EFD = F.grouped_mm(du_MF.T, x_MD, offs=offsets_E)
        dx_ND = summed(dx_MD, None, row_NS, x_ND.dtype)
        return dx_ND, dweight_NS.to(weight_NS.dtype), dgate_EFD, dup_EFD, ddown_EDF, None, None, None, None
