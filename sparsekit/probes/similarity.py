"""How alike the stream is before and after each layer, and how soon the last layer's prediction can be read off it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.base import DenseProbe, Observer, ProbeResult, Tokens, bootstrap
from sparsekit.probes.layered import LayeredModel, Pass

AT_ONCE = 4096  # tokens whose states are compared together
TOP = 5


class Similarity(DenseProbe):
    """Cosine, angular distance and linear CKA between the streams of all layers, block influence, and the logit lens.

    Matrices [L+1, L+1] over h_0 … h_L: ``cosine`` of the means over tokens; ``angular`` (1/pi) arccos cos(h_l, h_m),
    mean over tokens; ``cka`` ||Xc^T Yc||_F^2 / (||Xc^T Xc||_F ||Yc^T Yc||_F), columns centred. Per layer:
    ``block_influence`` 1 - cos(h_l, h_{l+1}), mean over tokens; ``lens_kl`` KL(p_l || p_L) in nats with p_l the softmax
    of head(h_l), and ``lens_overlap``, the share of p_L's 5 likeliest tokens among p_l's. CKA and the lens are taken
    over ``sample`` tokens, evenly spread.

    Source: block influence: Men et al. 2024, arXiv 2403.03853, eq. 1; angular: Gromov et al. 2024, arXiv 2403.17887,
    eq. 7; CKA: Kornblith et al. 2019, arXiv 1905.00414, eq. 5; lens: nostalgebraist 2020
    """

    class Params(DenseProbe.Params):
        sample: PositiveInt = 1024
        lens: bool = True

    def observer(self, view: LayeredModel, tokens: Tokens) -> SimilarityObserver:
        return SimilarityObserver(view, tokens, self.params, self.seed)


class SimilarityObserver(Observer):
    """Holds a batch's states until its end, sums over tokens, and the states of sampled tokens."""

    def __init__(self, view: LayeredModel, tokens: Tokens, params: Any, seed: int):
        self.view, self.params, self.seed = view, params, seed
        n_states = view.n_layers + 1
        n_tokens = tokens.ids_ST.numel()
        spread = torch.linspace(0, n_tokens - 1, min(params.sample, n_tokens), dtype=torch.float64)
        self._sampled = spread.round().long().unique()  # of all tokens, by place
        self._begin = 0
        self._states: list[Tensor] = []
        self._sum_LD = torch.zeros(n_states, view.d_model, dtype=torch.float64, device=view.device)
        self._angle_LL = torch.zeros(n_states, n_states, dtype=torch.float64, device=view.device)
        self._influence: list[Tensor] = []
        self._samples: list[Tensor] = []
        self._n = 0
        self._heads: Pass | None = None

    def begin(self, batch: Pass) -> None:
        self._states = [batch.h_0]
        self._heads = batch

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        self._states.append(out_BTD)

    def end(self, batch: Pass, h_BTD: Tensor) -> None:
        shape = h_BTD.shape
        n = shape[0] * shape[1]
        full = wide(h_BTD.dtype)
        influence = []
        for begin in range(0, n, AT_ONCE):
            x_LND = torch.stack([h.flatten(0, 1)[begin : begin + AT_ONCE] for h in self._states]).to(full)
            self._sum_LD += x_LND.sum(1, dtype=torch.float64)
            unit_LND = x_LND / x_LND.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(full).tiny)
            cosine_NLL = torch.einsum("lnd,mnd->nlm", unit_LND, unit_LND).double().clamp(-1, 1)
            self._angle_LL += (cosine_NLL.acos() / math.pi).sum(0)
            influence.append(1 - cosine_NLL.diagonal(1, dim1=1, dim2=2))
        self._influence.append(torch.cat(influence).unflatten(0, shape[:2]).mean(1).cpu())
        here = self._sampled[(self._sampled >= self._begin) & (self._sampled < self._begin + n)] - self._begin
        places = here.to(h_BTD.device)
        self._samples.append(torch.stack([h.flatten(0, 1)[places] for h in self._states]))
        self._begin += n
        self._n += n
        self._states = []

    def result(self) -> ProbeResult:
        result = ProbeResult()
        mean_LD = self._sum_LD / self._n
        unit_LD = mean_LD / mean_LD.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        angle_LL = (self._angle_LL / self._n).fill_diagonal_(0)
        sample_LND = torch.cat(self._samples, dim=1)
        cka = cka_matrix(sample_LND)
        for name, matrix in (("cosine", unit_LD @ unit_LD.T), ("angular", angle_LL), ("cka", cka)):
            result.matrices[name] = matrix.cpu().numpy()
        influence_SL = torch.cat(self._influence).numpy()
        result.per_layer["block_influence"] = influence_SL.mean(0)
        result.scalars["block_influence"] = float(influence_SL.mean())
        result.intervals["block_influence"] = bootstrap(influence_SL.mean(1), seed=self.seed)
        neighbours = angle_LL.diagonal(1)
        result.scalars["angular_neighbours"] = float(neighbours.mean())
        result.intervals["angular_neighbours"] = None
        result.remark("angular_neighbours has no interval: angles are summed over tokens, not by sequence")
        if self.params.lens:
            result.per_layer["lens_kl"], result.per_layer["lens_overlap"] = self._lens(sample_LND)
        result.meta["axes"] = dict.fromkeys(result.matrices, ("h_l", "h_m"))
        result.meta["sampled_tokens"] = sample_LND.shape[1]
        return result

    def _lens(self, sample_LND: Tensor) -> tuple[Any, Any]:
        """KL(p_l || p_L) and the overlap of the likeliest tokens, of h_0 … h_{L-1}."""
        assert self._heads is not None
        full = wide(sample_LND.dtype)
        n = sample_LND.shape[1]
        at_once = max(1, (1 << 24) // self.view.vocab_size)
        sums = torch.zeros(2, self.view.n_layers, dtype=torch.float64, device=sample_LND.device)
        for x_LND in sample_LND.split(at_once, dim=1):
            last_NV = self._heads.head(x_LND[-1][None])[0].to(full).log_softmax(-1)
            best_NK = last_NV.topk(min(TOP, last_NV.shape[-1]), dim=-1).indices
            for layer in range(self.view.n_layers):
                log_p_NV = self._heads.head(x_LND[layer][None])[0].to(full).log_softmax(-1)
                kl_N = (log_p_NV.exp() * (log_p_NV - last_NV)).sum(-1)
                own_NK = log_p_NV.topk(best_NK.shape[1], dim=-1).indices
                shared_N = (own_NK[:, :, None] == best_NK[:, None, :]).any(1).double().mean(-1)
                sums[:, layer] += torch.stack((kl_N.double().sum(), shared_N.sum()))
        kl, overlap = (sums / n).cpu().numpy()
        return kl, overlap


def cka_matrix(x_LND: Tensor) -> Tensor:
    """Linear CKA between every two of L sets of states of the same N tokens, [L, L]; 0 where a set does not vary."""
    centred = x_LND.double() - x_LND.double().mean(1, keepdim=True)
    n, width = centred.shape[1:]
    if n <= width:  # the Gram matrices of tokens say the same as those of channels, and are smaller
        grams = torch.stack([x @ x.T for x in centred]).flatten(1)
        products = grams @ grams.T
    else:
        products = torch.stack([torch.stack([(a.T @ b).square().sum() for b in centred]) for a in centred])
    norms = products.diagonal().sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, products / scale, 0)
