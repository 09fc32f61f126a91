"""How likely a model finds the rest of a text, for many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sparsekit.components.contracts import ForwardContext, wide
from sparsekit.model.decoder import Decoder, Unembedding
from sparsekit.model.generate import pads
from sparsekit.model.packed import packed

AUTO_TOKENS = 16384

Request = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def loglikelihoods(
    model: Decoder,
    requests: Sequence[Request],
    batch_size: int | None = None,
    on_done: Callable[[int], None] = lambda n: None,
) -> list[tuple[float, bool]]:
    """Of each (context, continuation): ln p(continuation | context), and whether greedy decoding would write it.

    Sequences of similar length run together, right-padded, each sequence once for all requests that share it; neither
    changes a result (up to rounding). A context is cut from its left where both are too long for the model.

    Args:
        batch_size: sequences at a time; None for as many as make 16384 tokens, and half as many where memory runs out.
        on_done: called with a number of requests that are done.

    Raises:
        ValueError: an empty context, or a continuation longer than ``max_seq_len``.
    """
    limit = model.spec.max_seq_len
    asked: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(requests):
        if not len(context):
            raise ValueError("the context is empty: give at least one token")
        if len(continuation) > limit:
            raise ValueError(f"a continuation of {len(continuation)} tokens is longer than max_seq_len, {limit}")
        # the last token is only predicted
        asked.setdefault(tuple(map(int, (*context, *continuation)))[-limit - 1 : -1], []).append(index)
    results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    inputs = sorted((ids for ids in asked if ids), key=len, reverse=True)
    with packed(model, rows=AUTO_TOKENS):
        for batch in _batches(inputs, batch_size if pads(model) else 1):
            for row, ids in zip(_scored(model, batch, requests, asked, batch_size is None), batch, strict=True):
                for index, result in zip(asked[ids], row, strict=True):
                    results[index] = result
                on_done(len(row))
    return results


def _batches(inputs: list[tuple[int, ...]], batch_size: int | None) -> Iterator[list[tuple[int, ...]]]:
    """Of sequences, the longest first."""
    start = 0
    while start < len(inputs):
        size = batch_size or max(1, AUTO_TOKENS // len(inputs[start]))
        yield inputs[start : start + size]
        start += size


def _scored(
    model: Decoder,
    batch: list[tuple[int, ...]],
    requests: Sequence[Request],
    asked: dict[tuple[int, ...], list[int]],
    may_split: bool,
) -> list[list[tuple[float, bool]]]:
    """The results of each sequence's requests."""
    try:
        return _forward(model, batch, [[requests[i][1] for i in asked[ids]] for ids in batch])
    except torch.OutOfMemoryError:
        if not may_split or len(batch) == 1:
            raise
    half = len(batch) // 2
    return [row for part in (batch[:half], batch[half:]) for row in _scored(model, part, requests, asked, may_split)]


def _forward(
    model: Decoder, batch: list[tuple[int, ...]], wanted: list[list[Sequence[int]]]
) -> list[list[tuple[float, bool]]]:
    device, width = next(model.parameters()).device, max(map(len, batch))
    # padding comes after the sequence's end, where a causal model does not look
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=device)
    picks = [
        (row, len(ids) - len(continuation) + place, token)
        for row, ids in enumerate(batch)
        for continuation in wanted[row]
        for place, token in enumerate(map(int, continuation))
    ]
    row_M, place_M, token_M = torch.tensor(picks, device=device).reshape(-1, 3).T

    def head(x_BTD: Tensor, unembedding: Unembedding) -> Tensor:
        return unembedding.logits(x_BTD[row_M, place_M])  # of those places only: a whole batch's are large

    logits_MV = model(ids_BT, ForwardContext(), head)
    logits_MV = logits_MV.to(wide(logits_MV.dtype))
    ln_p_M = logits_MV.log_softmax(-1).gather(-1, token_M[:, None])[:, 0]
    told = iter(zip(ln_p_M.tolist(), (logits_MV.argmax(-1) == token_M).tolist(), strict=True))
    results = []
    for continuations in wanted:
        each = [[next(told) for _ in continuation] for continuation in continuations]
        results.append([(sum(p for p, _ in tokens), all(greedy for _, greedy in tokens)) for tokens in each])
    return results
