"""Elementwise non-linearities."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from sparsekit.components.contracts import Activation


class ReLU(Activation):
    """max(0, x).

    Source: Nair & Hinton 2010, ICML
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class GELU(Activation):
    """x Phi(x), Phi the standard normal distribution function.

    Source: Hendrycks & Gimpel 2016, arXiv 1606.08415, eq. 1
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class SiLU(Activation):
    """x sigmoid(x).

    Source: Elfwing, Uchibe & Doya 2017, arXiv 1702.03118, eq. 3
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class ReLU2(Activation):
    """max(0, x)^2.

    Source: So et al. 2021, arXiv 2109.08668; sparsity: Zhang et al. 2024, arXiv 2402.03804
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class GELUTanh(Activation):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the tanh approximation of GELU.

    Source: Hendrycks & Gimpel 2016, arXiv 1606.08415, sec. 2
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class ShiftedReLU(Activation):
    """max(0, x - shift).

    Source: Mirzadeh et al. 2023, arXiv 2310.04564, sec. 5.3
    """

    class Params(Activation.Params):
        shift: float = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - self.params.shift)


class FATReLU(Activation):
    """x where x > threshold, else 0.

    Source: Kurtz et al. 2020, ICML (Inducing and exploiting activation sparsity); Song et al. 2024, arXiv 2402.13516
    """

    class Params(Activation.Params):
        threshold: NonNegativeFloat = 0.01

    def forward(self, x: Tensor) -> Tensor:
        return F.threshold(x, self.params.threshold, 0.0)


class ClippedReLU(Activation):
    """min(max(0, x - shift), limit).

    Source: Price et al. 2024, arXiv 2402.16184, eq. 3
    """

    class Params(Activation.Params):
        shift: float = 1.0
        limit: PositiveFloat = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.params.shift).clamp(0.0, self.params.limit)
