"""Text from a model: a key-value cache and sampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsekit.components.contracts import Component, ForwardContext
from sparsekit.model.decoder import Decoder


class KVCache:
    """Keys and values of the positions a model has seen, layer by layer, in buffers of a fixed length."""

    def __init__(self, max_seq_len: int):
        self.max_seq_len = max_seq_len
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer_index: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Appends this forward's keys and values to a layer's; returns all of them, [batch, heads, seen, head_dim]."""
        if layer_index not in self._layers:
            k_shape, v_shape = ((*x.shape[:2], self.max_seq_len, x.shape[3]) for x in (k_BGTK, v_BGTK))
            self._layers[layer_index] = k_BGTK.new_empty(k_shape), v_BGTK.new_empty(v_shape)
        end = self.length + k_BGTK.shape[2]
        keys, values = self._layers[layer_index]
        keys[:, :, self.length : end] = k_BGTK
        values[:, :, self.length : end] = v_BGTK
        return keys[:, :, :end], values[:, :, :end]

    def context(self, n_tokens: int, device: torch.device) -> ForwardContext:
        """What the model is told about the next n_tokens."""
        positions = torch.arange(self.length, self.length + n_tokens, device=device)
        return ForwardContext(positions_BT=positions[None], cache=self)


@torch.no_grad()
def generate(
    model: Decoder,
    ids_T: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yields new tokens after a prompt, one at a time.

    Past ``max_seq_len`` the model goes on with the last half of what it has. Temperature 0 takes the likeliest token.

    Raises:
        ValueError: an empty prompt, a negative temperature, or top_k below 1.
    """
    if not ids_T:
        raise ValueError("the prompt is empty: give at least one token")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    limit = model.spec.max_seq_len
    can_cache = all(layer.attention.caches for layer in model.layers)
    can_cache &= all(module.causal for module in model.modules() if isinstance(module, Component))
    was_training = model.training
    model.eval()
    try:
        ids, cache, fresh = list(ids_T)[-limit:], KVCache(limit), list(ids_T)[-limit:]
        for _ in range(max_new_tokens):
            if len(ids) > limit:
                ids = fresh = ids[-(limit // 2 or 1) :]
                cache = KVCache(limit)
            if can_cache:
                x_1T = torch.tensor([fresh], device=device)
                logits_V = model(x_1T, cache.context(len(fresh), device))[0, -1]
                cache.length += len(fresh)
            else:
                logits_V = model(torch.tensor([ids], device=device))[0, -1]
            token = int(sample(logits_V.float(), temperature, top_k, generator))
            if token == stop_id:
                return
            yield token
            ids.append(token)
            fresh = [token]
    finally:
        model.train(was_training)


def sample(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One token from softmax(logits / temperature), among the top_k likeliest if given; the likeliest at 0."""
    if temperature == 0:
        return logits_V.argmax()
    if top_k is not None and top_k < logits_V.shape[-1]:
        lowest = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < lowest, float("-inf"))
    return torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)[0]
