"""Attention in kernels that never hold the scores, other libraries' and torch's: what each needs and can do."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.components.contracts import ForwardContext, constant
from sparsekit.components.kernels import HALF, Extras, Kernel, Rule, begins, installed, places, sees


class Flex(Kernel):
    """torch's flex_attention: masks and score changes compiled into one kernel, hidden blocks skipped.

    Source: Dong et al. 2024, arXiv 2412.05496
    """

    features = frozenset({"window", "sinks", "document", "softcap", "alibi", "sink_logits"})
    dtypes = (*HALF, torch.float32)
    gradients = ("cuda",)
    min_head_dim = 16

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        if device.type == "meta":
            return None
        documents = context.documents_BT
        place = None if documents is None else places(documents)

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            mask = sees(rule, query, key, key if place is None else place[b, key])
            if documents is not None:
                mask = mask & (documents[b, query] == documents[b, key])
            return mask

        n_batch = None if documents is None else documents.shape[0]
        return create_block_mask(seen, n_batch, None, n_queries, n_queries, device=str(device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        from torch.nn.attention.flex_attention import AuxRequest

        slopes, softcap = extras.slopes_H, extras.softcap

        def change(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if slopes is None else score + slopes[h] * (key - query)

        options: dict[str, Any] = {
            "score_mod": change if softcap is not None or slopes is not None else None,
            "block_mask": mask,
            "scale": extras.scale,
            "enable_gqa": q.shape[1] != k.shape[1],
        }
        flex = _flex(q.device.type)
        if extras.sink_H is None:
            return flex(q, k, v, **options)
        out, aux = flex(q, k, v, **options, return_aux=AuxRequest(lse=True))
        # sum exp(s) / (sum exp(s) + exp(sink)), by which a key more shrinks all weights
        return out * torch.sigmoid(aux.lse - extras.sink_H[None, :, None])[..., None].to(out.dtype)


@functools.cache
def _flex(device: str) -> Any:
    """flex_attention, compiled where that is what makes it fast."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention


class Varlen(Kernel):
    """torch's varlen_attn: flash attention over packed documents, without a mask of queries by keys.

    Source: Dao 2023, arXiv 2307.08691
    """

    features = frozenset({"document"})
    dtypes = HALF
    devices = ("cuda",)
    gradients = ("cuda",)

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        return document_ends(context.documents_BT, n_queries)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = mask
        if ends is None:
            ends = torch.arange(0, q.shape[0] * q.shape[2] + 1, q.shape[2], device=q.device, dtype=torch.int32)
        groups = q.shape[1] // k.shape[1]
        packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        if groups > 1 and not _varlen_has("enable_gqa"):
            packed[1:] = [x.repeat_interleave(groups, dim=1) for x in packed[1:]]
        options: dict[str, Any] = {"scale": extras.scale} if _varlen_has("scale") else {}
        if _varlen_has("window_size"):
            options["window_size"] = (-1, 0)
        else:
            options["is_causal"] = True
        if _varlen_has("enable_gqa"):
            options["enable_gqa"] = groups > 1
        if not _varlen_has("scale") and extras.scale != q.shape[-1] ** -0.5:
            packed[0] = packed[0] * (extras.scale * q.shape[-1] ** 0.5)
        attend: Any = varlen_attn  # its signature differs between versions
        out = attend(*packed, ends, ends, longest, longest, **options)
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


@constant
def _varlen_has(option: str) -> bool:
    """Whether this version of torch has an option."""
    return option in _varlen_options()


@functools.cache
def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def document_ends(documents_BT: Tensor | None, n_queries: int) -> tuple[Tensor | None, int]:
    """Where documents begin and end in the batch laid end to end (int32, from 0 to B·T), and the longest possible.

    None where every sequence is one document. Their number depends on the data, so the host waits for the device
    here, once a forward.
    """
    if documents_BT is None:
        return None, n_queries
    first = begins(documents_BT).flatten().nonzero()[:, 0]
    return F.pad(first, (0, 1), value=documents_BT.numel()).to(torch.int32), n_queries


class Flash(Kernel):
    """flash-attn 4 or 2, whichever is installed: exact attention in tiles that never leave the chip.

    Source: Dao 2023, arXiv 2307.08691; version 4: Shah et al. 2024, arXiv 2407.08608, and its successors
    """

    features = frozenset({"document", "window"})
    dtypes = HALF
    devices = ("cuda",)
    gradients = ("cuda",)
    min_head_dim = 32  # version 4 has no backward below
    package = ("flash_attn", "flash")

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        return document_ends(context.documents_BT, n_queries)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        ends, longest = mask
        shape = q.shape[0], q.shape[2], q.shape[1], v.shape[-1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if ends is not None:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        before = None if rule.window is None else rule.window - 1  # keys before the query
        if installed("flash_attn.cute"):
            out = _flash_4(q, k, v, ends, longest, extras.scale, before)[0]
        else:
            out = _flash_2(q, k, v, ends, longest, extras.scale, before)
        return out.view(shape).transpose(1, 2)


def _flash_2(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int, scale: float, before: int | None
) -> Tensor:
    import flash_attn

    window = (-1, -1) if before is None else (before, 0)
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True, "window_size": window}
    if ends is None:
        out: Tensor = flash_attn.flash_attn_func(q, k, v, **options)
    else:
        out = flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, **options)
    return out


# Version 4 compiles its kernels from Python at the first call, which torch.compile cannot trace; as operators of our
# own they stand in a graph whole.
@torch.library.custom_op("sparsekit::flash_4", mutates_args=())
def _flash_4(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int, scale: float, before: int | None
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import interface as cute

    options = _flash_4_options(ends, longest, before)
    out, lse = cute._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, **options)
    return out.contiguous(), lse.contiguous()


@_flash_4.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None, longest: int, scale: float, before: int | None
) -> tuple[Tensor, Tensor]:
    heads_last = q.shape[:-1]  # [B, T, H], or [B·T, H] of documents
    lse = (*heads_last[:-2], heads_last[-1], heads_last[-2])
    return q.new_empty(*heads_last, v.shape[-1]), q.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op("sparsekit::flash_4_backward", mutates_args=())
def _flash_4_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor | None, longest: int,
    scale: float, before: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.cute import interface as cute

    options = _flash_4_options(ends, longest, before)
    dq, dk, dv = cute._flash_attn_bwd(q, k, v, out, gradient, lse, scale, **options)[:3]
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_flash_4_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends: Tensor | None, longest: int,
    scale: float, before: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash_4_options(ends: Tensor | None, longest: int, before: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": True, "window_size_left": before}
    if ends is not None:
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return options


def _flash_4_keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, ctx.longest, ctx.scale, ctx.before = inputs
    ctx.save_for_backward(q, k, v, *output, ends)


def _flash_4_gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, ends = ctx.saved_tensors
    dq, dk, dv = _flash_4_backward(gradient, q, k, v, out, lse, ends, ctx.longest, ctx.scale, ctx.before)
    return dq, dk, dv, None, None, None, None


_flash_4.register_autograd(_flash_4_gradients, setup_context=_flash_4_keep)


class XFormers(Kernel):
    """xformers' memory_efficient_attention, which picks cutlass or flash operators.

    Source: Rabe & Staats 2021, arXiv 2112.05682; Lefaudeux et al. 2022, xFormers
    """

    features = frozenset({"document", "window"})
    dtypes = (*HALF, torch.float32)
    devices = ("cuda",)
    gradients = ("cuda",)
    fullgraph = False  # its operators' shape functions do not take the scale that they are called with
    package = ("xformers", "xformers")

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, gradients: bool, head_dim: int = 64) -> str | None:
        reason = super().refusal(device, dtype, gradients, head_dim)
        if reason is None and installed("flash_attn") and not installed("flash_attn.flash_attn_interface"):
            return "takes flash-attn 4, which is installed, for version 2 and fails; uninstall one of them"
        return reason

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        if device.type == "meta":
            return None
        self.demand(rule, device, self.dtypes[0], torch.is_grad_enabled())  # before its package is imported
        from xformers.ops.fmha import attn_bias as bias

        ends, _ = document_ends(context.documents_BT, n_queries)
        if ends is None:
            mask = bias.LowerTriangularFromBottomRightMask()
        else:
            mask = bias.BlockDiagonalCausalMask.from_seqlens(ends.diff().tolist(), device=device)
        return mask if rule.window is None else mask.make_local_attention(rule.window)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        from xformers.ops import fmha

        groups = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shape = (*q.shape[:3], v.shape[-1])
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        if hasattr(mask, "q_seqinfo"):  # documents are laid end to end
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        out: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, scale=extras.scale)
        return out.view(shape).transpose(1, 2)
