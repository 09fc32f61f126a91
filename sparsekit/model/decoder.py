"""The transformer itself: embedding, layers, final norm, head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekit.components.contracts import (
    Attention,
    Build,
    Embedding,
    FeedForward,
    ForwardContext,
    Linear,
    Residual,
    State,
    active_parameters,
    flops_per_token,
)
from sparsekit.components.embeddings import TokenEmbedding
from sparsekit.components.linears import PlainLinear
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


@dataclass(frozen=True)
class Unembedding:
    """The way from the final norm's output to logits, for a head that takes it in pieces.

    Attributes:
        logits: x [..., d_model] -> [..., vocab].
        weight, bias, scale: logits(x) = scale (x weight^T + bias), where the head is that and no more; else the
            weight is None.
    """

    logits: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0


class Decoder(nn.Module):
    """A decoder-only transformer built from a model spec: ``model(ids) -> logits`` [batch, seq, vocab]."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec
        build = Build(spec.d_model, spec.max_seq_len, 0, spec.n_layers, spec.linear, spec.init)
        self.embedding: Embedding = build.child(spec.embedding, vocab_size=spec.vocab_size)
        blocks = [Block(block, replace(build, layer_index=index)) for index, block in enumerate(spec.per_layer)]
        self.layers = cast(Sequence[Block], nn.ModuleList(blocks))
        self.norm = build.child(spec.last_norm)
        self.head: Linear | None = None if spec.tie_embeddings else build.linear("head", spec.d_model, spec.vocab_size)

    def forward(
        self,
        ids_BT: Tensor,
        context: ForwardContext | None = None,
        head: Callable[[Tensor, Unembedding], Any] | None = None,
    ) -> Any:
        """The logits, [batch, seq, vocab], or what ``head`` makes of the final norm's output, [batch, seq, d_model].

        What is called in here finds the weights whole also where they are sharded over processes.
        """
        context = context or ForwardContext()
        x_BTD = self.hidden(ids_BT, context)
        return self.logits(x_BTD, context) if head is None else head(self.norm(x_BTD), self.unembedding(context))

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
        return self.unembed(self.norm(x_BTD), context)

    def unembed(self, x: Tensor, context: ForwardContext) -> Tensor:
        """The head alone, [..., d_model] -> [..., vocab]."""
        logits: Tensor = self.embedding.unembed(x) if self.head is None else self.head(x, context)
        logits = logits if self.spec.logit_scale == 1.0 else logits * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def unembedding(self, context: ForwardContext) -> Unembedding:
        """:meth:`unembed`, and what it is made of if that is a matrix product."""

        def logits(x: Tensor) -> Tensor:
            return self.unembed(x, context)

        if self.spec.logit_softcap is not None:
            return Unembedding(logits)
        if self.head is None and type(self.embedding).unembed is TokenEmbedding.unembed:
            return Unembedding(logits, cast(TokenEmbedding, self.embedding).weight, None, self.spec.logit_scale)
        if self.head is not None and type(self.head).forward is PlainLinear.forward:
            return Unembedding(logits, self.head.effective_weight(), self.head.bias, self.spec.logit_scale)
        return Unembedding(logits)

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
