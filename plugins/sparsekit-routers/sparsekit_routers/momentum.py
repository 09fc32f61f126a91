"""A residual scheme in which the feed-forward's steps gather momentum over depth."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveFloat
from torch import Tensor

from sparsekit.components.contracts import Attention, Build, FeedForward, ForwardContext, State, run
from sparsekit.components.residuals import PreNorm

KEY = "ffn_momentum"


class MomentumResidual(PreNorm):
    """h = x + s A(n(x)); m = mu m' + gamma F(n(h)); y = h + s m, m' being m of the layer before (0 below the first).

    Layers of experts taken for steps of gradient descent, with heavy-ball momentum; mu 0 and gamma 1 is pre_norm. m is
    state that flows over depth beside the stream, in every forward from 0. Shapes: [batch, seq, d_model] -> same.

    Source: Teo & Nguyen 2024, arXiv 2410.14574 (MomentumSMoE, whose code has the sign of m the other way)
    """

    class Params(PreNorm.Params):
        mu: float = Field(default=0.7, ge=0, lt=1)
        gamma: PositiveFloat = 1.0

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.mu, self.gamma = params.mu, params.gamma

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        x_BTD, state = self.combine(x_BTD, state, context, attention, self.attention_norm)
        branch_BTD, state = run(ffn, self.ffn_norm(x_BTD), state, context)
        momentum_BTD = self.gamma * branch_BTD
        if KEY in state:
            momentum_BTD = momentum_BTD + self.mu * state[KEY]
        return x_BTD + self.scale * momentum_BTD, {**state, KEY: momentum_BTD}
