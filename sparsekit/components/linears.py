"""Projections: what ``build.linear`` makes, and the grouped matrix multiply behind experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sparsekit.components.contracts import Build, ExpertGroups, ForwardContext, Linear, compute_dtype


class PlainLinear(Linear):
    """y = x W^T + b, a dense projection.

    Inside experts W is [E, d_out, d_in] and a row is multiplied by the matrix of the expert, or by the blend of all,
    that ``context.groups`` gives it to.
    """

    divisible = True

    def forward(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        return project(x, self.effective_weight(), self.bias, context)

    def only_weight(self) -> Tensor | None:
        own = type(self).forward is not PlainLinear.forward
        return None if own or self.bias is not None else self.effective_weight()


class MaskedLinear(PlainLinear):
    """y = x (M * W)^T + b, M a fixed random mask that keeps a share 1 - sparsity of each matrix's weights.

    Only projections whose role is in ``roles`` are masked; the others are plain. The mask is drawn with the weights,
    from the model's seed, and saved with them.

    Source: Liu et al. 2022, arXiv 2202.02643 (random pruning, uniform layer ratio)
    """

    divisible = True

    class Params(PlainLinear.Params):
        sparsity: float = Field(default=0.5, ge=0, lt=1)
        roles: list[str] = ["gate", "up", "down"]

    mask: Tensor

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.masked = self.role in params.roles and params.sparsity > 0
        if self.masked:
            self.register_buffer("mask", torch.empty(self.weight.shape, dtype=torch.bool))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.masked:
            self.mask.copy_(random_mask(self.weight.shape, self.params.sparsity, self.weight.device))

    def effective_weight(self) -> Tensor:
        return self.weight * self.mask if self.masked else self.weight


def random_mask(shape: torch.Size, sparsity: float, device: torch.device) -> Tensor:
    """True for a share 1 - sparsity of each matrix's entries, to the nearest one, drawn uniformly."""
    flat = torch.rand(*shape[:-2], shape[-2] * shape[-1], device=device)
    n_kept = round((1 - sparsity) * flat.shape[-1])
    kept = flat.argsort(dim=-1)[..., :n_kept]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, kept, True).view(shape)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, context: ForwardContext | None) -> Tensor:
    """x [..., d_in] times weight [d_out, d_in], or [E, d_out, d_in] with the groups of the context.

    Raises:
        TypeError: the weight is an expert's and the caller did not hand on its context.
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    if context is None or context.groups is None:
        raise TypeError(
            "a projection inside experts needs the context: call linear(x, context), "
            "or say grouped = False in the feed-forward's class"
        )
    groups = context.groups
    if groups.blend_GE is not None:
        return blended(x, weight, bias, groups.blend_GE)
    if groups.offsets_E is None:
        return F.linear(x, weight[groups.expert], None if bias is None else bias[groups.expert])
    dtype = compute_dtype(x.device, x.dtype)  # autocast itself does not know the operator
    y = grouped_projection(x.to(dtype), weight.to(dtype), groups)
    if bias is not None:
        rows = torch.arange(x.shape[0], device=x.device)
        owner = torch.searchsorted(groups.offsets_E, rows, right=True).clamp(max=bias.shape[0] - 1)
        y = y + bias[owner].to(y.dtype)
    return y


def blended(x_GRI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, blend_GE: Tensor) -> Tensor:
    """y[g] = x[g] W[g]^T + b[g] of the blends W[g] = sum_e blend[g, e] W_e; [G, R, d_in] -> [G, R, d_out]."""
    blend_GE = blend_GE.to(weight_EOI.dtype)
    weight_GOI = (blend_GE @ weight_EOI.flatten(1)).unflatten(1, weight_EOI.shape[1:])
    y_GRO = torch.bmm(x_GRI, weight_GOI.mT)
    return y_GRO if bias_EO is None else y_GRO + (blend_GE @ bias_EO)[:, None]


def grouped_projection(x_MI: Tensor, weight_EOI: Tensor, groups: ExpertGroups) -> Tensor:
    """:func:`grouped_mm`, on a GPU in bfloat16 without the cost of a custom operator, some 0.1 ms a call."""
    direct = x_MI.is_cuda and x_MI.dtype == torch.bfloat16 and _native(weight_EOI)
    run: Any = _Grouped.apply if direct else grouped_mm
    y_MO: Tensor = run(x_MI, weight_EOI, groups.offsets_E, groups.complete)
    return y_MO


class _Grouped(torch.autograd.Function):
    """torch's grouped_mm, in whose gradient a compiler sees what is called."""

    @staticmethod
    def forward(x_MI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, complete: bool) -> Tensor:
        y_MO = F.grouped_mm(x_MI.contiguous(), weight_EOI.transpose(-2, -1), offs=offsets_E)
        return y_MO if complete else _clear_unused(y_MO, offsets_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.complete = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy_MO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_MI, weight_EOI, offsets_E = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        dy_MO = dy_MO.contiguous()
        dx_MI = F.grouped_mm(dy_MO, weight_EOI, offs=offsets_E) if needs_x else None
        if dx_MI is not None and not ctx.complete:
            dx_MI = _clear_unused(dx_MI, offsets_E)
        if not needs_weight:
            return dx_MI, None, None, None
        if (
            dx_MI is None
        ):  # a compiler that sees dy used transposed alone lays it out so, and groups are not aligned then
            return None, grouped_outer(dy_MO, x_MI, offsets_E), None, None
        return dx_MI, F.grouped_mm(dy_MO.T, x_MI.contiguous(), offs=offsets_E), None, None


def _clear_unused(y_MO: Tensor, offsets_E: Tensor) -> Tensor:
    """Zeros in the rows past the last offset, in which grouped_mm wrote nothing."""
    used_M = torch.arange(y_MO.shape[0], device=y_MO.device) < offsets_E[-1]
    return torch.where(used_M[:, None], y_MO, 0)


# torch's own grouped_mm leaves rows past the last offset unwritten, wants 16-byte rows and 16- or 32-bit floats,
# refuses non-contiguous gradients, and is compiled in bfloat16 only; behind a custom operator none of that shows.


def _native(*tensors: Tensor) -> bool:
    return all(
        t.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and t.shape[-1] * t.element_size() % 16 == 0
        and t.shape[-2] * t.element_size() % 16 == 0
        for t in tensors
    ) and (tensors[0].device.type == "cpu" or tensors[0].dtype == torch.bfloat16)


@torch.library.custom_op("sparsekit::grouped_mm", mutates_args=())
def grouped_mm(x_MI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, complete: bool = False) -> Tensor:
    """y[m] = weight[e(m)] x[m], e(m) the first expert whose offset is above m; rows past the last offset are 0.

    Shapes: x [M, d_in], weight [E, d_out, d_in], offsets int32 [E], ascending; y [M, d_out]. ``complete`` says that the
    last offset is M, which saves a pass over y.
    """
    # the row count need not be aligned, so only the matrices' own sides are looked at
    if _native(weight_EOI):
        y = F.grouped_mm(x_MI.contiguous(), weight_EOI.transpose(-2, -1), offs=offsets_E)
        return y if complete else _clear_unused(y, offsets_E)
    y = x_MI.new_zeros(x_MI.shape[0], weight_EOI.shape[1])
    for weight, start, end in _spans(weight_EOI, offsets_E):
        y[start:end] = x_MI[start:end] @ weight.T
    return y


@grouped_mm.register_fake
def _(x_MI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, complete: bool = False) -> Tensor:
    return x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("sparsekit::grouped_outer", mutates_args=())
def grouped_outer(y_MO: Tensor, x_MI: Tensor, offsets_E: Tensor) -> Tensor:
    """G[e] = sum over the rows m of expert e of y[m] x[m]^T, shape [E, d_out, d_in]: the weight's gradient."""
    n_experts = offsets_E.shape[0]
    sides = y_MO.new_empty((0, y_MO.shape[1], x_MI.shape[1]))
    if _native(sides):
        return F.grouped_mm(y_MO.contiguous().T, x_MI.contiguous(), offs=offsets_E)
    gradient = y_MO.new_zeros(n_experts, y_MO.shape[1], x_MI.shape[1])
    for out, start, end in _spans(gradient, offsets_E):
        torch.mm(y_MO[start:end].T, x_MI[start:end], out=out)
    return gradient


@grouped_outer.register_fake
def _(y_MO: Tensor, x_MI: Tensor, offsets_E: Tensor) -> Tensor:
    return y_MO.new_empty(offsets_E.shape[0], y_MO.shape[1], x_MI.shape[1])


def _spans(matrices_E: Tensor, offsets_E: Tensor) -> list[tuple[Tensor, int, int]]:
    ends = offsets_E.tolist()
    return [(matrix, start, end) for matrix, start, end in zip(matrices_E, [0, *ends], ends, strict=False)]


def _save_mm(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.complete = inputs
    ctx.save_for_backward(*tensors)


def _save_outer(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx, dy_MO: Tensor):  # type: ignore[no-untyped-def]
    x_MI, weight_EOI, offsets_E = ctx.saved_tensors
    transposed_EIO = weight_EOI.transpose(-2, -1)
    dx = grouped_mm(dy_MO, transposed_EIO, offsets_E, ctx.complete) if ctx.needs_input_grad[0] else None
    dw = grouped_outer(dy_MO, x_MI, offsets_E) if ctx.needs_input_grad[1] else None
    return dx, dw, None, None


def _grouped_outer_backward(ctx, dg_EOI: Tensor):  # type: ignore[no-untyped-def]
    y_MO, x_MI, offsets_E = ctx.saved_tensors
    dy = grouped_mm(x_MI, dg_EOI, offsets_E, False)
    return dy, grouped_mm(y_MO, dg_EOI.transpose(-2, -1), offsets_E, False), None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_mm)
grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_save_outer)
