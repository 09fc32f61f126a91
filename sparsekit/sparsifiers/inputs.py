"""Sparsifiers of what every projection reads: teal, wina."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.anatomy import Weight
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import LayeredModel
from sparsekit.sparsifiers.base import Candidates, InOrder, Parts, Sparsifier
from sparsekit.sparsifiers.installed import SiteOf, Target
from sparsekit.sparsifiers.rules import Limit, Rule, n_kept
from sparsekit.sparsifiers.sites import all_linears, stage_of, stages

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

    ``allocation`` "uniform" drops the same share everywhere. "greedy" keeps the mean over a layer's weights at
    ``sparsity`` and raises shares in steps of equal size in weights, ``step`` of the largest projection: each time that
    share with which ||y - y_dense||^2 of the layer's output grows least (on the calibration data's first batch).
    "greedy_global" keeps the mean over all layers' weights instead: every layer's steps are found as before, on dense
    streams, and that layer takes its next one in which the mean over tokens of ||y - y_dense||^2 / ||y_dense||^2 grows
    least for each weight; the paper gives all layers one sparsity.

    Source: Liu et al. 2024, arXiv 2408.14690, sec. 4.2 and algorithm 1
    """

    class Params(InputSparsifier.Params):
        sparsity: float = Field(default=0.5, ge=0, lt=1)
        allocation: Literal["uniform", "greedy", "greedy_global"] = "uniform"
        step: float = Field(default=0.1, gt=0, le=1)

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
        return Target(weight, Rule(limit))

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        found: dict[SiteOf, Limit] = {}
        order, by_layer = InOrder(view, tokens, self.seed), all_linears(view)
        shares = self._shares(view, tokens, by_layer)
        for layer in range(view.n_layers):
            pending = _pending(by_layer[layer])
            if layer not in shares:
                with order.first_batch():
                    raises = greedy(order, pending, self.params.step)
                    shares[layer] = spent({layer: raises}, self.params.sparsity * _total(pending))[layer]
            for names in stages(view, layer, by_layer[layer]):
                samples = order.samples({name: pending[name] for name in names})
                for name in names:
                    limit = found[layer, name] = Limit(samples[name].quantile(shares[layer].get(name, 0.0)))
                    order.mask(name, pending[name].limited(limit))
            order.advance()
        meta["shares"] = {
            str(layer): {name: round(shares[layer].get(name, 0.0), 6) for name in by_layer[layer]} for layer in by_layer
        }
        return found

    def _shares(
        self, view: LayeredModel, tokens: Tokens, by_layer: Mapping[int, Mapping[str, Weight]]
    ) -> dict[int, dict[str, float]]:
        """What share of each projection's inputs is dropped, of layers of which that is known beforehand."""
        p = self.params
        if p.allocation == "uniform" or not p.sparsity:
            return {layer: dict.fromkeys(weights, p.sparsity) for layer, weights in by_layer.items()}
        if p.allocation == "greedy":
            return {}
        order, raises = InOrder(view, tokens.select(slice(tokens.batch_size)), self.seed), {}
        for layer in range(view.n_layers):
            raises[layer] = list(greedy(order, _pending(by_layer[layer]), p.step))
            order.advance()
        return spent(raises, p.sparsity * sum(_total(_pending(weights)) for weights in by_layer.values()))


def _pending(weights: Mapping[str, Weight]) -> dict[str, Target]:
    return {name: Target(weight, Rule(Limit())) for name, weight in weights.items()}


def _total(pending: Mapping[str, Target]) -> int:
    return sum(target.numel for target in pending.values())


class Raise(NamedTuple):
    """One step of a search for shares: a projection's goes ``before`` to ``share``.

    Attributes:
        weights: how many fewer are read.
        cost: by how much the layer's relative error grows for each of them.
    """

    name: str
    before: float
    share: float
    weights: float
    cost: float


def greedy(order: InOrder, pending: Mapping[str, Target], step: float) -> Iterator[Raise]:
    """Raises shares of a layer's projections where the layer's output minds least, until next to nothing is read."""
    samples = order.samples(pending)
    (dense,) = order.outputs({})
    size = {name: target.numel for name, target in pending.items()}
    shares = dict.fromkeys(pending, 0.0)

    @functools.cache
    def limited(name: str, share: float) -> Target:
        return pending[name].limited(Limit(samples[name].quantile(share)))

    def errors(shares: Mapping[str, float]) -> tuple[float, float]:
        """Squared, and relative to each token's output."""
        (out,) = order.outputs({name: limited(name, share) for name, share in shares.items() if share})
        off = (out - dense).double().square().sum(-1)
        return float(off.sum()), float((off / dense.double().square().sum(-1).clamp(min=1e-30)).mean())

    now = relative = 0.0
    while left := [name for name, share in shares.items() if share < HIGHEST]:
        tried = {}
        for name in left:
            share = min(HIGHEST, shares[name] + step * max(size.values()) / size[name])
            tried[name] = share, (share - shares[name]) * size[name], *errors({**shares, name: share})
        name = min(tried, key=lambda name: (tried[name][2] - now) / tried[name][1])
        share, weights, now, then = tried[name]
        yield Raise(name, shares[name], share, weights, (then - relative) / weights)
        shares[name], relative = share, then


def spent(raises: Mapping[int, Iterable[Raise]], budget: float) -> dict[int, dict[str, float]]:
    """Shares by layer with which so many weights are not read, the last step cut short: layers' steps in their order,
    each time the cheapest next one."""
    shares: dict[int, dict[str, float]] = {layer: {} for layer in raises}
    rest = {layer: iter(steps) for layer, steps in raises.items()}
    ahead = {layer: step for layer, steps in rest.items() if (step := next(steps, None)) is not None}
    while ahead and budget > 0:
        layer = min(ahead, key=lambda layer: (ahead[layer].cost, layer))
        step = ahead.pop(layer)
        part = min(1.0, budget / step.weights)
        shares[layer][step.name] = step.before + part * (step.share - step.before)
        budget -= step.weights
        if budget > 0 and (following := next(rest[layer], None)) is not None:
            ahead[layer] = following
    return shares


class Wina(InputSparsifier):
    """Keeps the inputs with the largest |x_i| ||W[:, i]|| of each token: round((1 - sparsity) d_in), at least one.

    For a matrix with orthogonal columns no other choice of as many inputs changes W x less. ``transform``
    "column_orthogonal" gives projections that read the same vector the basis V in which the columns of one of them (the
    gate, the key, or the only one) are orthogonal: W V reads mask(V^T x), and without a mask the function is the same.
    What o and down read has no such leader and keeps its basis.

    V^T x is one more D x D product for all that read x. Folding the bases into the stream, with which an RMSNorm
    commutes once its gain is in the next weights, would not save it: every basis is another, so that each skip
    connection would have to turn the stream by V_before^T V_after, as many D x D products, and only a basis for the
    whole depth, in which the columns of one matrix are orthogonal, is free. Here weights and norms stay as they are,
    whatever the residual scheme.

    Source: Chen et al. 2025, arXiv 2505.19427, sec. 3
    """

    class Params(InputSparsifier.Params):
        sparsity: float = Field(default=0.5, ge=0, lt=1)
        transform: Literal["none", "column_orthogonal"] = "none"

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
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
