"""Tokens from a model: a key-value cache, and batches of prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sparsekit.components.attention import KernelAttention
from sparsekit.components.contracts import Component, ForwardContext
from sparsekit.components.positions import ALiBi
from sparsekit.model.decoder import Decoder, Unembedding
from sparsekit.model.sampling import Sampling

Ends = Callable[[int, int], bool]


class KVCache:
    """Keys and values of the positions a model has seen, layer by layer, in buffers of a fixed length.

    A sequence's position p stands at p of its buffers. Sequences of different lengths share a cache: what a buffer
    holds past its sequence's end is seen by no query, and overwritten when the sequence comes there.
    """

    def __init__(self, max_seq_len: int):
        self.max_seq_len = max_seq_len
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._places_BT: Tensor | None = None

    def extend(self, layer_index: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Takes up this forward's keys and values of a layer; returns all of them, [batch, heads, seen, head_dim]."""
        if layer_index not in self._layers:
            k_shape, v_shape = ((*x.shape[:2], self.max_seq_len, x.shape[3]) for x in (k_BGTK, v_BGTK))
            # zeros: a value that no query sees is still multiplied, by 0, which would keep a NaN
            self._layers[layer_index] = k_BGTK.new_zeros(k_shape), v_BGTK.new_zeros(v_shape)
        end = self.length + k_BGTK.shape[2]
        keys, values = self._layers[layer_index]
        if self._places_BT is None:
            keys[:, :, self.length : end] = k_BGTK
            values[:, :, self.length : end] = v_BGTK
        else:
            rows_B1 = torch.arange(keys.shape[0], device=keys.device)[:, None]
            keys[rows_B1, :, self._places_BT] = k_BGTK.transpose(1, 2)
            values[rows_B1, :, self._places_BT] = v_BGTK.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]

    def context(self, n_tokens: int, device: torch.device) -> ForwardContext:
        """What the model is told about the next n_tokens, where all sequences are equally long."""
        self._places_BT = None
        positions = torch.arange(self.length, self.length + n_tokens, device=device)
        return ForwardContext(positions_BT=positions[None], cache=self)

    def ragged(self, lengths_B: Sequence[int], n_tokens: int, device: torch.device) -> ForwardContext:
        """As :meth:`context`, after sequences of different lengths, the longest first: masks are as long as its row."""
        assert lengths_B[0] == max(lengths_B) == self.length, "the first sequence is the longest, and fills the cache"
        starts_B1 = torch.tensor(lengths_B, device=device)[:, None]
        self._places_BT = starts_B1 + torch.arange(n_tokens, device=device)
        return ForwardContext(positions_BT=self._places_BT, cache=self)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these sequences only."""
        for index, (keys, values) in self._layers.items():
            self._layers[index] = keys[list(rows)], values[list(rows)]


def generate(
    model: Decoder,
    ids_T: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yields new tokens after a prompt, one at a time.

    Past ``max_seq_len`` the model goes on with the last half of what it has. Temperature 0 takes the likeliest token;
    what the others do, :class:`~sparsekit.model.sampling.Sampling` says.

    Raises:
        ValueError: an empty prompt, or a number outside its range.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p)
    tokens = generate_batch(
        model, [ids_T], max_new_tokens, sampling=sampling, seed=seed, ends=lambda _, token: token == stop_id
    )
    try:
        for _, token in tokens:
            yield token
    finally:
        tokens.close()


@torch.no_grad()
def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    ends: Ends = lambda index, token: False,
    batch_size: int | None = None,
) -> Generator[tuple[int, int], None, None]:
    """Yields (index of a prompt, its next token), a token of every open prompt and then the next ones.

    What follows a prompt depends on neither the others nor their number (up to rounding); prompt i draws as if it were
    alone with ``seed + i``.

    Args:
        ends: called with each (index, token); True ends that prompt, and the token is not yielded.
        batch_size: how many prompts run at a time; None for all.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(map(len, prompts)):
        raise ValueError("the prompt is empty: give at least one token")
    device, limit = next(model.parameters()).device, model.spec.max_seq_len
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(prompts))]
    was_training = model.training
    model.eval()
    try:
        for group in together(model, [min(len(ids), limit) for ids in prompts], batch_size):
            rows = [(i, [int(token) for token in prompts[i]][-limit:]) for i in group]
            yield from _generate(model, rows, max_new_tokens, sampling, generators, ends, device)
    finally:
        model.train(was_training)


def _generate(
    model: Decoder,
    rows: list[tuple[int, list[int]]],
    max_new_tokens: int,
    sampling: Sampling,
    generators: list[torch.Generator],
    ends: Ends,
    device: torch.device,
) -> Generator[tuple[int, int], None, None]:
    """Of prompts that may run together, as (index, ids)."""
    limit, caches, cache = model.spec.max_seq_len, can_cache(model), None
    for step in range(max_new_tokens):
        if cache is None or len(rows[0][1]) > limit:  # the first is the longest
            rows = [(i, ids if len(ids) <= limit else ids[-(limit // 2 or 1) :]) for i, ids in rows]
            rows.sort(key=lambda row: -len(row[1]))
            cache = KVCache(min(limit, len(rows[0][1]) + max_new_tokens - step - 1)) if caches else None
        logits_BV = _next_logits(model, [ids for _, ids in rows], cache, device)
        tokens = sampling.pick(logits_BV, [generators[i] for i, _ in rows]).tolist()
        kept = []
        for row, ((index, ids), token) in enumerate(zip(rows, tokens, strict=True)):
            if ends(index, token):
                continue
            yield index, token
            ids.append(token)
            kept.append(row)
        if not kept:
            return
        if len(kept) < len(rows):
            rows = [rows[row] for row in kept]
            if cache is not None:
                cache.keep(kept)
                cache.length = len(rows[0][1]) - 1


def _next_logits(model: Decoder, rows: list[list[int]], cache: KVCache | None, device: torch.device) -> Tensor:
    """The logits after each row, [batch, vocab]; what is in the cache is not run again."""
    lengths = [len(row) for row in rows]
    last = [length - 1 for length in lengths]
    if cache is None or not cache.length:
        # padding comes after the row's end, where a causal model does not look
        ids = [row + [0] * (max(lengths) - len(row)) for row in rows]
        context, at = ForwardContext() if cache is None else cache.context(max(lengths), device), last
    else:
        ids, at = [row[-1:] for row in rows], [0] * len(rows)
        context = cache.context(1, device) if len(set(last)) == 1 else cache.ragged(last, 1, device)

    def head(x_BTD: Tensor, unembedding: Unembedding) -> Tensor:
        return unembedding.logits(x_BTD[torch.arange(len(at), device=device), torch.tensor(at, device=device)])

    logits_BV: Tensor = model(torch.tensor(ids, device=device), context, head)
    if cache is not None:
        cache.length = max(lengths)
    return logits_BV


def can_cache(model: Decoder) -> bool:
    """Whether every attention keeps its keys and values, and no output depends on what comes after it or beside it.

    An expert of limited capacity does not take from one token what it would take from the sequence.
    """
    return all(layer.attention.caches for layer in model.layers) and pads(model)


def together(model: Decoder, lengths: Sequence[int], batch_size: int | None = None) -> list[list[int]]:
    """Sequences that may run in one forward, right-padded: their indices, the longest first.

    All, ``batch_size`` at a time, where no output depends on other sequences or on what comes after it; else each
    alone. With a cache, only such as are equally long where an attention takes positions to be the same in all.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if not pads(model):
        return [[i] for i in order]
    groups = [order]
    if can_cache(model) and not all(_ragged(layer.attention) for layer in model.layers):
        groups = [list(group) for _, group in groupby(order, key=lambda i: lengths[i])]
    size = batch_size or max(len(lengths), 1)
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def pads(model: Decoder) -> bool:
    """Whether a sequence comes out the same with padding after it and others beside it."""
    parts = [module for module in model.modules() if isinstance(module, Component)]
    return all(part.causal and not part.batch_coupled for part in parts)


def _ragged(attention: Component) -> bool:
    # ALiBi's kernels tell distances from tensor sizes, and another's attention need not read each row's positions
    return isinstance(attention, KernelAttention) and not isinstance(attention.position, ALiBi)
