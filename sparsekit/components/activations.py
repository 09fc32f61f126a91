"""Elementwise non-linearities."""

from __future__ import annotations

import torch.nn.functional as F
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
