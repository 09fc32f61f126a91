"""An attention for sparsekit; in a spec ``"attention": {"type": "new_part", "n_heads": 4}``.

It changes one step of multi-head attention and inherits the rest: positions, masks, documents, kernels, the cache.
An attention of another make derives from ``sparsekit.components.contracts.Attention`` and brings its own forward.

Shapes: B batch, T tokens, H heads, G key-value heads, K their width, E = H K.
"""

from __future__ import annotations

from typing import Any

import torch
from sparsekit.components.attention import MultiHead
from sparsekit.components.contracts import Build, ForwardContext
from torch import Tensor, nn


class NewPart(MultiHead):
    """o([g_1 z_1, …, g_H z_H]) for the heads' outputs z of multi-head attention, g learned, 1 at first.

    Source: NormFormer: Shleifer, Weston & Ott 2021, arXiv 2110.09456 (head scale)
    """

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.gain_H = nn.Parameter(torch.empty(self.n_heads))

    def reset_parameters(self) -> None:
        """Fills what this class owns: a model is first built without memory."""
        super().reset_parameters()
        nn.init.ones_(self.gain_H)

    def split(self, n: int) -> dict[str, int]:
        return {**super().split(n), "gain_H": 0}

    def attend(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, context: ForwardContext) -> Tensor:
        z_BTE = super().attend(q_BHTK, k_BGTK, v_BGTV, context)
        z_BTHK = z_BTE.unflatten(-1, (-1, self.head_dim))
        return (z_BTHK * self.gain_H[:, None]).flatten(-2)
