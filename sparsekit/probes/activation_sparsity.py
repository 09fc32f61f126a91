"""How sparse feed-forwards are: which neurons a token needs, by what each contributes to its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from sparsekit.probes import released_sparsity as released
from sparsekit.probes.activity import Activity, spread
from sparsekit.probes.base import Array, DenseProbe, Observer, ProbeResult, Tokens, bootstrap, dense_pass
from sparsekit.probes.cett import Calibration, Found, above, search, write_thresholds
from sparsekit.probes.layered import LayeredModel, Pass
from sparsekit.probes.neurons import (
    SITES,
    WITH_INPUT,
    Active,
    Gates,
    as_rows,
    downs,
    fat_eps,
    nonzero,
    sparse_losses,
    top_k,
    unseen,
    unseen_parts,
)


class ActivationSparsity(DenseProbe):
    """How many neurons of a feed-forward are active: exactly, by rank, by gate, or by what perplexity bears (CETT-PPL).

    A neuron contributes n_i = r a_i W_down[:, i]: a_i the input of the down projection, r the routing weight (1 outside
    of mixtures), c_i = ||n_i||. By ``metric``, a_i is active where it is not 0 and

    * nonzero: no more than that;
    * top_k: it is among the ``k`` (a share) largest |a_i| of its token;
    * fat_eps: the gate |act(W_gate x)_i| > ``eps`` (ungated: |a_i|);
    * cett: c_i >= t_l, where the mean over tokens of ||sum over c_i < t_l of n_i|| / ||sum n_i|| is ``cett``;
    * cett_ppl: as cett, with the largest CETT whose thresholds raise perplexity by at most ``p``.

    activation_ratio is the mean over layers and tokens of active / visited neurons; in mixtures activation_ratio_of_all
    is that of all experts' neurons. The first three are read off the dense model; cett and cett_ppl off the model that
    drops what is inactive (``activation_ratio_dense``: off the dense one, with the same thresholds). Thresholds come
    from every other sequence and the rest is measured, unless ``held_out=false``: perplexity_ratio is on the former and
    perplexity_ratio_held_out on the latter. ``meta`` has the thresholds as text, the bracket and the status: ok;
    saturated, where a CETT of 1 is feasible; step, where the ratio jumps over 1 + p.

    Also: aggregated_sparsity, the share of neurons that none of ``recent`` tokens in a row uses; union_density, the
    share that 8 tokens in a row use together; frequency [L, C]; heat_map, the activation ratio of each
    layer and token of ``pictured`` sequences.
    ``compat="released"`` measures as Sparsing Law's released code does, its defects included (dense layers only).

    Source: Luo et al. 2024, arXiv 2411.02335, sec. 4.1; CETT: Zhang et al. 2024, arXiv 2402.03804
    """

    class Params(DenseProbe.Params):
        metric: Literal["nonzero", "top_k", "fat_eps", "cett", "cett_ppl"] = "cett_ppl"
        k: float = Field(default=0.1, gt=0, le=1)
        eps: NonNegativeFloat = 0.01
        cett: float = Field(default=0.2, gt=0, lt=1)
        p: PositiveFloat = 0.01
        grid: PositiveInt = 64
        held_out: bool = True
        recent: PositiveInt = 64
        pictured: NonNegativeInt = 4
        compat: Literal["released"] | None = None

    def __init__(self, params: Any = None):
        super().__init__(params)
        # the others look at the tokens more than once
        dense = self.params.metric not in ("cett", "cett_ppl") and self.params.compat is None
        self.shares = dense or self.params.metric == "nonzero"  # type: ignore[misc]

    def observer(self, view: LayeredModel, tokens: Tokens) -> Measured:
        """For the metrics that need no more than one look at the dense model.

        Raises:
            DataError: no layer's activations can be seen.
        """
        missing = unseen(view)
        if self.params.metric == "fat_eps":
            gates = Gates(view)
            return Measured(self, view, partial(fat_eps, self.params.eps, gates), missing | gates.missing, WITH_INPUT)
        return Measured(
            self, view, nonzero if self.params.metric == "nonzero" else partial(top_k, self.params.k), missing
        )

    @torch.no_grad()
    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        if self.params.compat is not None:
            released.demand_dense(view)
        if self.params.metric in ("cett", "cett_ppl"):
            return self._by_cett(view, tokens)
        return super().run(view, tokens) if self.shares else self._by_released_gate(view, tokens)

    def _by_cett(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        p = self.params
        banks, missing = downs(view)
        calibration: Calibration | released.HeldCalibration
        limit: Callable[..., Active]
        find: Callable[..., Found]
        if p.compat is None:
            calibration, limit, find = Calibration(banks, view.n_layers, p.grid, self.seed), above, search
        else:
            calibration, find = released.HeldCalibration(banks, view.n_layers), released.search
            limit = partial(released.above_in_dtype, dtype=view.dtype)
        apart = p.held_out and p.compat is None and len(tokens.ids_ST) > 1
        ours, measured = (tokens.select(slice(i, None, 2)) for i in (0, 1)) if apart else (tokens, tokens)
        dense_pass(view, ours, [calibration])
        dense_S = np.concatenate(calibration.losses)

        def ratio_with(thresholds: Sequence[float]) -> float:
            return perplexity_ratio(
                np.stack((sparse_losses(view, ours, limit(thresholds, banks), missing), dense_S), 1)
            )

        if p.metric == "cett_ppl":
            found = find(calibration.thresholds, ratio_with, p.p)
        else:
            thresholds = calibration.thresholds(p.cett)
            found = Found(p.cett, (p.cett, p.cett), thresholds, ratio_with(thresholds), "ok", 1)
        active = limit(found.thresholds, banks)
        dense = Measured(self, view, active, missing)
        (of_dense,) = dense_pass(view, measured, [dense])
        result, sparse_S = self._of_sparse(view, measured, active, missing)
        for name in ("activation_ratio", "activation_ratio_of_all"):
            if name in of_dense.scalars:
                result.scalars[f"{name}_dense"] = of_dense.scalars[name]
                result.intervals[f"{name}_dense"] = of_dense.intervals[name]
                result.per_layer[f"{name}_dense"] = of_dense.per_layer[name]
        result.scalars |= {"cett": found.cett, "perplexity_ratio": found.ratio}
        result.intervals |= {"cett": None, "perplexity_ratio": None}
        result.remark("cett and perplexity_ratio have no intervals: they are what the thresholds were chosen by")
        if apart:
            pairs = np.stack((sparse_S, np.concatenate(dense.losses)), 1)
            result.scalars["perplexity_ratio_held_out"] = perplexity_ratio(pairs)
            result.intervals["perplexity_ratio_held_out"] = bootstrap(pairs, perplexity_ratio, self.seed)
        elif p.compat is None and p.held_out:
            result.remark("one sequence cannot be divided: thresholds come from what is measured")
        tell(result, found, calibration)
        return result

    def _by_released_gate(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        """top_k and fat_eps of Sparsing Law's code, in the model that drops what they call inactive."""
        gates = Gates(view)
        missing = unseen(view) | gates.missing
        dense = Measured(self, view, nonzero, missing)
        dense_pass(view, tokens, [dense])
        by_rank = self.params.metric == "top_k"
        active = (
            partial(released.top_k_of_tensor, self.params.k)
            if by_rank
            else partial(released.fat_below, self.params.eps)
        )
        result, sparse_S = self._of_sparse(view, tokens, partial(active, gates), missing)
        pairs = np.stack((sparse_S, np.concatenate(dense.losses)), 1)
        result.scalars["perplexity_ratio"] = perplexity_ratio(pairs)
        result.intervals["perplexity_ratio"] = bootstrap(pairs, perplexity_ratio, self.seed)
        return result

    def _of_sparse(
        self, view: LayeredModel, tokens: Tokens, active: Active, missing: Mapping[int, str]
    ) -> tuple[ProbeResult, Array]:
        """What is active in the model that drops the rest, and its losses."""
        activity = Activity(view, self.params.recent, self.params.pictured)
        losses_S = sparse_losses(view, tokens, active, missing, activity.add)
        return self.told(activity, missing), losses_S

    def told(self, activity: Activity, missing: Mapping[int, str]) -> ProbeResult:
        """What was counted, and why layers are missing."""
        result = ProbeResult(meta={"metric": self.params.metric, "compat": self.params.compat})
        activity.fill(result, self.seed)
        for layer, reason in sorted(missing.items()):
            result.remark(f"layer {layer}: not applicable: {reason}")
        for layer in unseen_parts(activity.view):
            result.remark(f"layer {layer}: a shared expert cannot be seen; the numbers are of the other experts")
        return result


class Measured(Observer):
    """What a rule calls active, in the dense model, and its losses."""

    def __init__(
        self,
        probe: ActivationSparsity,
        view: LayeredModel,
        active: Active,
        missing: Mapping[int, str],
        sites: Sequence[str] = SITES,
    ):
        self.probe, self.active, self.missing, self.sites = probe, active, missing, sites
        self.activity = Activity(view, probe.params.recent, probe.params.pictured)
        self.losses: list[Array] = []

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        if layer not in self.missing:
            kept = self.active(layer, seen)
            self.activity.add(layer, {site: (as_rows(seen[site]), x) for site, x in kept.items()}, *batch.ids_BT.shape)

    def end(self, batch: Pass, h_BTD: Tensor) -> None:
        self.losses.append(batch.losses(h_BTD).double().cpu().numpy())

    def result(self) -> ProbeResult:
        return self.probe.told(self.activity, self.missing)


def tell(result: ProbeResult, found: Found, calibration: Calibration | released.HeldCalibration) -> None:
    """Adds the thresholds and how they were come by."""
    n_layers = len(found.thresholds)
    result.per_layer["threshold"] = np.array(found.thresholds)
    result.meta |= {
        "status": found.status, "bracket": list(found.bracket), "runs": found.runs,
        "thresholds": write_thresholds(found.thresholds),
    }  # fmt: skip
    if isinstance(calibration, released.HeldCalibration):
        return
    zero = {layer: curve.zero_tokens for layer, curve in calibration.curves.items()}
    result.per_layer["zero_output_tokens"] = spread(n_layers, zero)
    if sum(zero.values()):
        result.remark(f"{sum(zero.values())} times a token's feed-forward output was 0; CETT leaves these out")
    points = {layer: curve.measured() for layer, curve in calibration.curves.items()}
    most = max(len(t) for t, _ in points.values())
    for index, name in enumerate(("curve_t", "curve_cett")):
        padded = {n: np.pad(x[index], (0, most - len(x[index])), constant_values=np.nan) for n, x in points.items()}
        result.arrays[name] = spread(n_layers, padded, most)


def perplexity_ratio(losses_S2: Array) -> float:
    """exp(mean of the first - mean of the second)."""
    sparse, dense = losses_S2.mean(0)
    return float(np.exp(sparse - dense))
