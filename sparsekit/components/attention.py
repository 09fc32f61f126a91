"""Attention as a head layout around a position, a kernel and an optional query-key norm, each a slot of its own."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from sparsekit.components.contracts import Attention, Build, ForwardContext
from sparsekit.components.kernels import MaskRule
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick


class HeadAttention(Attention):
    """o(attend(q, k, v)) for any number of key-value heads; the entries below only say how many."""

    caches = True

    class Params(Attention.Params):
        n_heads: PositiveInt
        head_dim: PositiveInt | None = None
        position: Annotated[Choice, Slot("position")] = pick("rope")
        kernel: Annotated[Choice, Slot("kernel")] = pick("sdpa")
        qk_norm: Annotated[Choice, Slot("norm")] | None = None
        window: PositiveInt | None = None
        bias: bool = False

    @staticmethod
    def kv_heads(params: Any) -> int:
        raise NotImplementedError

    @staticmethod
    def width(params: Any, d_model: int) -> int:
        """head_dim, by default d_model / n_heads."""
        return int(params.head_dim or d_model // params.n_heads)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.head_dim is None and facts.d_model % params.n_heads:
            raise ValueError(
                f"d_model ({facts.d_model}) is not divisible by n_heads ({params.n_heads}); "
                f"change n_heads, or give head_dim"
            )
        head_dim = cls.width(params, facts.d_model)
        facts.child(params.position, head_dim=head_dim)
        facts.child(params.kernel)
        if params.qk_norm is not None:
            facts.child(params.qk_norm, width=head_dim)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.layer_index = build.layer_index
        self.n_heads, self.n_kv_heads = params.n_heads, self.kv_heads(params)
        self.head_dim = self.width(params, build.d_model)
        d_query, d_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q = build.linear("q", build.d_model, d_query, params.bias)
        self.k = build.linear("k", build.d_model, d_kv, params.bias)
        self.v = build.linear("v", build.d_model, d_kv, params.bias)
        self.o = build.linear("o", d_query, build.d_model, params.bias)
        self.position = build.child(params.position, head_dim=self.head_dim)
        self.kernel = build.child(params.kernel)
        self.q_norm = self.k_norm = None
        if params.qk_norm is not None:
            self.q_norm = build.child(params.qk_norm, width=self.head_dim)
            self.k_norm = build.child(params.qk_norm, width=self.head_dim)
        self.rule = MaskRule(params.window)
        self.mask_key = self.rule.key(params.kernel.type)

    def prepare(self, seq_len: int, device: torch.device, context: ForwardContext) -> tuple[str, Any]:
        return self.mask_key, self.kernel.prepare(self.rule, seq_len, device, context)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        n_batch, n_queries, _ = x_BTD.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(n_batch, n_queries, -1, self.head_dim)

        q_BTHK, k_BTGK, v_BTGK = (heads(linear(x_BTD, context)) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        q, k = self.position(q, k, context)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer_index, k, v)
        if self.mask_key in context.prepared:
            mask = context.prepared[self.mask_key]
        else:
            mask = self.kernel.prepare(self.rule, n_queries, x_BTD.device, context)
        z_BHTK = self.kernel(q, k, v, mask, self.head_dim**-0.5)
        return self.o(z_BHTK.transpose(1, 2).reshape(n_batch, n_queries, -1), context)

    def flops_per_token(self, seq_len: int) -> float:
        # scores and their product with v, over all keys in reach: the eager kernel masks but does not skip
        reach = min(seq_len, self.rule.window or seq_len)
        return super().flops_per_token(seq_len) + 4.0 * reach * self.n_heads * self.head_dim

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
