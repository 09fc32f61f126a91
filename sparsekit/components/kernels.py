"""How attention is computed, given heads: one signature, several implementations, each telling what it can do."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import Component, ForwardContext, compute_dtype
from sparsekit.errors import SparsekitError
from sparsekit.registry import registry
from sparsekit.spec.facts import Facts, check_children

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32, torch.float64)
FEATURES = ("window", "sinks", "document", "cache", "softcap", "alibi", "sink_logits", "normalizer", "value_dim")


@dataclass(frozen=True)
class Rule:
    """What an attention asks of its kernel, beside causality.

    Attributes:
        window: a query sees itself and the window - 1 keys before it; None for all.
        sinks: so many first keys of a document are seen whatever the window.
        softcap: scores become softcap * tanh(score / softcap).
        features: which of FEATURES that takes, with what comes as tensors (alibi, sink_logits) included.
    """

    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    features: frozenset[str] = frozenset()

    def key(self, kernel: str) -> str:
        """Under which masks are shared: by what shapes them and, since auto goes by it, by what is asked besides."""
        return "/".join(("mask", kernel, str(self.window), str(self.sinks), *sorted(self.features)))


@dataclass(frozen=True)
class Extras:
    """What joins the scores and is no mask.

    Attributes:
        scale: by which q k^T is multiplied.
        slopes_H: ALiBi's, or None.
        sink_H: a learned logit a head that takes part in the softmax and carries no value, or None.
        normalizer: in place of the softmax, or None.
    """

    scale: float
    softcap: float | None = None
    slopes_H: Tensor | None = None
    sink_H: Tensor | None = None
    normalizer: nn.Module | None = None


class Kernel(Component):
    """softmax(scale q k^T + mask) v for grouped heads: head h reads key-value head h // (H / G).

    Attributes:
        features: which of FEATURES it can do.
        dtypes, devices: what it runs in and on.
        gradients: the devices on which it has a backward.
        package: what must be installed, and the extra that installs it.
    """

    features: ClassVar[frozenset[str]] = frozenset()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ALL
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    gradients: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    package: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        rule: Rule = facts.get("rule", Rule())
        lacking = sorted(rule.features - cls.features)
        if lacking:
            able = [e.name for e in registry("kernel").entries() if e.built_in and rule.features <= _features(e.name)]
            raise ValueError(f"cannot do {' and '.join(lacking)}; {' or '.join(able) or 'no kernel'} can")
        check_children(params, facts)

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, gradients: bool) -> str | None:
        """Why it cannot run there, or None where it can."""
        if cls.package is not None and not _installed(cls.package[0]):
            return f"needs the package {cls.package[0]}: pip install 'sparsekit[{cls.package[1]}]'"
        if device.type not in cls.devices:
            return f"does not run on {device.type}"
        if dtype not in cls.dtypes:
            return f"does not run in {str(dtype).removeprefix('torch.')}"
        if gradients and device.type not in cls.gradients:
            return f"has no gradients on {device.type}"
        return None

    def demand(self, rule: Rule, device: torch.device, dtype: torch.dtype, gradients: bool) -> None:
        """Refuses what the kernel cannot do there.

        Raises:
            SparsekitError: it cannot; the message names one that can.
        """
        reason = self.refusal(device, dtype, gradients)
        if reason is not None:
            able = _able(rule.features, device, dtype, gradients)
            raise SparsekitError(f"kernel {type(self).__name__.lower()!r} {reason}; use {' or '.join(able)}")

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        """The mask in the form this kernel wants it; None where plain causality in one document is all."""
        return visible(rule, n_queries, device, context)

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        """Contexts [batch, heads, queries, value head_dim].

        Raises:
            SparsekitError: the kernel cannot run on these tensors; the message names one that can.
        """
        if q_BHTK.device.type == "meta":  # where shapes alone are worked out, one kernel stands for all
            grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
            return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=grouped)
        self.demand(rule, q_BHTK.device, q_BHTK.dtype, q_BHTK.requires_grad)
        return self.attend(q_BHTK, k_BGSK, v_BGSK, mask, rule, extras)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        """As forward, once it is known that the kernel can."""
        raise NotImplementedError


def _able(features: frozenset[str], device: torch.device, dtype: torch.dtype, gradients: bool) -> list[str]:
    """The built-in kernels that can do what is asked, there."""
    names = [entry.name for entry in registry("kernel").entries() if entry.built_in]
    able = [name for name in names if features <= _features(name)]
    return [name for name in able if _class(name).refusal(device, dtype, gradients) is None]


def _features(name: str) -> frozenset[str]:
    return registry("kernel").get(name).features


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def visible(rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Tensor | None:
    """True where a query sees a key, [B or 1, 1, T, S]; None where it sees all of its past in one document.

    With a cache, queries stand at ``context.positions_BT`` and keys at 0 .. S-1.
    """
    documents, positions = context.documents_BT, context.positions_BT
    if documents is None and rule.window is None and context.cache is None:
        return None
    if context.cache is None:
        query = torch.arange(n_queries, device=device)[None, :, None]
        key = torch.arange(n_queries, device=device)[None, None, :]
    else:
        assert positions is not None, "a cache needs the positions of its queries"
        query = positions[:, :, None]
        key = torch.arange(int(positions[0, -1]) + 1, device=device)[None, None, :]
    mask = key <= query
    if rule.window is not None:
        near = query - key < rule.window
        if rule.sinks:
            first = key if documents is None else places(documents)[:, None, :]
            near = near | (first < rule.sinks)
        mask = mask & near
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return mask[:, None]


def places(documents_BT: Tensor) -> Tensor:
    """How far each token stands from its document's first."""
    index = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return index - torch.where(begins_BT, index, 0).cummax(dim=-1).values


def distances(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Key position less query position, [T, S]; the queries are the last of the keys' positions."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)
    return torch.arange(n_keys, device=device)[None, :] - query[:, None]


class SDPA(Kernel):
    """torch's scaled_dot_product_attention, which picks the fastest backend of the device.

    Source: PyTorch
    """

    features = frozenset({"window", "sinks", "document", "cache", "alibi", "value_dim"})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, extras: Extras) -> Tensor:
        if extras.slopes_H is not None:
            distance_TS = distances(q.shape[2], k.shape[2], q.device)
            seen = distance_TS <= 0 if mask is None else mask
            bias_HTS = extras.slopes_H[:, None, None] * distance_TS
            mask = bias_HTS.to(q.dtype).masked_fill(~seen, float("-inf"))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=extras.scale, enable_gqa=q.shape[1] != k.shape[1]
        )


class Eager(Kernel):
    """The formula written out, scores and probabilities whole: the reference that every kernel is held against.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1
    """

    features = frozenset(FEATURES)

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, extras: Extras) -> Tensor:
        """[batch, heads, queries, keys]; rows sum to 1, less what a learned sink takes."""
        k_BHSK = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores_BHTS = q @ k_BHSK.transpose(-2, -1) * extras.scale
        scores_BHTS = scores_BHTS.to(torch.promote_types(q.dtype, torch.float32))
        if extras.softcap is not None:
            scores_BHTS = extras.softcap * torch.tanh(scores_BHTS / extras.softcap)
        if extras.slopes_H is not None:
            scores_BHTS = scores_BHTS + extras.slopes_H[:, None, None] * distances(q.shape[2], k.shape[2], q.device)
        if mask is None:
            mask = torch.ones(scores_BHTS.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
        if extras.sink_H is not None:  # a key more, which is seen by all and then left out
            sink = extras.sink_H[None, :, None, None].to(scores_BHTS.dtype).expand(*scores_BHTS.shape[:-1], 1)
            scores_BHTS = torch.cat((scores_BHTS, sink), dim=-1)
        weights = scores_BHTS.softmax(-1) if extras.normalizer is None else extras.normalizer(scores_BHTS)
        return (weights if extras.sink_H is None else weights[..., :-1]).to(q.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, extras: Extras) -> Tensor:
        v_BHSK = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return self.probabilities(q, k, mask, extras) @ v_BHSK


class Flex(Kernel):
    """torch's flex_attention: masks and score changes compiled into one kernel, hidden blocks skipped.

    Source: Dong et al. 2024, arXiv 2412.05496
    """

    features = frozenset({"window", "sinks", "document", "softcap", "alibi", "sink_logits"})
    dtypes = (*HALF, torch.float32)
    gradients = ("cuda",)

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        if device.type == "meta":
            return None
        documents = context.documents_BT
        place = None if documents is None else places(documents)

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            mask = key <= query
            if rule.window is not None:
                near = query - key < rule.window
                first = key if place is None else place[b, key]
                mask = mask & (near | (first < rule.sinks) if rule.sinks else near)
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
        if groups > 1 and "enable_gqa" not in _varlen_options():
            packed[1:] = [x.repeat_interleave(groups, dim=1) for x in packed[1:]]
        options: dict[str, Any] = {"scale": extras.scale} if "scale" in _varlen_options() else {}
        if "window_size" in _varlen_options():
            options["window_size"] = (-1, 0)
        else:
            options["is_causal"] = True
        if "enable_gqa" in _varlen_options():
            options["enable_gqa"] = groups > 1
        if "scale" not in _varlen_options() and extras.scale != q.shape[-1] ** -0.5:
            packed[0] = packed[0] * (extras.scale * q.shape[-1] ** 0.5)
        attend: Any = varlen_attn  # its signature differs between versions
        out = attend(*packed, ends, ends, longest, longest, **options)
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


@functools.cache
def _varlen_options() -> frozenset[str]:
    """Which options this version of torch has."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def document_ends(documents_BT: Tensor | None, n_queries: int) -> tuple[Tensor | None, int]:
    """Where documents begin and end in the batch laid end to end (int32, from 0 to B·T), and the longest possible.

    None where every sequence is one document. Their number depends on the data, so the host waits for the device
    here, once a forward.
    """
    if documents_BT is None:
        return None, n_queries
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    begins = begins_BT.flatten().nonzero()[:, 0]
    return F.pad(begins, (0, 1), value=documents_BT.numel()).to(torch.int32), n_queries


class Flash(Kernel):
    """flash-attn 4 or 2, whichever is installed: exact attention in tiles that never leave the chip.

    Source: Dao 2023, arXiv 2307.08691; version 4: Shah et al. 2024, arXiv 2407.08608, and its successors
    """

    features = frozenset({"document", "window"})
    dtypes = HALF
    devices = ("cuda",)
    gradients = ("cuda",)
    package = ("flash_attn", "flash")

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        return document_ends(context.documents_BT, n_queries)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        whole, packed, everything = _flash()
        options: dict[str, Any] = {"softmax_scale": extras.scale, "causal": True}
        if rule.window is not None:
            options["window_size"] = (rule.window - 1, 0)  # keys before the query
        else:
            options["window_size"] = everything
        ends, longest = mask
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if ends is None:
            out = whole(q, k, v, **options)
        else:
            lengths = {f"cu_seqlens_{x}": ends for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
            out = packed(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, **options)
        out = out[0] if isinstance(out, tuple) else out  # version 4 returns the log-sum-exp too
        return out.view(*q.shape[:3], v.shape[-1]).transpose(1, 2)


@functools.cache
def _flash() -> tuple[Any, Any, tuple[Any, Any]]:
    """(attention of whole sequences, of packed ones, what stands for no window)."""
    if importlib.util.find_spec("flash_attn.cute") is not None:
        cute = importlib.import_module("flash_attn.cute.interface")
        return cute.flash_attn_func, cute.flash_attn_varlen_func, (None, None)
    two = importlib.import_module("flash_attn")
    return two.flash_attn_func, two.flash_attn_varlen_func, (-1, -1)


class XFormers(Kernel):
    """xformers' memory_efficient_attention, which picks cutlass or flash operators.

    Source: Rabe & Staats 2021, arXiv 2112.05682; Lefaudeux et al. 2022, xFormers
    """

    features = frozenset({"document", "window"})
    dtypes = (*HALF, torch.float32)
    devices = ("cuda",)
    gradients = ("cuda",)
    package = ("xformers", "xformers")

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, gradients: bool) -> str | None:
        reason = super().refusal(device, dtype, gradients)
        if reason is None and _installed("flash_attn") and not _installed("flash_attn.flash_attn_interface"):
            return "takes flash-attn 4, which is installed, for version 2 and fails; uninstall one of them"
        return reason

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        if device.type == "meta":
            return None
        self.demand(rule, device, self.dtypes[0], torch.is_grad_enabled())  # before its package is imported
        bias = importlib.import_module("xformers.ops.fmha.attn_bias")
        ends, _ = document_ends(context.documents_BT, n_queries)
        if ends is None:
            mask = bias.LowerTriangularFromBottomRightMask()
        else:
            mask = bias.BlockDiagonalCausalMask.from_seqlens(ends.diff().tolist(), device=device)
        return mask if rule.window is None else mask.make_local_attention(rule.window)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        fmha = importlib.import_module("xformers.ops.fmha")
        groups = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shape = (*q.shape[:3], v.shape[-1])
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        if hasattr(mask, "q_seqinfo"):  # documents are laid end to end
            q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        out: Tensor = fmha.memory_efficient_attention(q, k, v, attn_bias=mask, scale=extras.scale)
        return out.view(shape).transpose(1, 2)


class Auto(Kernel):
    """The fastest kernel that can do what is asked: varlen for documents on a GPU, else sdpa, flex or eager.

    Source: sparsekit
    """

    features = frozenset(FEATURES)

    def __init__(self, params: Any, build: Any):
        super().__init__(params, build)
        self.kernels = nn.ModuleDict(
            {name: registry("kernel").get(name)(Kernel.Params(), build) for name in ("sdpa", "flex", "varlen", "eager")}
        )

    def choose(self, rule: Rule, device: torch.device, dtype: torch.dtype, documents: bool, cache: bool) -> str:
        """The name of the kernel to use."""
        wanted = rule.features | ({"document"} if documents else set()) | ({"cache"} if cache else set())
        order = ("varlen", "sdpa", "flex", "eager") if documents else ("sdpa", "flex", "eager")
        able = [name for name in order if wanted <= _features(name)]
        gradients = torch.is_grad_enabled()
        return next((n for n in able if _class(n).refusal(device, dtype, gradients) is None), able[-1])

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        dtype = compute_dtype(device, context.dtype)
        name = self.choose(rule, device, dtype, context.documents_BT is not None, context.cache is not None)
        return name, self.kernels[name].prepare(rule, n_queries, device, context)  # type: ignore[operator]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        name, prepared = mask
        out: Tensor = self.kernels[name](q, k, v, prepared, rule, extras)
        return out


def _class(name: str) -> type[Kernel]:
    found: type[Kernel] = registry("kernel").get(name)
    return found
