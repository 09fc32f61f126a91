"""From token ids to vectors, and back where embeddings are tied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn

from sparsekit.components.contracts import Build, Embedding, ForwardContext


class TokenEmbedding(Embedding):
    """x = scale * table[id].

    Source: Vaswani et al. 2017, arXiv 1706.03762, sec. 3.4
    """

    class Params(Embedding.Params):
        scale: PositiveFloat = 1.0

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.weight = nn.Parameter(torch.empty(build.facts["vocab_size"], build.d_model))
        self.init = build.child(build.init_slot)

    def reset_parameters(self) -> None:
        self.init(self.weight, "embed")

    def forward(self, ids_BT: Tensor, context: ForwardContext) -> Tensor:
        x_BTD = F.embedding(ids_BT, self.weight)
        return x_BTD if self.params.scale == 1.0 else x_BTD * self.params.scale

    def unembed(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD, self.weight)


class TokenAndPositionEmbedding(TokenEmbedding):
    """x = scale * table[id] + positions[t], a learned vector for each position, as in GPT-2.

    Source: Radford et al. 2018, Improving Language Understanding by Generative Pre-Training, eq. 2
    """

    def __init__(self, params: Any, build: Build):
        super().__init__(params, build)
        self.positions_SD = nn.Parameter(torch.empty(build.max_seq_len, build.d_model))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.init(self.positions_SD, "embed")

    def forward(self, ids_BT: Tensor, context: ForwardContext) -> Tensor:
        places = slice(ids_BT.shape[1]) if context.positions_BT is None else context.positions_BT
        return super().forward(ids_BT, context) + self.positions_SD[places]
