"""Queries, keys and values where a Hugging Face attention scores them, whichever way it does."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsekit.probes.anatomy import Score
from sparsekit.probes.layered import Edit

PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm}
BIASED_PRODUCTS = {torch.baddbmm, torch.Tensor.baddbmm}
SCALINGS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
SHRINKINGS = {torch.div, torch.Tensor.div, torch.Tensor.__truediv__}
SOFTMAXES = {F.softmax, torch.softmax, torch.Tensor.softmax}


class ScoreWatch(TorchFunctionMode):
    """While an attention runs: q, k, v of its scaled_dot_product_attention, or of its product, softmax and product.

    Keys and values that were repeated for the query heads of a group are told once.

    Attributes:
        scale: by which q k^T was multiplied; None until seen.
        softmaxes: how often scores were normalised.
        context: what the attention made of the values, before the output projection; None until seen.
    """

    def __init__(self, attention: nn.Module, sequences: int, edit: Edit, seen: dict[str, Any]):
        super().__init__()
        self.attention, self.sequences, self.edit, self.seen = attention, sequences, edit, seen
        self.scale: float | None = None
        self.softmaxes = 0
        self.context: Tensor | None = None
        self._on = False
        self._weights: Tensor | None = None
        self._product: tuple[Any, ...] | None = None

    def hooks(self, undo: ExitStack) -> None:
        """Looks only while the attention runs; ``undo`` ends it."""

        def begin(*_: Any) -> None:
            self._on = True

        def end(*_: Any) -> None:
            self._on = False

        undo.callback(self.attention.register_forward_pre_hook(begin).remove)
        undo.callback(self.attention.register_forward_hook(end).remove)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._on:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._fused(args, kwargs)
        if func in PRODUCTS or func in BIASED_PRODUCTS:
            return self._multiply(func, args, kwargs)
        if func in SOFTMAXES and self._product is not None:
            self.softmaxes += 1
            self._tell_added(args[0])
            self._weights = func(*args, **kwargs)
            return self._weights
        out = func(*args, **kwargs)
        if self.softmaxes == 0 and self._product is not None and func in SCALINGS | SHRINKINGS:
            number = next((x for x in args if isinstance(x, (int, float))), None)
            if number is not None and isinstance(out, Tensor) and out.numel() == self._product[0].numel():
                self.scale = (self.scale or 1.0) * (number if func in SCALINGS else 1 / number)
        if self._weights is not None and isinstance(out, Tensor) and any(x is self._weights for x in args):
            self._weights = out  # cast, dropped out, reshaped, less a sink
        return out

    def _heads(self, x: Tensor, transposed: bool = False) -> Tensor:
        """[N, heads, T, K] of what may be [N·heads, T, K] or have its last two dimensions the other way round."""
        x = x.transpose(-2, -1) if transposed else x
        return x.view(self.sequences, -1, *x.shape[-2:]) if x.ndim == 3 else x

    def _see(self, site: str, x: Tensor) -> Tensor:
        """The tensor, or what an edit puts there; of repeated heads one each is told."""
        groups = distinct_heads(x) if site in "kv" else x.shape[1]
        once = x[:, :: x.shape[1] // groups]
        if site in self.edit:
            once = self.edit[site](once)
            x = once.repeat_interleave(x.shape[1] // groups, 1)
        self.seen[site] = once
        return x

    def _fused(self, args: Any, kwargs: Any) -> Tensor:
        named = dict(
            zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False), **kwargs
        )
        for site, name in zip("qkv", ("query", "key", "value"), strict=True):
            named[name] = self._see(site, named[name])
        given = named.get("scale")
        self.scale = named["query"].shape[-1] ** -0.5 if given is None else float(given)
        mask = named.get("attn_mask")
        if mask is None and not named.get("is_causal", False):
            sides = named["query"].shape[-2], named["key"].shape[-2]
            mask = torch.ones(1, 1, *sides, dtype=torch.bool, device=named["query"].device)
        self.seen["score"] = Score(self.scale, mask)
        self.softmaxes += 1
        self.context = F.scaled_dot_product_attention(**named)
        return self.context

    def _tell_added(self, scores: Tensor) -> None:
        """What was added to scale q k^T before the softmax, a cap's effect included."""
        if {"q", "k"} <= set(self.seen) and scores.shape[-1] == self.seen["k"].shape[-2]:
            q, k = self.seen["q"], self.seen["k"]
            plain = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1) * (self.scale or 1.0)
            self.seen["score"] = Score(self.scale or 1.0, scores.view(plain.shape) - plain)

    def _multiply(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """The product before a softmax has queries and keys, the one after it weights and values."""
        if func in BIASED_PRODUCTS:
            bias, first, second = [*args, kwargs.get("batch1"), kwargs.get("batch2")][:3]
        else:
            bias, (first, second) = None, args[:2]
        if not isinstance(first, Tensor) or not isinstance(second, Tensor) or second.ndim < 3:
            return func(*args, **kwargs)
        if self._weights is not None and first.numel() == self._weights.numel():
            v = self._see("v", self._heads(second))
            self.context = func(first, v.reshape(second.shape), **kwargs)
            self._weights = None
            return self.context
        if self.softmaxes:
            return func(*args, **kwargs)
        q, k = self._heads(first), self._heads(second, transposed=True)
        put_q, put_k = self._see("q", q), self._see("k", k)
        if put_q is not q:
            first = put_q.reshape(first.shape)
        if put_k is not k:
            second = put_k.transpose(-2, -1).reshape(second.shape)
        if bias is None:
            out: Tensor = func(first, second)
        else:
            numbers = {name: kwargs[name] for name in ("alpha", "beta") if name in kwargs}
            self.scale = float(numbers.get("alpha", 1.0))
            out = torch.baddbmm(bias, first, second, **numbers)
        self._product = (out,)
        self.scale = self.scale or 1.0
        return out


def distinct_heads(x_NHTK: Tensor) -> int:
    """How many heads there are when heads that stand side by side and are the same count once."""
    n_heads = x_NHTK.shape[1]
    for groups in range(1, n_heads):
        if n_heads % groups == 0:
            x = x_NHTK.unflatten(1, (groups, -1))
            if torch.equal(x, x[:, :, :1].expand_as(x)):
                return groups
    return n_heads
