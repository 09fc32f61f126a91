"""Where norms sit and how branches add: the knobs of the curse of depth.

Below, n is the block's norm (one for each place), A the attention, F the feed-forward, s the scale of every branch,
l the layer from 1, and L the number of layers.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from sparsekit.components.contracts import (
    Attention,
    Build,
    Component,
    FeedForward,
    ForwardContext,
    Norm,
    Residual,
    State,
    run,
)


class SequentialResidual(Residual):
    """Attention and then feed-forward, each combined with the stream alike; an entry says how, in :meth:`combine`."""

    class Params(Residual.Params):
        scale: PositiveFloat = 1.0

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.scale: float = params.scale
        self.attention_norm = self.make_norm(build)
        self.ffn_norm = self.make_norm(build)

    def make_norm(self, build: Build) -> Any:
        """What one sub-layer is given to be combined with."""
        return build.child(build.facts["norm"])

    def combine(
        self, x: Tensor, state: State, context: ForwardContext, sublayer: Component, norm: Any
    ) -> tuple[Tensor, State]:
        """The stream after one sub-layer."""
        raise NotImplementedError

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        x_BTD, state = self.combine(x_BTD, state, context, attention, self.attention_norm)
        return self.combine(x_BTD, state, context, ffn, self.ffn_norm)


class PreNorm(SequentialResidual):
    """h = x + s A(n(x)); y = h + s F(n(h)).

    Source: Xiong et al. 2020, arXiv 2002.04745, table 1; scale: Hu et al. 2024, arXiv 2404.06395
    """

    def combine(
        self, x: Tensor, state: State, context: ForwardContext, sublayer: Component, norm: Any
    ) -> tuple[Tensor, State]:
        branch, state = run(sublayer, norm(x), state, context)
        return x + self.scale * branch, state


class PostNorm(SequentialResidual):
    """h = n(x + s A(x)); y = n(h + s F(h)).

    Source: Vaswani et al. 2017, arXiv 1706.03762, sec. 3.1
    """

    def combine(
        self, x: Tensor, state: State, context: ForwardContext, sublayer: Component, norm: Any
    ) -> tuple[Tensor, State]:
        branch, state = run(sublayer, x, state, context)
        return norm(x + self.scale * branch), state


class OutputNorm(SequentialResidual):
    """h = x + s n(A(x)); y = h + s n(F(h)): the norm on a branch's output, inside the residual.

    Source: OLMo 2 2025, arXiv 2501.00656, eq. 1 and 2
    """

    def combine(
        self, x: Tensor, state: State, context: ForwardContext, sublayer: Component, norm: Any
    ) -> tuple[Tensor, State]:
        branch, state = run(sublayer, x, state, context)
        return x + self.scale * norm(branch), state


class PeriNorm(SequentialResidual):
    """h = x + s n'(A(n(x))); y = h + s n'(F(n(h))): a norm before and another after each branch.

    Source: Kim et al. 2025, arXiv 2502.02732, eq. 4
    """

    def make_norm(self, build: Build) -> Any:
        return nn.ModuleList(build.child(build.facts["norm"]) for _ in ("before", "after"))

    def combine(
        self, x: Tensor, state: State, context: ForwardContext, sublayer: Component, norm: Any
    ) -> tuple[Tensor, State]:
        before, after = norm
        branch, state = run(sublayer, before(x), state, context)
        return x + self.scale * after(branch), state


class LayerNormScaling(SequentialResidual):
    """h = x + s A(n(x) / sqrt(l)); y = h + s F(n(h) / sqrt(l)), which keeps the variance from growing over depth.

    Source: Sun et al. 2025, arXiv 2502.05795, eq. 9
    """

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.shrink = (build.layer_index + 1) ** -0.5

    def combine(
        self, x: Tensor, state: State, context: ForwardContext, sublayer: Component, norm: Any
    ) -> tuple[Tensor, State]:
        branch, state = run(sublayer, norm(x) * self.shrink, state, context)
        return x + self.scale * branch, state


class DeepNorm(SequentialResidual):
    """h = n(a x + s A(x)); y = n(a h + s F(h)), with a = (2L)^(1/4); pair it with the init deep_norm.

    Source: Wang et al. 2022, arXiv 2203.00555, fig. 2 (decoder-only)
    """

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.alpha = (2 * build.n_layers) ** 0.25

    def combine(
        self, x: Tensor, state: State, context: ForwardContext, sublayer: Component, norm: Any
    ) -> tuple[Tensor, State]:
        branch, state = run(sublayer, x, state, context)
        return norm(self.alpha * x + self.scale * branch), state


class MixLN(Residual):
    """post_norm in the first ``share`` of the layers, pre_norm in the rest.

    The first are floor(share L).

    Source: Li, Yin & Liu 2024, arXiv 2412.13795, eq. 5
    """

    class Params(SequentialResidual.Params):
        share: float = Field(default=0.25, ge=0, le=1)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        n_post = math.floor(params.share * build.n_layers + 1e-9)  # where 0.29 * 100 is just short of 29
        scheme = PostNorm if build.layer_index < n_post else PreNorm
        self.scheme = scheme(SequentialResidual.Params(scale=params.scale), build)

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        return self.scheme(x_BTD, state, context, attention, ffn)


class Parallel(Residual):
    """y = x + s (A(n(x)) + F(n(x))), both sub-layers reading the same normalised stream.

    Source: Wang & Komatsuzaki 2021 (GPT-J); Chowdhery et al. 2022, arXiv 2204.02311, sec. 2
    """

    class Params(Residual.Params):
        scale: PositiveFloat = 1.0

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.scale: float = params.scale
        self.make_norms(build)

    def make_norms(self, build: Build) -> None:
        self.norm: Norm = build.child(build.facts["norm"])

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        read = self.norm(x_BTD)
        attended, state = run(attention, read, state, context)
        transformed, state = run(ffn, read, state, context)
        return x_BTD + self.scale * (attended + transformed), state


class ParallelTwoNorms(Parallel):
    """y = x + s (A(n(x)) + F(n'(x))), each sub-layer with a norm of its own.

    Source: Black et al. 2022, arXiv 2204.06745, sec. 2.1 (GPT-NeoX)
    """

    def make_norms(self, build: Build) -> None:
        self.attention_norm: Norm = build.child(build.facts["norm"])
        self.ffn_norm: Norm = build.child(build.facts["norm"])

    def forward(
        self, x_BTD: Tensor, state: State, context: ForwardContext, attention: Attention, ffn: FeedForward
    ) -> tuple[Tensor, State]:
        attended, state = run(attention, self.attention_norm(x_BTD), state, context)
        transformed, state = run(ffn, self.ffn_norm(x_BTD), state, context)
        return x_BTD + self.scale * (attended + transformed), state
