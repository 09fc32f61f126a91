"""Which experts a token visits, and with what weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from sparsekit.components.contracts import Build, ForwardContext, Router, Routing, attach_loss
from sparsekit.spec.facts import Facts


class TopK(Router):
    """The k experts of highest score, s = softmax(W x) or sigmoid(W x), weighted by s (renormalised on request).

    Auxiliary losses, in training: load balance, (E/k) sum_e share_e mean(s_e), with share_e the tokens that chose e
    over all tokens (1 where uniform; sigmoid scores are first divided by their sum); and z, mean logsumexp(W x)^2.

    Source: Shazeer et al. 2017, arXiv 1701.06538; losses: arXiv 2101.03961, eq. 4, and 2202.08906, eq. 5
    """

    class Params(Router.Params):
        k: PositiveInt
        score: Literal["softmax", "sigmoid"] = "softmax"
        renormalize: bool = False
        load_balance: NonNegativeFloat = 0.01
        z_loss: NonNegativeFloat = 0.001

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.k > facts["n_experts"]:
            raise ValueError(f"k ({params.k}) is above n_experts ({facts['n_experts']})")

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = params.k
        self.gate = build.linear("router", build.d_model, self.n_experts)
        self.counter("load_balance_loss")
        self.counter("z_loss")
        self.counter("confidence")

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        logits_NE = self.gate(x_ND, context)
        logits_NE = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
        scores_NE = logits_NE.softmax(-1) if self.params.score == "softmax" else logits_NE.sigmoid()
        weight_NK, expert_NK = scores_NE.topk(self.params.k, dim=-1)
        self.record("confidence", weight_NK[:, 0].sum() / max(x_ND.shape[0], 1))
        if self.params.renormalize:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        if self.training:
            weight_NK = self._with_losses(weight_NK, expert_NK, scores_NE, logits_NE, context)
        return Routing.per_token(expert_NK, weight_NK)

    def _with_losses(
        self, weight_NK: Tensor, expert_NK: Tensor, scores_NE: Tensor, logits_NE: Tensor, context: ForwardContext
    ) -> Tensor:
        n_tokens = max(scores_NE.shape[0], 1)
        chosen_NE = torch.zeros_like(scores_NE).scatter(1, expert_NK, 1.0)
        shares_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        balance = self.n_experts / self.params.k * (chosen_NE.sum(0) * shares_NE.sum(0)).sum() / n_tokens**2
        z = logits_NE.logsumexp(-1).square().sum() / n_tokens
        self.record("load_balance_loss", balance)
        self.record("z_loss", z)
        return attach_loss(weight_NK, self.params.load_balance * balance + self.params.z_loss * z, context)
