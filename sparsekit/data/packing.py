"""From a stream of tokens to windows of inputs and next-token targets.

On the host a batch stays as narrow as the stream, 2 bytes a token; it is widened on the device that trains.

Shapes: N tokens of the stream, B windows, T = seq_len positions; T1 = T + 1, an input more for the last target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.data.token_set import Tokens
from sparsekit.data.tokenizers import Ids
from sparsekit.errors import DataError

IGNORE = -100  # the target that counts for nothing, as torch's cross_entropy has it


@dataclass(frozen=True)
class Batch:
    """Windows as a model and an objective take them.

    Attributes:
        ids_BT: int64 inputs.
        targets_BT: int64, the token that follows each input, or IGNORE.
        documents_BT: int64, where two inputs of a window differ in it they are of different documents; None without
            a document mask.
        n_targets: how many targets are not IGNORE, known on the host, so that no one waits for the device.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None
    n_targets: int


@dataclass(frozen=True)
class HostBatch:
    """Windows as they are read and travel.

    Attributes:
        tokens_BT1: [B, T + 1] uint16 or int32: inputs and, one further, targets.
        ignored_BT: bool, the targets that count for nothing; None where all count.
        documents_BT: int32, how many documents of the window end before each input; None without a document mask.
        n_targets: how many targets count.
    """

    tokens_BT1: Tensor
    ignored_BT: Tensor | None
    documents_BT: Tensor | None
    n_targets: int

    def __len__(self) -> int:
        return len(self.tokens_BT1)

    def pin(self) -> HostBatch:
        """The same in page-locked memory, from where a copy to a GPU need not be waited for."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """On the device that trains, and widened there: the narrow tensors are what crosses the bus."""
        here = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        tokens_BT1 = here["tokens_BT1"]
        ids_BT, targets_BT = tokens_BT1[:, :-1].to(torch.int64), tokens_BT1[:, 1:].to(torch.int64)
        if "ignored_BT" in here:
            targets_BT.masked_fill_(here["ignored_BT"], IGNORE)
        documents_BT = here["documents_BT"].to(torch.int64) if "documents_BT" in here else None
        return Batch(ids_BT.contiguous(), targets_BT.contiguous(), documents_BT, self.n_targets)

    def _tensors(self) -> dict[str, Tensor]:
        found = {"tokens_BT1": self.tokens_BT1, "ignored_BT": self.ignored_BT, "documents_BT": self.documents_BT}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def pack(tokens_BT1: Ids, eos_id: int | None = None, ignored_BT: np.ndarray[Any, Any] | None = None) -> HostBatch:
    """A batch of rows of tokens.

    Args:
        tokens_BT1: inputs and, one further, targets; uint16 or uint32. The batch takes the array over.
        eos_id: the end of text, for a document mask: the first token of a document, which an end of text precedes,
            is ignored then; None for no mask.
        ignored_BT: further targets that count for nothing.
    """
    documents_BT = None
    if eos_id is not None:
        ends_BT = tokens_BT1[:, :-1] == eos_id
        documents_BT = np.zeros(ends_BT.shape, np.int32)
        np.cumsum(ends_BT[:, :-1], axis=1, dtype=np.int32, out=documents_BT[:, 1:])
        ignored_BT = ends_BT if ignored_BT is None else ignored_BT | ends_BT
    n_targets = tokens_BT1.shape[0] * (tokens_BT1.shape[1] - 1)
    if ignored_BT is not None:
        n_targets -= int(np.count_nonzero(ignored_BT))
    # torch converts uint32 but hardly computes with it, and no vocabulary comes near 2^31
    tokens = tokens_BT1.view(np.int32) if tokens_BT1.dtype == np.uint32 else tokens_BT1
    return HostBatch(
        torch.from_numpy(tokens),
        None if ignored_BT is None else torch.from_numpy(ignored_BT),
        None if documents_BT is None else torch.from_numpy(documents_BT),
        n_targets,
    )


def interleave(batches: Sequence[HostBatch], places: Sequence[np.ndarray[Any, Any]]) -> HostBatch:
    """One batch of several, each of whose rows go to given places.

    Args:
        batches: of equal T and dtype.
        places: for each batch the rows that its own become; together 0 .. B-1.
    """
    n_rows = sum(map(len, batches))

    def merged(name: str, missing: Any) -> Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        given = next((part for part in parts if part is not None), None)
        if given is None:
            return None
        whole = np.empty((n_rows, given.shape[1]), given.numpy().dtype)
        for part, rows in zip(parts, places, strict=True):
            whole[rows] = missing if part is None else part.numpy()
        return torch.from_numpy(whole)

    tokens_BT1 = merged("tokens_BT1", None)
    assert tokens_BT1 is not None
    n_targets = sum(batch.n_targets for batch in batches)
    return HostBatch(tokens_BT1, merged("ignored_BT", False), merged("documents_BT", 0), n_targets)


class Windows:
    """The stream cut into windows of ``seq_len`` inputs, each with the token that follows it as target.

    Window w holds inputs [wT, wT + T) and targets [wT + 1, wT + T + 1). The last is moved back to end where the
    stream does, and what earlier windows cover of it is ignored among its targets: over one pass every token but the
    very first is a target exactly once, and every window is full. A stream of fewer than T + 1 tokens is one window,
    filled up with ends of text whose targets are ignored, so that a shape compiled for T serves it too.

    With ``document_mask`` a batch tells the documents of a window apart, and the first token of a document, which an
    end of text precedes, is ignored; padding counts as documents of its own.

    Raises:
        DataError: the stream has no next token, as it holds fewer than two.
    """

    def __init__(self, token_set: Tokens, seq_len: int, document_mask: bool = False):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, and a window holds at least one token")
        self._n_tokens = len(token_set)
        if self._n_tokens < 2:
            raise DataError(f"the text has {self._n_tokens} tokens, and a target needs two; give more text")
        self.token_set, self.seq_len, self.document_mask = token_set, seq_len, document_mask
        self.n_targets = self._n_tokens - 1  # over one pass; those that the document mask takes away included
        self._n_windows = -(-self.n_targets // seq_len)
        self._last_begin = max(0, self.n_targets - seq_len)
        # every document ends in an end of text, so the stream's last token is one
        last = token_set.rows(np.array([self.n_targets]), 1)
        self._eos_id = int(last[0, 0]) if document_mask else None

    def __len__(self) -> int:
        return self._n_windows

    def gather(self, indices: np.ndarray[Any, Any]) -> HostBatch:
        """The windows of these numbers, in this order.

        Args:
            indices: [B] integers in [0, len(self)).

        Raises:
            IndexError: one of them is outside.
        """
        indices_B = np.asarray(indices, dtype=np.int64)
        most = int(indices_B.view(np.uint64).max(initial=0))  # unsigned, so that what is negative is too large as well
        if most >= self._n_windows:
            raise IndexError(f"window {indices_B.min()} to {indices_B.max()} of {self._n_windows}")
        covered_to_B = indices_B * self.seq_len  # targets up to here belong to earlier windows
        if most * self.seq_len <= self._last_begin and self._n_tokens > self.seq_len:
            return pack(self.token_set.rows(covered_to_B, self.seq_len + 1), self._eos_id)
        begins_B = np.minimum(covered_to_B, self._last_begin)
        places_BT = begins_B[:, None] + np.arange(1, self.seq_len + 1)  # of the targets
        ignored_BT = (places_BT <= covered_to_B[:, None]) | (places_BT >= self._n_tokens)
        return pack(self.token_set.rows(begins_B, self.seq_len + 1), self._eos_id, ignored_BT)
