"""Stratified mixtures: experts in ordered strata, of which a token visits one after the other, few or many."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from sparsekit.components.contracts import (
    Build,
    FeedForward,
    ForwardContext,
    Routing,
    active_parameters,
    attach_loss,
    flops_per_token,
)
from sparsekit.components.moe import Mixture
from sparsekit.components.routers import one_hot, widened
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot


class Stratified(Mixture):
    """A token in stratum l visits e = argmax p, p = softmax(W_l x) over the experts of strata l and later.

    Then x <- x + p_e FFN_e(x), and it stands in the stratum after e's, until there is none: 1 to L experts a token. The
    output is what was added in all. ``norm`` normalises x before each visit but the first. ``strata`` has the experts
    of each stratum; one stratum is the mixture of top_k with k 1. Load balance and z losses are LearnedRouter's, of the
    tokens that stand in a stratum, mean over strata. Counter ``passes``: experts a token visits; costs are counted as
    at initialisation, where all of them are equally likely.

    Shapes: [batch, seq, d_model] -> same; each pass lays out all N tokens and computes those that stand there.

    Source: Xu et al. 2023, arXiv 2305.02176 (SMoE)
    """

    class Params(FeedForward.Params):
        strata: list[PositiveInt] = Field(default=[2, 2], min_length=1)
        expert: Annotated[Choice, Slot("ffn")]
        norm: Annotated[Choice, Slot("norm")] | None = None
        load_balance: NonNegativeFloat = 0.01
        z_loss: NonNegativeFloat = 0.001
        dispatch: Literal["grouped", "loop"] = "grouped"

    @classmethod
    def experts_of(cls, params: Any) -> int:
        return sum(params.strata)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        super().check(params, facts)
        if params.norm is not None:
            facts.child(params.norm)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.starts = [sum(params.strata[:level]) for level in range(len(params.strata))]
        open_at = [self.n_experts - start for start in self.starts]
        self.gates = nn.ModuleList(build.linear("router", build.d_model, n) for n in open_at)
        later = params.strata[1:] if params.norm is not None else []
        self.norms = nn.ModuleList(build.child(params.norm) for _ in later)
        for name in ("load_balance_loss", "z_loss", "passes"):
            self.counter(name)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        n_tokens = x_ND.shape[0]
        level_N = torch.zeros(n_tokens, dtype=torch.int64, device=x_ND.device)
        counts_E = torch.zeros(self.n_experts, dtype=torch.int32, device=x_ND.device)
        total_ND, losses = torch.zeros_like(x_ND), []
        for level, (start, gate) in enumerate(zip(self.starts, self.gates, strict=True)):
            here_N = level_N == level
            read_ND = self.norms[level - 1](x_ND) if level and self.norms else x_ND
            logits_NE = widened(gate(read_ND, context))
            weight_N1, choice_N1 = logits_NE.softmax(-1).max(-1, keepdim=True)
            expert_N1 = (choice_N1 + start).masked_fill(~here_N[:, None], self.n_experts)
            step_ND, step_E = self.send(read_ND, Routing.per_token(expert_N1, weight_N1, level == 0), context)
            step_ND = step_ND.to(x_ND.dtype)
            x_ND, total_ND, counts_E = x_ND + step_ND, total_ND + step_ND, counts_E + step_E
            losses.append(self._losses(logits_NE, choice_N1, here_N))
            above_N = sum((expert_N1[:, 0] >= end).long() for end in self.starts)  # 1 + the stratum of the expert
            level_N = torch.where(here_N, above_N, level_N)
        self.count(counts_E, n_tokens)
        self.record("passes", counts_E.sum() / max(n_tokens, 1))
        return self._with_losses(total_ND, losses, context).view_as(x_BTD)

    def _losses(self, logits_NE: Tensor, choice_N1: Tensor, here_N: Tensor) -> Tensor:
        """(load balance, z) of the tokens that stand here; 0 where there are none."""
        scores_NE, here_N1 = logits_NE.softmax(-1), here_N[:, None].to(logits_NE.dtype)
        n_here = here_N1.sum().clamp(min=1)
        shares_E = (scores_NE * here_N1).sum(0) / n_here
        chosen_E = (one_hot(choice_N1, scores_NE) * here_N1).sum(0) / n_here
        z = (logits_NE.logsumexp(-1, keepdim=True).square() * here_N1).sum() / n_here
        return torch.stack((logits_NE.shape[1] * (chosen_E * shares_E).sum(), z))

    def _with_losses(self, y_ND: Tensor, losses: list[Tensor], context: ForwardContext) -> Tensor:
        if not self.training:
            return y_ND
        balance, z = torch.stack(losses).mean(0).unbind()
        self.record("load_balance_loss", balance)
        self.record("z_loss", z)
        return attach_loss(y_ND, self.params.load_balance * balance + self.params.z_loss * z, context)

    @property
    def experts_per_token(self) -> float:
        """Experts that a token visits where each gate finds all of its experts equally likely."""
        after = [0.0]  # from the last stratum to the first
        for level in reversed(range(len(self.starts))):
            sizes = self.params.strata[level:]
            visits = zip(sizes, reversed(after), strict=True)
            after.append(1 + sum(size * left for size, left in visits) / sum(sizes))
        return after[-1]

    def split(self, n: int) -> dict[str, int]:
        raise ValueError("a pass reads what the one before it has computed whole, so its experts cannot be divided")

    def active_parameters(self) -> int:
        around = sum(active_parameters(module) for module in (*self.gates, *self.norms))
        return round(around + self.experts_per_token * active_parameters(self.one_expert))

    def flops_per_token(self, seq_len: int) -> float:
        around = sum(flops_per_token(module, seq_len) for module in (*self.gates, *self.norms))
        return around + self.experts_per_token * flops_per_token(self.one_expert, seq_len)
