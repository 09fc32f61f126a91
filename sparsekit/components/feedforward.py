"""Dense feed-forward layers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import PositiveInt
from torch import Tensor

from sparsekit.components.activations import GELU, ReLU, SiLU
from sparsekit.components.contracts import Activation, Build, FeedForward, ForwardContext
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

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        return self.down(self.activation(self.gate(x_BTD, context)) * self.up(x_BTD, context), context)


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
