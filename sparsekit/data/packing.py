"""From a stream of tokens to windows of inputs and next-token targets.

Shapes: N tokens of the stream, B windows, T = seq_len positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.data.token_set import Tokens
from sparsekit.errors import DataError

IGNORE = -100  # the target that counts for nothing, as torch's cross_entropy has it


@dataclass(frozen=True)
class Batch:
    """Windows as torch tensors.

    Attributes:
        ids_BT: int64 inputs.
        targets_BT: int64, the token that follows each input, or IGNORE.
        documents_BT: int64, the number of each input's document in the stream; None without a document mask.
        n_targets: how many targets are not IGNORE, known on the host, so that no one waits for the device.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None
    n_targets: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        documents_BT = None if self.documents_BT is None else move(self.documents_BT)
        return Batch(move(self.ids_BT), move(self.targets_BT), documents_BT, self.n_targets)


class Windows:
    """The stream cut into windows of ``seq_len`` inputs, each with the token that follows it as target.

    Window w holds inputs [wT, wT + T) and targets [wT + 1, wT + T + 1). The last is moved back to end where the
    stream does, and what earlier windows cover of it is IGNORE among its targets: over one pass every token but the
    very first is a target exactly once, and every window is full. A stream of fewer than T + 1 tokens is one window,
    filled up with ends of text whose targets are IGNORE, so that a shape compiled for T serves it too.

    With ``document_mask`` a batch tells the document of each input, and the first token of a document, which an end
    of text precedes, is IGNORE; padding counts as a document of its own.

    Raises:
        DataError: the stream has no next token, as it holds fewer than two.
    """

    def __init__(self, token_set: Tokens, seq_len: int, document_mask: bool = False):
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}, and a window holds at least one token")
        if len(token_set) < 2:
            raise DataError(f"the text has {len(token_set)} tokens, and a target needs two; give more text")
        self.token_set, self.seq_len, self.document_mask = token_set, seq_len, document_mask
        self.n_targets = len(token_set) - 1  # over one pass; those that the document mask takes away included
        self._n_windows = -(-self.n_targets // seq_len)

    def __len__(self) -> int:
        return self._n_windows

    def gather(self, indices: np.ndarray[Any, Any]) -> Batch:
        """The windows of these numbers, in this order.

        Args:
            indices: [B] integers in [0, len(self)).

        Raises:
            IndexError: one of them is outside.
        """
        indices_B = np.asarray(indices, dtype=np.int64)
        if indices_B.size and (indices_B.min() < 0 or indices_B.max() >= len(self)):
            raise IndexError(f"window {indices_B.min()} to {indices_B.max()} of {len(self)}")
        n_tokens = len(self.token_set)
        covered_to_B = indices_B * self.seq_len  # targets up to here belong to earlier windows
        begins_B = np.minimum(covered_to_B, max(0, n_tokens - 1 - self.seq_len))
        places = begins_B[:, None] + np.arange(self.seq_len + 1)  # [B, T + 1]: an input and, one on, its target
        # every document ends in an end of text, so the last token is one: what a short stream is filled up with
        window = self.token_set.rows(begins_B, self.seq_len + 1).astype(np.int64)
        ids, targets = window[:, :-1].copy(), window[:, 1:].copy()  # copies, as a window of one row is contiguous
        ignored = (places[:, 1:] <= covered_to_B[:, None]) | (places[:, 1:] >= n_tokens)
        documents_BT = None
        if self.document_mask:
            documents = self.token_set.documents(places)
            ignored |= documents[:, 1:] != documents[:, :-1]
            documents_BT = torch.from_numpy(np.ascontiguousarray(documents[:, :-1], dtype=np.int64))
        targets[ignored] = IGNORE
        n_targets = int(ignored.size - np.count_nonzero(ignored))
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), documents_BT, n_targets)
