"""How weights are drawn, by role."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from sparsekit.components.contracts import Init

WRITERS = ("o", "down")  # what writes to the residual stream


class NormalBase(Init):
    """N(0, (std * factor)^2), the factor by role; ``roles`` multiplies some roles' further: ``{"router": 0.1}``."""

    class Params(Init.Params):
        std: NonNegativeFloat = 0.02
        roles: dict[str, NonNegativeFloat] = {}

    def factor(self, weight: Tensor, role: str) -> float:
        return 1.0

    def draw(self, weight: Tensor, std: float) -> None:
        nn.init.normal_(weight, std=std)

    def __call__(self, weight: Tensor, role: str) -> None:
        self.draw(weight, self.params.std * self.factor(weight, role) * self.params.roles.get(role, 1.0))


class Normal(NormalBase):
    """Every weight from N(0, std^2).

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners
    """


class TruncNormal(NormalBase):
    """Every weight from N(0, std^2), cut off at ``cutoff`` standard deviations.

    Source: OLMo 2024, arXiv 2402.00838, sec. 3.2
    """

    class Params(NormalBase.Params):
        cutoff: NonNegativeFloat = 3.0

    def draw(self, weight: Tensor, std: float) -> None:
        if std == 0:
            return super().draw(weight, std)
        limit = self.params.cutoff * std
        nn.init.trunc_normal_(weight, std=std, a=-limit, b=limit)


class DepthScaled(NormalBase):
    """N(0, std^2), but N(0, std^2 / 2L) for what writes to the residual stream (o and down), L the layers.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, sec. 2.3
    """

    def factor(self, weight: Tensor, role: str) -> float:
        return (2 * self.build.n_layers) ** -0.5 if role in WRITERS else 1.0


class ZeroOut(NormalBase):
    """N(0, std^2), but 0 for what writes to the residual stream (o and down): every layer begins as the identity.

    Source: Zhang, Dauphin & Ma 2019, arXiv 1901.09321, sec. 3
    """

    def factor(self, weight: Tensor, role: str) -> float:
        return 0.0 if role in WRITERS else 1.0


class DeepNormInit(NormalBase):
    """N(0, std^2), times (8L)^(-1/4) for v, o and the feed-forward: what the residual scheme deep_norm asks for.

    Source: Wang et al. 2022, arXiv 2203.00555, fig. 2 (decoder-only)
    """

    def factor(self, weight: Tensor, role: str) -> float:
        return (8 * self.build.n_layers) ** -0.25 if role in ("v", "o", "gate", "up", "down") else 1.0


class MuP(NormalBase):
    """N(0, std^2) at fan-in base_width; matrices scale by sqrt(base_width / fan_in), the head by base_width / fan_in.

    Embeddings keep std. Pair it with learning rates that fall as base_width / d_model for matrices.

    Source: Yang et al. 2022, arXiv 2203.03466, table 3
    """

    class Params(NormalBase.Params):
        base_width: PositiveInt = 256

    def factor(self, weight: Tensor, role: str) -> float:
        if role == "embed":
            return 1.0
        ratio: float = self.params.base_width / weight.shape[-1]
        return ratio if role == "head" else ratio**0.5
