"""Variance and moments of activations as means over tokens: one definition, in training and in probes.

Shapes: K sums kept, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.components.contracts import wide

SITES = ("resid", "attn_out", "ffn_out")
# means over tokens: of the variance over channels, of powers of all entries, of the skewness and kurtosis over channels
SUMS = ("variance", "x2", "x1", "x3", "x4", "skewness", "skewness^2", "kurtosis", "kurtosis^2")
WITHOUT_MOMENTS = 2


def token_means(x_ND: Tensor, moments: bool, dtype: torch.dtype) -> Tensor:
    """What SUMS names, of each token, [K, N]; in float32 or wider.

    Variance is unbiased, over the D channels of a token; skewness m3 / m2^1.5 and kurtosis m4 / m2^2, likewise of one
    token; x1 to x4 are means of powers. They are sums of centred sums, so that they lose nothing to a mean far from 0.
    """
    x_ND = x_ND.to(wide(x_ND.dtype))
    width = x_ND.shape[1]
    mean_N1 = x_ND.mean(-1, keepdim=True)
    z_ND = x_ND - mean_N1
    square_N1 = z_ND.square().mean(-1, keepdim=True)
    mean_N, m2_N = mean_N1[:, 0].to(dtype), square_N1[:, 0].to(dtype)
    kept = [m2_N * (width / max(width - 1, 1)), m2_N + mean_N**2]
    if moments:
        z_ND *= torch.where(square_N1 > 0, square_N1.rsqrt(), 0)  # of unit variance: powers neither over- nor underflow
        square_ND = z_ND.square()
        skewness_N = (z_ND * square_ND).mean(-1).to(dtype)
        kurtosis_N = square_ND.square_().mean(-1).to(dtype)
        m3_N, m4_N = skewness_N * m2_N**1.5, kurtosis_N * m2_N**2
        kept += [
            mean_N,
            m3_N + 3 * mean_N * m2_N + mean_N**3,
            m4_N + 4 * mean_N * m3_N + 6 * mean_N**2 * m2_N + mean_N**4,
            skewness_N, skewness_N**2, kurtosis_N, kurtosis_N**2,
        ]  # fmt: skip
    return torch.stack(kept)


def site_means(x_ND: Tensor, moments: bool, dtype: torch.dtype) -> Tensor:
    """:func:`token_means`, their mean over tokens, [K]."""
    return token_means(x_ND, moments, dtype).mean(-1)


def moments_of(means: Mapping[str, Tensor], n_entries: Tensor | float) -> dict[str, Tensor]:
    """Skewness m3 / m2^1.5, kurtosis m4 / m2^2 and coefficient of variation std / |mean| of all entries.

    Args:
        means: of powers, x1 to x4.
        n_entries: how many entries there were, for the unbiased standard deviation.
    """
    x1, x2, x3, x4 = (means[f"x{power}"] for power in (1, 2, 3, 4))
    m2 = (x2 - x1**2).clamp(min=0)
    m3 = x3 - 3 * x1 * x2 + 2 * x1**3
    m4 = x4 - 4 * x1 * x3 + 6 * x1**2 * x2 - 3 * x1**4
    std = (m2 * unbiased(torch.as_tensor(n_entries, dtype=m2.dtype))).sqrt()
    return {"skewness": ratio(m3, m2**1.5), "kurtosis": ratio(m4, m2**2), "cv": ratio(std, x1.abs())}


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the latter is 0."""
    return torch.where(denominator != 0, numerator / denominator, 0)


def unbiased(n: Tensor) -> Tensor:
    """n / (n - 1)."""
    return n / (n - 1).clamp(min=1)
