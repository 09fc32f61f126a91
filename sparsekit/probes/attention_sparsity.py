"""How sparse attention is: what share of the keys that a query sees it attends to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.errors import DataError
from sparsekit.probes.anatomy import Score
from sparsekit.probes.base import Array, DenseProbe, Observer, ProbeResult, Tokens, bootstrap
from sparsekit.probes.layered import LayeredModel, Pass

ABSOLUTE = (1e-3, 1e-4)
MOST_SCORES = 1 << 24  # that exist at a time


class AttentionSparsity(DenseProbe):
    """How sparse each head's attention is: shares of small weights, entropy, support, mass on few keys.

    For a query that sees n >= ``min_visible`` keys with weights p: below_<tau> the share of the n below tau;
    below_uniform that below 1/n; entropy H / log n, H = -sum p log p; support exp(H) / n; top_<k> the sum of the
    k = ``top`` largest; first_token the weight of the sequence's first token. A head's value is the mean over such
    queries. In ``matrices`` by layer and head [L, H]; by layer the mean over heads; as scalars over layers. What a
    query sees is what the model's own mask says. Where learned sinks take a part of p, H is of the rest, made to sum
    to 1.

    Scores are worked out again from q and k for a block of queries at a time.

    Source: entropy: Zhai et al. 2023, arXiv 2303.06296; first token: Xiao et al. 2023, arXiv 2309.17453
    """

    class Params(DenseProbe.Params):
        top: PositiveInt = 8
        min_visible: PositiveInt = 16

    def observer(self, view: LayeredModel, tokens: Tokens) -> AttentionObserver:
        """
        Raises:
            DataError: no layer's scores can be seen, or sequences are shorter than ``min_visible``.
        """
        least = max(2, self.params.min_visible)
        if tokens.ids_ST.shape[1] < least:
            raise DataError(
                f"attention_sparsity: no query sees {least} keys; give longer sequences or a lower min_visible"
            )
        return AttentionObserver(view, tokens, self.params.top, least, self.seed)


class AttentionObserver(Observer):
    """Sums of what :class:`AttentionSparsity` measures, by layer, sequence and head."""

    sites = ("q", "k", "score")

    def __init__(self, view: LayeredModel, tokens: Tokens, k: int, min_visible: int, seed: int):
        self.view, self.k, self.min_visible, self.seed = view, k, min_visible, seed
        self.names = [f"below_{tau:g}" for tau in ABSOLUTE]
        self.names += ["below_uniform", "entropy", "support", f"top_{k}", "first_token"]
        self.remarks: dict[int, str] = {}
        self.sums: dict[int, list[Tensor]] = {}  # by layer, of each batch [B, H, measures]
        self.queries: dict[int, list[Tensor]] = {}  # [B], of which that is the sum
        for layer in range(view.n_layers):
            missing = [reason for reason in map(view.sites(layer).get, self.sites) if reason is not None]
            if missing:
                self.remarks[layer] = missing[0].removeprefix("not applicable: ")
            else:
                self.sums[layer], self.queries[layer] = [], []
        if not self.sums:
            raise DataError(f"attention_sparsity: no layer can be measured; of layer 0: {self.remarks[0]}")

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        if layer not in self.sums:
            return
        q_BHTK, k_BGSK, how = (seen[site] for site in self.sites)
        n, heads, length = q_BHTK.shape[:3]
        sums = torch.zeros(n, heads, len(self.names), dtype=torch.float64, device=q_BHTK.device)
        queries = torch.zeros(n, dtype=torch.float64, device=q_BHTK.device)
        block = max(1, MOST_SCORES // (n * heads * k_BGSK.shape[2]))
        for first in range(0, length, block):
            p, visible = probabilities(q_BHTK, k_BGSK, how, first, min(first + block, length))
            count_BHT = visible.sum(-1).expand(p.shape[:-1])
            counts = count_BHT >= self.min_visible
            sums += (self.measures(p, visible, count_BHT) * counts[..., None]).sum(2)
            queries += counts[:, 0].sum(-1)
        self.sums[layer].append(sums.cpu())
        self.queries[layer].append(queries.cpu())

    def measures(self, p_BHTS: Tensor, visible: Tensor, count_BHT: Tensor) -> Tensor:
        """[B, H, T, measures]; of a query that sees too few keys, anything finite."""
        n = count_BHT.clamp(min=2).to(p_BHTS.dtype)
        total = p_BHTS.sum(-1)
        shares = p_BHTS / torch.where(total > 0, total, 1)[..., None]
        entropy = -torch.special.xlogy(shares, shares).sum(-1)
        limits: list[Any] = [*ABSOLUTE, (1 / n)[..., None]]
        below = [((p_BHTS < limit) & visible).sum(-1) / n for limit in limits]
        top = p_BHTS.topk(min(self.k, p_BHTS.shape[-1]), dim=-1).values.sum(-1)
        found = [*below, entropy / n.log(), entropy.exp() / n, top, p_BHTS[..., 0]]
        return torch.stack(found, dim=-1).double()

    def result(self) -> ProbeResult:
        result = ProbeResult()
        sums = {layer: torch.cat(parts).numpy() for layer, parts in self.sums.items()}  # [S, H, measures]
        queries = {layer: torch.cat(parts).numpy() for layer, parts in self.queries.items()}
        measured = [layer for layer in sums if queries[layer].sum()]
        self.remarks |= {layer: f"no query sees {self.min_visible} keys" for layer in sums if layer not in measured}
        for layer, reason in sorted(self.remarks.items()):
            result.remark(f"layer {layer}: not applicable: {reason}")
        most = max(x.shape[1] for x in sums.values())
        for index, name in enumerate(self.names):
            by_head = np.full((self.view.n_layers, most), np.nan)
            by_layer = np.full(self.view.n_layers, np.nan)
            pairs = []  # of each layer [S, 2]: the sum over queries of the mean over heads, and how many queries
            for layer in measured:
                values_SH = sums[layer][..., index]
                by_head[layer, : values_SH.shape[1]] = values_SH.sum(0) / queries[layer].sum()
                pairs.append(np.stack((values_SH.mean(1), queries[layer]), axis=-1))
                by_layer[layer] = _mean_of_ratios(pairs[-1][:, None])
            result.matrices[name], result.per_layer[name] = by_head, by_layer
            if measured:
                pairs_SL2 = np.stack(pairs, axis=1)
                result.scalars[name] = _mean_of_ratios(pairs_SL2)
                result.intervals[name] = bootstrap(pairs_SL2, _mean_of_ratios, self.seed)
        result.meta["axes"] = dict.fromkeys(self.names, ("layer", "head"))
        return result


def _mean_of_ratios(pairs_SL2: Array) -> float:
    """The mean over layers of sum over sequences / sum over sequences."""
    whole_L2 = pairs_SL2.sum(0)
    return float(np.mean(whole_L2[:, 0] / whole_L2[:, 1]))


def probabilities(q_BHTK: Tensor, k_BGSK: Tensor, how: Score, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(weights [B, H, t, S], True where a query sees a key) of queries first … last - 1, in float32 or wider."""
    dtype = wide(q_BHTK.dtype)
    n_keys, groups = k_BGSK.shape[2], k_BGSK.shape[1]
    q_BGHTK = q_BHTK[:, :, first:last].to(dtype).unflatten(1, (groups, -1))
    scores = (q_BGHTK @ k_BGSK.to(dtype)[:, :, None].transpose(-2, -1)).flatten(1, 2) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    key = torch.arange(n_keys, device=scores.device)
    query = torch.arange(first, last, device=scores.device)[:, None]
    if how.slopes_H is not None:
        scores = scores + how.slopes_H[:, None, None].to(dtype) * (key - query)
    if how.mask is None:
        visible = (key <= query)[None, None]
    elif how.mask.dtype == torch.bool:
        visible = how.mask[:, :, first:last, :n_keys]
    else:
        added = how.mask[:, :, first:last, :n_keys].to(dtype)
        visible = added > torch.finfo(how.mask.dtype).min / 2
        scores = scores + torch.where(visible, added, 0)
    scores = scores.masked_fill(~visible, float("-inf"))
    if how.sink_H is not None:  # a key more, which is seen by all and then left out
        sink = how.sink_H[None, :, None, None].to(dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    p = scores.softmax(-1) if how.normalizer is None else how.normalizer(scores)
    return p[..., :n_keys].nan_to_num(0.0), visible
