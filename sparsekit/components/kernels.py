"""How attention is computed, given heads: one signature, several implementations, each telling what it can do."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import Component, ForwardContext, compute_dtype, constant, wide
from sparsekit.errors import SparsekitError
from sparsekit.registry import registry
from sparsekit.spec.facts import Facts, check_children

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32, torch.float64)
FEATURES = (
    "window", "sinks", "document", "cache", "softcap", "alibi", "sink_logits", "normalizer", "value_dim", "own_mask",
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What an attention asks of its kernel, beside causality.

    Attributes:
        window: a query sees itself and the window - 1 keys before it; None for all.
        sinks: so many first keys of a document are seen whatever the window.
        softcap: scores become softcap * tanh(score / softcap).
        features: which of FEATURES that takes, with what comes as tensors (alibi, sink_logits) included.
        head_dim: of queries and keys.
    """

    window: int | None = None
    sinks: int = 0
    softcap: float | None = None
    features: frozenset[str] = frozenset()
    head_dim: int = 64

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
        min_head_dim: the narrowest queries it takes on a GPU.
        fullgraph: torch.compile takes a layer whole, this kernel included.
        package: what must be installed, and the extra that installs it.
    """

    features: ClassVar[frozenset[str]] = frozenset()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ALL
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    gradients: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    min_head_dim: ClassVar[int] = 1
    fullgraph: ClassVar[bool] = True
    package: ClassVar[tuple[str, str] | None] = None

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        rule: Rule = facts.get("rule", Rule())
        lacking = sorted(rule.features - cls.features)
        if lacking:
            able = " or ".join(able_to(rule.features))
            raise ValueError(f"cannot do {' and '.join(lacking)}; {able or 'no kernel'} can")
        check_children(params, facts)

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, gradients: bool, head_dim: int = 64) -> str | None:
        """Why it cannot run there, or None where it can."""
        if cls.package is not None and not installed(cls.package[0]):
            return f"needs the package {cls.package[0]}: pip install 'sparsekit[{cls.package[1]}]'"
        if device.type not in cls.devices:
            return f"does not run on {device.type}"
        if dtype not in cls.dtypes:
            return f"does not run in {str(dtype).removeprefix('torch.')}"
        if gradients and device.type not in cls.gradients:
            return f"has no gradients on {device.type}"
        if device.type == "cuda" and head_dim < cls.min_head_dim:
            return f"needs a head_dim of at least {cls.min_head_dim}; here it is {head_dim}"
        return None

    def demand(self, rule: Rule, device: torch.device, dtype: torch.dtype, gradients: bool) -> None:
        """Refuses what the kernel cannot do there.

        Raises:
            SparsekitError: it cannot; the message names one that can.
        """
        reason = self.refusal(device, dtype, gradients, rule.head_dim)
        if reason is not None:
            able = [name for name in able_to(rule.features) if _can_run(name, rule, device, dtype, gradients)]
            own = next((name for name in able_to(frozenset()) if _class(name) is type(self)), type(self).__name__)
            raise SparsekitError(f"kernel {own!r} {reason}; use {' or '.join(able)}")

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        """The mask in the form this kernel wants it; None where plain causality in one document is all."""
        return visible(rule, n_queries, device, context)

    def own_mask(self, seen_BHTS: Tensor, rule: Rule) -> Any:
        """A mask that an attention made of its data, true where a query sees a key, in the form this kernel wants it.

        Its rule asks for the feature "own_mask"; documents, the past and the cache are the mask's maker's to mind.
        """
        return seen_BHTS

    def forward(self, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        """Contexts [batch, heads, queries, value head_dim].

        Raises:
            SparsekitError: the kernel cannot run on these tensors; the message names one that can.
        """
        if q_BHTK.device.type == "meta":
            return self.outline(q_BHTK, k_BGSK, v_BGSK, mask, rule, extras)
        self.demand(rule, q_BHTK.device, q_BHTK.dtype, q_BHTK.requires_grad)
        return self.attend(q_BHTK, k_BGSK, v_BGSK, mask, rule, extras)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        """As forward, once it is known that the kernel can."""
        raise NotImplementedError

    def outline(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        """As forward on the meta device, where only shapes count and what is kept for the backward."""
        return fused(q, k, v)


@torch.library.custom_op("sparsekit::fused_attention", mutates_args=())
def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("stands for any kernel that never holds the scores, on the meta device alone")


@_fused.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


_fused.register_autograd(_backward, setup_context=_keep)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a kernel that never holds the scores makes and keeps (its inputs, output and log-sum-exp), in shape."""
    return _fused(q, k, v)[0]


def able_to(features: frozenset[str]) -> list[str]:
    """The built-in kernels that can do what is asked, somewhere."""
    return [e.name for e in registry("kernel").entries() if e.built_in and features <= _class(e.name).features]


def _can_run(name: str, rule: Rule, device: torch.device, dtype: torch.dtype, gradients: bool) -> bool:
    return _class(name).refusal(device, dtype, gradients, rule.head_dim) is None


def _class(name: str) -> type[Kernel]:
    found: type[Kernel] = registry("kernel").get(name)
    return found


@constant
def installed(package: str) -> bool:
    """Whether a package can be imported, found out once and while a model is traced, not in it."""
    return _found(package)


@functools.cache
def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def visible(rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Tensor | None:
    """True where a query sees a key, [B or 1, 1, T, S]; None where it sees all of its past in one document.

    With a cache, queries stand at ``context.positions_BT`` and keys at 0 .. S-1; None then has T = S, or one query
    that sees all keys.
    """
    documents, positions, cache = context.documents_BT, context.positions_BT, context.cache
    plain = cache is None or (cache.ends_with_queries and n_queries in (1, cache.n_keys))
    if plain and documents is None and rule.window is None:
        return None
    if cache is None:
        query = torch.arange(n_queries, device=device)[None, :, None]
        key = torch.arange(n_queries, device=device)[None, None, :]
    else:
        assert positions is not None, "a cache needs the positions of its queries"
        query = positions[:, :, None]
        key = torch.arange(cache.n_keys, device=device)[None, None, :]
    place = key if documents is None else places(documents)[:, None, :]
    mask = sees(rule, query, key, place)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None, :])
    return mask[:, None]


def sees(rule: Rule, query: Tensor, key: Tensor, place: Tensor) -> Tensor:
    """True where a query sees a key of its document, whose place in that document is ``place``."""
    past = key <= query
    if rule.window is None:
        return past
    near = query - key < rule.window
    return past & (near | (place < rule.sinks) if rule.sinks else near)


def places(documents_BT: Tensor) -> Tensor:
    """How far each token stands from its document's first."""
    index = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return index - torch.where(begins(documents_BT), index, 0).cummax(dim=-1).values


def begins(documents_BT: Tensor) -> Tensor:
    """True at each document's first token, [B, T]."""
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return begins_BT


def distances(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Key position less query position, [T, S]; the queries are the last of the keys' positions."""
    query = torch.arange(n_keys - n_queries, n_keys, device=device)
    return torch.arange(n_keys, device=device)[None, :] - query[:, None]


class SDPA(Kernel):
    """torch's scaled_dot_product_attention, which picks the fastest backend of the device.

    Source: PyTorch
    """

    features = frozenset({"window", "sinks", "document", "cache", "alibi", "value_dim", "own_mask"})

    def outline(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        fuses = extras.slopes_H is None and q.shape[-1] == v.shape[-1]  # else torch takes its unfused formula
        return fused(q, k, v) if fuses else self.attend(q, k, v, mask, rule, extras)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, extras: Extras) -> Tensor:
        if extras.slopes_H is not None:
            distance_TS = distances(q.shape[2], k.shape[2], q.device)
            seen = distance_TS <= 0 if mask is None else mask
            bias_HTS = extras.slopes_H[:, None, None] * distance_TS
            mask = bias_HTS.to(q.dtype).masked_fill(~seen, float("-inf"))
        causal = mask is None and q.shape[2] > 1  # one query alone is the last, and sees all keys
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=extras.scale, enable_gqa=q.shape[1] != k.shape[1]
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
        scores_BHTS = scores_BHTS.to(wide(q.dtype))
        if extras.softcap is not None:
            scores_BHTS = extras.softcap * torch.tanh(scores_BHTS / extras.softcap)
        if extras.slopes_H is not None:
            scores_BHTS = scores_BHTS + extras.slopes_H[:, None, None] * distances(q.shape[2], k.shape[2], q.device)
        if mask is None:
            mask = distances(q.shape[2], k.shape[2], q.device) <= 0
        scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
        if extras.sink_H is not None:  # a key more, which is seen by all and then left out
            sink = extras.sink_H[None, :, None, None].to(scores_BHTS.dtype).expand(*scores_BHTS.shape[:-1], 1)
            scores_BHTS = torch.cat((scores_BHTS, sink), dim=-1)
        weights = scores_BHTS.softmax(-1) if extras.normalizer is None else extras.normalizer(scores_BHTS)
        return (weights if extras.sink_H is None else weights[..., :-1]).to(q.dtype)

    def outline(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        return self.attend(q, k, v, mask, rule, extras)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, extras: Extras) -> Tensor:
        v_BHSK = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return self.probabilities(q, k, mask, extras) @ v_BHSK


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
        able = [name for name in order if wanted <= _class(name).features]
        gradients = torch.is_grad_enabled()
        if device.type == "meta":
            return able[0]
        return next((name for name in able if _can_run(name, rule, device, dtype, gradients)), able[-1])

    def prepare(self, rule: Rule, n_queries: int, device: torch.device, context: ForwardContext) -> Any:
        dtype = compute_dtype(device, context.dtype)
        name = self.choose(rule, device, dtype, context.documents_BT is not None, context.cache is not None)
        return name, self.kernels[name].prepare(rule, n_queries, device, context)  # type: ignore[operator]

    def own_mask(self, seen_BHTS: Tensor, rule: Rule) -> Any:
        dtype = compute_dtype(seen_BHTS.device, torch.float32)
        name = self.choose(rule, seen_BHTS.device, dtype, documents=False, cache=False)
        return name, self.kernels[name].own_mask(seen_BHTS, rule)  # type: ignore[operator]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, rule: Rule, extras: Extras) -> Tensor:
        name, prepared = mask
        out: Tensor = self.kernels[name](q, k, v, prepared, rule, extras)
        return out

    outline = attend
