"""Two components of somebody else's: all that it takes to add one is this class and a line in pyproject.toml."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from sparsekit.components.contracts import Build, FeedForward, ForwardContext, Norm


class MaxoutFeedForward(FeedForward):
    """FFN(x) = W_down max(W_gate x, W_up x), the larger of two linear pieces for every neuron.

    Shapes: [..., d_model] -> [..., d_model].

    Source: Goodfellow et al. 2013, arXiv 1302.4389, eq. 1
    """

    class Params(FeedForward.Params):
        d_ff: PositiveInt

    def __init__(self, params: Params, build: Build):
        super().__init__(params, build)
        self.gate = build.linear("gate", build.d_model, params.d_ff)
        self.up = build.linear("up", build.d_model, params.d_ff)
        self.down = build.linear("down", params.d_ff, build.d_model)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        pieces = torch.maximum(self.gate(x_BTD, context), self.up(x_BTD, context))
        return self.down(pieces, context)


class ScaleNorm(Norm):
    """y = g x / max(||x||, eps), with one learned scale g for the whole vector.

    Source: Nguyen & Salazar 2019, arXiv 1910.05895, eq. 5
    """

    class Params(Norm.Params):
        eps: PositiveFloat = 1e-5

    def __init__(self, params: Params, build: Build):
        super().__init__(params, build)
        self.scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / x.norm(dim=-1, keepdim=True).clamp(min=self.params.eps)
