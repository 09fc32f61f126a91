"""A residual scheme for sparsekit, how branches join the stream; in a spec ``"residual": "new_part"``.

Shapes: B batch, T tokens, D d_model.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat
from sparsekit.components.contracts import Attention, Build, FeedForward, ForwardContext, Residual, State, run
from torch import Tensor, nn


class NewPart(Residual):
    """h = x + a * A(n(x)); y = h + b * F(n'(h)), with a and b learned for each channel, ``start`` at first.

    n and n' are the block's norm, A its attention, F its feed-forward.

    Source: LayerScale: Touvron et al. 2021, arXiv 2103.17239, sec. 2
    """

    class Params(Residual.Params):
        start: PositiveFloat = 0.1

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.attention_norm = build.child(build.facts["norm"])
        self.ffn_norm = build.child(build.facts["norm"])
        self.a_D = nn.Parameter(torch.empty(build.d_model))
        self.b_D = nn.Parameter(torch.empty(build.d_model))

    def reset_parameters(self) -> None:
        """Fills what this class owns: a model is first built without memory."""
        nn.init.constant_(self.a_D, self.params.start)
        nn.init.constant_(self.b_D, self.params.start)

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        # run calls a sub-layer, and hands on what flows across depth beside the stream
        branch_BTD, state = run(attention, self.attention_norm(x_BTD), state, context)
        h_BTD = x_BTD + self.a_D * branch_BTD
        branch_BTD, state = run(ffn, self.ffn_norm(h_BTD), state, context)
        return h_BTD + self.b_D * branch_BTD, state
