"""Weights, attention and activations together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.probes.activation_sparsity import ActivationSparsity
from sparsekit.probes.attention_sparsity import AttentionSparsity
from sparsekit.probes.base import DenseProbe, Observer, Probe, ProbeResult, Tokens
from sparsekit.probes.layered import LayeredModel, Pass
from sparsekit.probes.weight_sparsity import WeightSparsity


class Sparsity(DenseProbe):
    """How sparse weights, attention and activations are: weight_, attention_ and activation_sparsity in one.

    Their results stand under ``weights/``, ``attention/`` and ``activations/``; their parameters are this probe's. What
    does not apply to a model is left out, with a remark.

    Source: sparsekit
    """

    class Params(WeightSparsity.Params, AttentionSparsity.Params, ActivationSparsity.Params):
        pass

    def observer(self, view: LayeredModel, tokens: Tokens) -> Together:
        """What is seen in the shared pass; the rest runs after it."""
        return Together(self, view, tokens)

    def parts(self) -> dict[str, Probe]:
        """The three, with their share of the parameters."""
        classes = {"weights": WeightSparsity, "attention": AttentionSparsity, "activations": ActivationSparsity}
        found: dict[str, Probe] = {}
        for name, cls in classes.items():
            found[name] = cls(cls.Params(**{field: getattr(self.params, field) for field in cls.Params.model_fields}))
            found[name].seed = self.seed
        return found


class Together(Observer):
    """The observers of those parts that share a pass."""

    def __init__(self, probe: Sparsity, view: LayeredModel, tokens: Tokens):
        self.view, self.tokens, self.parts = view, tokens, probe.parts()
        self.missing: dict[str, str] = {}
        self.observers: dict[str, Observer] = {}
        for name, part in self.parts.items():
            if isinstance(part, DenseProbe) and part.shares:
                try:
                    self.observers[name] = part.observer(view, tokens)
                except DataError as error:
                    self.missing[name] = str(error)
        self.sites = tuple(dict.fromkeys(site for each in self.observers.values() for site in each.sites))

    def begin(self, batch: Pass) -> None:
        for observer in self.observers.values():
            observer.begin(batch)

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        for observer in self.observers.values():
            observer.layer(batch, layer, h_BTD, out_BTD, {site: seen[site] for site in observer.sites if site in seen})

    def end(self, batch: Pass, h_BTD: Tensor) -> None:
        for observer in self.observers.values():
            observer.end(batch, h_BTD)

    def result(self) -> ProbeResult:
        whole = ProbeResult()
        for name, part in self.parts.items():
            if name in self.missing:
                continue
            try:
                found = self.observers[name].result() if name in self.observers else part.run(self.view, self.tokens)
            except DataError as error:
                self.missing[name] = str(error)
                continue
            for field in ("scalars", "per_layer", "matrices", "intervals", "arrays"):
                getattr(whole, field).update({f"{name}/{key}": value for key, value in getattr(found, field).items()})
            axes = {f"{name}/{key}": value for key, value in found.meta.pop("axes", {}).items()}
            whole.meta["axes"] = whole.meta.get("axes", {}) | axes
            for remark in found.meta.pop("remarks", ()):
                whole.remark(f"{name}: {remark}")
            whole.meta |= {f"{name}/{key}": value for key, value in found.meta.items()}
        for reason in self.missing.values():
            whole.remark(f"not applicable: {reason}")
        if not whole.scalars:
            raise DataError(f"sparsity: nothing can be measured; {next(iter(self.missing.values()))}")
        return whole
