"""How attention knows where a token stands."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor

from sparsekit.components.contracts import Build, ForwardContext, Position
from sparsekit.spec.facts import Facts


class RoPE(Position):
    """Rotates query and key by their position: pair (i, i + K/2) turns by position * theta^(-2i/K).

    Scores then depend on positions only through their difference. Tables stay in float32 (or float64) whatever the
    model's dtype.

    Source: Su et al. 2021, arXiv 2104.09864, eq. 34
    """

    class Params(Position.Params):
        theta: PositiveFloat = 10000.0

    cos: Tensor
    sin: Tensor

    @classmethod
    def check(cls, params: Params, facts: Facts) -> None:
        if facts["head_dim"] % 2:
            raise ValueError(f"rope turns pairs of channels, but head_dim is {facts['head_dim']}; make it even")

    def __init__(self, params: Params, build: Build):
        super().__init__(params, build)
        shape = build.max_seq_len, build.facts["head_dim"] // 2
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)

    def reset_parameters(self) -> None:
        length, half = self.cos.shape
        pair, position = (torch.arange(n, dtype=torch.float64, device=self.cos.device) for n in (half, length))
        angle = torch.outer(position, self.params.theta ** (-pair / half))
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    def _apply(self, fn: Any, recurse: bool = True) -> RoPE:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        wide = torch.promote_types(self.cos.dtype, torch.float32)
        stale = wide != self.cos.dtype or wide == torch.float64
        if stale and not self.cos.is_meta:  # a cast has rounded the tables, or float64 can hold better ones
            self.cos, self.sin = (torch.empty_like(table, dtype=wide) for table in (self.cos, self.sin))
            self.reset_parameters()
        return self

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        if context.positions_BT is None:
            cos, sin = self.cos[: q_BHTK.shape[-2]], self.sin[: q_BHTK.shape[-2]]
        else:
            cos, sin = self.cos[context.positions_BT][:, None], self.sin[context.positions_BT][:, None]
        return _rotate(q_BHTK, cos, sin), _rotate(k_BGTK, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class NoPosition(Position):
    """Leaves query and key as they are; causality alone tells order.

    Source: Kazemnejad et al. 2023, arXiv 2305.19466
    """

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        return q_BHTK, k_BGTK
