"""Activation checkpointing: what a layer works out in the forward is worked out again in the backward, and not kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparsekit.model.decoder import Decoder

# What is dear to compute, by operator: the results of matrix products, of attention, and what other processes sent.
KEPT = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "sparsekit::grouped_mm",
    "sparsekit::experts_up",
    "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flex_attention", "flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward",
    "xformers::efficient_attention_forward_cutlass",
    "_c10d_functional::all_reduce", "_c10d_functional::all_to_all_single",
    "_c10d_functional_autograd::all_to_all_single",
}  # fmt: skip


def recompute(model: Decoder, which: Literal["none", "full", "selective"] | int) -> None:
    """Makes layers recompute: all ("full"), every n-th (a number n), or all but for what is dear ("selective").

    The numbers are the same bit for bit, random ones too, and so are the names of parameters.

    Source: Chen et al. 2016, arXiv 1604.06174; selective: Korthikanti et al. 2022, arXiv 2205.05198, sec. 5
    """
    if which == "none":
        return
    every = which if isinstance(which, int) else 1
    options: dict[str, Any] = {"context_fn": _selective} if which == "selective" else {}
    for index, layer in enumerate(model.layers):
        if (index + 1) % every == 0:
            _wrap(layer, options)


def _wrap(layer: nn.Module, options: dict[str, Any]) -> None:
    """Inside a layer's call, and not around it: hooks on the layer (statistics, gathering of weights) run once."""
    inner: Callable[..., Any] = layer.forward
    layer.forward = partial(checkpoint, inner, use_reentrant=False, **options)


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
