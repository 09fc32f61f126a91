"""A layer's parts, found by structure: what measures that go inside a layer read off it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """A projection y = x weight^T + bias.

    Attributes:
        weight: [d_out, d_in], as it multiplies; of experts [E, d_out, d_in]. A view where the model keeps it so, else
            a copy (heads that are interleaved in one matrix).
        bias: [d_out] or [E, d_out], or None.
        module: the module it belongs to, or None where it is a part of one.
    """

    weight: Tensor
    bias: Tensor | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class NormParts:
    """A norm over channels: rmsnorm x / sqrt(mean(x^2) + eps) w, layernorm (x - mean) / sqrt(var + eps) w + bias.

    Attributes:
        weight: [D] as it multiplies (1 added where the parameter is centred at 0), or None for 1.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The definition, in x's dtype."""
        z = x - x.mean(-1, keepdim=True) if self.kind == "layernorm" else x
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)
        z = z if self.weight is None else z * self.weight
        return z if self.bias is None else z + self.bias


@dataclass(frozen=True)
class RopeParts:
    """How queries and keys turn: channel pair (i, i + R/2) of the first R by (cos, sin) of its position.

    (a, b) becomes (a cos - b sin, b cos + a sin); the other channels stay.

    Attributes:
        cos, sin: [T, R/2], by position.
    """

    cos: Tensor
    sin: Tensor

    @property
    def channels(self) -> int:
        """R."""
        return 2 * self.cos.shape[-1]


@dataclass(frozen=True)
class ExpertParts:
    """A mixture's experts, their matrices stacked.

    Attributes:
        top_k: experts a token visits (in expectation where that varies).
        gate, up, down: [E, d_out, d_in]; gate is None where experts are not gated.
        shared: the parts of an expert that every token visits, by the names of Anatomy's fields, or empty.
    """

    n_experts: int
    top_k: float
    gate: Weight | None
    up: Weight
    down: Weight
    shared: dict[str, Weight] = field(default_factory=dict)


class ExpertRows(NamedTuple):
    """Activations of the experts that tokens visit: FFN(x_t) is the sum over rows of token t of weight W_down act.

    Attributes:
        act_MF: the input of the expert's down projection.
        token_M: int64, which of the N·T tokens (sequence by sequence) a row belongs to.
        expert_M: int64, its expert; 0 for a shared one.
        weight_M: by which the expert's output is multiplied.
    """

    act_MF: Tensor
    token_M: Tensor
    expert_M: Tensor
    weight_M: Tensor


class Score(NamedTuple):
    """What an attention makes of q and k: normalise(cap(scale q k^T) + slopes·distance + mask).

    Attributes:
        scale: by which q k^T is multiplied.
        mask: [N or 1, H or 1, T, S], bool (True: seen) or what is added; None where a query sees all of its past.
        softcap: a score s becomes softcap tanh(s / softcap) first.
        slopes_H: times key position less query position is added to a score (ALiBi).
        sink_H: a further logit a head that takes part in the softmax and has no value.
        normalizer: in place of the softmax, called with scores.
    """

    scale: float
    mask: Tensor | None = None
    softcap: float | None = None
    slopes_H: Tensor | None = None
    sink_H: Tensor | None = None
    normalizer: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Anatomy:
    """A layer's parts, None where it has none or they were not found; then ``missing`` may say why, by field.

    Attributes:
        attention, ffn: the two sub-layers; the layer itself where one has no module of its own.
        residual: "pre_norm" (h + s A(norm_1(h)), then likewise the feed-forward with norm_2), "parallel"
            (h + s (A(norm_1(h)) + F(norm_2(h)))), or the name of another scheme.
        branch_scale: s.
        norm_1, norm_2: before attention and before the feed-forward.
        q, k, v, o, gate, up, down: projections; gate is None in a feed-forward that is not gated. In a mixture gate,
            up and down are None: see ``experts``.
        scale: by which q k^T is multiplied.
        q_norm, k_norm: of each head's query and key over its own K channels, before rope.
        activation: elementwise; the down projection reads activation(gate x) * (up x), or activation(up x).
        attention_extras: what the score does beyond a causal softmax of scale q k^T after rope, by name ("window",
            "softcap", "alibi", "qk_norm", "sinks", "output_gate", …).
    """

    attention: nn.Module | None = None
    ffn: nn.Module | None = None
    residual: str | None = None
    branch_scale: float = 1.0
    norm_1: NormParts | None = None
    norm_2: NormParts | None = None
    q: Weight | None = None
    k: Weight | None = None
    v: Weight | None = None
    o: Weight | None = None
    gate: Weight | None = None
    up: Weight | None = None
    down: Weight | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    scale: float | None = None
    q_norm: NormParts | None = None
    k_norm: NormParts | None = None
    rope: RopeParts | None = None
    attention_extras: tuple[str, ...] = ()
    activation: Callable[[Tensor], Tensor] | None = None
    experts: ExpertParts | None = None
    missing: dict[str, str] = field(default_factory=dict)
