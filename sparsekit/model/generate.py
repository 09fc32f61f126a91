"""Tokens from a model, also after many prompts of different lengths at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor

from sparsekit.components.contracts import Component, ForwardContext
from sparsekit.errors import SparsekitError
from sparsekit.model.cache import KVCache
from sparsekit.model.decoder import Decoder, Unembedding
from sparsekit.model.decoding import CompiledSteps, steps_of
from sparsekit.model.packed import packed
from sparsekit.model.sampling import Sampling

Ends = Callable[[int, int], bool]
WORTH_PACKING = 16  # steps: laying out the weights takes as long as a few of them


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
    compile: bool = False,
    backend: str = "inductor",
) -> Generator[tuple[int, int], None, None]:
    """Yields (index of a prompt, its next token), a token of every open prompt and then the next ones.

    What follows a prompt depends on neither the others nor their number (up to rounding); prompt i draws as if it were
    alone with ``seed + i``.

    Args:
        ends: called with each (index, token); True ends that prompt, and the token is not yielded.
        batch_size: how many prompts run at a time; None for all.
        compile: the step that decodes a token runs through torch.compile; pays for many tokens on a GPU.
        backend: of torch.compile.

    Raises:
        ValueError: an empty prompt.
        SparsekitError: a model whose step cannot be compiled.
    """
    if not all(map(len, prompts)):
        raise ValueError("the prompt is empty: give at least one token")
    device, limit = next(model.parameters()).device, model.spec.max_seq_len
    steps = None
    if compile:
        _demand_one_shape(model)
        steps = steps_of(model, backend)
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(prompts))]
    was_training = model.training
    model.eval()
    try:
        groups = together(model, [min(len(ids), limit) for ids in prompts], batch_size)
        pays = len(groups) * max_new_tokens >= WORTH_PACKING and can_cache(model) and steps is None
        with packed(model, max(map(len, groups), default=1)) if pays else nullcontext():
            for group in groups:
                rows = [(i, [int(token) for token in prompts[i]][-limit:]) for i in group]
                yield from _generate(model, rows, max_new_tokens, sampling, generators, ends, device, steps)
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
    steps: CompiledSteps | None,
) -> Generator[tuple[int, int], None, None]:
    """Of prompts that may run together, as (index, ids)."""
    limit, cache = model.spec.max_seq_len, None
    caches = can_cache(model)
    done: set[int] = set()  # rows that have ended, which a compiled step goes on with
    for step in range(max_new_tokens):
        if cache is None or len(rows[0][1]) > limit:  # the first is the longest
            rows = [(i, ids if len(ids) <= limit else ids[-(limit // 2 or 1) :]) for i, ids in rows if i not in done]
            rows.sort(key=lambda row: -len(row[1]))
            longest = min(limit, len(rows[0][1]) + max_new_tokens - step - 1)
            if steps is not None:
                cache = steps.cache(len(rows), longest, limit)
            else:
                cache = KVCache(longest) if caches else None
        logits_BV = _next_logits(model, [ids for _, ids in rows], cache, device, steps)
        tokens = sampling.pick(logits_BV, [generators[i] for i, _ in rows]).tolist()
        kept = []
        for row, ((index, ids), token) in enumerate(zip(rows, tokens, strict=True)):
            if index in done or ends(index, token):
                done.add(index)
            else:
                yield index, token
                kept.append(row)
            ids.append(token)
        if not kept:
            return
        if len(kept) < len(rows) and steps is None:
            rows = [rows[row] for row in kept]
            if cache is not None:
                cache.keep(kept)
                cache.length = len(rows[0][1]) - 1


def _next_logits(
    model: Decoder, rows: list[list[int]], cache: KVCache | None, device: torch.device, steps: CompiledSteps | None
) -> Tensor:
    """The logits after each row, [batch, vocab]; what is in the cache is not run again."""
    lengths = [len(row) for row in rows]
    last = [length - 1 for length in lengths]
    if steps is not None and cache is not None and cache.length:
        return steps.logits(model, cache, [row[-1] for row in rows], last)
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

    An expert of limited capacity does not take from one token what it would take from the sequence. Nor has a
    feed-forward that looks back a memory of what it saw.
    """
    remembers = all(layer.attention.caches and layer.ffn.token_wise for layer in model.layers)
    return remembers and pads(model)


def together(model: Decoder, lengths: Sequence[int], batch_size: int | None = None) -> list[list[int]]:
    """Sequences that may run in one forward, right-padded: their indices, the longest first.

    All, ``batch_size`` at a time, where no output depends on other sequences or on what comes after it; else each
    alone. With a cache, only such as are equally long where an attention takes positions to be the same in all.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if not pads(model):
        return [[i] for i in order]
    groups = [order]
    if can_cache(model) and not all(layer.attention.ragged for layer in model.layers):
        groups = [list(group) for _, group in groupby(order, key=lambda i: lengths[i])]
    size = batch_size or max(len(lengths), 1)
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def pads(model: Decoder) -> bool:
    """Whether a sequence comes out the same with padding after it and others beside it."""
    parts = [module for module in model.modules() if isinstance(module, Component)]
    return all(part.causal and not part.batch_coupled for part in parts)


def _demand_one_shape(model: Decoder) -> None:
    """Refuses to compile a step that is not the same for every token."""
    if not can_cache(model):
        raise SparsekitError("compile: this model keeps no cache of keys and values; leave it out")
    odd = next((layer.attention for layer in model.layers if not layer.attention.ragged), None)
    if odd is not None:
        names = [type(part).__name__ for part in (odd, getattr(odd, "position", None)) if part is not None]
        raise SparsekitError(f"compile: {' with '.join(names)} needs to know how long a sequence is; leave it out")
