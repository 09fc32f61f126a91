"""Dense feed-forward layers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from sparsekit.components.activations import GELU, ReLU, SiLU
from sparsekit.components.contracts import (
    Activation,
    Build,
    FeedForward,
    ForwardContext,
    Linear,
    divided,
    projections,
)
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick


class MLP(FeedForward):
    """FFN(x) = W_down act(W_up x).

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 2
    """

    class Params(FeedForward.Params):
        d_ff: PositiveInt
        activation: Annotated[Choice, Slot("activation")] = pick("gelu")
        bias: bool = False

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.up = build.linear("up", build.d_model, params.d_ff, params.bias)
        self.down = build.linear("down", params.d_ff, build.d_model, params.bias)
        self.activation = build.child(params.activation)

    def split(self, n: int) -> dict[str, int]:
        divided("d_ff", self.params.d_ff, n)
        return {"up": 0, "down": 1}

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        return self.down(self.activation(self.up(x_BTD, context)), context)


class GatedBase(FeedForward):
    """FFN(x) = W_down (act(W_gate x) * W_up x); the entries below say which activation."""

    class Params(FeedForward.Params):
        d_ff: PositiveInt
        bias: bool = False

    fixed_activation: ClassVar[type[Activation]]

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.gate = build.linear("gate", build.d_model, params.d_ff, params.bias)
        self.up = build.linear("up", build.d_model, params.d_ff, params.bias)
        self.down = build.linear("down", params.d_ff, build.d_model, params.bias)
        self.activation = self.make_activation(build)

    def make_activation(self, build: Build) -> Activation:
        return self.fixed_activation(self.fixed_activation.Params(), build)

    def split(self, n: int) -> dict[str, int]:
        divided("d_ff", self.params.d_ff, n)
        return {"gate": 0, "up": 0, "down": 1}

    def silu_gated(self) -> tuple[Linear, Linear, Linear] | None:
        usual = type(self).forward is GatedBase.forward and type(self.activation) is SiLU
        return (self.gate, self.up, self.down) if usual else None

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        gate, up = projections(x_BTD, context, self.gate, self.up)
        return self.down(self.activation(gate) * up, context)


class Gated(GatedBase):
    """FFN(x) = W_down (act(W_gate x) * W_up x), with any activation.

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6
    """

    class Params(GatedBase.Params):
        activation: Annotated[Choice, Slot("activation")] = pick("silu")

    def make_activation(self, build: Build) -> Activation:
        made: Activation = build.child(self.params.activation)
        return made


class SwiGLU(GatedBase):
    """FFN(x) = W_down (silu(W_gate x) * W_up x).

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6
    """

    fixed_activation = SiLU


class GEGLU(GatedBase):
    """FFN(x) = W_down (gelu(W_gate x) * W_up x).

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6
    """

    fixed_activation = GELU


class ReGLU(GatedBase):
    """FFN(x) = W_down (relu(W_gate x) * W_up x).

    Source: Shazeer 2020, arXiv 2002.05202, eq. 6
    """

    fixed_activation = ReLU


class DReLU(GatedBase):
    """FFN(x) = W_down (relu(W_gate x) * relu(W_up x)), relu on both branches.

    Source: Song et al. 2024, arXiv 2406.05955, eq. 1
    """

    fixed_activation = ReLU

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        gate, up = projections(x_BTD, context, self.gate, self.up)
        return self.down(self.activation(gate) * self.activation(up), context)


class TopKFeedForward(FeedForward):
    """FFN(x) = W_down TopK_k(relu(W_up x)): of each token's neurons the k largest stay, the rest are 0.

    Source: Li et al. 2022, arXiv 2210.06313, sec. 4
    """

    class Params(FeedForward.Params):
        d_ff: PositiveInt
        k: PositiveInt

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.k > params.d_ff:
            raise ValueError(f"k ({params.k}) is above d_ff ({params.d_ff})")

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.up = build.linear("up", build.d_model, params.d_ff)
        self.down = build.linear("down", params.d_ff, build.d_model)

    def split(self, n: int) -> dict[str, int]:
        raise ValueError("the k largest are chosen among all neurons, so these cannot be divided")

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        hidden = self.up(x_BTD, context).relu()
        kept, where = hidden.topk(self.params.k, dim=-1)
        return self.down(torch.zeros_like(hidden).scatter(-1, where, kept), context)
