"""A norm for sparsekit; in a spec ``"norm": "new_part"``."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveFloat
from sparsekit.components.contracts import Build, Norm
from torch import Tensor, nn


class NewPart(Norm):
    """y = weight * x / (mean |x| + eps): the mean of sizes in place of the root of the mean of squares.

    Shapes: [..., width] -> [..., width].

    Source: Wu et al. 2018, arXiv 1802.09769 (there over a batch)
    """

    class Params(Norm.Params):
        eps: PositiveFloat = 1e-6

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.weight = nn.Parameter(torch.empty(self.width))

    def reset_parameters(self) -> None:
        """Fills what this class owns: a model is first built without memory."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (self.weight * wide / (wide.abs().mean(-1, keepdim=True) + self.params.eps)).to(x.dtype)
