"""Sparsifiers of a feed-forward's neurons, the inputs of its down projection: cett, fat_eps, top_k."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.probes import cett
from sparsekit.probes.anatomy import Weight
from sparsekit.probes.base import Tokens, dense_pass
from sparsekit.probes.layered import LayeredModel
from sparsekit.probes.neurons import Down, Downs, sparse_losses
from sparsekit.sparsifiers.base import Candidates, InOrder, Parts, Sparsifier, level_for, realised_with
from sparsekit.sparsifiers.installed import SiteOf, Target
from sparsekit.sparsifiers.mixtures import Experts, neurons
from sparsekit.sparsifiers.rules import Limit, Rule, Sample, n_kept
from sparsekit.sparsifiers.sites import DOWN, SHARED, FeedForward, feed_forwards


def one_of(params: Any, *names: str) -> None:
    """Refuses several ways at once of saying how much is to be dropped."""
    given = [name for name in names if getattr(params, name) is not None]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(names)}, not {' and '.join(given)}")


class NeuronSparsifier(Sparsifier):
    """Masks what down projections read: of dense feed-forwards, and of the experts of mixtures.

    Attributes:
        gated: it wants to see gates where a feed-forward has any.
    """

    gated = False

    def candidates(self, view: LayeredModel) -> Candidates:
        return {where: (parts.down, parts) for where, parts in self.places(view).items()}

    def places(self, view: LayeredModel, meta: dict[str, Any] | None = None) -> dict[SiteOf, FeedForward | Experts]:
        """All neurons, by layer and DOWN, or in a mixture EXPERTS and SHARED; ``meta`` takes what is missing."""
        found, missing = neurons(view, self.gated)
        _note(missing, meta)
        return found

    def parts(self, view: LayeredModel, meta: dict[str, Any] | None = None) -> dict[int, FeedForward]:
        """The dense feed-forwards alone, by layer; ``meta`` takes why layers have none."""
        found, missing = feed_forwards(view, self.gated)
        _note(missing, meta)
        return found

    def pending(self, view: LayeredModel, layer: int, parts: FeedForward | Experts, name: str = DOWN) -> Target:
        """A layer's target before its limit is known."""
        return self.target(view, (layer, name), parts.down, parts, Limit(torch.zeros(())))


def _note(missing: Mapping[int, str], meta: dict[str, Any] | None) -> None:
    if meta is not None and missing:
        meta["missing"] = {str(layer): reason for layer, reason in missing.items()}


class Cett(NeuronSparsifier):
    """Drops neuron i where its output ||a_i W_down[:, i]|| is below its layer's threshold, Sparsing Law's.

    Thresholds t_l are such that each layer's CETT, the mean over tokens of ||sum over c_i < t_l of n_i|| / ||sum n_i||,
    is the same: the largest at which perplexity on the calibration data rises by at most ``ppl`` (``p`` is another
    name of it; 0.01 where nothing is given), or ``cett`` itself, or the one that drops a share ``sparsity`` of neurons.
    Or else ``thresholds``, one a layer: a list, a text in Sparsing Law's format, a file that holds one, or the result
    (.json) of the probe activation_sparsity. In a mixture neurons are those of the experts that a token visits, and
    n_i has the routing weight in it.

    Source: Luo et al. 2024, arXiv 2411.02335, sec. 4.1
    """

    class Params(NeuronSparsifier.Params):
        ppl: PositiveFloat | None = None
        cett: float | None = Field(default=None, ge=0, le=1)
        sparsity: float | None = Field(default=None, ge=0, lt=1)
        thresholds: list[float] | str | None = None
        grid: PositiveInt = 64

        @model_validator(mode="before")
        @classmethod
        def _p(cls, data: Any) -> Any:
            """The probe's name for the same."""
            if isinstance(data, dict) and "p" in data and "ppl" not in data:
                return {"ppl" if key == "p" else key: value for key, value in data.items()}
            return data

        @model_validator(mode="after")
        def _one(self) -> Cett.Params:
            one_of(self, "ppl", "cett", "sparsity", "thresholds")
            return self

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
        norm_EF = Down.of(weight.weight).norm_EF
        if isinstance(parts, Experts):
            return Target(weight, Rule(limit, norm_EF, inclusive=True, by_routing=True), parts)
        scale = 1.0 if parts is None else parts.scale
        return Target(weight, Rule(limit, norm_EF[0] * scale, inclusive=True), parts)

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        places, p = self.places(view, meta), self.params
        if p.thresholds is not None:
            return _limits(places, read(p.thresholds, view.n_layers))
        banks: Downs = {layer: {} for layer, _ in places}
        for (layer, name), each in places.items():
            banks[layer]["shared_act" if name == SHARED else "ffn_act"] = Down.of(each.down.weight)
        curves = cett.Calibration(banks, view.n_layers, p.grid, self.seed)
        dense_pass(view, tokens, [curves])
        if p.cett is not None or p.sparsity is not None:
            level = p.cett if p.cett is not None else 0.0
            if p.sparsity:
                level = level_for(
                    p.sparsity,
                    lambda at: realised_with(view, tokens, self.targets(view, _limits(places, curves.thresholds(at)))),
                )
            meta["cett"] = level
            return _limits(places, curves.thresholds(level))
        missing = {layer: "" for layer in range(view.n_layers) if layer not in banks}
        dense = float(torch.cat([torch.from_numpy(x) for x in curves.losses]).mean())

        def ratio_with(thresholds: Sequence[float]) -> float:
            sparse = sparse_losses(view, tokens, cett.above(thresholds, banks), missing)
            return math.exp(float(sparse.mean()) - dense)

        found = cett.search(curves.thresholds, ratio_with, p.ppl or 0.01)
        meta |= {"cett": found.cett, "status": found.status, "perplexity_ratio": found.ratio, "runs": found.runs}
        return _limits(places, found.thresholds)


def _limits(places: Iterable[SiteOf], thresholds: Sequence[float]) -> dict[SiteOf, Limit]:
    return {(layer, name): Limit(torch.tensor(thresholds[layer], dtype=torch.float64)) for layer, name in places}


def read(given: list[float] | str, n_layers: int) -> tuple[float, ...]:
    """Thresholds from a list, a text, a file of it, or a probe's result.

    Raises:
        DataError: it is none of these, or there is not one a layer.
    """
    text = ",".join(map(repr, given)) if isinstance(given, list) else given
    path = Path(text)
    if isinstance(given, str) and ("/" in text or path.suffix in (".json", ".txt")):
        try:
            text = path.read_text(encoding="utf-8")
            text = json.loads(text)["meta"]["thresholds"] if path.suffix == ".json" else text
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or f"it has no thresholds ({error!r})"
            raise DataError(f"{path}: cannot be read as thresholds ({reason}); give one number a layer") from None
    return cett.read_thresholds(text, n_layers)


class FatEps(NeuronSparsifier):
    """Drops neuron i where its gate |act(W_gate x)_i| is at most eps; where there is no gate, |a_i|.

    ``eps`` is one number for the model, 0.01 where nothing is given; or the one that drops a share ``sparsity``.

    Source: Luo et al. 2024, arXiv 2411.02335, sec. 4.1 (FAT-eps)
    """

    gated = True

    class Params(NeuronSparsifier.Params):
        eps: NonNegativeFloat | None = None
        sparsity: float | None = Field(default=None, ge=0, lt=1)

        @model_validator(mode="after")
        def _one(self) -> FatEps.Params:
            one_of(self, "eps", "sparsity")
            return self

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
        return Target(weight, Rule(limit, by_gate=parts is not None and parts.gate is not None), parts)

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        places = self.places(view, meta)

        def all_at(eps: Tensor) -> dict[SiteOf, Limit]:
            return {where: Limit(eps) for where in places}

        if not self.params.sparsity:
            eps = 0.0 if self.params.sparsity is not None else 0.01 if self.params.eps is None else self.params.eps
            return all_at(torch.tensor(eps, dtype=torch.float64))
        scores = Sample(len(places), self.seed)
        order = InOrder(view, tokens, self.seed)
        for layer in range(view.n_layers):
            here = {name: each for (at, name), each in places.items() if at == layer}
            pending = {name: self.pending(view, layer, each, name) for name, each in here.items()}
            for sample in order.samples(pending).values():
                scores.add(sample.scores())
            order.advance()
        # of the dense model; what is dropped moves later layers' gates
        level = level_for(
            self.params.sparsity,
            lambda at: realised_with(view, tokens, self.targets(view, all_at(scores.quantile(at)))),
        )
        return all_at(scores.quantile(level))


class TopK(NeuronSparsifier):
    """Keeps the k largest |a_i| of each token's neurons.

    ``k`` is a share of them, 0.1 where nothing is given, or 1 - ``sparsity``: round(k d_ff) stay, at least one. In a
    mixture they are the largest of all routed experts that the token visits, and apart from these of a shared one.

    Source: Luo et al. 2024, arXiv 2411.02335, sec. 4.1 (top-k)
    """

    class Params(NeuronSparsifier.Params):
        k: float | None = Field(default=None, gt=0, le=1)
        sparsity: float | None = Field(default=None, ge=0, lt=1)

        @model_validator(mode="after")
        def _one(self) -> TopK.Params:
            one_of(self, "k", "sparsity")
            return self

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
        return Target(weight, Rule(limit), parts)

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        p = self.params
        share = 1 - p.sparsity if p.sparsity is not None else 0.1 if p.k is None else p.k
        found = self.places(view, meta).items()
        return {where: Limit(k=n_kept(share, each.down.weight.shape[-1])) for where, each in found}
