"""Where norms sit and how branches add."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveFloat
from torch import Tensor

from sparsekit.components.contracts import (
    Attention,
    Build,
    FeedForward,
    ForwardContext,
    Residual,
    State,
    run,
)


class TwoNorms(Residual):
    """A scheme with one norm for each sub-layer, built from the block's norm slot; ``scale`` multiplies branches."""

    class Params(Residual.Params):
        scale: PositiveFloat = 1.0

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.attention_norm = build.child(build.facts["norm"])
        self.ffn_norm = build.child(build.facts["norm"])
        self.scale: float = params.scale


class PreNorm(TwoNorms):
    """h = x + scale attention(norm(x)); y = h + scale ffn(norm(h)).

    Source: Xiong et al. 2020, arXiv 2002.04745, table 1; scale: Hu et al. 2024, arXiv 2404.06395
    """

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        branch, state = run(attention, self.attention_norm(x_BTD), state, context)
        x_BTD = x_BTD + self.scale * branch
        branch, state = run(ffn, self.ffn_norm(x_BTD), state, context)
        return x_BTD + self.scale * branch, state


class PostNorm(TwoNorms):
    """h = norm(x + scale attention(x)); y = norm(h + scale ffn(h)).

    Source: Vaswani et al. 2017, arXiv 1706.03762, sec. 3.1
    """

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        branch, state = run(attention, x_BTD, state, context)
        x_BTD = self.attention_norm(x_BTD + self.scale * branch)
        branch, state = run(ffn, x_BTD, state, context)
        return self.ffn_norm(x_BTD + self.scale * branch), state
