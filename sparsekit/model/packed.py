"""Projections that run, for as long as a model only answers, on weights in the order that the processor reads best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.components.contracts import ForwardContext, Linear
from sparsekit.components.embeddings import TokenEmbedding
from sparsekit.components.linears import PlainLinear
from sparsekit.model.decoder import Decoder


@contextmanager
def packed(model: Decoder, rows: int) -> Iterator[None]:
    """On a CPU, in float32: plain projections multiply with a copy of their weights in the order that oneDNN wants.

    Results differ by rounding. It takes the memory of the weights once more. Not in a model that is compiled, nor where
    weights are shared out over processes; a weight that is changed meanwhile is used as it then is.

    Args:
        rows: how many vectors are multiplied at a time, for the most part.
    """
    changed: list[tuple[nn.Module, str]] = []
    try:
        if torch.backends.mkldnn.is_available() and not any(
            getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
        ):
            for module in model.modules():
                if module is model.embedding and model.head is not None:
                    continue  # which does not multiply
                name, weight, bias = _product(module)
                if weight is not None and name not in vars(module):  # else another has packed it
                    setattr(module, name, _run(module, name, weight, bias, rows))
                    changed.append((module, name))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def _product(module: nn.Module) -> tuple[str, Tensor | None, Tensor | None]:
    """The method that is a product with a matrix and no more; the matrix, or None; and what is added."""
    weight: Tensor | None = None
    name, bias = "forward", None
    if isinstance(module, Linear) and type(module).forward is PlainLinear.forward:
        weight, bias = module.effective_weight(), module.bias
    elif isinstance(module, TokenEmbedding) and type(module).unembed is TokenEmbedding.unembed:
        name, weight = "unembed", module.weight
    if weight is None or weight.ndim != 2 or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return name, None, None
    return name, None if hasattr(weight, "device_mesh") else weight, bias


def _run(module: Any, name: str, weight: Tensor, bias: Tensor | None, rows: int) -> Callable[..., Tensor]:
    """The same method over a copy of the matrix."""
    plain, own, onednn = getattr(module, name), module.weight, torch.ops.mkldnn
    version, matrix = own._version, onednn._reorder_linear_weight(weight, max(rows, 2))  # 2's order serves 1 as well

    def product(x: Tensor, context: ForwardContext | None = None) -> Tensor:
        if own._version != version or x.dtype != torch.float32 or torch.is_grad_enabled():
            y: Tensor = plain(x) if context is None else plain(x, context)
        else:
            y = onednn._linear_pointwise(x, matrix, bias, "none", [], "")
        return y

    return product
