"""Assignments of tokens to experts in the order of the experts, and the way there and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekit.components.contracts import Routing, wide


class SortedRows(NamedTuple):
    """The assignments of a routing in the order of their experts, M rows.

    Attributes:
        order_M: which assignment each row is; those of no expert come last.
        token_M: the token of each row.
        offsets_E: int32, the end of each expert's rows.
        slots: assignments a token, where every token has equally many.
    """

    order_M: Tensor
    token_M: Tensor
    offsets_E: Tensor
    slots: int


def sort_rows(routing: Routing, n_tokens: int, n_experts: int) -> SortedRows:
    """The assignments sorted by expert, those of one expert in the order in which they came."""
    narrow = torch.int16 if n_experts < 2**15 else torch.int32  # a radix sort takes as long as its keys are wide
    expert_M, order_M = routing.expert_M.to(narrow).sort(stable=True)
    experts = torch.arange(n_experts, device=expert_M.device, dtype=narrow)
    offsets_E = torch.searchsorted(expert_M, experts, right=True).to(torch.int32)
    slots = max(order_M.shape[0] // max(n_tokens, 1), 1)
    token_M = order_M // slots if routing.token_M is None else routing.token_M[order_M]
    return SortedRows(order_M, token_M, offsets_E, slots)


def rows_of_tokens(rows: SortedRows) -> Tensor:
    """The rows of each token, [N, slots], where all have equally many."""
    order_M = rows.order_M
    back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(order_M.shape[0], device=order_M.device))
    return back_M.view(-1, rows.slots)


# Where every token has equally many assignments, the two below are gathers forward and backward, which add up in a
# fixed order; torch's own gradients of indexing add atomically, which is slower and never twice the same.


def spread(x_ND: Tensor, token_M: Tensor, back_NS: Tensor) -> Tensor:
    """x[token_M]: the tokens as rows, of which ``back_NS`` are those of each token."""
    x_MD: Tensor = _Spread.apply(x_ND, token_M, back_NS)  # type: ignore[no-untyped-call]
    return x_MD


def combine(y_MD: Tensor, weight_NS: Tensor, rows: SortedRows, back_NS: Tensor) -> Tensor:
    """For each token the sum of its rows, weighted; [N, D] in the wider dtype of rows and weights."""
    y_ND: Tensor = _Combine.apply(y_MD, weight_NS, rows.token_M, rows.order_M, back_NS)  # type: ignore[no-untyped-call]
    return y_ND


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(x_ND: Tensor, token_M: Tensor, back_NS: Tensor) -> Tensor:
        return x_ND[token_M]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, dx_MD: Tensor) -> tuple[Tensor, None, None]:
        (back_NS,) = ctx.saved_tensors
        return summed(dx_MD, None, back_NS, dx_MD.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(y_MD: Tensor, weight_NS: Tensor, token_M: Tensor, order_M: Tensor, back_NS: Tensor) -> Tensor:
        return summed(y_MD, weight_NS, back_NS, torch.promote_types(y_MD.dtype, weight_NS.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_MD, weight_NS, token_M, order_M, back_NS = ctx.saved_tensors
        dy_MD = dy_ND[token_M]  # both in the order of rows, so that one compiled pass makes them
        dweight_M = (dy_MD * y_MD).sum(-1, dtype=weight_NS.dtype)
        weight_M = weight_NS.flatten()[order_M]
        return (dy_MD * weight_M[:, None]).to(y_MD.dtype), dweight_M[back_NS], None, None, None


def summed(x_MD: Tensor, weight_NS: Tensor | None, back_NS: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over s of weight[n, s] x[back[n, s]] in a dtype, added up in float32 or wider, term by term: compiled, one
    pass."""
    total = torch.zeros((), dtype=wide(x_MD.dtype), device=x_MD.device)
    for slot, back_N in enumerate(back_NS.unbind(1)):
        term_ND = x_MD[back_N].to(total.dtype)
        total = total + (term_ND if weight_NS is None else term_ND * weight_NS[:, slot, None])
    # compiled by torch 2.11, an autograd.Function that ends in a cast to the type it has has no gradient
    return total if total.dtype == dtype else total.to(dtype)
