"""Attention as a head layout around a position, a kernel and an optional query-key norm, each a slot of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from sparsekit.components.contracts import (
    Attention,
    Build,
    ForwardContext,
    Linear,
    Position,
    below,
    divided,
    projections,
)
from sparsekit.components.kernels import Extras, Rule
from sparsekit.errors import SparsekitError
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick


class KernelAttention(Attention):
    """What every attention does around its heads: masks, score changes, the kernel, the output projection.

    A query sees itself and ``window`` - 1 keys before it, and its document's first ``sinks`` keys always. ``softcap``
    c turns a score s into c tanh(s / c). ``sink_logits`` adds a learned logit a head to the softmax's sum, for
    attention to nothing. ``output_gate`` multiplies the heads' output by sigmoid(W_gate x). ``normalizer`` stands for
    the softmax. Scores are multiplied by ``score_scale``, by default 1 / sqrt(width of a head's keys).
    """

    caches = True
    gate: Linear | None
    position: Position
    o: Linear

    class Params(Attention.Params):
        n_heads: PositiveInt
        position: Annotated[Choice, Slot("position")] = pick("rope")
        kernel: Annotated[Choice, Slot("kernel")] = pick("sdpa")
        normalizer: Annotated[Choice, Slot("normalizer")] = pick("softmax")
        window: PositiveInt | None = None
        sinks: NonNegativeInt = 0
        softcap: PositiveFloat | None = None
        score_scale: PositiveFloat | None = None
        sink_logits: bool = False
        output_gate: bool = False

    @classmethod
    def width(cls, params: Any, d_model: int) -> int:
        """Of a head's queries and keys."""
        raise NotImplementedError

    @classmethod
    def rule(cls, params: Any, d_model: int) -> Rule:
        """What is asked of the kernel."""
        asked = {
            "window": params.window is not None,
            "sinks": params.sinks > 0,
            "softcap": params.softcap is not None,
            "sink_logits": params.sink_logits,
            "alibi": params.position.type == "alibi",
            "normalizer": params.normalizer.type != "softmax",
        }
        features = frozenset(name for name, wanted in asked.items() if wanted)
        return Rule(params.window, params.sinks, params.softcap, features, cls.width(params, d_model))

    @classmethod
    def check_around(cls, params: Any, facts: Facts, **position_facts: Any) -> None:
        """Checks the slots that all attentions share."""
        if params.sinks and params.window is None:
            raise ValueError(f"sinks ({params.sinks}) are keys that a window would hide; give a window")
        facts.child(params.position, n_heads=params.n_heads, **position_facts)
        facts.child(params.kernel, rule=cls.rule(params, facts.d_model))
        facts.child(params.normalizer)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.layer_index = build.layer_index
        self.n_heads: int = params.n_heads
        self.kernel = build.child(params.kernel)
        if "cache" not in self.kernel.features:
            self.caches = False
        softmax = params.normalizer.type == "softmax"
        self.normalizer: nn.Module | None = None if softmax else build.child(params.normalizer)
        self.asked = self.rule(params, build.d_model)
        self.mask_key = self.asked.key(params.kernel.type)
        self.ragged = params.position.type != "alibi"  # whose kernels tell distances from tensor sizes
        self.sink_H = nn.Parameter(torch.empty(self.n_heads)) if params.sink_logits else None

    def reset_parameters(self) -> None:
        if self.sink_H is not None:
            nn.init.zeros_(self.sink_H)

    def prepare(self, seq_len: int, device: torch.device, context: ForwardContext) -> tuple[str, Any]:
        if context.cache is not None and not self.caches:
            name = self.params.kernel.type
            raise SparsekitError(f"kernel {name!r} cannot use a key-value cache; use auto, eager or sdpa")
        return self.mask_key, self.kernel.prepare(self.asked, seq_len, device, context)

    def attend(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, context: ForwardContext) -> Tensor:
        """Heads' contexts side by side, [batch, seq, heads * value dim]."""
        q_BHTK, k_BGTK = q_BHTK.to(v_BGTV.dtype), k_BGTK.to(v_BGTV.dtype)  # which norms widen under autocast
        if context.cache is not None:
            k_BGTK, v_BGTV = context.cache.extend(self.layer_index, k_BGTK, v_BGTV)
        if self.mask_key in context.prepared:
            mask = context.prepared[self.mask_key]
        else:
            mask = self.prepare(q_BHTK.shape[2], q_BHTK.device, replace(context, dtype=q_BHTK.dtype))[1]
        slopes_H = getattr(self.position, "slopes_H", None)
        scale = self.params.score_scale or q_BHTK.shape[-1] ** -0.5
        extras = Extras(scale, self.params.softcap, slopes_H, self.sink_H, self.normalizer)
        z_BHTV = self.kernel(q_BHTK, k_BGTK, v_BGTV, mask, self.asked, extras)
        return z_BHTV.transpose(1, 2).flatten(2)

    def output(self, z_BTE: Tensor, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """The gate, where there is one, and the projection."""
        if self.gate is not None:
            z_BTE = z_BTE * torch.sigmoid(self.gate(x_BTD, context))
        y_BTD: Tensor = self.o(z_BTE, context)
        return y_BTD

    def split_heads(self, n: int) -> dict[str, int]:
        """How n processes share heads: queries, what is kept of each head, and the projections around them."""
        divided("n_heads", self.n_heads, n)
        parts = {"q": 0, "o": 1, **below("position", self.position.split(n))}
        if self.gate is not None:
            parts["gate"] = 0
        if self.sink_H is not None:
            parts["sink_H"] = 0
        return parts

    def reach(self, seq_len: int) -> int:
        """Keys whose scores count for a query: all, even hidden ones, as the eager kernel has it; fewer in a window."""
        return min(seq_len, (self.params.window or seq_len) + self.params.sinks)


class HeadAttention(KernelAttention):
    """o(attend(q, k, v)) for any number of key-value heads; the entries below only say how many.

    ``bias`` "qkv" gives one to queries, keys and values alone. ``qk_norm`` is over each head's channels, or, where
    ``qk_norm_over`` is "projection", over those of all heads together.
    """

    class Params(KernelAttention.Params):
        head_dim: PositiveInt | None = None
        qk_norm: Annotated[Choice, Slot("norm")] | None = None
        qk_norm_over: Literal["head", "projection"] = "head"
        bias: bool | Literal["qkv"] = False

    @staticmethod
    def kv_heads(params: Any) -> int:
        raise NotImplementedError

    @classmethod
    def width(cls, params: Any, d_model: int) -> int:
        return int(params.head_dim or d_model // params.n_heads)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.head_dim is None and facts.d_model % params.n_heads:
            raise ValueError(
                f"d_model ({facts.d_model}) is not divisible by n_heads ({params.n_heads}); "
                f"change n_heads, or give head_dim"
            )
        head_dim = cls.width(params, facts.d_model)
        cls.check_around(params, facts, head_dim=head_dim, n_kv_heads=cls.kv_heads(params))
        if params.qk_norm is not None:
            for n_heads in {params.n_heads, cls.kv_heads(params)}:
                facts.child(params.qk_norm, width=cls.norm_width(params, head_dim, n_heads))

    @staticmethod
    def norm_width(params: Any, head_dim: int, n_heads: int) -> int:
        """Channels that the norm of queries, or of keys, takes together."""
        return head_dim if params.qk_norm_over == "head" else head_dim * n_heads

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.n_kv_heads = self.kv_heads(params)
        self.head_dim = self.width(params, build.d_model)
        d_query, d_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q = build.linear("q", build.d_model, d_query, bool(params.bias))
        self.k = build.linear("k", build.d_model, d_kv, bool(params.bias))
        self.v = build.linear("v", build.d_model, d_kv, bool(params.bias))
        self.o = build.linear("o", d_query, build.d_model, params.bias is True)
        self.gate = build.linear("gate", build.d_model, d_query) if params.output_gate else None
        heads = {"n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads}
        self.position = build.child(params.position, head_dim=self.head_dim, **heads)
        self.q_norm = self.k_norm = None
        if params.qk_norm is not None:
            widths = (self.norm_width(params, self.head_dim, n) for n in (self.n_heads, self.n_kv_heads))
            self.q_norm, self.k_norm = (build.child(params.qk_norm, width=width) for width in widths)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        q, k, v = projections(x_BTD, context, self.q, self.k, self.v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        q, k = self.position(q, k, context)
        return self.output(self.attend(q, k, v, context), x_BTD, context)

    @staticmethod
    def _normed(x_BTE: Tensor, norm: Any) -> Tensor:
        normed: Tensor = norm(x_BTE.unflatten(-1, (-1, norm.width))).flatten(-2)
        return normed

    def split(self, n: int) -> dict[str, int]:
        if self.q_norm is not None and self.params.qk_norm_over == "projection":
            raise ValueError("qk_norm is over the channels of all heads together, so these cannot be divided")
        parts = self.split_heads(n)
        if self.n_kv_heads == 1:  # all query heads read it, so it is whole on each
            return parts
        divided("n_kv_heads", self.n_kv_heads, n)
        return {**parts, "k": 0, "v": 0}

    def flops_per_token(self, seq_len: int) -> float:
        return super().flops_per_token(seq_len) + 4.0 * self.reach(seq_len) * self.n_heads * self.head_dim

    def cache_bytes_per_token(self, element_size: int) -> int:
        return 2 * self.n_kv_heads * self.head_dim * element_size


class MultiHead(HeadAttention):
    """Multi-head attention: as many key-value heads as query heads.

    Source: Vaswani et al. 2017, arXiv 1706.03762, sec. 3.2.2
    """

    @staticmethod
    def kv_heads(params: Any) -> int:
        return int(params.n_heads)


class GroupedQuery(HeadAttention):
    """Grouped-query attention: each of n_kv_heads key-value heads serves n_heads / n_kv_heads query heads.

    Source: Ainslie et al. 2023, arXiv 2305.13245
    """

    class Params(HeadAttention.Params):
        n_kv_heads: PositiveInt

    @staticmethod
    def kv_heads(params: Any) -> int:
        return int(params.n_kv_heads)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.n_heads % params.n_kv_heads:
            raise ValueError(f"n_heads ({params.n_heads}) is not divisible by n_kv_heads ({params.n_kv_heads})")
        super().check(params, facts)


class MultiQuery(HeadAttention):
    """Multi-query attention: one key-value head for all query heads.

    Source: Shazeer 2019, arXiv 1911.02150
    """

    @staticmethod
    def kv_heads(params: Any) -> int:
        return 1


class MultiHeadLatent(KernelAttention):
    """Multi-head latent attention: keys and values come from one low-rank vector c = n(W_dkv x) a token.

    Head h has query [q_h; rope(q'_h)] and key [k_h; rope(k')], where k_h and v_h are projections of c, q_h and q'_h of
    n(W_dq x) (of x where ``q_rank`` is null), and k' of x is shared by all heads. n is ``latent_norm``.

    Source: DeepSeek-AI 2024, arXiv 2405.04434, eq. 9-19
    """

    class Params(KernelAttention.Params):
        kv_rank: PositiveInt
        q_rank: PositiveInt | None = None
        head_dim: PositiveInt | None = None
        rope_head_dim: PositiveInt = 16
        v_head_dim: PositiveInt | None = None
        latent_norm: Annotated[Choice, Slot("norm")] = pick("rmsnorm")

    @classmethod
    def width(cls, params: Any, d_model: int) -> int:
        return int(params.head_dim or d_model // params.n_heads) + int(params.rope_head_dim)

    @classmethod
    def rule(cls, params: Any, d_model: int) -> Rule:
        rule = super().rule(params, d_model)
        return replace(rule, features=rule.features | {"value_dim"})

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.head_dim is None and facts.d_model % params.n_heads:
            raise ValueError(f"d_model ({facts.d_model}) is not divisible by n_heads ({params.n_heads}); give head_dim")
        cls.check_around(params, facts, head_dim=params.rope_head_dim, n_kv_heads=1)
        for rank in {params.kv_rank, params.q_rank or params.kv_rank}:
            facts.child(params.latent_norm, width=rank)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        heads, d_model = self.n_heads, build.d_model
        self.head_dim = int(params.head_dim or d_model // heads)
        self.v_head_dim = int(params.v_head_dim or self.head_dim)
        self.rope_head_dim: int = params.rope_head_dim
        q_width = self.width(params, d_model)
        self.q_down = build.linear("q", d_model, params.q_rank) if params.q_rank else None
        self.q_norm = build.child(params.latent_norm, width=params.q_rank) if params.q_rank else None
        self.q = build.linear("q", params.q_rank or d_model, heads * q_width)
        self.kv_down = build.linear("k", d_model, params.kv_rank)
        self.kv_norm = build.child(params.latent_norm, width=params.kv_rank)
        self.k_rope = build.linear("k", d_model, self.rope_head_dim)
        self.k = build.linear("k", params.kv_rank, heads * self.head_dim)
        self.v = build.linear("v", params.kv_rank, heads * self.v_head_dim)
        self.o = build.linear("o", heads * self.v_head_dim, d_model)
        self.gate = build.linear("gate", d_model, heads * self.v_head_dim) if params.output_gate else None
        self.position = build.child(params.position, head_dim=self.rope_head_dim, n_heads=heads, n_kv_heads=1)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        low = x_BTD
        if self.q_down is not None and self.q_norm is not None:
            low = self.q_norm(self.q_down(x_BTD, context))
        latent_BTR = self.kv_norm(self.kv_down(x_BTD, context))

        def heads(x: Tensor, width: int) -> Tensor:
            return x.unflatten(-1, (-1, width)).transpose(1, 2)

        q = heads(self.q(low, context), self.head_dim + self.rope_head_dim)
        q, q_rope = q.split([self.head_dim, self.rope_head_dim], dim=-1)
        k = heads(self.k(latent_BTR, context), self.head_dim)
        v = heads(self.v(latent_BTR, context), self.v_head_dim)
        q_rope, k_rope = self.position(q_rope, heads(self.k_rope(x_BTD, context), self.rope_head_dim), context)
        q = torch.cat((q, q_rope), dim=-1)
        k = torch.cat((k, k_rope.expand(-1, k.shape[1], -1, -1)), dim=-1)
        return self.output(self.attend(q, k, v, context), x_BTD, context)

    def split(self, n: int) -> dict[str, int]:
        return {**self.split_heads(n), "k": 0, "v": 0}  # the latents are whole on each

    def flops_per_token(self, seq_len: int) -> float:
        per_key = self.head_dim + self.rope_head_dim + self.v_head_dim
        return super().flops_per_token(seq_len) + 2.0 * self.reach(seq_len) * self.n_heads * per_key

    def cache_bytes_per_token(self, element_size: int) -> int:
        # keys and values are cached whole, not as the latent
        return self.n_heads * (self.head_dim + self.rope_head_dim + self.v_head_dim) * element_size
