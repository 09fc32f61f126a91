"""How well a model predicts text that it was not trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.data.loader import validation_batches
from sparsekit.data.packing import Windows
from sparsekit.data.token_set import Tokens
from sparsekit.model.decoder import Decoder
from sparsekit.training.distributed import World

NATS_PER_BIT = math.log(2)


class Evaluation:
    """The mean loss over each of several texts, in nats a token and in bits a byte of the text.

    bits a byte = loss / ln 2 * tokens / bytes.

    Args:
        texts: by name; "val" is the training source's own.
        limit: of the windows of each text, evenly spread; None for all.
        stopping: asked between batches, the same on all ranks; where it says so the evaluation is given up.
    """

    def __init__(
        self,
        texts: Mapping[str, Tokens],
        seq_len: int,
        document_mask: bool,
        micro_batch_size: int,
        limit: int | None,
        world: World,
        stopping: Callable[[], bool],
    ):
        self.windows = {name: Windows(tokens, seq_len, document_mask) for name, tokens in texts.items()}
        self.bytes_per_token = {name: tokens.n_bytes / len(tokens) for name, tokens in texts.items()}
        self.micro_batch_size, self.limit, self.world, self.stopping = micro_batch_size, limit, world, stopping

    @torch.no_grad()
    def __call__(self, model: Decoder, objective: Any, autocast: Callable[[], Any]) -> dict[str, float] | None:
        """``{"val_loss": …, "val_bits_per_byte": …}`` and the like for each text; None where it was given up."""
        told: dict[str, float] = {}
        model.eval()
        try:
            for name in self.windows:
                loss = self._loss(name, model, objective, autocast)
                if loss is None:
                    return None
                told[f"{name}_loss"] = loss
                told[f"{name}_bits_per_byte"] = loss / NATS_PER_BIT / self.bytes_per_token[name]
        finally:
            model.train()
        return told

    def _loss(self, name: str, model: Decoder, objective: Any, autocast: Callable[[], Any]) -> float | None:
        rank, size = self.world.data_rank, self.world.data_size
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # of the loss, and of targets
        batches = validation_batches(self.windows[name], self.micro_batch_size, self.limit)
        while round_ := list(itertools.islice(batches, size)):
            if self.stopping():
                return None
            # all ranks must run the model equally often, as they gather its weights together
            mine = rank < len(round_)
            batch = round_[rank if mine else 0].to(self.world.device)
            with autocast():
                loss = objective(model, batch, ForwardContext(documents_BT=batch.documents_BT))
            if mine:
                sums[0] += loss.reported
                sums[1] += batch.n_targets
        total, n_targets = self.world.sum(sums / self.world.tensor).tolist()
        return total / max(1.0, n_targets)
