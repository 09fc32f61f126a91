"""Projections that run, for as long as a model only answers, on weights in the order that the processor reads best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    Those of one input do so as one product. Results differ by rounding. It takes the memory of the weights once more.
    Not in a model that is compiled, nor where weights are shared out over processes; a weight that is changed meanwhile
    is used as it then is.

    Args:
        rows: how many vectors are multiplied at a time, for the most part.
    """
    changed: list[tuple[nn.Module, str]] = []
    try:
        if torch.backends.mkldnn.is_available() and not any(
            getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
        ):
            for module in model.modules():
                name = _product(module)
                if name is not None and name not in vars(module):  # else another has packed it
                    product = Product(module, name, rows)
                    methods = {name: product, "beside": product.beside} if name == "forward" else {name: product}
                    for method, own in methods.items():
                        setattr(module, method, own)
                        changed.append((module, method))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def _product(module: Any) -> str | None:
    """The method that is a product with a matrix, and no more, in a module; None if there is none or it cannot."""
    if isinstance(module, Linear) and type(module).forward is PlainLinear.forward:
        name = "forward"
    elif isinstance(module, TokenEmbedding) and type(module).unembed is TokenEmbedding.unembed:
        name = "unembed"
    else:
        return None
    weight = module.weight
    fits = weight.ndim == 2 and weight.device.type == "cpu" and weight.dtype == torch.float32
    return name if fits and not hasattr(weight, "device_mesh") else None


class Product:
    """What stands for a module's method meanwhile."""

    def __init__(self, module: Any, name: str, rows: int):
        self.module, self.plain, self.rows = module, getattr(module, name), rows
        self.alone: Matrix | None = None
        self.together: dict[tuple[int, ...], Matrix] = {}

    def __call__(self, x: Tensor, context: ForwardContext | None = None) -> Tensor:
        if _answers(x):
            if self.alone is None:
                self.alone = Matrix([self.module], self.rows)
            if self.alone.holds:
                return self.alone(x)
        y: Tensor = self.plain(x) if context is None else self.plain(x, context)
        return y

    def beside(self, others: Sequence[Linear], x: Tensor, context: ForwardContext | None) -> list[Tensor]:
        """As :meth:`~sparsekit.components.contracts.Linear.beside`, unless somebody listens to one of them."""
        linears = [self.module, *others]
        if _answers(x) and all(_bare(linear) for linear in linears):
            key = tuple(map(id, others))
            if key not in self.together:
                self.together[key] = Matrix(linears, self.rows)
            if self.together[key].holds:
                return list(self.together[key](x).split([linear.d_out for linear in linears], dim=-1))
        return [linear(x, context) for linear in linears]


class Matrix:
    """The matrices of some projections, one below the other, in oneDNN's order."""

    def __init__(self, modules: Sequence[Any], rows: int):
        self.weights = [module.weight for module in modules]
        self.versions = [weight._version for weight in self.weights]
        matrix = torch.cat([m.effective_weight() if isinstance(m, Linear) else m.weight for m in modules])
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(matrix, max(rows, 2))  # 2's order serves 1 as well
        biases = [getattr(module, "bias", None) for module in modules]
        given = [torch.zeros(len(w)) if bias is None else bias for w, bias in zip(self.weights, biases, strict=True)]
        self.bias = None if all(bias is None for bias in biases) else torch.cat(given)

    @property
    def holds(self) -> bool:
        """Whether no weight has changed since."""
        return all(weight._version == seen for weight, seen in zip(self.weights, self.versions, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.matrix, self.bias, "none", [], "")
        return y


def _answers(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_grad_enabled()


def _bare(linear: nn.Module) -> bool:
    """Whether a module is packed, and calling it is that and no more."""
    return isinstance(vars(linear).get("forward"), Product) and not (linear._forward_hooks or linear._forward_pre_hooks)
