"""What is lost when two layers change places, or when layers are left out.

Shapes, beside those of base.py: R branches, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.base import Array, Probe, ProbeResult, Tokens
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

Pair = tuple[int, int]


class Permutation(Probe):
    """P(i,j) = |L_swap(i,j) - L| / L, L the loss, and L_swap(i,j) that with layers i and j in each other's place.

    The matrix ``score`` [L, L] is symmetric, 0 on the diagonal, nan where a pair was not asked for; per layer,
    ``score`` is P_i = mean over j != i of P(i,j). Scalars: ``permutation``, the mean over pairs, and ``depth_weighted``
    = sum_i (i + 1) P_i / sum_i (i + 1).

    A branch (i,j) starts from the undisturbed h_i, and goes through j, i+1 … j-1, i, j+1 … L-1. No two branches ever
    have the same input of the same layer, so that L + sum_i (L-1-i)(L-i) layers are the fewest, and what is run.

    * ``pairs``: "all", "adjacent" (j = i + 1), "none", or one, "2-5".
    * ``exact``: each branch goes through the layers by itself, in batches of the size asked for: bit for bit what the
      permuted model would compute on such a batch.
    * ``removal`` "layers": also, per layer, ``removal`` = L_without - L in nats. "spans": also the matrix ``removal``
      [first, last] with all layers from first to last left out, nan where last < first. Scalar ``removal``: the mean
      over layers.

    Raises:
        ViewError: there are no two layers, or not the pair that was asked for.

    Source: arXiv 2603.15389; removal: Men et al. 2024, arXiv 2403.03853
    """

    class Params(BranchParams):
        pairs: Annotated[str, Field(pattern=r"^(all|adjacent|none|\d+-\d+)$")] = "all"
        exact: bool = False
        removal: Literal["none", "layers", "spans"] = "none"

    @torch.no_grad()
    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        n_layers, params = view.n_layers, self.params
        pairs = wanted_pairs(params.pairs, n_layers)
        spans = wanted_spans(params.removal, n_layers)
        # the undisturbed h_0 … h_L are held beside the branches
        most = n_layers + 1 + max(len(pairs), len(spans), 1)
        plan = Plan.of(view, tokens, params, most, view.dtype, apart=params.exact)
        at_a_time = max(1, plan.states - n_layers - 1)
        rows = 1 + len(pairs) + len(spans)
        lost_RS = torch.zeros(rows, len(tokens.ids_ST), dtype=wide(view.dtype), device=view.device)
        counted = Counted(view)
        with compiled(view, params.compile):
            schedules: list[Any] = [Swaps(some, n_layers, view.device) for some in groups(pairs, at_a_time)]
            schedules += [Removals(some, n_layers) for some in groups(spans, at_a_time)]
            first = 0
            for ids_BT in tokens.batches(plan.sequences):
                batch, which = view.start(ids_BT), slice(first, first + len(ids_BT))
                dense_RBTD = undisturbed(batch)
                lost_RS[0, which] = batch.losses(dense_RBTD[-1])
                row = 1
                for schedule in schedules:
                    lost_RB = losses(batch, schedule.run(batch, dense_RBTD, plan.branches), plan.branches)
                    lost_RS[row : row + len(lost_RB), which] = lost_RB
                    row += len(lost_RB)
                first += len(ids_BT)
                counted.floor += (
                    n_layers + sum(n_layers - i for i, _ in pairs) + sum(n_layers - 1 - b for _, b in spans)
                )
        samples_SR = lost_RS.double().cpu().numpy().T
        result = ProbeResult(meta=counted.told())
        if pairs:
            self._tell_swaps(result, samples_SR[:, : 1 + len(pairs)], pairs, n_layers)
        if spans:
            self._tell_removals(result, np.delete(samples_SR, range(1, 1 + len(pairs)), axis=1), spans, n_layers)
        return result

    def _tell_swaps(self, result: ProbeResult, samples_SR: Array, pairs: Sequence[Pair], n_layers: int) -> None:
        i, j = np.array(pairs).T

        def matrix(mean_R: Array) -> Array:
            score = np.full((n_layers, n_layers), np.nan)
            score[i, j] = score[j, i] = of_pairs(mean_R)
            return score

        def of_pairs(mean_R: Array) -> Array:
            return np.asarray(np.abs(mean_R[1:] - mean_R[0]) / mean_R[0])

        measures: dict[str, Callable[[Array], float]] = {
            "permutation": lambda mean_R: float(of_pairs(mean_R).mean()),
            "depth_weighted": lambda mean_R: depth_weighted(of_layers(matrix(mean_R))),
        }
        mean_R = samples_SR.mean(0)
        for name, measure in measures.items():
            result.scalars[name] = measure(mean_R)
            result.intervals[name] = interval(samples_SR, measure, self.seed)
        result.matrices["score"] = score = matrix(mean_R)
        result.per_layer["score"] = of_layers(score)
        np.fill_diagonal(score, 0.0)

    def _tell_removals(self, result: ProbeResult, samples_SR: Array, spans: Sequence[Pair], n_layers: int) -> None:
        single = [1 + row for row, (first, last) in enumerate(spans) if first == last]
        change = (samples_SR[:, 1:] - samples_SR[:, :1]).mean(0)
        result.per_layer["removal"] = change[np.array(single) - 1]
        result.scalars["removal"] = float(result.per_layer["removal"].mean())
        by_sequence = samples_SR[:, single].mean(1) - samples_SR[:, 0]
        result.intervals["removal"] = interval(by_sequence, float, self.seed)
        if self.params.removal == "spans":
            matrix = np.full((n_layers, n_layers), np.nan)
            matrix[tuple(np.array(spans).T)] = change
            result.matrices["removal"] = matrix
            result.meta["axes"] = {"removal": ("first left out", "last left out")}


def wanted_pairs(which: str, n_layers: int) -> list[Pair]:
    """The pairs i < j that are asked for, sorted by j and then i.

    Raises:
        ViewError: the model has no such pair.
    """
    if which == "none":
        return []
    if n_layers < 2:
        raise ViewError("permutation: the model has one layer, which has none to change places with; say pairs=none")
    if which in ("all", "adjacent"):
        return [(i, j) for j in range(n_layers) for i in range(j) if which == "all" or j == i + 1]
    i, j = sorted(int(layer) for layer in which.split("-"))
    if i == j or j >= n_layers:
        raise ViewError(f"permutation: pairs={which} are no two of the layers 0 to {n_layers - 1}")
    return [(i, j)]


def wanted_spans(which: str, n_layers: int) -> list[Pair]:
    """(first, last) of what is left out, sorted by last and then first."""
    if which == "none":
        return []
    return [(a, b) for b in range(n_layers) for a in range(b + 1) if which == "spans" or a == b]


def undisturbed(batch: Pass) -> Tensor:
    """h_0 … h_L, [L + 1, B, T, D]."""
    n_layers = batch.view.n_layers
    states_RBTD = empty_states(batch, n_layers + 1)
    states_RBTD[0] = batch.h_0
    for layer in range(n_layers):
        states_RBTD[layer + 1] = batch.layer(layer, states_RBTD[layer])
    return states_RBTD


class Swaps:
    """The order in which swapped branches go through the layers, so that each layer has as many at a time as can be.

    Four sweeps: h_i through j for all pairs of each j; then all pairs through what lies between; then through i for all
    pairs of each i; then through what comes after j. Which rows a step takes is worked out here once, as one tensor on
    the device, so that steps make nothing wait.
    """

    def __init__(self, pairs: Sequence[Pair], n_layers: int, device: torch.device):
        self.n = len(pairs)
        starts: list[tuple[int, list[int]]] = []
        steps: list[tuple[int, list[int]]] = []
        rows = range(self.n)
        for layer in range(n_layers):
            starts.append((layer, [row for row in rows if pairs[row][1] == layer]))
        for layer in range(n_layers):
            steps.append((layer, [row for row in rows if pairs[row][0] < layer < pairs[row][1]]))
        for layer in range(n_layers):
            steps.append((layer, [row for row in rows if pairs[row][0] == layer]))
        for layer in range(n_layers):
            steps.append((layer, [row for row in rows if pairs[row][1] < layer]))
        first = torch.tensor([i for i, _ in pairs], device=device)
        self.starts = [(layer, taken, first[taken]) for layer, taken in on_device(starts, device)]
        self.steps = on_device(steps, device)

    def run(self, batch: Pass, dense_RBTD: Tensor, at_a_time: int) -> Tensor:
        """h_L of the branches, [P, B, T, D]."""
        states_RBTD = empty_states(batch, self.n)
        for layer, rows, prefixes in self.starts:
            some = zip(rows.split(at_a_time), prefixes.split(at_a_time), strict=True)
            for taken, prefix in some:
                self._apply(batch, layer, dense_RBTD.index_select(0, prefix), taken, states_RBTD)
        for layer, rows in self.steps:
            for taken in rows.split(at_a_time):
                self._apply(batch, layer, states_RBTD.index_select(0, taken), taken, states_RBTD)
        return states_RBTD

    @staticmethod
    def _apply(batch: Pass, layer: int, h_RBTD: Tensor, rows: Tensor, states_RBTD: Tensor) -> None:
        out = batch.layer(layer, h_RBTD.flatten(0, 1)).view_as(h_RBTD)
        states_RBTD.index_copy_(0, rows, out)


class Removals:
    """Branches without some consecutive layers: (first, last) starts from the undisturbed h_first before last + 1."""

    def __init__(self, spans: Sequence[Pair], n_layers: int):
        self.spans, self.n_layers = spans, n_layers

    def run(self, batch: Pass, dense_RBTD: Tensor, at_a_time: int) -> Tensor:
        """h_L of the branches, [R, B, T, D]."""
        states_RBTD = empty_states(batch, len(self.spans))
        for row, (first, _) in enumerate(self.spans):
            states_RBTD[row] = dense_RBTD[first]
        for layer in range(self.n_layers):
            running = sum(last < layer for _, last in self.spans)  # they are sorted by it
            through(batch, layer, states_RBTD[:running], at_a_time)
        return states_RBTD


def on_device(steps: Sequence[tuple[int, list[int]]], device: torch.device) -> list[tuple[int, Tensor]]:
    """The steps that take any rows, with the rows on the device."""
    return [(layer, torch.tensor(rows, device=device)) for layer, rows in steps if rows]


def of_layers(matrix: Array) -> Array:
    """P_i = mean over j != i of P(i,j), over the pairs there are; nan for a layer that is in none."""
    there = ~np.isnan(matrix)
    sums, counts = np.where(there, matrix, 0).sum(1), there.sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def depth_weighted(score_L: Array) -> float:
    """sum_i (i + 1) P_i / sum_i (i + 1), over the layers that have a P_i."""
    depth, known = np.arange(1, len(score_L) + 1), ~np.isnan(score_L)
    return float((depth[known] * score_L[known]).sum() / depth[known].sum())
