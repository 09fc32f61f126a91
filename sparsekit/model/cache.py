"""Keys and values of the positions that a model has seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.components.contracts import ForwardContext


class KVCache:
    """Keys and values layer by layer, in buffers of a fixed length.

    A sequence's position p stands at p of its buffers. Sequences of different lengths share a cache: what a buffer
    holds past its sequence's end is seen by no query, and overwritten when the sequence comes there.
    """

    def __init__(self, max_seq_len: int):
        self.max_seq_len = max_seq_len
        self.length = 0
        self.n_keys = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._places_BT: Tensor | None = None

    @property
    def ends_with_queries(self) -> bool:
        return self._places_BT is None

    def extend(self, layer_index: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Takes up this forward's keys and values of a layer; returns all of them, [batch, heads, seen, head_dim]."""
        if layer_index not in self.layers:
            k_shape, v_shape = ((*x.shape[:2], self.max_seq_len, x.shape[3]) for x in (k_BGTK, v_BGTK))
            # zeros: a value that no query sees is still multiplied, by 0, which would keep a NaN
            self.layers[layer_index] = k_BGTK.new_zeros(k_shape), v_BGTK.new_zeros(v_shape)
        keys, values = self.layers[layer_index]
        if self._places_BT is None:
            keys[:, :, self.length : self.n_keys] = k_BGTK
            values[:, :, self.length : self.n_keys] = v_BGTK
        else:
            put(keys, values, self._places_BT, k_BGTK, v_BGTK)
        return keys[:, :, : self.n_keys], values[:, :, : self.n_keys]

    def context(self, n_tokens: int, device: torch.device) -> ForwardContext:
        """What the model is told about the next n_tokens, where all sequences are equally long."""
        self._places_BT, self.n_keys = None, self.length + n_tokens
        positions = torch.arange(self.length, self.n_keys, device=device)
        return ForwardContext(positions_BT=positions[None], cache=self)

    def ragged(self, lengths_B: Sequence[int], n_tokens: int, device: torch.device) -> ForwardContext:
        """As :meth:`context`, after sequences of different lengths, the longest first: masks are as long as its row."""
        assert lengths_B[0] == max(lengths_B) == self.length, "the first sequence is the longest, and fills the cache"
        starts_B1 = torch.tensor(lengths_B, device=device)[:, None]
        self._places_BT, self.n_keys = starts_B1 + torch.arange(n_tokens, device=device), self.length + n_tokens
        return ForwardContext(positions_BT=self._places_BT, cache=self)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these sequences only."""
        for index, (keys, values) in self.layers.items():
            self.layers[index] = keys[list(rows)], values[list(rows)]


class WholeCache:
    """The buffers of a :class:`KVCache` for one token of each sequence, always seen whole: one shape for every step.

    What lies past a sequence's end is masked like the future. Nothing in it is a number that changes, nor waits for
    the device, so that a step is compiled once.
    """

    ends_with_queries = False

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], places_B1: Tensor):
        self.layers, self.places_B1 = layers, places_B1
        self.n_keys = layers[0][0].shape[2]

    def extend(self, layer_index: int, k_BG1K: Tensor, v_BG1K: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`KVCache.extend`."""
        keys, values = self.layers[layer_index]
        put(keys, values, self.places_B1, k_BG1K, v_BG1K)
        return keys, values


def put(keys: Tensor, values: Tensor, places_BT: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> None:
    """Writes each sequence's keys and values at its places."""
    rows_B1 = torch.arange(keys.shape[0], device=keys.device)[:, None]
    keys[rows_B1, :, places_BT] = k_BGTK.transpose(1, 2)
    values[rows_B1, :, places_BT] = v_BGTK.transpose(1, 2)
