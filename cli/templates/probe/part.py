"""A probe for sparsekit, a measure of a trained model; ``sparsekit probe RUN --probes new_part``.

Shapes: B sequences, T tokens, D d_model; S sequences in all, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveFloat
from sparsekit.probes.base import DenseProbe, Observer, ProbeResult, Tokens, bootstrap
from sparsekit.probes.layered import LayeredModel, Pass
from torch import Tensor


class NewPart(DenseProbe):
    """How far each layer moves the stream: the mean over tokens of ||h' - h||^p / ||h||^p, h before it and h' after.

    Per layer and, as their mean, for the model: ``step``.

    Source: sparsekit
    """

    class Params(DenseProbe.Params):
        p: PositiveFloat = 1.0

    def observer(self, view: LayeredModel, tokens: Tokens) -> Steps:
        return Steps(self.params.p, self.seed)


class Steps(Observer):
    """Looks on while all probes share one pass over the tokens."""

    def __init__(self, p: float, seed: int):
        self.p, self.seed = p, seed
        self.by_layer: dict[int, list[Tensor]] = {}

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        step_BT = ((out_BTD - h_BTD).double().norm(dim=-1) / h_BTD.double().norm(dim=-1)) ** self.p
        self.by_layer.setdefault(layer, []).append(step_BT.mean(-1).cpu())

    def result(self) -> ProbeResult:
        step_SL = torch.stack([torch.cat(self.by_layer[layer]) for layer in sorted(self.by_layer)], dim=1).numpy()
        result = ProbeResult()
        result.per_layer["step"] = step_SL.mean(0)
        result.scalars["step"] = float(step_SL.mean())
        result.intervals["step"] = bootstrap(step_SL.mean(1), seed=self.seed)
        return result
