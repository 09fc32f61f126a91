"""What training minimises."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit import spec
from sparsekit.components.contracts import ForwardContext
from sparsekit.data.packing import IGNORE, Batch
from sparsekit.model.decoder import Decoder


class Objective:
    """A loss over a model and a batch, summed over the batch's targets (the trainer divides by their number)."""

    class Params(spec.Params):
        pass

    def __init__(self, params: Any):
        self.params = params

    def __call__(self, model: Decoder, batch: Batch, context: ForwardContext) -> Tensor:
        raise NotImplementedError


class NextToken(Objective):
    """Cross-entropy of the next token, -sum log p(target), in nats.

    Source: Bengio et al. 2003, JMLR 3
    """

    def __call__(self, model: Decoder, batch: Batch, context: ForwardContext) -> Tensor:
        logits_BTV = model(batch.ids_BT, context)
        logits = logits_BTV.flatten(0, 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), batch.targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
