"""How gradients become updates."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from sparsekit import spec
from sparsekit.components.contracts import Embedding, Linear


class Optimizer:
    """Makes a torch optimizer for a model; the trainer sets each group's lr to its ``peak_lr`` times the schedule.

    Attributes:
        states_per_parameter: numbers it keeps for each parameter, for the memory estimate.
    """

    class Params(spec.Params):
        lr: PositiveFloat = 1e-3

    states_per_parameter: ClassVar[int]

    def __init__(self, params: Any):
        self.params = params

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError


class AdamW(Optimizer):
    """Adam with decoupled weight decay, of matrices only by default (norms, biases and embeddings are not decayed).

    ``decay`` "all" decays every parameter.

    Source: Loshchilov & Hutter 2017, arXiv 1711.05101, alg. 2
    """

    class Params(Optimizer.Params):
        betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
        eps: PositiveFloat = 1e-8
        weight_decay: NonNegativeFloat = 0.1
        decay: Literal["matrices", "all"] = "matrices"

    states_per_parameter = 2

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        decayed: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for module, name, parameter in owned_parameters(model):
            decays = self.params.decay == "all" or is_matrix(module, name, parameter)
            (decayed if decays else rest).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.params.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.params.lr, betas=tuple(self.params.betas), eps=self.params.eps, fused=True,
        )  # fmt: skip


def owned_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name in it, parameter), each parameter once."""
    found, seen = [], set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and parameter.requires_grad:
                seen.add(id(parameter))
                found.append((module, name, parameter))
    return found


def is_matrix(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter maps vectors to vectors: neither an embedding, nor a bias (experts stack theirs), nor 1-D."""
    if isinstance(module, (Embedding, nn.Embedding)) or (isinstance(module, Linear) and name == "bias"):
        return False
    return parameter.ndim >= 2
