"""How sparse weights are: matrix by matrix, without and with a scale."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.errors import DataError
from sparsekit.probes.base import Array, Probe, ProbeResult, Tokens
from sparsekit.probes.layered import LayeredModel

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
ABSOLUTE = (1e-4, 1e-3, 1e-2)
RELATIVE = (0.01, 0.1)
RANKS = ("stable_rank", "effective_rank")
# what a change of scale leaves alone stands first: weight decay shrinks norms, and that is no sparsity
MEASURES = (
    "gini", "hoyer", "l1_over_l2", "kurtosis", *RANKS, *(f"below_{r:g}_rms" for r in RELATIVE),
    *(f"below_{tau:g}" for tau in ABSOLUTE),
)  # fmt: skip


class WeightSparsity(Probe):
    """How sparse the weights of every matrix are: Gini, Hoyer, kurtosis, ranks, and shares below thresholds.

    Of a matrix W of n entries and singular values s: gini sum_i (2i - n - 1) x_i / (n sum_i x_i) of the ascending
    x = |w|; hoyer (sqrt(n) - l1/l2) / (sqrt(n) - 1); l1_over_l2; kurtosis m4 / m2^2; stable_rank sum(s^2) / max(s)^2;
    effective_rank exp(-sum p log p), p = s / sum(s); below_<r>_rms the share of |w| < r RMS(W), below_<tau> of
    |w| < tau. 0/0 is 0, and matrices of zeros are counted.

    ``<role>/<measure>`` is by layer, a mean over matrices where experts have one each; a bare measure is the mean over
    a layer's roles and, as a scalar, over all layers. Roles are q k v o gate up down; a shared expert's begin with
    shared_, and other matrices go by their parameter's name. ``ranks=false`` leaves out what needs singular values.

    Source: Hoyer 2004, JMLR 5; Gini: Hurley & Rickard 2009, arXiv 0811.4706; effective rank: Roy & Vetterli 2007
    """

    class Params(Probe.Params):
        ranks: bool = True

    @torch.no_grad()
    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        measures = [name for name in MEASURES if self.params.ranks or name not in RANKS]
        of_role: dict[str, Array] = {}
        of_layer = {name: np.full(view.n_layers, np.nan) for name in measures}
        n_zero = 0
        for layer in range(view.n_layers):
            found: dict[str, list[float]] = {name: [] for name in measures}
            for role, weight_EOI in matrices(view, layer):
                each = [measure(weight_OI, self.params.ranks) for weight_OI in weight_EOI]
                n_zero += sum(not weight_OI.any() for weight_OI in weight_EOI)
                for name in measures:
                    value = float(np.mean([one[name] for one in each]))
                    found[name].append(value)
                    of_role.setdefault(f"{role}/{name}", np.full(view.n_layers, np.nan))[layer] = value
            for name, values in found.items():
                of_layer[name][layer] = np.mean(values) if values else np.nan
        if all(np.isnan(values).all() for values in of_layer.values()):
            raise DataError("weight_sparsity: no layer holds a matrix; there is nothing to measure")
        scalars = {name: float(np.nanmean(values)) for name, values in of_layer.items()}
        result = ProbeResult({**scalars, "zero_matrices": float(n_zero)}, {**of_layer, **of_role})
        result.intervals = dict.fromkeys(result.scalars)
        result.remark("no intervals: weights do not depend on sequences")
        return result


def matrices(view: LayeredModel, layer: int) -> Iterator[tuple[str, Tensor]]:
    """(role, [E, d_out, d_in]) of a layer, E = 1 outside of mixtures; then by name what no role was found for."""
    anatomy = view.anatomy(layer)
    found = {role: getattr(anatomy, role) for role in ROLES}
    if anatomy.experts is not None:
        found |= {role: getattr(anatomy.experts, role) for role in ("gate", "up", "down")}
        found |= {f"shared_{role}": weight for role, weight in anatomy.experts.shared.items()}
    seen: set[int] = set()
    for role, weight in found.items():
        if weight is not None:
            seen |= {weight.weight.untyped_storage().data_ptr()}
            seen |= {p.untyped_storage().data_ptr() for p in weight.module.parameters()} if weight.module else set()
            yield role, weight.weight.view(-1, *weight.weight.shape[-2:])
    for name, parameter in view.blocks[layer].named_parameters():
        if parameter.ndim >= 2 and parameter.untyped_storage().data_ptr() not in seen:
            yield name.removesuffix(".weight"), parameter.reshape(-1, *parameter.shape[-2:])


def measure(weight_OI: Tensor, ranks: bool = True) -> dict[str, float]:
    """MEASURES of one matrix; singular values in float32, or float64 where the weight is, sums in float64."""
    weight_OI = weight_OI.to(wide(weight_OI.dtype))
    n = weight_OI.numel()
    x = weight_OI.abs().flatten().sort().values
    x64 = x.double()
    l1, l2 = float(x64.sum()), float(torch.linalg.vector_norm(x64))
    places = torch.arange(1 - n, n + 1, 2, device=x.device, dtype=torch.float64)
    w = weight_OI.double()
    z = w - w.mean()
    m2 = float(z.square().mean())
    found = {
        "gini": ratio(float(places @ x64), n * l1),
        "hoyer": (math.sqrt(n) - l1 / l2) / (math.sqrt(n) - 1) if l2 and n > 1 else 0.0,
        "l1_over_l2": ratio(l1, l2),
        "kurtosis": ratio(float(z.square().square().mean()), m2**2),
    }
    limits = {f"below_{r:g}_rms": r * l2 / math.sqrt(n) for r in RELATIVE} | {f"below_{t:g}": t for t in ABSOLUTE}
    found |= {name: float((x64 < limit).double().mean()) for name, limit in limits.items()}
    if ranks:
        s = torch.linalg.svdvals(weight_OI).double()
        p = s / s.sum() if float(s[0]) > 0 else s
        found["stable_rank"] = ratio(float(s.square().sum()), float(s[0]) ** 2)
        found["effective_rank"] = math.exp(float(-torch.special.xlogy(p, p).sum())) if float(s[0]) > 0 else 0.0
    return found


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, 0 where that is 0/0."""
    return numerator / denominator if denominator else 0.0
