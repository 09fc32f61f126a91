"""GRIN's router: experts are sampled, and the gradient of the choice is estimated by a midpoint."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from sparsekit.components.contracts import Build, ForwardContext, Routing
from sparsekit.components.routers import LearnedRouter, check_k, one_hot
from sparsekit.spec.facts import Facts

FAR = 1 / 3  # Heun's third order: f(x) - f(0) = x (f'(x) / 4 + 3 f'(x / 3) / 4) up to x^4


class SparseMixer(LearnedRouter):
    """SparseMixer-v2: k experts D one after the other, each sampled from pi = softmax of the scores that are close.

    Close to the largest score m is s with m - s <= 2 jitter_eps max(|s|, m); the experts chosen before are out. In
    training D ~ pi, and its weight is c pi_D, where c = 1 if D is the likeliest, else 1 with chance 1/4 and 1/3 with
    chance 3/4 (1 without ``heun``); the gradient is that of pi_D whatever c. In eval D is the likeliest and c = 1.
    The first term of a Taylor series is thereby what the scores learn from, so that an expert not chosen counts as 0.

    Load balance and z losses are LearnedRouter's, on the softmax of all scores. Shapes: x [N, D] -> N k assignments.

    Source: Liu et al. 2024, arXiv 2409.12136 (SparseMixer-v2); Liu et al. 2023, arXiv 2310.00811 (its midpoint)
    """

    class Params(LearnedRouter.Params):
        k: PositiveInt = 2
        jitter_eps: float = Field(default=0.1, ge=0)
        heun: bool = True

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        check_k(params.k, facts)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.experts_per_token = params.k

    def forward(self, x_ND: Tensor, context: ForwardContext) -> Routing:
        logits_NE = self.logits(x_ND, context)
        open_NE, experts, weights = logits_NE, [], []
        for _ in range(self.params.k):
            expert_N1, weight_N1 = self._choose(open_NE, logits_NE)
            open_NE = open_NE.scatter(1, expert_N1, float("-inf"))
            experts.append(expert_N1)
            weights.append(weight_N1)
        expert_NK, weight_NK = torch.cat(experts, dim=1), torch.cat(weights, dim=1)
        scores_NE = logits_NE.softmax(-1)
        chosen_NE = one_hot(expert_NK, scores_NE)
        return Routing.per_token(expert_NK, self.with_losses(weight_NK, chosen_NE, scores_NE, logits_NE, context))

    def _choose(self, open_NE: Tensor, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """One more expert of each token among the open ones, and its weight; [N, 1] each."""
        best_N1, likeliest_N1 = open_NE.detach().max(-1, keepdim=True)
        reach_NE = 2 * self.params.jitter_eps * torch.maximum(logits_NE.detach().abs(), best_N1)
        pi_NE = open_NE.masked_fill(best_N1 - open_NE.detach() > reach_NE, float("-inf")).softmax(-1)
        if not self.training:
            return likeliest_N1, pi_NE.gather(1, likeliest_N1)
        # pi over exponential noise is largest for e with chance pi_e
        expert_N1 = (pi_NE.detach() / torch.empty_like(pi_NE).exponential_()).argmax(-1, keepdim=True)
        pi_N1 = pi_NE.gather(1, expert_N1)
        if not self.params.heun:
            return expert_N1, pi_N1
        whole_N1 = (expert_N1 == likeliest_N1) | (torch.rand_like(pi_N1) < 0.25)
        return expert_N1, pi_N1 - (1 - FAR) * (pi_N1 * ~whole_N1).detach()
