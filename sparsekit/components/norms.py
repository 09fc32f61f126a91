"""Normalisation of the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from sparsekit.components.contracts import Build, Norm


class WeightedNorm(Norm):
    """A norm followed by a learned scale for each channel, where ``affine``.

    With ``zero_centered`` the parameter is what the scale differs from 1 by, so that weight decay pulls it to 1.
    """

    class Params(Norm.Params):
        affine: bool = True
        zero_centered: bool = False

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.weight = nn.Parameter(torch.empty(self.width)) if params.affine else None

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 0.0 if self.params.zero_centered else 1.0)

    def scale(self) -> Tensor | None:
        """What the normalised channels are multiplied by."""
        if self.weight is None or not self.params.zero_centered:
            return self.weight
        return 1.0 + self.weight


class RMSNorm(WeightedNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight.

    Source: Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4
    """

    class Params(WeightedNorm.Params):
        eps: PositiveFloat = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.scale(), self.params.eps)


class LayerNorm(WeightedNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, the variance biased.

    Source: Ba, Kiros & Hinton 2016, arXiv 1607.06450, eq. 4
    """

    class Params(WeightedNorm.Params):
        eps: PositiveFloat = 1e-5
        bias: bool = True

    def __init__(self, params: Params, build: Build):
        super().__init__(params, build)
        has_bias = params.affine and params.bias
        self.bias = nn.Parameter(torch.empty(self.width)) if has_bias else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.scale(), self.bias, self.params.eps)


class DynamicTanh(WeightedNorm):
    """y = weight tanh(alpha x) + bias, with one learned alpha: no statistics at all.

    Source: Zhu et al. 2025, arXiv 2503.10622, eq. 2
    """

    class Params(WeightedNorm.Params):
        alpha: PositiveFloat = 0.5

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.alpha = nn.Parameter(torch.empty(1))  # FSDP2 takes no scalars
        self.bias = nn.Parameter(torch.empty(self.width)) if params.affine else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.alpha, self.params.alpha)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.alpha * x)
        scale = self.scale()
        y = y if scale is None else y * scale
        return y if self.bias is None else y + self.bias


class NoNorm(Norm):
    """y = x, for ablations."""

    def forward(self, x: Tensor) -> Tensor:
        return x
