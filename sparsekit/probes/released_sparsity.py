"""Activation sparsity as Sparsing Law's released code measures it, defects included, to compare with its numbers.

Source: Luo et al. 2024, arXiv 2411.02335, released code
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.probes.base import Array, Observer, ProbeResult
from sparsekit.probes.cett import CLOSEST, Found
from sparsekit.probes.layered import LayeredModel, Pass
from sparsekit.probes.neurons import Active, Downs, Gates, acts_of

NEARLY_0 = 1e-18
CANDIDATES = 65536


def demand_dense(view: LayeredModel) -> None:
    """Refuses mixtures, which the released code does not know.

    Raises:
        DataError: a layer is one.
    """
    mixed = [layer for layer in range(view.n_layers) if view.anatomy(layer).experts is not None]
    if mixed:
        raise DataError(
            f"activation_sparsity: compat 'released' measures dense feed-forwards only, and layer {mixed[0]} is a "
            f"mixture; leave compat out"
        )


def top_k_of_tensor(share: float, gates: Gates, layer: int, seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """Not each token's largest gates but the whole batch's."""
    gate_MF = gates.of(layer, "ffn_act", seen).clone()
    flat = gate_MF.view(-1)
    flat[flat.abs().topk(int(flat.numel() * (1 - share)), largest=False).indices] = 0
    return {"ffn_act": gate_MF.abs() >= NEARLY_0}


def fat_below(eps: float, gates: Gates, layer: int, seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """A gate of exactly eps counts as active, and so does an activation of 0 behind a gate that is not."""
    gate_MF = gates.of(layer, "ffn_act", seen)
    return {"ffn_act": gate_MF.float().abs() >= eps + NEARLY_0}


def above_in_dtype(thresholds: Sequence[float], banks: Downs, dtype: torch.dtype) -> Active:
    """|a_i| >= t / w_i, both sides in the model's dtype; zeros are active where t is 0."""
    norms = {layer: by_site["ffn_act"].weight_EDF[0].norm(dim=0).to(dtype) for layer, by_site in banks.items()}

    def active(layer: int, seen: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"ffn_act": ~(acts_of(seen["ffn_act"]).abs() < thresholds[layer] / norms[layer])}

    return active


class HeldCalibration(Observer):
    """All activations of all layers at once, out of which a threshold is searched for each CETT anew."""

    sites = ("ffn_act",)

    def __init__(self, banks: Downs, n_layers: int):
        self.banks, self.n_layers = banks, n_layers
        self.acts: dict[int, list[Tensor]] = {layer: [] for layer in banks}
        self.losses: list[Array] = []

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        if layer in self.acts:
            self.acts[layer].append(acts_of(seen["ffn_act"]).clone())

    def end(self, batch: Pass, h_BTD: Tensor) -> None:
        self.losses.append(batch.losses(h_BTD).double().cpu().numpy())

    def thresholds(self, target: float) -> tuple[float, ...]:
        """Of every layer, 0 where it has no activations."""
        found = [0.0] * self.n_layers
        for layer, by_site in self.banks.items():
            found[layer] = threshold(torch.cat(self.acts[layer]), by_site["ffn_act"].weight_EDF[0], target)
        return tuple(found)

    def result(self) -> ProbeResult:
        return ProbeResult()


def threshold(act_NF: Tensor, weight_DF: Tensor, target: float, candidates: int = CANDIDATES) -> float:
    """By halving a row of candidates that stand evenly between the least c and a 0.99 quantile.

    The quantile is of every so-manieth c only; where the first candidate's CETT is above the target, the largest is
    taken; one token whose output is 0 makes CETT nan, which counts as too little.
    """
    act_NF, weight_DF = act_NF.float(), weight_DF.float()
    c_NF = act_NF.abs() * weight_DF.norm(dim=0)
    sample = c_NF.flatten()[:: max(c_NF.numel() // candidates, 1)]
    t = torch.linspace(float(c_NF.min()), float(sample.quantile(0.99)), candidates)
    whole_N = (act_NF @ weight_DF.T).norm(dim=-1)
    left, right = 0, len(t) - 1
    while left < right:
        middle = (left + right) // 2
        tail_ND = act_NF.masked_fill(c_NF > t[middle].to(c_NF.device), 0.0) @ weight_DF.T
        if float((tail_ND.norm(dim=-1) / whole_N).mean()) > target:
            right = middle
        else:
            left = middle + 1
    return float(t[left - 1])


def search(
    thresholds_at: Callable[[float], Sequence[float]], ratio_with: Callable[[Sequence[float]], float], p: float
) -> Found:
    """Bisects CETT to the end and takes the middle of the last bracket, feasible or not; the status is always ok."""
    low, high, runs = 0.0, 1.0, 0
    while high - low > CLOSEST:
        middle = (low + high) / 2
        runs += 1
        if ratio_with(thresholds_at(middle)) < 1 + p:
            low = middle
        else:
            high = middle
    middle = (low + high) / 2
    thresholds = tuple(thresholds_at(middle))
    return Found(middle, (low, high), thresholds, ratio_with(thresholds), "ok", runs + 1)
