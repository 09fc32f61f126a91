"""The step that decodes a token of each sequence, compiled once for all steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.cache import KVCache, WholeCache
from sparsekit.model.decoder import Decoder, Unembedding

SHORTEST = 256  # positions; a cache's length is this times a power of two, so that few of them are compiled


class CompiledSteps:
    """The decoding of one model's tokens through ``torch.compile``, with caches that stay where they are.

    With the backend inductor a GPU replays each step as a CUDA graph, without the host. A step is compiled for each
    number of sequences and length of the cache (seconds to minutes the first time); its buffers are kept as long as
    the model, since what is compiled knows their addresses, and serve one generation at a time.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str = "inductor"):
        mode: dict[str, Any] = {"mode": "reduce-overhead"} if backend == "inductor" else {}
        self._run: Callable[..., Tensor] = torch.compile(step, backend=backend, dynamic=False, fullgraph=True, **mode)
        self._caches: dict[tuple[int, int], KVCache] = {}

    def cache(self, n_sequences: int, longest: int, limit: int) -> KVCache:
        """One that holds ``longest`` positions, empty; an earlier one where it has the same shape."""
        length = SHORTEST
        while length < longest:
            length *= 2
        found = self._caches.setdefault((n_sequences, min(length, limit)), KVCache(min(length, limit)))
        found.length = 0
        return found

    def logits(self, model: Decoder, cache: KVCache, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """The logits after a token of each sequence, [batch, vocab], each at its own position."""
        device = next(model.parameters()).device
        layers = [cache.layers[index] for index in range(len(model.layers))]
        for buffers in layers:
            for buffer in buffers:
                torch._dynamo.mark_static_address(buffer)
        ids_B1, places_B1 = (torch.tensor(each, device=device)[:, None] for each in (tokens, places))
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        return self._run(model, ids_B1, places_B1, layers).clone()  # whose memory the next step uses again


def step(model: Decoder, ids_B1: Tensor, places_B1: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The logits, [batch, vocab]; keys and values go into ``layers``."""
    context = ForwardContext(positions_BT=places_B1, cache=WholeCache(layers, places_B1))
    found: Tensor = model(ids_B1, context, last)
    return found


def last(x_BTD: Tensor, unembedding: Unembedding) -> Tensor:
    """The logits after each sequence's last token."""
    return unembedding.logits(x_BTD[:, -1])


_known: WeakKeyDictionary[Decoder, dict[str, CompiledSteps]] = WeakKeyDictionary()


def steps_of(model: Decoder, backend: str = "inductor") -> CompiledSteps:
    """A model's own, made when they are first asked for."""
    own = _known.setdefault(model, {})
    if backend not in own:
        own[backend] = CompiledSteps(backend)
    return own[backend]
