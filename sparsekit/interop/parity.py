"""Whether two models are one function: their logits on the same tokens."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.data.tokenizers import Tokenizer
from sparsekit.errors import CheckpointError

TOLERANCE = 1e-4
SEQUENCES, LENGTH = 2, 256


@dataclass(frozen=True)
class Difference:
    """Of logits: the norm of the difference over the original's, and the largest; on how many tokens, and which."""

    relative: float
    largest: float
    tokens: int
    kind: str

    def __str__(self) -> str:
        told = f"relative difference {self.relative:.2g}, largest {self.largest:.2g}"
        return f"logits on {self.tokens} tokens ({self.kind}): {told}"

    def demand(self, name: str) -> None:
        """Refuses what is another function.

        Raises:
            CheckpointError: the difference is beyond rounding.
        """
        if not self.relative <= TOLERANCE:
            told = f"{self}, more than {TOLERANCE:g}; it is another function, and nothing was written"
            raise CheckpointError(f"{name}: {told}")


def some_ids(tokenizer: Tokenizer | None, vocab_size: int, max_seq_len: int) -> tuple[Tensor, str]:
    """Token ids of a novel, [sequences, tokens], or uniformly random ones where there is no tokenizer; and which."""
    length = min(LENGTH, max_seq_len)
    if tokenizer is not None:
        from sparsekit.spec.run import DataSpec

        choice = DataSpec().source
        source: Any = choice.cls(choice.params)
        text = next(iter(source.documents("validation")))[: 40 * SEQUENCES * length]
        ids = torch.from_numpy(tokenizer.encode(text)[: SEQUENCES * length].astype(np.int64))
        if len(ids) == SEQUENCES * length and int(ids.max()) < vocab_size:
            return ids.view(SEQUENCES, length), "of a novel"
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (SEQUENCES, length), generator=generator), "drawn at random"


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """[sequences, tokens, vocabulary] in float32, of one of ours or one of transformers'."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without")  # which compiles to be fast
        found = [model(row[None]) for row in ids]
    return torch.cat([getattr(one, "logits", one).float() for one in found])


def compared(original: Tensor, other: Tensor, kind: str) -> Difference:
    """How far logits are from the original ones."""
    gap = other - original
    relative = float(gap.norm() / original.norm())
    return Difference(relative, float(gap.abs().max()), original.shape[0] * original.shape[1], kind)
