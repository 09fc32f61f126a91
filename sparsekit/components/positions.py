"""How attention knows where a token stands."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from sparsekit.components.contracts import Build, ForwardContext, Position, wide
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot


class TabledPosition(Position):
    """One whose ``tables`` stay in float32 (or float64) whatever the model's dtype."""

    tables: ClassVar[tuple[str, ...]]

    def _apply(self, fn: Any, recurse: bool = True) -> TabledPosition:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        found = {name: getattr(self, name) for name in self.tables}
        dtype = next(iter(found.values())).dtype
        full = wide(dtype)
        stale = full != dtype or full == torch.float64
        if stale and not any(table.is_meta for table in found.values()):
            # a cast has rounded the tables, or float64 can hold better ones
            for name, table in found.items():
                setattr(self, name, torch.empty_like(table, dtype=full))
            self.reset_parameters()
        return self

    def reset_parameters(self) -> None:
        raise NotImplementedError


class RoPE(TabledPosition):
    """Rotates query and key by their position: pair (i, i + R/2) of R channels turns by position * theta^(-2i/R).

    Scores then depend on positions only through their difference. R is ``fraction`` of head_dim; the rest of the
    channels carry no position.

    Source: Su et al. 2021, arXiv 2104.09864, eq. 34; partial: Black et al. 2022, arXiv 2204.06745
    """

    class Params(Position.Params):
        theta: PositiveFloat = 10000.0
        fraction: float = Field(default=1.0, gt=0, le=1)
        scaling: Annotated[Choice, Slot("rope_scaling")] | None = None

    tables = ("cos", "sin")
    cos: Tensor
    sin: Tensor

    @staticmethod
    def rotated(params: Any, head_dim: int) -> int:
        """How many channels of a head turn."""
        return round(params.fraction * head_dim)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        channels = cls.rotated(params, facts["head_dim"])
        if channels % 2 or not channels:
            raise ValueError(
                f"rope turns pairs of channels, but {channels} of head_dim {facts['head_dim']} are to turn; "
                f"make that number even"
            )
        if params.scaling is not None:
            facts.child(params.scaling)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.channels = self.rotated(params, build.facts["head_dim"])
        self.scaling = None if params.scaling is None else build.child(params.scaling)
        shape = build.max_seq_len, self.channels // 2
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)

    def reset_parameters(self) -> None:
        length, half = self.cos.shape
        pair, position = (torch.arange(n, dtype=torch.float64, device=self.cos.device) for n in (half, length))
        frequency, factor = self.params.theta ** (-pair / half), 1.0
        if self.scaling is not None:
            frequency, factor = self.scaling(frequency, self.params.theta)
        angle = torch.outer(position, frequency)
        self.cos.copy_(angle.cos() * factor)
        self.sin.copy_(angle.sin() * factor)

    def split(self, n: int) -> dict[str, int]:
        return {}

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        if context.positions_BT is None:
            cos, sin = self.cos[: q_BHTK.shape[-2]], self.sin[: q_BHTK.shape[-2]]
        else:
            cos, sin = self.cos[context.positions_BT][:, None], self.sin[context.positions_BT][:, None]
        return self._rotate(q_BHTK, cos, sin), self._rotate(k_BGTK, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, still = x[..., : self.channels], x[..., self.channels :]
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
        return turned if not still.shape[-1] else torch.cat((turned, still), dim=-1)


class ALiBi(TabledPosition):
    """Adds slope_h (key position - query position) to the scores of head h, slopes 2^(-8 h / H) for h = 1 .. H.

    Where H is no power of two, the slopes are those of the next lower one and then every other of the next higher.

    Source: Press, Smith & Lewis 2021, arXiv 2108.12409, sec. 3
    """

    tables = ("slopes_H",)
    slopes_H: Tensor

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.register_buffer("slopes_H", torch.empty(build.facts["n_heads"]), persistent=False)

    def reset_parameters(self) -> None:
        self.slopes_H.copy_(torch.tensor(alibi_slopes(self.slopes_H.shape[0]), dtype=torch.float64))

    def split(self, n: int) -> dict[str, int]:
        return {"slopes_H": 0}

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        return q_BHTK, k_BGTK


def alibi_slopes(n_heads: int) -> list[float]:
    """The slope of each head."""
    lower = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * h / lower) for h in range(1, lower + 1)]
    higher = [2 ** (-8 * h / (2 * lower)) for h in range(1, 2 * lower + 1)]
    return slopes + higher[0::2][: n_heads - lower]


class Learned(Position):
    """Adds a learned vector for each position and head to query and key, in every layer.

    For vectors that are added once, to the token embeddings, use the embedding token_and_position.

    Source: Press, Smith & Lewis 2020, arXiv 2012.15832, sec. 4.1 (position-infused attention)
    """

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        facts, length = build.facts, build.max_seq_len
        self.query_SHK = nn.Parameter(torch.empty(length, facts["n_heads"], facts["head_dim"]))
        self.key_SGK = nn.Parameter(torch.empty(length, facts["n_kv_heads"], facts["head_dim"]))
        self.init = build.child(build.init_slot)

    def reset_parameters(self) -> None:
        self.init(self.query_SHK, "embed")
        self.init(self.key_SGK, "embed")

    def split(self, n: int) -> dict[str, int]:
        return {"query_SHK": 1} if self.key_SGK.shape[1] == 1 else {"query_SHK": 1, "key_SGK": 1}

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        if context.positions_BT is None:
            places: Any = slice(q_BHTK.shape[-2])
        else:
            places = context.positions_BT
        # [T, heads, K] or [B, T, heads, K], turned to heads before tokens
        query, key = (table[places].transpose(-3, -2).to(q_BHTK.dtype) for table in (self.query_SHK, self.key_SGK))
        return q_BHTK + query, k_BGTK + key


class NoPosition(Position):
    """Leaves query and key as they are; causality alone tells order.

    Source: Kazemnejad et al. 2023, arXiv 2305.19466
    """

    def split(self, n: int) -> dict[str, int]:
        return {}

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        return q_BHTK, k_BGTK
