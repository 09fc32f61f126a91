"""Which neurons of a feed-forward are active, token by token: counts of them, and of how they are shared by tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.probes.anatomy import ExpertRows
from sparsekit.probes.base import Array, ProbeResult, bootstrap, mean
from sparsekit.probes.layered import LayeredModel

CHUNK = 8  # tokens whose neurons are united


class Activity:
    """Counts of active neurons by layer, sequence by sequence.

    A mixture's neurons are those of all its experts, C in all. A token visits a row's neurons where the row's weight is
    not 0.

    Args:
        recent: n of the aggregated sparsity, the share of neurons that none of n tokens in a row uses.
        pictured: of how many sequences the heat map is kept.
    """

    def __init__(self, view: LayeredModel, recent: int, pictured: int):
        self.view, self.recent, self.pictured = view, recent, pictured
        self._of: dict[str, dict[int, list[Array]]] = {
            name: {} for name in ("visited", "all", "union", "unused", "idle", "tokens")
        }
        self._used_C: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}
        self._wide: dict[int, bool] = {}

    def add(self, layer: int, parts: Mapping[str, tuple[ExpertRows, Tensor]], n_sequences: int, length: int) -> None:
        """A batch's rows at a layer, by site, each with what is active of them [M, F]."""
        n_tokens = n_sequences * length
        device = next(iter(parts.values()))[1].device
        active_N = torch.zeros(n_tokens, dtype=torch.int64, device=device)
        visited_N = torch.zeros_like(active_N)
        union_B = torch.zeros(n_sequences, dtype=torch.float64, device=device)
        used_B = torch.zeros_like(union_B)
        counts: list[Tensor] = []
        for site, (rows, active_MF) in parts.items():
            kept = rows.weight_M != 0
            rows, active_MF = ExpertRows(*(x[kept] for x in rows)), active_MF[kept]
            active_N.index_add_(0, rows.token_M, active_MF.sum(-1))
            visited_N.index_add_(0, rows.token_M, torch.full_like(rows.token_M, active_MF.shape[1]))
            for block_NF in self._by_expert(layer, site, rows, active_MF, n_tokens):
                block_BTF = block_NF.view(n_sequences, length, -1)
                counts.append(block_NF.sum(0))
                union_B += united(block_BTF)
                used_B += used_recently(block_BTF, self.recent)
        used_C = torch.cat(counts)
        total = len(used_C)
        self._used_C[layer] = self._used_C.get(layer, 0) + used_C
        self._tokens[layer] = self._tokens.get(layer, 0) + n_tokens
        self._wide[layer] = bool((visited_N < total).any()) or self._wide.get(layer, False)
        share_N = active_N.double() / visited_N.clamp(min=1)  # 0/0 is 0: a token that no expert took
        kept_here = {
            "visited": share_N.view(n_sequences, length).mean(1),
            "all": active_N.view(n_sequences, length).double().mean(1) / total,
            "union": union_B / total,
            "unused": 1 - used_B / total,
            "idle": (visited_N == 0).view(n_sequences, length).sum(1),
            "tokens": share_N.view(n_sequences, length).float(),
        }
        for name, values in kept_here.items():
            so_far = self._of[name].setdefault(layer, [])
            room = self.pictured - sum(map(len, so_far)) if name == "tokens" else n_sequences
            so_far.append(values[: max(room, 0)].cpu().numpy())

    def _by_expert(self, layer: int, site: str, rows: ExpertRows, active_MF: Tensor, n_tokens: int) -> Iterator[Tensor]:
        """[N, F] of one expert after the other, False where a token does not visit it."""
        experts = self.view.anatomy(layer).experts
        if site == "shared_act" or experts is None:
            yield active_MF.new_zeros(n_tokens, active_MF.shape[1]).index_put((rows.token_M,), active_MF)
            return
        for expert in range(experts.n_experts):
            here = (rows.expert_M == expert).nonzero()[:, 0]
            yield active_MF.new_zeros(n_tokens, active_MF.shape[1]).index_put((rows.token_M[here],), active_MF[here])

    def fill(self, result: ProbeResult, seed: int) -> None:
        """Writes what was counted into a result, scalars with their intervals."""
        layers = sorted(self._tokens)
        by_name = {n: {layer: np.concatenate(x) for layer, x in found.items()} for n, found in self._of.items()}
        n_layers = self.view.n_layers
        names = {"activation_ratio": "visited", "union_density": "union", "aggregated_sparsity": "unused"}
        if any(self._wide.values()):
            names["activation_ratio_of_all"] = "all"
        for name, kept in names.items():
            samples_SL = np.stack([by_name[kept][layer] for layer in layers], axis=1)
            result.per_layer[name] = spread(n_layers, dict(zip(layers, samples_SL.mean(0), strict=True)))
            result.scalars[name] = float(samples_SL.mean())
            result.intervals[name] = bootstrap(samples_SL, mean_of_all, seed)
        idle = sum(int(by_name["idle"][layer].sum()) for layer in layers)
        if idle:
            result.remark(f"{idle} times a token visited no neuron of a layer; its activation ratio counts as 0")
        frequencies = [(self._used_C[layer].double() / self._tokens[layer]).cpu().numpy() for layer in layers]
        most = max(map(len, frequencies))
        padded = [np.pad(f, (0, most - len(f)), constant_values=np.nan) for f in frequencies]
        result.arrays["frequency"] = spread(n_layers, dict(zip(layers, padded, strict=True)), most)
        pictures = {layer: by_name["tokens"][layer] for layer in layers}
        result.arrays["heat_map"] = spread(n_layers, pictures, *next(iter(pictures.values())).shape)
        if self.pictured:
            result.matrices["heat_map"] = result.arrays["heat_map"][:, 0]
            result.meta["axes"] = {"heat_map": ("layer", "token")}


def united(block_BTF: Tensor) -> Tensor:
    """[B] how many neurons CHUNK tokens in a row use together, mean over chunks; a last short chunk is left out."""
    length = block_BTF.shape[1]
    size = min(CHUNK, length)
    chunks = block_BTF[:, : length // size * size].unflatten(1, (-1, size))
    return chunks.any(2).sum(-1).double().mean(1)


def used_recently(block_BTF: Tensor, recent: int) -> Tensor:
    """[B] how many neurons at least one of the last ``recent`` tokens used, mean over tokens that have so many."""
    size = min(recent, block_BTF.shape[1])
    found = []
    for block_TF in block_BTF:  # one by one: the running count is four times as wide as what it counts
        count_TF = torch.nn.functional.pad(block_TF.cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
        found.append((count_TF[size:] > count_TF[:-size]).sum(-1).double().mean())
    return torch.stack(found)


def spread(n_layers: int, values: Mapping[int, Any], *shape: int) -> Array:
    """[L, …] with the values of some layers, nan elsewhere."""
    whole = np.full((n_layers, *shape), np.nan, dtype=np.float64)
    for layer, value in values.items():
        whole[layer] = value
    return whole


def mean_of_all(samples: Array) -> float:
    return float(mean(samples).mean())
