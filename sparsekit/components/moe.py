"""A feed-forward layer of experts: a router sends tokens, any feed-forward is the expert, no token is dropped here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from sparsekit.components.contracts import (
    Build,
    Component,
    ExpertGroups,
    FeedForward,
    ForwardContext,
    Linear,
    Routing,
    active_parameters,
    below,
    flops_per_token,
)
from sparsekit.components.fused_experts import fused, weights_of
from sparsekit.components.sorted_rows import SortedRows, combine, rows_of_tokens, sort_rows, spread
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick


class Mixture(FeedForward):
    """Base of layers of experts: builds them, and sends tokens to them as a routing says.

    ``dispatch`` "grouped" sorts tokens by expert and runs all experts as grouped matrix products; "loop" runs one
    expert after the other and is the readable reference. An entry's ``Params`` have both that and ``expert``, a slot of
    kind ffn.
    """

    grouped = False  # as an expert of another mixture it is looped
    load: Tensor

    @classmethod
    def experts_of(cls, params: Any) -> int:
        """How many experts there are."""
        return int(params.n_experts)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        facts.child(params.expert)
        demand_token_wise(params.expert)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.n_experts = self.experts_of(params)
        self.make_router(build)
        one_module = params.expert.cls.grouped
        if one_module:
            self.experts = build.experts(self.n_experts).child(params.expert)
            demand_grouped(self.experts, params.expert.type)
        else:
            self.experts = nn.ModuleList(build.child(params.expert) for _ in range(self.n_experts))
        if any(module.batch_coupled for module in self.experts.modules() if isinstance(module, Component)):
            self.causal = False  # later tokens of a sequence are among the others that an expert is sent
        self.dispatch = self._grouped if one_module and params.dispatch == "grouped" else self._loop
        self.counter("load", self.n_experts)
        self.counter("load_max")
        self.counter("load_entropy")

    def make_router(self, build: Build) -> None:
        """Builds what routes, before the experts: weights are drawn in the order in which parts are built."""

    def send(self, x_ND: Tensor, routing: Routing, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """sum of w FFN_e(x_t) over the assignments (t, e, w) of each token t, and how many each expert has, [E]."""
        y_ND, offsets_E = self.dispatch(x_ND, routing, context)
        return y_ND, offsets_E.diff(prepend=offsets_E.new_zeros(1))

    def count(self, counts_E: Tensor, n_tokens: int) -> None:
        """Tokens an expert over all tokens; the largest over the mean; entropy of the shares over log E."""
        load_E = counts_E.to(self.load.dtype) / max(n_tokens, 1)
        share_E = load_E / load_E.sum().clamp(min=1e-9)
        self.record("load", load_E)
        self.record("load_max", share_E.max() * self.n_experts)
        self.record("load_entropy", -torch.special.xlogy(share_E, share_E).sum() / math.log(max(2, self.n_experts)))

    def _grouped(self, x_ND: Tensor, routing: Routing, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Sorted by expert, the tokens of one expert are consecutive rows, and all experts run at once."""
        weights = weights_of(self.experts, x_ND, routing)
        if weights is not None:
            return fused(x_ND, routing, weights)
        rows = sort_rows(routing, x_ND.shape[0], self.n_experts)
        return self._by_rows(x_ND, routing, rows, context), rows.offsets_E

    def _by_rows(self, x_ND: Tensor, routing: Routing, rows: SortedRows, context: ForwardContext) -> Tensor:
        order_M, token_M = rows.order_M, rows.token_M
        inside = self._inside(context, ExpertGroups(rows.offsets_E, complete=routing.complete), token_M)
        if routing.token_M is None:
            back_NS = rows_of_tokens(rows)
            y_MD = self._of_experts(spread(x_ND, token_M, back_NS), inside, routing, rows)
            return combine(y_MD, routing.weight_M.view_as(back_NS), rows, back_NS)
        y_MD = self._of_experts(x_ND[token_M], inside, routing, rows)
        weighted_MD = y_MD * routing.weight_M[order_M][:, None]
        return weighted_MD.new_zeros(x_ND.shape).index_add(0, token_M, weighted_MD)

    def _of_experts(self, x_MD: Tensor, inside: ForwardContext, routing: Routing, rows: SortedRows) -> Tensor:
        y_MD: Tensor = self.experts(x_MD, inside)
        if routing.complete:
            return y_MD
        # rows of no expert hold nothing, and nothing times 0 may still be NaN
        used_M = torch.arange(y_MD.shape[0], device=y_MD.device) < rows.offsets_E[-1]
        return torch.where(used_M[:, None], y_MD, 0)

    @staticmethod
    def _inside(context: ForwardContext, groups: ExpertGroups, token_M: Tensor) -> ForwardContext:
        """The context of experts, whose rows are tokens in another order: what goes by position is left out."""
        ids_M = None if context.ids_BT is None else context.ids_BT.reshape(-1)[token_M]
        return replace(context, groups=groups, ids_BT=ids_M, documents_BT=None, positions_BT=None, seq_len=None)

    def _loop(self, x_ND: Tensor, routing: Routing, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The formula, expert by expert."""
        n_rows = routing.expert_M.shape[0]
        token_M = routing.token_M
        if token_M is None:
            token_M = torch.arange(x_ND.shape[0], device=x_ND.device)
            token_M = token_M.repeat_interleave(n_rows // max(x_ND.shape[0], 1))
        y_ND = torch.zeros_like(x_ND)
        for index in range(self.n_experts):
            own = self._own(routing.expert_M, index)
            expert = self.experts[index] if isinstance(self.experts, nn.ModuleList) else self.experts
            y = expert(x_ND[token_M[own]], self._inside(context, ExpertGroups(expert=index), token_M[own]))
            y_ND = y_ND.index_add(0, token_M[own], (y * routing.weight_M[own][:, None]).to(y_ND.dtype))
        return y_ND, sort_rows(routing, x_ND.shape[0], self.n_experts).offsets_E

    def _own(self, expert_M: Tensor, index: int) -> Tensor:
        """Where the assignments to an expert stand; on the meta device, as many as if loads were even."""
        if expert_M.is_meta:
            return expert_M.new_empty(math.ceil(expert_M.shape[0] / self.n_experts))
        return (expert_M == index).nonzero()[:, 0]

    @property
    def one_expert(self) -> nn.Module:
        """An expert, or all of them as one module, which counts as one of them."""
        return self.experts[0] if isinstance(self.experts, nn.ModuleList) else self.experts

    def split(self, n: int) -> dict[str, int]:
        copies = isinstance(self.experts, nn.ModuleList)
        experts = [(f"experts.{i}", e) for i, e in enumerate(self.experts)] if copies else [("experts", self.experts)]
        parts: dict[str, int] = {}
        for path, expert in experts:
            parts |= below(path, expert.split(n))
        return parts  # each routes all tokens alike, and its experts compute summands of their outputs

    def stacked_experts(self) -> nn.Module:
        if self.dispatch != self._grouped:
            raise ValueError("its experts run one after the other, as they cannot be grouped or dispatch is 'loop'")
        return self.experts


class MoE(Mixture):
    """y_t = sum over the assignments (t, e, w) of w FFN_e(x_t), plus a shared expert that every token visits.

    ``shared_combine`` "mean" gives (shared + k routed)/(k + 1), k the experts a token visits. A router whose choices
    couple tokens (switch), inside an expert, is not causal.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 1; shared experts: Dai et al. 2024, arXiv 2401.06066, eq. 9
    """

    class Params(FeedForward.Params):
        n_experts: PositiveInt
        router: Annotated[Choice, Slot("router")] = pick("top_k", k=2)
        expert: Annotated[Choice, Slot("ffn")]
        shared_expert: Annotated[Choice, Slot("ffn")] | None = None
        shared_combine: Literal["sum", "mean"] = "sum"
        dispatch: Literal["grouped", "loop"] = "grouped"

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        facts.child(params.router, n_experts=params.n_experts)
        super().check(params, facts)
        if params.shared_expert is not None:
            facts.child(params.shared_expert)
            demand_token_wise(params.shared_expert)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.shared_expert = None if params.shared_expert is None else build.child(params.shared_expert)

    def make_router(self, build: Build) -> None:
        self.router = build.child(self.params.router, n_experts=self.n_experts)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])  # N may be 0: a mixture inside a mixture, whose expert nobody chose
        seq_len = x_BTD.shape[1] if x_BTD.ndim == 3 else None
        routing = self.router(x_ND, replace(context, seq_len=seq_len))
        y_ND, counts_E = self.send(x_ND, routing, context)
        self.count(counts_E, x_ND.shape[0])
        if self.shared_expert is not None:
            shared_ND = self.shared_expert(x_ND, context)
            k = self.router.experts_per_token
            y_ND = shared_ND + y_ND if self.params.shared_combine == "sum" else (shared_ND + k * y_ND) / (k + 1)
        return y_ND.to(x_BTD.dtype).view_as(x_BTD)

    def split(self, n: int) -> dict[str, int]:
        shared = {} if self.shared_expert is None else below("shared_expert", self.shared_expert.split(n))
        return super().split(n) | shared

    def active_parameters(self) -> int:
        shared = 0 if self.shared_expert is None else active_parameters(self.shared_expert)
        routed = self.router.experts_per_token * active_parameters(self.one_expert)
        return round(active_parameters(self.router) + shared + routed)

    def flops_per_token(self, seq_len: int) -> float:
        shared = 0.0 if self.shared_expert is None else flops_per_token(self.shared_expert, seq_len)
        routed = self.router.experts_per_token * flops_per_token(self.one_expert, seq_len)
        return flops_per_token(self.router, seq_len) + shared + routed


def demand_token_wise(expert: Choice) -> None:
    """Refuses an expert that looks at more than the tokens which it is sent.

    Raises:
        ValueError: it does.
    """
    if not expert.cls.token_wise:
        raise ValueError(
            f"expert {expert.type!r} wants whole sequences, of which an expert is sent a few tokens; "
            f"use it as the block's ffn"
        )


def demand_grouped(experts: nn.Module, name: str) -> None:
    """Refuses an expert that holds parameters which all experts would share unawares."""
    for path, module in experts.named_modules():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if own and not isinstance(module, Linear):
            where = ".".join(part for part in (path, own[0]) if part)
            raise TypeError(
                f"ffn {name!r} cannot be grouped: its parameter {where} does not come from build.linear; "
                f"say grouped = False in its class"
            )
