"""A feed-forward layer for sparsekit; in a spec ``"ffn": {"type": "new_part", "d_ff": 128}``.

Shapes: B batch, T tokens, D d_model, F d_ff.
"""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt
from sparsekit.components.contracts import Build, FeedForward, ForwardContext
from torch import Tensor


class NewPart(FeedForward):
    """FFN(x) = W_down (W_gate x * W_up x): the product of two projections, with no other non-linearity.

    Shapes: [..., d_model] -> [..., d_model].

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6 (bilinear)
    """

    class Params(FeedForward.Params):
        d_ff: PositiveInt

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        # every projection comes from build.linear, so that it can be masked, stacked into experts or sharded
        self.gate = build.linear("gate", build.d_model, params.d_ff)
        self.up = build.linear("up", build.d_model, params.d_ff)
        self.down = build.linear("down", params.d_ff, build.d_model)

    def split(self, n: int) -> dict[str, int]:
        """Among n processes each holds some rows of gate and up, and the columns of down that read them."""
        if self.params.d_ff % n:
            raise ValueError(f"d_ff ({self.params.d_ff}) cannot be divided by {n}")
        return {"gate": 0, "up": 0, "down": 1}

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        hidden_BTF = self.gate(x_BTD, context) * self.up(x_BTD, context)
        return self.down(hidden_BTF, context)
