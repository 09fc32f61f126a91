"""A router for sparsekit's mixtures of experts; in a spec ``"router": {"type": "new_part", "k": 2}``.

Shapes: N tokens, D d_model, E experts, K experts of a token.
"""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat, PositiveInt
from sparsekit.components.contracts import Build, ForwardContext, Router, Routing, attach_loss
from sparsekit.spec.facts import Facts
from torch import Tensor


class NewPart(Router):
    """The k experts of highest s = softmax(W x), weighted by s, and a load-balance loss of its own.

    With I_e = sum over tokens of s_e the loss is Var(I) / mean(I)^2: 0 where all experts are wanted alike. ``balance``
    times it is added to what training minimises; metrics.jsonl has it as ``balance_loss``, without the factor.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 6-7
    """

    class Params(Router.Params):
        k: PositiveInt
        balance: NonNegativeFloat = 0.01

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        """What ``sparsekit validate`` refuses."""
        if params.k > facts["n_experts"]:
            raise ValueError(f"k ({params.k}) is above n_experts ({facts['n_experts']})")

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = params.k
        self.gate = build.linear("router", build.d_model, self.n_experts)
        self.counter("balance_loss")

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        scores_NE = self.gate(x_ND, context).float().softmax(-1)
        weight_NK, expert_NK = scores_NE.topk(self.params.k, dim=-1)
        if self.training:
            importance_E = scores_NE.sum(0)
            loss = importance_E.var(correction=0) / importance_E.mean().square().clamp(min=1e-9)
            self.record("balance_loss", loss)
            weight_NK = attach_loss(weight_NK, self.params.balance * loss, context)
        return Routing.per_token(expert_NK, weight_NK)
