"""Sparsifiers of what every projection reads: teal, wina."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.anatomy import Weight
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import LayeredModel
from sparsekit.sparsifiers.base import Candidates, InOrder, Sparsifier
from sparsekit.sparsifiers.installed import SiteOf, Target
from sparsekit.sparsifiers.rules import Limit, Rule, n_kept
from sparsekit.sparsifiers.sites import FeedForward, all_linears, stage_of, stages

LEADERS = ("gate", "k")  # of the projections that read the same, whose columns become orthogonal
HIGHEST = 0.99  # no input is dropped whole in the search for shares


class InputSparsifier(Sparsifier):
    """Masks the inputs of q, k, v, o, gate, up and down, or of whatever projections layers have."""

    def candidates(self, view: LayeredModel) -> Candidates:
        return {
            (layer, name): (weight, None)
            for layer, parts in all_linears(view).items()
            for name, weight in parts.items()
        }


class Teal(InputSparsifier):
    """Drops inputs |x_i| up to the projection's threshold, a quantile of them on the calibration data.

    ``allocation`` "uniform" drops the same share everywhere; "greedy" keeps the mean over a layer's weights at
    ``sparsity`` and raises, ``step`` at a time, the share of that projection where ||y - y_dense||^2 of the layer's
    output grows least for each weight that need not be read (on the calibration data's first batch).

    Source: Liu et al. 2024, arXiv 2408.14690, sec. 4.2 and algorithm 1
    """

    class Params(InputSparsifier.Params):
        sparsity: float = Field(default=0.5, ge=0, lt=1)
        allocation: Literal["uniform", "greedy"] = "uniform"
        step: float = Field(default=0.1, gt=0, le=1)

    def target(
        self, view: LayeredModel, where: SiteOf, weight: Weight, parts: FeedForward | None, limit: Limit
    ) -> Target:
        return Target(weight, Rule(limit))

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        found: dict[SiteOf, Limit] = {}
        order, by_layer = InOrder(view, tokens, self.seed), all_linears(view)
        meta["shares"] = {}
        for layer in range(view.n_layers):
            pending = {name: Target(weight, Rule(Limit())) for name, weight in by_layer[layer].items()}
            shares = self._shares(order, pending)
            meta["shares"][str(layer)] = {name: round(share, 6) for name, share in shares.items()}
            for names in stages(view, layer, by_layer[layer]):
                samples = order.samples({name: pending[name] for name in names})
                for name in names:
                    limit = found[layer, name] = Limit(samples[name].quantile(shares[name]))
                    order.mask(name, pending[name].limited(limit))
            order.advance()
        return found

    def _shares(self, order: InOrder, pending: Mapping[str, Target]) -> dict[str, float]:
        """What share of each projection's inputs is dropped in the layer that calibration has come to."""
        p = self.params
        if p.allocation == "uniform" or not p.sparsity or not pending:
            return dict.fromkeys(pending, p.sparsity)
        batches, order.batches = order.batches, order.batches[:1]
        try:
            return greedy(order, pending, p.sparsity, p.step)
        finally:
            order.batches = batches


def greedy(order: InOrder, pending: Mapping[str, Target], budget: float, step: float) -> dict[str, float]:
    """Shares whose mean by the projections' weights is the budget, raised where the layer's output minds least.

    What it costs to raise a share grows with what is dropped already, so that only the one that would be raised by what
    it cost before is tried again.
    """
    samples = order.samples(pending)
    (dense,) = order.outputs({})
    total = sum(target.weight.weight.numel() for target in pending.values())
    part = {name: target.weight.weight.numel() / total for name, target in pending.items()}
    shares = dict.fromkeys(pending, 0.0)

    @functools.cache
    def limited(name: str, share: float) -> Target:
        return pending[name].limited(Limit(samples[name].quantile(share)))

    def error(shares: Mapping[str, float]) -> float:
        (out,) = order.outputs({name: limited(name, share) for name, share in shares.items() if share})
        return float((out - dense).double().square().sum())

    now, spent = 0.0, 0.0
    cost = dict.fromkeys(pending, 0.0)  # of raising each, when it was last tried
    while cost and budget - spent > 1e-9:
        tried: dict[str, tuple[float, float]] = {}
        while (name := min(cost, key=lambda name: cost[name])) not in tried:
            raised = min(HIGHEST, round(shares[name] + min(step, (budget - spent) / part[name]), 9))
            then = error({**shares, name: raised})
            cost[name] = (then - now) / ((raised - shares[name]) * part[name])
            tried[name] = raised, then
        raised, now = tried[name]
        spent += (raised - shares[name]) * part[name]
        shares[name] = raised
        if raised == HIGHEST:
            del cost[name]
    return shares


class Wina(InputSparsifier):
    """Keeps the inputs with the largest |x_i| ||W[:, i]|| of each token: round((1 - sparsity) d_in), at least one.

    For a matrix with orthogonal columns no other choice of as many inputs changes W x less. ``transform``
    "column_orthogonal" gives projections that read the same vector the basis V in which the columns of one of them (the
    gate, the key, or the only one) are orthogonal: W V reads mask(V^T x), and without a mask the function is the same.
    V^T x is one more D x D product for all that read x, as the stream between layers stays in its own basis; what o and
    down read has no such leader and keeps its basis.

    Source: Chen et al. 2025, arXiv 2505.19427, sec. 3
    """

    class Params(InputSparsifier.Params):
        sparsity: float = Field(default=0.5, ge=0, lt=1)
        transform: Literal["none", "column_orthogonal"] = "none"

    def target(
        self, view: LayeredModel, where: SiteOf, weight: Weight, parts: FeedForward | None, limit: Limit
    ) -> Target:
        basis = self._basis(view, where) if self.params.transform == "column_orthogonal" else None
        matrix = weight.weight if basis is None else weight.weight.to(basis.dtype) @ basis
        return Target(weight, Rule(limit, column_norms(matrix), basis_II=basis))

    def _basis(self, view: LayeredModel, where: SiteOf) -> Tensor | None:
        layer, name = where
        group = stage_of(self._groups(view, layer), name)
        leader = next((each for each in LEADERS if each in group), name)
        if leader not in LEADERS and (len(group) > 1 or leader in ("o", "down")):
            return None
        if (layer, leader) not in self._bases:
            self._bases[layer, leader] = orthogonal_basis(self._weights[layer][leader].weight)
        return self._bases[layer, leader]

    def _groups(self, view: LayeredModel, layer: int) -> Sequence[Sequence[str]]:
        if self._view is not view:
            self._view, self._weights = view, all_linears(view)
            self._stages: dict[int, list[list[str]]] = {}
            self._bases: dict[SiteOf, Tensor] = {}
        if layer not in self._stages:
            self._stages[layer] = stages(view, layer, dict(self._weights[layer]))
        return self._stages[layer]

    _view: LayeredModel | None = None

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        share = 1 - self.params.sparsity
        return {
            where: Limit(k=n_kept(share, weight.weight.shape[1]))
            for where, (weight, _) in self.candidates(view).items()
        }


def column_norms(weight_OI: Tensor) -> Tensor:
    """||W[:, i]||, in float32 or wider."""
    return torch.linalg.vector_norm(weight_OI, dim=0, dtype=wide(weight_OI.dtype))


def orthogonal_basis(weight_OI: Tensor) -> Tensor:
    """V, orthogonal [I, I], such that W V has orthogonal columns: the right singular vectors; in float32 or wider."""
    weight = weight_OI.double()
    basis = torch.linalg.eigh(weight.T @ weight).eigenvectors
    return basis.to(wide(weight_OI.dtype))
