"""SMEAR: one expert a sequence, whose weights are a blend of all experts' weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from sparsekit.components.contracts import Build, ExpertGroups, FeedForward, ForwardContext
from sparsekit.components.moe import demand_grouped, demand_token_wise
from sparsekit.components.routers import widened
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot


class Smear(FeedForward):
    """y_t = FFN_W(x_t) with the weights W = sum_e g_e W_e, g = softmax(W_r mean_t x_t): experts merged, not sent to.

    The mean is over the sequence, so that this sees the future. With ``segment`` it does not: the experts of each
    ``segment`` tokens are merged by the mean of the segment before, those of the first segment evenly. Any feed-forward
    whose projections come from build.linear is an expert. Documents that share a sequence share its experts.

    Shapes: [batch, seq, d_model] -> same; as many merged experts as sequences, or as segments.

    Source: Muqeeth, Liu & Raffel 2023, arXiv 2306.03745; segments: Zhong et al. 2024, arXiv 2405.03133 (causal)
    """

    causal = False
    token_wise = False
    grouped = False

    class Params(FeedForward.Params):
        n_experts: PositiveInt
        expert: Annotated[Choice, Slot("ffn")]
        segment: PositiveInt | None = None

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        facts.child(params.expert)
        demand_token_wise(params.expert)
        if not params.expert.cls.grouped:
            raise ValueError(
                f"expert {params.expert.type!r} has weights that cannot be blended (it says grouped = False)"
            )

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.causal = params.segment is not None
        self.gate = build.linear("router", build.d_model, params.n_experts)
        self.experts = build.experts(params.n_experts).child(params.expert)
        demand_grouped(self.experts, params.expert.type)
        self.counter("confidence")

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        n_batch, length, width = x_BTD.shape
        segment = self.params.segment or length
        x_GRD = F.pad(x_BTD, (0, 0, 0, -length % segment)).reshape(-1, segment, width)
        mean_GD = x_GRD.mean(1)
        if self.params.segment is not None:  # what the first looks back on is 0, and the softmax even
            mean_GD = F.pad(mean_GD.unflatten(0, (n_batch, -1))[:, :-1], (0, 0, 1, 0)).flatten(0, 1)
        blend_GE = widened(self.gate(mean_GD, context)).softmax(-1)
        self.record("confidence", blend_GE.amax(-1).mean())
        groups = ExpertGroups(blend_GE=blend_GE)
        inside = replace(context, groups=groups, ids_BT=None, documents_BT=None, positions_BT=None)
        y_GRD: Tensor = self.experts(x_GRD, inside)
        return y_GRD.reshape(n_batch, -1, width)[:, :length]

    def flops_per_token(self, seq_len: int) -> float:
        """Of one expert and its share of the merging, which goes over all experts' weights once a group of tokens."""
        shared_by = self.params.segment or seq_len
        weights = sum(p.numel() for p in self.experts.parameters())
        gate = self.gate.flops_per_token(seq_len)
        one_expert: float = self.experts.flops_per_token(seq_len)
        return one_expert + (gate + 2.0 * weights) / shared_by
