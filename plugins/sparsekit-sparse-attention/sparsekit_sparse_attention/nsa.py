"""Native sparse attention: summaries of blocks, the blocks that these point at, and a window, gated together."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from sparsekit.components.contracts import Attention, Build, ForwardContext, flops_per_token
from sparsekit.components.kernels import Extras, Rule, places
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick

BRANCHES = 3  # summaries, chosen blocks, window: each with keys and values of its own


class Summary(nn.Module):
    """phi(x_1 .. x_l) = W_2 gelu(W_1 [x_1 + e_1; ..; x_l + e_l]) of each block of l keys (or values), d apart.

    Shapes: [B, G, S, K] -> [B, G, C, K], C = (S - l) // d + 1 whole blocks.
    """

    def __init__(self, role: str, params: Any, head_dim: int, build: Build):
        super().__init__()
        self.block, self.stride = params.block, params.stride
        self.place_LK = nn.Parameter(torch.empty(self.block, head_dim))
        self.inner = build.linear(role, self.block * head_dim, 2 * head_dim)
        self.outer = build.linear(role, 2 * head_dim, head_dim)
        self.init = build.child(build.init_slot)

    def reset_parameters(self) -> None:
        self.init(self.place_LK, "embed")

    def forward(self, x_BGSK: Tensor, context: ForwardContext) -> Tensor:
        blocks_BGCLK = x_BGSK.unfold(2, self.block, self.stride).mT + self.place_LK
        summary: Tensor = self.outer(F.gelu(self.inner(blocks_BGCLK.flatten(-2), context)), context)
        return summary


class NSA(Attention):
    """o = g_cmp A(q, phi(K_cmp)) + g_slc A(q, K_slc of the n best blocks) + g_win A(q, K_win), g = sigmoid(W_g x).

    A is softmax attention over keys and values that each branch has for itself, phi a small network that sums up every
    ``block`` keys, ``stride`` apart; a query sees the summaries of blocks that are whole before it. Probabilities of
    these, summed over the query heads of a key-value head and over the strides that a summary shares with a block of
    ``select_block`` keys, score that block; a query sees the ``n_select`` best, among which always its document's first
    and its own with those before it, ``n_local`` in all. The window is the query and ``window`` - 1 keys before it.

    The selection is a mask on a dense product, which any kernel with ``own_mask`` takes: the method's result, not yet
    its speed. Shapes: [batch, seq, d_model] -> same. With a cache, keys and values of all branches stand in it side by
    side. Costs are counted as of the keys that a query sees.

    Source: Yuan et al. 2025, arXiv 2502.11089, eq. 5-12
    """

    caches = True
    ragged = True

    class Params(Attention.Params):
        n_heads: PositiveInt
        n_kv_heads: PositiveInt
        head_dim: PositiveInt | None = None
        block: PositiveInt = 32
        stride: PositiveInt = 16
        select_block: PositiveInt = 64
        n_select: PositiveInt = 16
        n_local: PositiveInt = 2
        window: PositiveInt = 512
        position: Annotated[Choice, Slot("position")] = pick("rope")
        kernel: Annotated[Choice, Slot("kernel")] = pick("sdpa")

    @classmethod
    def rule(cls, head_dim: int) -> Rule:
        """What is asked of the kernel."""
        return Rule(features=frozenset({"own_mask"}), head_dim=head_dim)

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.n_heads % params.n_kv_heads:
            raise ValueError(f"n_heads ({params.n_heads}) is not divisible by n_kv_heads ({params.n_kv_heads})")
        if params.head_dim is None and facts.d_model % params.n_heads:
            raise ValueError(f"d_model ({facts.d_model}) is not divisible by n_heads ({params.n_heads}); give head_dim")
        for name in ("block", "select_block"):
            if getattr(params, name) % params.stride:
                raise ValueError(f"{name} ({getattr(params, name)}) is not divisible by stride ({params.stride})")
        if params.block > facts.max_seq_len:
            told = f"block ({params.block}) is longer than max_seq_len ({facts.max_seq_len})"
            raise ValueError(f"{told}, so that nothing would be summed up")
        if params.n_select <= params.n_local:
            told = f"n_select ({params.n_select}) leaves none to choose"
            raise ValueError(f"{told} beside the first block and n_local ({params.n_local})")
        if params.position.type == "alibi":
            raise ValueError("position 'alibi' has no distance to a summary; use rope")
        head_dim = params.head_dim or facts.d_model // params.n_heads
        heads = {"n_heads": params.n_heads, "n_kv_heads": BRANCHES * params.n_kv_heads}
        facts.child(params.position, head_dim=head_dim, **heads)
        facts.child(params.kernel, rule=cls.rule(head_dim))

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.layer_index = build.layer_index
        self.n_heads, self.n_kv_heads = params.n_heads, params.n_kv_heads
        self.head_dim = int(params.head_dim or build.d_model // self.n_heads)
        self.asked = self.rule(self.head_dim)
        d_query, d_kv = self.n_heads * self.head_dim, BRANCHES * self.n_kv_heads * self.head_dim
        self.q = build.linear("q", build.d_model, d_query)
        self.k = build.linear("k", build.d_model, d_kv)
        self.v = build.linear("v", build.d_model, d_kv)
        self.gate = build.linear("gate", build.d_model, BRANCHES * self.n_heads, True)
        self.o = build.linear("o", d_query, build.d_model)
        self.sum_k = Summary("k", params, self.head_dim, build)
        self.sum_v = Summary("v", params, self.head_dim, build)
        heads = {"n_heads": self.n_heads, "n_kv_heads": BRANCHES * self.n_kv_heads}
        self.position = build.child(params.position, head_dim=self.head_dim, **heads)
        self.kernel = build.child(params.kernel)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        q, k, v = (linear(x_BTD, context) for linear in (self.q, self.k, self.v))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        q, k = self.position(q, k, context)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer_index, k, v)
        keys, values = k.chunk(BRANCHES, dim=1), v.chunk(BRANCHES, dim=1)
        query_BT, begin_BT = self._places(q.shape[2], q.device, context)
        key_S = torch.arange(k.shape[2], device=q.device)
        seen_BTS = (key_S <= query_BT[..., None]) & (key_S >= begin_BT[..., None])

        summed_BHTK, score_BGTC = self._summed(q, keys[0], values[0], query_BT, begin_BT, context)
        chosen_BGTJ = self._chosen(score_BGTC, key_S.shape[0], query_BT, begin_BT)
        chosen_BGTS = chosen_BGTJ.repeat_interleave(self.params.select_block, dim=-1)[..., : key_S.shape[0]]
        chosen_BHTS = (chosen_BGTS & seen_BTS[:, None]).repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        near_BTS = seen_BTS & (query_BT[..., None] - key_S < self.params.window)
        selected_BHTK = self._attend(q, keys[1], values[1], chosen_BHTS)
        near_BHTK = self._attend(q, keys[2], values[2], near_BTS[:, None])

        gates = torch.sigmoid(self.gate(x_BTD, context)).unflatten(-1, (BRANCHES, -1, 1)).transpose(1, 3).unbind(2)
        branches = (summed_BHTK, selected_BHTK, near_BHTK)
        z_BHTK = torch.stack([gate * branch for gate, branch in zip(gates, branches, strict=True)]).sum(0)
        y_BTD: Tensor = self.o(z_BHTK.transpose(1, 2).flatten(2), context)
        return y_BTD

    @staticmethod
    def _places(n_queries: int, device: torch.device, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """Among the keys, where each query stands and where its document begins; [B or 1, T]."""
        if context.cache is not None:
            assert context.positions_BT is not None, "a cache needs the positions of its queries"
            return context.positions_BT, torch.zeros_like(context.positions_BT)
        index_1T = torch.arange(n_queries, device=device)[None]
        if context.documents_BT is None:
            return index_1T, torch.zeros_like(index_1T)
        return index_1T, index_1T - places(context.documents_BT)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        mask = self.kernel.own_mask(seen, self.asked)
        z_BHTK: Tensor = self.kernel(q, k, v, mask, self.asked, Extras(self.head_dim**-0.5))
        return z_BHTK

    def _summed(
        self, q: Tensor, k: Tensor, v: Tensor, query_BT: Tensor, begin_BT: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """Attention to summaries, 0 where a query has none, and its probabilities, summed over a key head's queries."""
        if k.shape[2] < self.params.block:
            return torch.zeros_like(q), q.new_zeros(q.shape[0], self.n_kv_heads, q.shape[2], 0)
        k_BGCK, v_BGCK = self.sum_k(k, context), self.sum_v(v, context)
        start_C = torch.arange(k_BGCK.shape[2], device=q.device) * self.params.stride
        whole_BTC = (start_C + self.params.block - 1 <= query_BT[..., None]) & (start_C >= begin_BT[..., None])
        whole_B11TC = whole_BTC[:, None, None]
        q_BGRTK = q.unflatten(1, (self.n_kv_heads, -1))
        scores = q_BGRTK @ k_BGCK[:, :, None].mT * self.head_dim**-0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # not -inf, of which a query without summaries would have a row, and its softmax no number
        p_BGRTC = scores.masked_fill(~whole_B11TC, torch.finfo(scores.dtype).min).softmax(-1) * whole_B11TC
        return (p_BGRTC.to(q.dtype) @ v_BGCK[:, :, None]).flatten(1, 2), p_BGRTC.detach().sum(2)

    def _chosen(self, score_BGTC: Tensor, n_keys: int, query_BT: Tensor, begin_BT: Tensor) -> Tensor:
        """Which blocks each query and key head chooses, [B, G, T, J]."""
        size, n_blocks = self.params.select_block, -(-n_keys // self.params.select_block)
        block_J = torch.arange(n_blocks, device=score_BGTC.device)
        own_BT1, first_BT1 = query_BT[..., None] // size, begin_BT[..., None] // size
        always_BTJ = (block_J == first_BT1) | ((block_J > own_BT1 - self.params.n_local) & (block_J >= first_BT1))
        open_BTJ = (block_J <= own_BT1) & (block_J >= first_BT1)
        overlap_CJ = shared_strides(score_BGTC.shape[-1], block_J, self.params)
        score_BGTJ = score_BGTC @ overlap_CJ.to(score_BGTC.dtype)
        score_BGTJ = score_BGTJ.masked_fill(always_BTJ[:, None], float("inf"))
        score_BGTJ = score_BGTJ.masked_fill(~open_BTJ[:, None], float("-inf"))
        best_BGTn = score_BGTJ.topk(min(self.params.n_select, n_blocks), dim=-1).indices
        chosen_BGTJ = torch.zeros_like(score_BGTJ, dtype=torch.bool).scatter(-1, best_BGTn, True)
        return chosen_BGTJ & open_BTJ[:, None]

    def flops_per_token(self, seq_len: int) -> float:
        stride, block = self.params.stride, self.params.block
        n_summaries = max(0, (seq_len - block) // stride + 1)
        chosen = min(seq_len, self.params.n_select * self.params.select_block)
        keys = n_summaries + chosen + min(seq_len, self.params.window)
        sums = flops_per_token(self.sum_k, seq_len) + flops_per_token(self.sum_v, seq_len)
        projections = sum(linear.flops_per_token(seq_len) for linear in (self.q, self.k, self.v, self.gate, self.o))
        summing = self.n_kv_heads * sums * n_summaries / seq_len
        return projections + summing + 4.0 * keys * self.n_heads * self.head_dim

    def cache_bytes_per_token(self, element_size: int) -> int:
        return 2 * BRANCHES * self.n_kv_heads * self.head_dim * element_size


def shared_strides(n_summaries: int, block_J: Tensor, params: Any) -> Tensor:
    """How many strides of keys a summary and a block have in common, [C, J]: eq. 9's double sum, by its geometry."""
    summary_C1 = torch.arange(n_summaries, device=block_J.device)[:, None]
    per_summary, per_block = params.block // params.stride, params.select_block // params.stride
    ends_CJ = torch.minimum(summary_C1 + per_summary, (block_J + 1) * per_block)
    return (ends_CJ - torch.maximum(summary_C1, block_J * per_block)).clamp(min=0)
