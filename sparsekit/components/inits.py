"""How weights are drawn, by role."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from torch import Tensor, nn

from sparsekit.components.contracts import Init


class Normal(Init):
    """Every weight from N(0, std^2).

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners
    """

    class Params(Init.Params):
        std: NonNegativeFloat = 0.02

    def __call__(self, weight: Tensor, role: str) -> None:
        nn.init.normal_(weight, std=self.params.std)


class DepthScaled(Init):
    """N(0, std^2), but N(0, std^2 / 2L) for what writes to the residual stream (o and down), L the layers.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, sec. 2.3
    """

    class Params(Init.Params):
        std: NonNegativeFloat = 0.02

    def __call__(self, weight: Tensor, role: str) -> None:
        std = self.params.std
        if role in ("o", "down"):
            std /= (2 * self.build.n_layers) ** 0.5
        nn.init.normal_(weight, std=std)
