"""A pre-norm or parallel layer's matrices and heads, as the closed forms of its Jacobian read them.

Norms stand in the projections that read them: weight, bias and centring. What is left of a norm is x^ = x / r. A norm
of queries or keys stays apart, as it comes between a projection and its turning. Shapes: probes/base.py; V head_dim of
values, R rows of W_in (gate and up under each other: 2F, or F where there is no gate), Z pairs of channels that turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.probes.anatomy import Anatomy, NormParts, RopeParts, Weight


def why_not(anatomy: Anatomy) -> str | None:
    """Why a layer has no structured form; None where it should have one, which is then still to be verified."""
    parts = ("norm_1", "norm_2", "q", "k", "v", "o", "up", "down", "activation", "n_heads", "scale")
    if anatomy.residual not in ("pre_norm", "parallel"):
        return f"its residual scheme is {anatomy.residual or 'not known'}, neither pre_norm nor parallel"
    norms = [norm for norm in (anatomy.q_norm, anatomy.k_norm) if norm is not None]
    handled = {"qk_norm"} if norms and all(norm.kind == "rmsnorm" and norm.bias is None for norm in norms) else set()
    if extras := [extra for extra in anatomy.attention_extras if extra not in handled]:
        return f"its attention has {' and '.join(extras)}"
    if anatomy.experts is not None:
        return "its feed-forward is a mixture of experts"
    for name in parts:
        if getattr(anatomy, name) is None:
            return f"it has no {name}" + (f": {anatomy.missing[name]}" if name in anatomy.missing else "")
    return anatomy.missing.get("rope")


@dataclass(frozen=True)
class Projection:
    """A matrix that reads a normalised stream: (x^ W^T + bias), the norm's weight, bias and centring folded in."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def fold(cls, weight: Weight, norm: NormParts, dtype: torch.dtype) -> Projection:
        matrix = weight.weight.to(dtype)
        bias = None if weight.bias is None else weight.bias.to(dtype)
        if norm.bias is not None:
            shift = matrix @ norm.bias.to(dtype)
            bias = shift if bias is None else bias + shift
        matrix = matrix if norm.weight is None else matrix * norm.weight.to(dtype)
        if norm.kind == "layernorm":
            matrix = matrix - matrix.mean(1, keepdim=True)
        return cls(matrix, bias)

    @classmethod
    def stack(cls, above: Projection, below: Projection) -> Projection:
        if above.bias is None and below.bias is None:
            return cls(torch.cat((above.weight, below.weight)), None)
        biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in (above, below)]
        return cls(torch.cat((above.weight, below.weight)), torch.cat(biases))


def unit(x: Tensor, norm: NormParts) -> tuple[Tensor, Tensor]:
    """(x / r, r): what a norm makes of a stream before its weight, and the root mean square r [..., 1]."""
    z = x - x.mean(-1, keepdim=True) if norm.kind == "layernorm" else x
    r = (z.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return z / r, r


class StructuredLayer:
    """A layer's matrices as the closed form reads them, in float32 or float64.

    Args:
        anatomy: one that passes :func:`why_not`.
        rope: how the batch's positions turn.
    """

    def __init__(self, anatomy: Anatomy, rope: RopeParts | None, dtype: torch.dtype):
        self.parallel = anatomy.residual == "parallel"
        self.heads, self.scale = cast(int, anatomy.n_heads), cast(float, anatomy.scale)
        self.norm_1, self.norm_2 = cast(NormParts, anatomy.norm_1), cast(NormParts, anatomy.norm_2)
        self.q, self.k, self.v = (
            Projection.fold(cast(Weight, w), self.norm_1, dtype) for w in (anatomy.q, anatomy.k, anatomy.v)
        )
        self.key_dim = self.q.weight.shape[0] // self.heads
        self.kv_heads = self.k.weight.shape[0] // self.key_dim
        self.value_dim = self.v.weight.shape[0] // self.kv_heads
        self.group = self.heads // self.kv_heads
        o, down = cast(Weight, anatomy.o), cast(Weight, anatomy.down)
        self.o = o.weight.to(dtype) * anatomy.branch_scale
        self.o_bias = None if o.bias is None else o.bias.to(dtype) * anatomy.branch_scale
        self.down = down.weight.to(dtype) * anatomy.branch_scale
        self.d_ff = self.down.shape[1]
        up = Projection.fold(cast(Weight, anatomy.up), self.norm_2, dtype)
        gated = anatomy.gate is not None
        self.ffn = Projection.stack(Projection.fold(anatomy.gate, self.norm_2, dtype), up) if anatomy.gate else up
        self.gated, self.activation = gated, cast(Callable[[Tensor], Tensor], anatomy.activation)
        self.q_norm, self.k_norm = anatomy.q_norm, anatomy.k_norm
        self.turns = None if rope is None else (rope.cos.to(dtype), rope.sin.to(dtype))

    def slopes(self, y_hat: Tensor) -> tuple[Tensor, Tensor]:
        """(d act(gate) up / d (W_in y^) [..., R], W_in y^ without its bias [..., R])."""
        pre = y_hat @ self.ffn.weight.T
        read = pre if self.ffn.bias is None else pre + self.ffn.bias
        inner = read[..., : self.d_ff].detach().requires_grad_()
        with torch.enable_grad():
            act = self.activation(inner)
            (slope,) = torch.autograd.grad(act.sum(), inner)
        return (torch.cat((slope * read[..., self.d_ff :], act.detach()), -1) if self.gated else slope), pre

    def turning(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine by position, [T, Z]; Z = 0 without rope."""
        if self.turns is None:
            return like.new_ones(length, 0), like.new_zeros(length, 0)
        return self.turns[0][:length], self.turns[1][:length]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope: pair (i, i + Z) of the first 2Z channels turns."""
    half = cos.shape[-1]
    a, b, still = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, still), dim=-1)


class HeadNorm(NamedTuple):
    """What a norm of each head's own channels did: x^ [B, H, T, K], its root mean square, and the weight, [K] or 1."""

    hat: Tensor
    r: Tensor
    weight: Tensor

    @classmethod
    def of(cls, x: Tensor, norm: NormParts) -> HeadNorm:
        hat, r = unit(x, norm)
        return cls(hat, r, x.new_ones(x.shape[-1]) if norm.weight is None else norm.weight.to(x.dtype))

    def at(self, *where: Any) -> HeadNorm:
        return HeadNorm(self.hat[where], self.r[where], self.weight)

    def moved(self, dx: Tensor) -> Tensor:
        """How the norm's output moves with its input."""
        return self.weight * (dx - self.hat * (self.hat * dx).mean(-1, keepdim=True)) / self.r

    def moved_back_(self, y: Tensor) -> Tensor:
        """The transpose of that, in place."""
        y *= self.weight / self.r
        return y.addcmul_(self.hat.expand_as(y), (self.hat * y).mean(-1, keepdim=True), value=-1)


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of a batch.

    Attributes:
        q_BHTK, k_BGTK: as they enter the score.
        q_free, k_free: how those move as the first norm stretches a token: themselves, but for biases and norms.
        v_BGTV: without the bias, which v_s - o_t does not contain either.
    """

    q_BHTK: Tensor
    k_BGTK: Tensor
    v_BGTV: Tensor
    q_free: Tensor
    k_free: Tensor
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None

    @classmethod
    def of(cls, layer: StructuredLayer, x_hat: Tensor, cos: Tensor, sin: Tensor) -> Heads:
        def project(projection: Projection, heads: int) -> Tensor:
            return (x_hat @ projection.weight.T).unflatten(-1, (heads, -1)).transpose(1, 2)

        def scored(projection: Projection, heads: int, norm: NormParts | None) -> tuple[Tensor, Tensor, Any]:
            free = project(projection, heads)
            whole = free if projection.bias is None else free + projection.bias.view(heads, 1, -1)
            if norm is not None:
                normed = HeadNorm.of(whole, norm)
                return turn(normed.hat * normed.weight, cos, sin), turn(normed.moved(free), cos, sin), normed
            turned = turn(whole, cos, sin)
            return turned, turned if free is whole else turn(free, cos, sin), None

        q, q_free, q_norm = scored(layer.q, layer.heads, layer.q_norm)
        k, k_free, k_norm = scored(layer.k, layer.kv_heads, layer.k_norm)
        return cls(q, k, project(layer.v, layer.kv_heads), q_free, k_free, q_norm, k_norm)

    def attend(self, layer: StructuredLayer) -> Tensor:
        """Contexts of all heads side by side, the values' bias included, [B, T, H V]."""
        k, v = self.k_BGTK, self.v_BGTV
        if layer.group > 1:  # shared heads are repeated: in float32 no fused kernel of a GPU takes them as they are
            k, v = (x.repeat_interleave(layer.group, 1) for x in (k, v))
        z_BHTV = F.scaled_dot_product_attention(self.q_BHTK, k, v, is_causal=True, scale=layer.scale)
        if layer.v.bias is not None:
            bias_GV = layer.v.bias.view(layer.kv_heads, 1, -1)
            z_BHTV = z_BHTV + bias_GV.repeat_interleave(layer.group, 0)
        return z_BHTV.transpose(1, 2).flatten(2)
