"""Sparsifiers by a feed-forward's gate, which alone is computed whole: cats, chess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sparsekit.probes.anatomy import ExpertRows, Weight
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import LayeredModel
from sparsekit.sparsifiers.base import Candidates, InOrder, Parts
from sparsekit.sparsifiers.installed import SiteOf, Target
from sparsekit.sparsifiers.mixtures import Experts, projected
from sparsekit.sparsifiers.neurons import NeuronSparsifier
from sparsekit.sparsifiers.rules import Limit, Rule
from sparsekit.sparsifiers.sites import DOWN, linears


class Cats(NeuronSparsifier):
    """Drops neuron i where its gate |act(W_gate x)_i| is at most its layer's threshold, the sparsity-quantile of them.

    The quantile is over the calibration tokens, with the layers below already sparse. Where there is no gate, of |a_i|.
    A mixture has one threshold for its routed experts, a quantile over what tokens visit, and one for a shared expert.

    Source: Lee et al. 2024, arXiv 2404.08763, eq. 3 and 4
    """

    gated = True

    class Params(NeuronSparsifier.Params):
        sparsity: float = Field(default=0.5, ge=0, lt=1)

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
        return Target(weight, Rule(limit, by_gate=parts is not None and parts.gate is not None), parts)

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        found: dict[SiteOf, Limit] = {}
        places, order = self.places(view, meta), InOrder(view, tokens, self.seed)
        for layer in range(view.n_layers):
            self.fit_attention(view, order, found)
            for name in [name for at, name in places if at == layer]:
                pending = self.pending(view, layer, places[layer, name], name)
                limit = found[layer, name] = self.limit(order, pending)
                order.mask(name, pending.limited(limit))
            order.advance()
        return found

    def fit_attention(self, view: LayeredModel, order: InOrder, found: dict[SiteOf, Limit]) -> None:
        """Masks what comes earlier in the layer that calibration has come to: nothing, here."""

    def limit(self, order: InOrder, pending: Target) -> Limit:
        """Of the feed-forward of that layer."""
        return Limit(order.samples({DOWN: pending})[DOWN].quantile(self.params.sparsity))


class Chess(Cats):
    """Drops neuron i where its gate |act(W_gate x)_i| is at most t_i = sqrt(T / E[(W_up x)_i^2]), channel by channel.

    T is the sparsity-quantile of |act(W_gate x)_i|^2 E[(W_up x)_i^2], both over the calibration tokens. In a mixture
    each expert has channels of its own, E over the tokens that visit it, and all routed experts have one T.
    ``attention`` "q_and_o" also drops the smallest |x_i| of what the query and the output projection read, the same
    share of them.

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

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
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
        if isinstance(parts, Experts):
            squared = squares(order, parts)
        else:
            squared = order.moment(parts.reader, lambda x: F.linear(x, up.weight, up.bias).square())
        weighted = pending._replace(rule=replace(pending.rule, weight_I=squared.sqrt().to(torch.float32)))
        root = order.samples({DOWN: weighted})[DOWN].quantile(self.params.sparsity)  # of the root, as T's is
        if not root:
            return Limit(root)
        return Limit(root.double() / squared.sqrt())


def squares(order: InOrder, experts: Experts) -> Tensor:
    """E[(W_up x)_i^2] of each expert over the tokens that visit it, [E, F], in float64; unvisited, of all visits."""
    sums_EF = torch.zeros(experts.up.weight.shape[:2], dtype=torch.float64, device=experts.up.weight.device)
    visits_E1 = sums_EF.new_zeros(len(sums_EF), 1)

    def look(x_ND: Tensor, rows: ExpertRows) -> Tensor:
        visited_M = rows.weight_M != 0
        expert_M = rows.expert_M[visited_M]
        up_MF = projected(experts.up, x_ND, rows)[visited_M]
        sums_EF.index_add_(0, expert_M, up_MF.double().square())
        visits_E1.index_add_(0, expert_M, visits_E1.new_ones(len(expert_M), 1))
        return rows.act_MF

    order.outputs(watch=lambda undo: experts.put(undo, look))
    everywhere = sums_EF.sum() / (visits_E1.sum() * sums_EF.shape[1]).clamp(min=1)
    return torch.where(visits_E1 > 0, sums_EF / visits_E1.clamp(min=1), everywhere)
