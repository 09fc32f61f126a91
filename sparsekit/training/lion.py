"""Updates that are signs."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from sparsekit.training.gradients import local
from sparsekit.training.optimizers import Adaptive, Step


class Lion(Adaptive):
    """w <- w - lr (sign(b1 m + (1 - b1) g) + decay w), then m <- b2 m + (1 - b2) g: half of Adam's state.

    Its learning rate is 3 to 10 times smaller than AdamW's and its decay as many times larger, as the defaults are.

    Source: Chen et al. 2023, arXiv 2302.06675, alg. 2
    """

    class Params(Adaptive.Params):
        lr: PositiveFloat = 1e-4
        weight_decay: NonNegativeFloat = 1.0
        betas: list[float] = Field(default=[0.9, 0.99], min_length=2, max_length=2)

    states_per_parameter = 1

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return LionStep(self.parameter_groups(model), {"lr": self.params.lr, "betas": tuple(self.params.betas)})


class LionStep(Step):
    """Lion's update, a kernel for all parameters at a time."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        beta1, beta2 = group["betas"]
        weights = [local(parameter.detach()) for parameter in parameters]
        momenta = self.state_of(parameters, "momentum")
        gradients = self.gradients(parameters)
        direction = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(direction, self.unless_bad(-group["lr"], 0.0, weights[0]))
        torch._foreach_mul_(weights, self.unless_bad(1 - group["lr"] * group["weight_decay"], 1.0, weights[0]))
        torch._foreach_add_(weights, direction)
        torch._foreach_mul_(momenta, self.unless_bad(beta2, 1.0, weights[0]))
        torch._foreach_add_(momenta, gradients, alpha=1 - beta2)
