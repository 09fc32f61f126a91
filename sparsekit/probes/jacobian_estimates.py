"""Norms of a matrix that is only known by its products with random directions, each with its standard error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.probes.base import Tokens
from sparsekit.probes.jacobian_products import Copies, push_sums
from sparsekit.probes.layered import LayeredModel, Pass

SKETCH = 8  # directions of the subspace iteration at most


@dataclass
class Estimates:
    """Of every layer, [L] by metric.

    Attributes:
        values, errors: the metrics and their standard errors by jackknife over directions; of ``spectral`` the error
            is what the last step of the iteration changed.
        reason: why ``spectral`` is missing, or None.
    """

    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    reason: str | None = None


def estimate(view: LayeredModel, tokens: Tokens, directions: int, iterations: int, room: int, seed: int) -> Estimates:
    """Metrics of the mean Jacobian of every layer from ``directions`` vector-Jacobian products.

    With v Rademacher and y = v J: ||J||_F^2 = E ||y||^2, ||J - I||_F^2 = E ||y - v||^2, tr J = E v.y, J_ii = E v_i y_i;
    squares of expectations are means over pairs of different directions, so that they are unbiased before the root.
    ``spectral`` is by subspace iteration from the products' leading directions, J by forward differentiation and J^T
    by products; it approaches from below.

    Source: Hutchinson 1989, Communications in Statistics 18(3); Bekas, Kokiopoulou & Saad 2007, Applied Numerical
    Mathematics 57 (diagonal); Halko, Martinsson & Tropp 2011, arXiv 0909.4061 (subspace iteration)
    """
    generator = torch.Generator().manual_seed(seed)
    shape = view.n_layers, directions, view.d_model
    v_LCD = (torch.randint(2, shape, generator=generator) * 2 - 1).to(view.device, torch.float32)
    y_LCD = _products(view, tokens, v_LCD, room)
    found = [direction_metrics(v_CD, y_CD) for v_CD, y_CD in zip(v_LCD.double(), y_LCD, strict=True)]
    values = {name: torch.stack([value[name][0] for value in found]) for name in found[0]}
    errors = {name: torch.stack([value[name][1] for value in found]) for name in found[0]}
    reason = None
    try:
        values["spectral"], errors["spectral"] = _spectral(view, tokens, y_LCD, iterations, room)
    except (RuntimeError, NotImplementedError) as error:
        values["spectral"] = errors["spectral"] = torch.full((view.n_layers,), torch.nan)
        reason = f"spectral: a layer has no products J d ({str(error).splitlines()[0]})"
    return Estimates(values, errors, reason)


def direction_metrics(v_CD: Tensor, y_CD: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """(value, standard error) of each metric of J from y = v J, C >= 3."""
    n, d_model = v_CD.shape
    diagonal_CD = v_CD * y_CD
    sum_D = diagonal_CD.sum(0)
    squares_C, shares_C, traces_C = diagonal_CD.square().sum(1), diagonal_CD @ sum_D, diagonal_CD.sum(1)
    whole_C, off_identity_C = y_CD.square().sum(1), (y_CD - v_CD).square().sum(1)

    def metrics(left_out: Tensor) -> dict[str, Tensor]:
        """Of all directions but one, or of all: a row of weights 0 or 1 each."""
        m = left_out.sum(-1)
        without = n - m  # 0 or 1
        mean_of = {
            "whole": left_out @ whole_C / m, "off_identity": left_out @ off_identity_C / m,
            "trace": left_out @ traces_C / m,
        }  # fmt: skip
        gone = 1 - left_out
        # ||sum c - c_r||^2 = ||sum c||^2 - 2 c_r . sum c + ||c_r||^2
        sum_square = sum_D.square().sum() - without * (2 * gone @ shares_C - gone @ squares_C)
        diagonal = (sum_square - left_out @ squares_C) / (m * (m - 1))
        trace_square = ((left_out @ traces_C).square() - left_out @ traces_C.square()) / (m * (m - 1))
        return {
            "identity_deviation": mean_of["off_identity"].clamp(min=0).sqrt() / d_model,
            "off_diagonal": (mean_of["whole"] - diagonal).clamp(min=0).sqrt() / max(1, d_model**2 - d_model) ** 0.5,
            "diagonal_mean": mean_of["trace"] / d_model,
            "diagonal_std": ((diagonal - trace_square / d_model) / max(1, d_model - 1)).clamp(min=0).sqrt(),
            "frobenius": mean_of["whole"].sqrt(),
        }

    every = metrics(torch.ones_like(traces_C)[None])
    but_one = metrics(1 - torch.eye(n, dtype=traces_C.dtype, device=traces_C.device))
    errors = {name: ((n - 1) / n * (x - x.mean()).square().sum()).sqrt() for name, x in but_one.items()}
    return {name: (value[0], errors[name]) for name, value in every.items()}


def _layers(view: LayeredModel, tokens: Tokens) -> Iterator[tuple[Pass, int, Tensor]]:
    for ids_BT in tokens.batches():
        batch = view.start(ids_BT)
        h = batch.h_0
        for layer in range(view.n_layers):
            out = batch.layer(layer, h)
            yield batch, layer, h
            h = out


def _products(view: LayeredModel, tokens: Tokens, v_LCD: Tensor, room: int) -> Tensor:
    """v J of every layer, in float64."""
    y_LCD = torch.zeros_like(v_LCD, dtype=torch.float64)
    for batch, layer, h in _layers(view, tokens):
        graph = Copies.within(batch, layer, h, room, v_LCD.shape[1])
        y_LCD[layer] += graph.pull_sums(v_LCD[layer])
    return y_LCD / tokens.ids_ST.numel()


def _spectral(view: LayeredModel, tokens: Tokens, y_LCD: Tensor, iterations: int, room: int) -> tuple[Tensor, Tensor]:
    """The largest singular value of every layer's J, and by how much the last step changed it."""
    sketch = min(SKETCH, *y_LCD.shape[1:])
    right = torch.linalg.svd(y_LCD, full_matrices=False).Vh[:, :sketch]
    found, before = y_LCD.new_zeros(view.n_layers), y_LCD.new_zeros(view.n_layers)
    for _ in range(iterations):
        before = found
        image = torch.zeros_like(right)
        for batch, layer, h in _layers(view, tokens):
            image[layer] += push_sums(batch, layer, h, right[layer])
        left = torch.linalg.qr(image.mT).Q.mT.contiguous()
        _, values, right = torch.linalg.svd(_products(view, tokens, left, room), full_matrices=False)
        found = values[:, 0]
    return found, (found - before).abs()
