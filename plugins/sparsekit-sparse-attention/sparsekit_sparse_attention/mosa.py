"""Mixture of sparse attention: each head chooses the tokens that it attends among."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from sparsekit.components.contracts import (
    Attention,
    Build,
    ExpertGroups,
    ForwardContext,
    active_parameters,
    flops_per_token,
)
from sparsekit.components.kernels import Extras, Rule, places
from sparsekit.components.routers import widened
from sparsekit.spec.facts import Facts
from sparsekit.spec.slot import Choice, Slot, pick


class MoSA(Attention):
    """Head h takes the k tokens I of largest s = sigmoid(w_h x), attends causally among them, and gives s_I W_o A(x_I).

    k = max(2, T / ``sparsity``) of T; the other tokens get nothing of this head. Positions are those in the sequence.
    ``include_first`` has each head take a document's first token. ``dense`` is an attention beside it, whose output is
    added. Which tokens are taken depends on later ones, so this is not causal. Documents share a head's k tokens by
    their length, rounded down, and each chooses among its own. Every projection is of a head alone: heads are built as
    experts are, each with rows of its own.

    Shapes: [batch, seq, d_model] -> same; k keys a head. There is no cache: generation chooses anew for each token.

    Source: Piękos, Csordás & Schmidhuber 2025, arXiv 2505.00315 (MoSA)
    """

    causal = False

    class Params(Attention.Params):
        n_heads: PositiveInt
        head_dim: PositiveInt | None = None
        sparsity: float = Field(default=8.0, ge=1)
        include_first: bool = False
        position: Annotated[Choice, Slot("position")] = pick("rope")
        kernel: Annotated[Choice, Slot("kernel")] = pick("sdpa")
        dense: Annotated[Choice, Slot("attention")] | None = None

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        if params.head_dim is None and facts.d_model % params.n_heads:
            raise ValueError(f"d_model ({facts.d_model}) is not divisible by n_heads ({params.n_heads}); give head_dim")
        if params.position.type == "alibi":
            raise ValueError("position 'alibi' goes by places among the chosen tokens; use rope")
        head_dim = params.head_dim or facts.d_model // params.n_heads
        facts.child(params.position, head_dim=head_dim, n_heads=1, n_kv_heads=1)
        facts.child(params.kernel, rule=Rule(head_dim=head_dim))
        if params.dense is not None:
            facts.child(params.dense)

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.n_heads: int = params.n_heads
        self.head_dim = int(params.head_dim or build.d_model // self.n_heads)
        self.asked = Rule(head_dim=self.head_dim)
        self.router = build.linear("router", build.d_model, self.n_heads)
        heads = build.experts(self.n_heads)
        self.q, self.k, self.v = (heads.linear(role, build.d_model, self.head_dim) for role in "qkv")
        self.o = heads.linear("o", self.head_dim, build.d_model)
        self.position = build.child(params.position, head_dim=self.head_dim, n_heads=1, n_kv_heads=1)
        self.kernel = build.child(params.kernel)
        self.dense = None if params.dense is None else build.child(params.dense)

    def chosen(self, length: int) -> int:
        """Tokens that a head takes of so many."""
        return min(length, max(2, int(length / self.params.sparsity)))

    def prepare(self, seq_len: int, device: torch.device, context: ForwardContext) -> tuple[str, Any] | None:
        return None if self.dense is None else self.dense.prepare(seq_len, device, context)

    def forward(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        n_batch, length, width = x_BTD.shape
        score_HBT = widened(self.router(x_BTD, context)).sigmoid().permute(2, 0, 1)
        token_HBk, used_HBk = self._choose(score_HBT.detach(), context)
        weight_HBk = score_HBT.gather(-1, token_HBk) * used_HBk
        row_M = (token_HBk + length * torch.arange(n_batch, device=x_BTD.device)[:, None]).flatten()

        # heads side by side, each with the rows that it chose
        per_head = row_M.shape[0] // self.n_heads
        ends_H = torch.arange(1, self.n_heads + 1, device=x_BTD.device, dtype=torch.int32) * per_head
        inside = self._inside(token_HBk, used_HBk, ExpertGroups(ends_H, complete=True), context)
        x_MD = x_BTD.reshape(-1, width)[row_M]
        q, k, v = (linear(x_MD, inside).view(-1, 1, token_HBk.shape[-1], self.head_dim) for linear in self._qkv())
        q, k = self.position(q, k, inside)
        mask = self.kernel.prepare(self.asked, q.shape[2], q.device, replace(inside, dtype=v.dtype))
        z_P1kK = self.kernel(q.to(v.dtype), k.to(v.dtype), v, mask, self.asked, Extras(self.head_dim**-0.5))
        y_MD = self.o(z_P1kK.reshape(-1, self.head_dim), inside) * weight_HBk.flatten()[:, None]
        y_BTD = y_MD.new_zeros(n_batch * length, width).index_add(0, row_M, y_MD).to(x_BTD.dtype).view_as(x_BTD)
        return y_BTD if self.dense is None else y_BTD + self.dense(x_BTD, context)

    def _qkv(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v

    def _choose(self, score_HBT: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """The tokens of each head in their order, [H, B, k], and which of them count."""
        length, documents = score_HBT.shape[-1], context.documents_BT
        k = self.chosen(length)
        if self.params.include_first:
            place_BT = torch.arange(length, device=score_HBT.device) if documents is None else places(documents)
            score_HBT = score_HBT.masked_fill(place_BT == 0, float("inf"))
        if documents is None:
            token_HBk = score_HBT.topk(k, dim=-1).indices.sort(dim=-1).values
            return token_HBk, torch.ones_like(token_HBk, dtype=torch.bool)
        own_BT = (documents[:, :, None] == documents[:, None]).sum(-1)
        best_HBT = score_HBT.argsort(dim=-1, descending=True, stable=True)
        by_document = documents.expand_as(best_HBT).gather(-1, best_HBT).argsort(dim=-1, stable=True)
        rank_BT = places(documents.sort(dim=-1).values)
        best_HBT = best_HBT.gather(-1, by_document)
        rank_HBT = torch.zeros_like(best_HBT).scatter(-1, best_HBT, rank_BT.expand_as(best_HBT))
        left_HBT = rank_HBT >= own_BT * k // length
        token_HBk = left_HBT.to(torch.int8).argsort(dim=-1, stable=True)[..., :k]
        return token_HBk, ~left_HBT.gather(-1, token_HBk)

    @staticmethod
    def _inside(token_HBk: Tensor, used_HBk: Tensor, groups: ExpertGroups, context: ForwardContext) -> ForwardContext:
        """The context of what each head chose: every head and sequence is a batch row, what counts not a document."""

        def taken(given_BT: Tensor) -> Tensor:
            whole_HBT = given_BT.expand(*token_HBk.shape[:2], -1)
            return whole_HBT.gather(-1, token_HBk)

        places_HBk = token_HBk if context.positions_BT is None else taken(context.positions_BT)
        documents = None
        if context.documents_BT is not None:
            documents = taken(context.documents_BT).masked_fill(~used_HBk, -1).flatten(0, 1)
        positions = places_HBk.flatten(0, 1)
        inside = replace(context, groups=groups, positions_BT=positions, documents_BT=documents)
        return replace(inside, ids_BT=None, prepared={})

    def active_parameters(self) -> int:
        """As each token is of n_heads / sparsity heads."""
        heads = self.n_heads / self.params.sparsity * sum(map(active_parameters, (*self._qkv(), self.o)))
        around = sum(active_parameters(part) for part in (self.router, self.position, self.dense) if part is not None)
        return round(heads + around)

    def flops_per_token(self, seq_len: int) -> float:
        k = self.chosen(seq_len)
        heads = self.n_heads * k / seq_len * sum(flops_per_token(part, seq_len) for part in (*self._qkv(), self.o))
        around = sum(flops_per_token(part, seq_len) for part in (self.router, self.dense) if part is not None)
        return around + heads + 4.0 * self.n_heads * self.head_dim * k * k / seq_len
