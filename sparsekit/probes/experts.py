"""What the experts of a mixture are given to do, and what is lost without one.

Shapes, beside those of base.py: R branches, of which 0 is the undisturbed one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sparsekit.components.contracts import Routing, wide
from sparsekit.probes.base import Array, DenseProbe, Observer, Probe, ProbeResult, Tokens
from sparsekit.probes.branches import (
    BranchParams,
    Counted,
    Plan,
    compiled,
    empty_states,
    groups,
    interval,
    losses,
    through,
)
from sparsekit.probes.layered import LayeredModel, Pass, ViewError


class ExpertLoad(DenseProbe):
    """How evenly tokens go to experts, and which experts they visit together.

    The load of an expert is the assignments to it over tokens; p is its share of all assignments. Per layer, and as
    scalars their means over mixtures: ``load_max`` = E max p, ``load_entropy`` = -sum p log p / log E, ``load_cv`` =
    std p / mean p (unbiased), ``confidence``, the mean over tokens of the largest weight that the router gives, and
    ``dropped``, assignments that a capacity cut over tokens, as the router counts them (0 where it has no such limit).
    Arrays: ``load`` [L, E], and ``co_activation`` [L, E, E], the share of tokens that visit both. nan where a layer is
    no mixture.

    Raises:
        ViewError: no layer has a router that can be seen.

    Source: Shazeer et al. 2017, arXiv 1701.06538, sec. 4; Fedus, Zoph & Shazeer 2021, arXiv 2101.03961, sec. 2.2
    """

    def observer(self, view: LayeredModel, tokens: Tokens) -> Loads:
        return Loads(view, len(tokens.ids_ST), self.seed)


class Loads(Observer):
    """Counts of assignments by sequence, on the device."""

    sites = ("router",)

    def __init__(self, view: LayeredModel, n_sequences: int, seed: int):
        self.view, self.seed, self.first = view, seed, 0
        self.experts = experts_of(view, "expert_load")
        most, n_layers = max(self.experts.values()), view.n_layers
        kind: dict[str, Any] = {"dtype": torch.float64, "device": view.device}
        self.load_SLE = torch.zeros(n_sequences, n_layers, most, **kind)
        self.together_LEE = torch.zeros(n_layers, most, most, **kind)
        self.told_SL2 = torch.zeros(n_sequences, n_layers, 2, **kind)  # confidence, dropped
        self.tokens = 0

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        if "router" not in seen:
            return
        routing, n_experts = seen["router"], self.experts[layer]
        (n_sequences, length), which = batch.ids_BT.shape, slice(self.first, self.first + len(batch.ids_BT))
        taken_NE = self.load_SLE.new_zeros(n_sequences * length, n_experts + 1)  # the last for what is not used
        ones_M = self.load_SLE.new_ones(routing.expert_M.shape)
        taken_NE.index_put_((routing.token_M, routing.expert_M), ones_M, accumulate=True)
        taken_NE = taken_NE[:, :-1]
        self.load_SLE[which, layer, :n_experts] = taken_NE.view(n_sequences, length, -1).mean(1)
        visited_NE = (taken_NE > 0).to(taken_NE.dtype)
        self.together_LEE[layer, :n_experts, :n_experts] += visited_NE.T @ visited_NE
        weight_M = torch.where(routing.expert_M < n_experts, routing.weight_M, 0).to(taken_NE.dtype)
        largest_N = weight_M.new_zeros(len(taken_NE)).scatter_reduce(0, routing.token_M, weight_M, "amax")
        self.told_SL2[which, layer, 0] = largest_N.view(n_sequences, length).mean(1)
        for module in self.view.blocks[layer].modules():
            if "dropped" in getattr(module, "counters", ()):
                self.told_SL2[which, layer, 1] = cast(Tensor, module.dropped)

    def end(self, batch: Pass, h_BTD: Tensor) -> None:
        self.first += len(batch.ids_BT)
        self.tokens += batch.ids_BT.numel()

    def result(self) -> ProbeResult:
        layers = sorted(self.experts)
        samples = torch.cat((self.load_SLE, self.told_SL2), dim=2).cpu().numpy()  # [S, L, E + 2]
        mean = samples.mean(0)
        result = ProbeResult()
        for index, name in enumerate(("load_max", "load_entropy", "load_cv", "confidence", "dropped")):
            of_layers = functools.partial(self._of_layers, index, layers)
            result.per_layer[name] = np.full(self.view.n_layers, np.nan)
            result.per_layer[name][layers] = of_layers(mean)
            result.scalars[name] = float(of_layers(mean).mean())
            result.intervals[name] = interval(samples, _mean_of(of_layers), self.seed)
        together = (self.together_LEE / self.tokens).cpu().numpy()
        load = mean[:, :-2].copy()
        for layer in range(self.view.n_layers):
            n_experts = self.experts.get(layer, 0)
            load[layer, n_experts:] = together[layer, n_experts:] = together[layer, :, n_experts:] = np.nan
        result.arrays |= {"load": load, "co_activation": together}
        remark_missing(result, self.view, layers)
        return result

    def _of_layers(self, index: int, layers: Sequence[int], mean: Array) -> Array:
        return np.array([_of_loads(mean[layer], self.experts[layer])[index] for layer in layers])


class ExpertImportance(Probe):
    """Loss without one expert, and without a mixture's whole sub-layer, less the model's loss; in nats.

    An expert is left out by taking its weight to be 0 wherever tokens visit it; nothing is routed anew. Array
    ``importance`` [L, E]; per layer ``expert_mean`` and ``expert_max`` of it, and ``sublayer``, where all that the
    feed-forward adds is left out, shared experts with it. Scalars: ``expert_importance``, the mean over experts and
    layers, and ``sublayer_importance``. nan where a layer is no mixture. The undisturbed h_l is where all branches of
    layer l start, and they go through the layers after it together.

    * ``experts``: false for the sub-layers alone.

    Raises:
        ViewError: no layer has a router that can be seen.
    """

    class Params(BranchParams):
        experts: bool = True

    @torch.no_grad()
    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        experts = experts_of(view, "expert_importance")
        most, n_layers = max(experts.values()) if self.params.experts else 0, view.n_layers
        plan = Plan.of(view, tokens, self.params, most + 2, view.dtype)
        # [L, E + 1, S], the last of a layer without its whole sub-layer
        lost_LRS = torch.full(
            (n_layers, most + 1, len(tokens.ids_ST)), torch.nan, dtype=wide(view.dtype), device=view.device
        )
        dense_S = lost_LRS.new_zeros(len(tokens.ids_ST))
        counted, first = Counted(view), 0
        with compiled(view, self.params.compile):
            for ids_BT in tokens.batches(plan.sequences):
                batch, which = view.start(ids_BT), slice(first, first + len(ids_BT))
                h = batch.h_0
                for layer in range(n_layers):
                    if layer in experts:
                        removed = list(range(experts[layer])) if self.params.experts else []
                        removed += [most] if view.sites(layer)["ffn_out"] is None else []
                        for some in groups(removed, plan.states - 1):
                            lost_RB = without(batch, layer, h, some, most, plan.branches)
                            for expert, lost_B in zip(some, lost_RB, strict=True):
                                lost_LRS[layer, expert, which] = lost_B
                        counted.floor += len(removed) * (n_layers - layer)
                    h = batch.layer(layer, h)
                dense_S[which] = batch.losses(h)
                counted.floor += n_layers
                first += len(ids_BT)
        result = self._told(view, sorted(experts), (lost_LRS - dense_S).double().cpu().numpy())
        result.meta |= counted.told()
        return result

    def _told(self, view: LayeredModel, layers: Sequence[int], change_LRS: Array) -> ProbeResult:
        result = ProbeResult()
        mean = change_LRS.mean(-1)
        result.per_layer["sublayer"] = mean[:, -1]
        known = [layer for layer in layers if view.sites(layer)["ffn_out"] is None]
        told = {"sublayer_importance": change_LRS[known, -1]} if known else {}
        for layer in set(layers) - set(known):
            result.remark(f"sublayer, layer {layer}: {view.sites(layer)['ffn_out']}")
        if self.params.experts:
            importance = result.arrays["importance"] = mean[:, :-1]
            for name, of in (("expert_mean", np.nanmean), ("expert_max", np.nanmax)):
                result.per_layer[name] = np.full(view.n_layers, np.nan)
                result.per_layer[name][layers] = of(importance[layers], axis=1)
            told["expert_importance"] = np.nanmean(change_LRS[layers, :-1], axis=1)
        for name, of_sequences in told.items():
            samples = of_sequences.mean(0)
            result.scalars[name] = float(samples.mean())
            result.intervals[name] = interval(samples, float, self.seed)
        remark_missing(result, view, layers)
        return result


def without(batch: Pass, layer: int, h_BTD: Tensor, removed: Sequence[int], whole: int, at_a_time: int) -> Tensor:
    """[R, B] losses with each of some experts removed from a layer; ``whole`` stands for all its sub-layer adds."""
    states_RBTD = empty_states(batch, len(removed))
    for state_BTD, expert in zip(states_RBTD, removed, strict=True):
        edit = {"ffn_out": torch.zeros_like} if expert == whole else {"router": unweighted(expert)}
        state_BTD.copy_(batch.observe(layer, h_BTD, [], edit)[0])
    for later in range(layer + 1, batch.view.n_layers):
        through(batch, later, states_RBTD, at_a_time)
    return losses(batch, states_RBTD, at_a_time)


def unweighted(expert: int) -> Any:
    """An edit by which an expert's outputs count 0."""

    def edit(routing: Routing) -> Routing:
        return routing._replace(weight_M=torch.where(routing.expert_M == expert, 0, routing.weight_M))

    return edit


def experts_of(view: LayeredModel, probe: str) -> dict[int, int]:
    """By layer how many experts it has, of those whose router can be seen.

    Raises:
        ViewError: there is none.
    """
    found: dict[int, int] = {}
    for layer in range(view.n_layers):
        if view.sites(layer)["router"] is None:
            anatomy = view.anatomy(layer)
            n: Any = anatomy.experts.n_experts if anatomy.experts else getattr(anatomy.ffn, "n_experts", None)
            if n:
                found[layer] = int(n)
    if not found:
        raise ViewError(f"{probe}: no layer is a mixture whose router can be seen ({view.sites(0)['router']})")
    return found


def remark_missing(result: ProbeResult, view: LayeredModel, layers: Sequence[int]) -> None:
    for layer in range(view.n_layers):
        if layer not in layers:
            result.remark(f"layer {layer}: {view.sites(layer)['router'] or 'how many experts it has is not known'}")


def _mean_of(function: Callable[[Array], Array]) -> Callable[[Array], float]:
    return lambda mean: float(function(mean).mean())


def _of_loads(row: Array, n_experts: int) -> tuple[float, float, float, float, float]:
    """load_max, load_entropy, load_cv, confidence, dropped, from the loads of a layer and its last two."""
    load, (confidence, dropped) = row[:n_experts], row[-2:]
    share = load / max(load.sum(), 1e-30)
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(max(2, n_experts))
    cv = share.std(ddof=1) * n_experts if n_experts > 1 else 0.0
    return float(share.max() * n_experts), float(entropy), float(cv), float(confidence), float(dropped)
