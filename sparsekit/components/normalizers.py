"""How scores become weights that sum to 1."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from sparsekit.components.contracts import Component
from sparsekit.spec.facts import Facts


class Normalizer(Component):
    """A map of scores [..., keys], -inf where a key is hidden, to weights in the simplex."""

    def forward(self, scores: Tensor) -> Tensor:
        raise NotImplementedError


class Softmax(Normalizer):
    """p = exp(z) / sum exp(z), which every kernel can do.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1
    """

    def forward(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class SparseNormalizer(Normalizer):
    """One that gives exact zeros, by the library entmax."""

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        try:
            importlib.import_module("entmax")
        except ImportError:
            raise ValueError("needs the library entmax: pip install 'sparsekit[entmax]'") from None


class Sparsemax(SparseNormalizer):
    """p = argmin over the simplex of ||p - z||^2, so p = max(0, z - tau).

    Source: Martins & Astudillo 2016, arXiv 1602.02068, eq. 2
    """

    def forward(self, scores: Tensor) -> Tensor:
        weights: Tensor = sparsemax(scores)
        return weights


class Entmax15(SparseNormalizer):
    """p = max(0, z/2 - tau)^2, the 1.5-entmax, between softmax and sparsemax.

    Source: Peters, Niculae & Martins 2019, arXiv 1905.05702, eq. 9
    """

    def forward(self, scores: Tensor) -> Tensor:
        weights: Tensor = entmax15(scores)
        return weights


# The library's own autograd functions stop compilation; behind custom operators blocks stay whole.


@torch.library.custom_op("sparsekit::sparsemax", mutates_args=())
def sparsemax(scores: Tensor) -> Tensor:
    """Sparsemax over the last dimension."""
    import entmax

    return entmax.sparsemax(scores, dim=-1)


@torch.library.custom_op("sparsekit::entmax15", mutates_args=())
def entmax15(scores: Tensor) -> Tensor:
    """1.5-entmax over the last dimension."""
    import entmax

    return entmax.entmax15(scores, dim=-1)


@sparsemax.register_fake
@entmax15.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores)


def _save_output(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output)


def _sparsemax_backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
    """J = diag(s) - s s^T / |S|, s the support's indicator."""
    (weights,) = ctx.saved_tensors
    support = (weights > 0).to(gradient.dtype)
    mean = (gradient * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
    return support * (gradient - mean)


def _entmax15_backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
    """J = diag(r) - r r^T / sum(r), r = sqrt(p)."""
    (weights,) = ctx.saved_tensors
    root = weights.sqrt()
    mean = (gradient * root).sum(-1, keepdim=True) / root.sum(-1, keepdim=True)
    return root * (gradient - mean)


sparsemax.register_autograd(_sparsemax_backward, setup_context=_save_output)
entmax15.register_autograd(_entmax15_backward, setup_context=_save_output)
