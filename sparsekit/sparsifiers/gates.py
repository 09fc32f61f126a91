"""Sparsifiers by a feed-forward's gate, which alone is computed whole: cats, chess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from sparsekit.probes.anatomy import Weight
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import LayeredModel
from sparsekit.sparsifiers.base import Candidates, InOrder
from sparsekit.sparsifiers.installed import SiteOf, Target
from sparsekit.sparsifiers.neurons import NeuronSparsifier
from sparsekit.sparsifiers.rules import Limit, Rule
from sparsekit.sparsifiers.sites import DOWN, FeedForward, linears


class Cats(NeuronSparsifier):
    """Drops neuron i where its gate |act(W_gate x)_i| is at most its layer's threshold, the sparsity-quantile of them.

    The quantile is over the calibration tokens, with the layers below already sparse. Where there is no gate, of |a_i|.

    Source: Lee et al. 2024, arXiv 2404.08763, eq. 3 and 4
    """

    gated = True

    class Params(NeuronSparsifier.Params):
        sparsity: float = Field(default=0.5, ge=0, lt=1)

    def target(
        self, view: LayeredModel, where: SiteOf, weight: Weight, parts: FeedForward | None, limit: Limit
    ) -> Target:
        return Target(weight, Rule(limit, by_gate=parts is not None and parts.gate is not None), parts)

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        found: dict[SiteOf, Limit] = {}
        parts, order = self.parts(view, meta), InOrder(view, tokens, self.seed)
        for layer in range(view.n_layers):
            self.fit_attention(view, order, found)
            if layer in parts:
                pending = self.pending(view, layer, parts[layer])
                limit = found[layer, DOWN] = self.limit(order, pending)
                order.mask(DOWN, pending.limited(limit))
            order.advance()
        return found

    def fit_attention(self, view: LayeredModel, order: InOrder, found: dict[SiteOf, Limit]) -> None:
        """Masks what comes earlier in the layer that calibration has come to: nothing, here."""

    def limit(self, order: InOrder, pending: Target) -> Limit:
        """Of the feed-forward of that layer."""
        return Limit(order.samples({DOWN: pending})[DOWN].quantile(self.params.sparsity))


class Chess(Cats):
    """Drops neuron i where its gate |act(W_gate x)_i| is at most t_i = sqrt(T / E[(W_up x)_i^2]), channel by channel.

    T is the sparsity-quantile of |act(W_gate x)_i|^2 E[(W_up x)_i^2], both over the calibration tokens. ``attention``
    "q_and_o" also drops the smallest |x_i| of what the query and the output projection read, the same share of them.

    Source: He et al. 2024, arXiv 2409.01366, sec. 4
    """

    class Params(Cats.Params):
        attention: Literal["none", "q_and_o"] = "none"

    def candidates(self, view: LayeredModel) -> Candidates:
        found = dict(super().candidates(view))
        if self.params.attention == "q_and_o":
            for layer in range(view.n_layers):
                roles = linears(view, layer)
                found |= {(layer, name): (roles[name], None) for name in ("q", "o") if name in roles}
        return found

    def target(
        self, view: LayeredModel, where: SiteOf, weight: Weight, parts: FeedForward | None, limit: Limit
    ) -> Target:
        return Target(weight, Rule(limit)) if parts is None else super().target(view, where, weight, parts, limit)

    def fit_attention(self, view: LayeredModel, order: InOrder, found: dict[SiteOf, Limit]) -> None:
        if self.params.attention == "none":
            return
        roles = linears(view, order.layer)
        for name in ("q", "o"):
            if name in roles:
                pending = Target(roles[name], Rule(Limit()))
                limit = Limit(order.samples({name: pending})[name].quantile(self.params.sparsity))
                found[order.layer, name] = limit
                order.mask(name, pending.limited(limit))

    def limit(self, order: InOrder, pending: Target) -> Limit:
        parts = pending.parts
        assert parts is not None
        up = parts.up
        if parts.gate is None or up is None:
            return super().limit(order, pending)
        squared_F = order.moment(parts.reader, lambda x: F.linear(x, up.weight, up.bias).square())
        weighted = pending._replace(rule=replace(pending.rule, weight_I=squared_F.sqrt().to(torch.float32)))
        root = order.samples({DOWN: weighted})[DOWN].quantile(self.params.sparsity)  # of the root, as T's is
        if not root:
            return Limit(root)
        return Limit(root.double() / squared_F.sqrt())
