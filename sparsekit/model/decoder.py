"""The transformer itself: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from sparsekit.components.contracts import (
    Attention,
    Build,
    FeedForward,
    ForwardContext,
    Residual,
    State,
    active_parameters,
    flops_per_token,
)
from sparsekit.spec.model import BlockSpec, ModelSpec


class Block(nn.Module):
    """One layer: an attention and a feed-forward, combined by a residual scheme."""

    def __init__(self, spec: BlockSpec, build: Build):
        super().__init__()
        self.attention: Attention = build.child(spec.attention)
        self.ffn: FeedForward = build.child(spec.ffn)
        self.residual: Residual = build.child(spec.residual, norm=spec.norm)

    def forward(self, x_BTD: Tensor, state: State, context: ForwardContext) -> tuple[Tensor, State]:
        x_BTD, state = self.residual(x_BTD, state, context, self.attention, self.ffn)
        return x_BTD, state


class Decoder(nn.Module):
    """A decoder-only transformer built from a model spec: ``model(ids) -> logits`` [batch, seq, vocab]."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        build = Build(spec.d_model, spec.max_seq_len, 0, spec.n_layers, spec.linear, spec.init)
        self.embedding = build.child(spec.embedding, vocab_size=spec.vocab_size)
        blocks = [Block(block, replace(build, layer_index=index)) for index, block in enumerate(spec.per_layer)]
        self.layers = cast(Sequence[Block], nn.ModuleList(blocks))
        self.norm = build.child(spec.last_norm)
        self.head = None if spec.tie_embeddings else build.linear("head", spec.d_model, spec.vocab_size)

    def forward(self, ids_BT: Tensor, context: ForwardContext | None = None) -> Tensor:
        context = context or ForwardContext()
        return self.logits(self.hidden(ids_BT, context), context)

    def hidden(self, ids_BT: Tensor, context: ForwardContext) -> Tensor:
        """The last layer's output, [batch, seq, d_model], before the final norm."""
        context = self.prepare(ids_BT, context)
        x_BTD = self.embedding(ids_BT, context)
        state: State = {}
        for layer in self.layers:
            x_BTD, state = layer(x_BTD, state, context)
        return x_BTD

    def logits(self, x_BTD: Tensor, context: ForwardContext) -> Tensor:
        """The final norm and the head."""
        x_BTD = self.norm(x_BTD)
        logits_BTV = self.embedding.unembed(x_BTD) if self.head is None else self.head(x_BTD, context)
        return logits_BTV if self.spec.logit_scale == 1.0 else logits_BTV * self.spec.logit_scale

    def prepare(self, ids_BT: Tensor, context: ForwardContext) -> ForwardContext:
        """The context with what layers share (masks), worked out once and not layer by layer."""
        context = replace(context, ids_BT=ids_BT, dtype=next(self.embedding.parameters()).dtype)
        prepared: dict[str, Any] = dict(context.prepared)
        for layer in self.layers:
            found = layer.attention.prepare(ids_BT.shape[1], ids_BT.device, context)
            if found is not None:
                prepared.setdefault(*found)
        return replace(context, prepared=prepared)

    def active_parameters(self) -> int:
        """Parameters that one token passes through; the embedding table counts whole."""
        return sum(active_parameters(child) for child in self._parts())

    def flops_per_token(self, seq_len: int) -> float:
        """Forward floating-point operations for one token in a sequence of seq_len."""
        total = sum(flops_per_token(child, seq_len) for child in self._parts())
        if self.head is None:
            total += 2.0 * self.spec.d_model * self.spec.vocab_size
        return total

    def _parts(self) -> list[nn.Module]:
        return [child for child in self.children() if child is not None]
