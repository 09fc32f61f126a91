"""How attention is computed, given heads: one signature, several implementations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.components.contracts import Component, ForwardContext


@dataclass(frozen=True)
class MaskRule:
    """Which keys a query sees: none later than itself, and of those the last ``window`` (itself included)."""

    window: int | None = None

    def key(self, kernel: str) -> str:
        return f"mask/{kernel}/{self.window}"


class Kernel(Component):
    """softmax(scale q k^T + mask) v for grouped heads: head h reads key-value head h // (H / G)."""

    def prepare(self, rule: MaskRule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        """The mask in the form this kernel wants it; None where the rule is plain causality."""
        return visible(rule, n_queries, device, context)

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Any, scale: float) -> Tensor:
        """Contexts [batch, heads, queries, head_dim]."""
        raise NotImplementedError


def visible(rule: MaskRule, n_queries: int, device: torch.device, context: ForwardContext) -> Tensor | None:
    """True where a query sees a key, [B or 1, 1, T, S]; None where it sees all of its past in one document.

    With a cache, queries stand at ``context.positions_BT`` and keys at 0 .. S-1.
    """
    documents, positions = context.documents_BT, context.positions_BT
    if documents is None and rule.window is None and context.cache is None:
        return None
    if context.cache is None:
        query = torch.arange(n_queries, device=device)[None, :, None]
        key = torch.arange(n_queries, device=device)[None, None, :]
    else:
        assert positions is not None, "a cache needs the positions of its queries"
        query = positions[:, :, None]
        key = torch.arange(int(positions[0, -1]) + 1, device=device)[None, None, :]
    mask = key <= query
    if rule.window is not None:
        mask = mask & (query - key < rule.window)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return mask[:, None]


class SDPA(Kernel):
    """torch's scaled_dot_product_attention, which picks the fastest backend of the device.

    Source: PyTorch
    """

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
        )  # fmt: skip


class Eager(Kernel):
    """The formula written out, scores and probabilities whole: the reference that every kernel is held against.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1
    """

    def probabilities(self, q_BHTK: Tensor, k_BGSK: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """[batch, heads, queries, keys], rows summing to 1."""
        k_BHSK = k_BGSK.repeat_interleave(q_BHTK.shape[1] // k_BGSK.shape[1], dim=1)
        scores_BHTS = q_BHTK @ k_BHSK.transpose(-2, -1) * scale
        if mask is None:
            mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTK.device).tril()
        wide = torch.promote_types(q_BHTK.dtype, torch.float32)
        return scores_BHTS.to(wide).masked_fill(~mask, float("-inf")).softmax(dim=-1).to(q_BHTK.dtype)

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        v_BHSK = v_BGSK.repeat_interleave(q_BHTK.shape[1] // v_BGSK.shape[1], dim=1)
        return self.probabilities(q_BHTK, k_BGSK, mask, scale) @ v_BHSK
