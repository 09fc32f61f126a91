"""A sparsifier at work in a model: hooks before its projections, or forwards that skip what is masked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import DataError
from sparsekit.model.decoder import Decoder
from sparsekit.model.meanwhile import run_eagerly, stand_in
from sparsekit.probes.anatomy import ExpertRows, Weight
from sparsekit.probes.layered import LayeredModel
from sparsekit.probes.neurons import top_k
from sparsekit.sparsifiers.mixtures import Experts
from sparsekit.sparsifiers.rules import Limit, Rule
from sparsekit.sparsifiers.sites import FeedForward
from sparsekit.sparsifiers.sites import SiteOf as SiteOf

MOST_ROWS = 8  # tokens at a time for which kernels read what is active only


class Target(NamedTuple):
    """A projection whose input is masked, and the feed-forward or the experts that it ends, where it does."""

    weight: Weight
    rule: Rule
    parts: FeedForward | Experts | None = None

    @property
    def numel(self) -> int:
        """Matrix entries that a token's input meets; of experts, of those that it visits."""
        if isinstance(self.parts, Experts):
            return round(self.parts.visits * self.weight.weight[0].numel())
        return self.weight.weight.numel()

    def limited(self, limit: Limit) -> Target:
        """The same with another limit."""
        return self._replace(rule=replace(self.rule, limit=limit))


class Turned:
    """Inputs in a basis, made once for all projections that read the same one after the other."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._kept: tuple[Tensor, Tensor] | None = None
        self._had: set[int] = set()  # who has had it; each once, so that a CUDA graph holds a product of its own

    def coordinates(self, rule: Rule, x: Tensor) -> Tensor:
        """As the rule says, for the one of several sites whose rule it is."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.is_inference():
            return rule.coordinates(x)
        this = x.data_ptr(), x.shape, x.stride(), x._version
        if self._kept is None or this != self._of or id(rule) in self._had:
            self._of, self._kept, self._had = this, (x, rule.coordinates(x)), set()  # x: no other gets its memory
        self._had.add(id(rule))
        return self._kept[1]


class Site:
    """One projection's input: masks it, counts what is 0 then, and remembers what its gate was computed from.

    Args:
        observe: told the scores of each input, [..., I]; then nothing is masked.
        expected: the share of zeros that is to be expected, by which kernels choose.
        turned: shared by all sites in the rule's basis.
    """

    def __init__(
        self,
        target: Target,
        observe: Callable[[Tensor], None] | None = None,
        count: bool = False,
        expected: float | None = None,
        turned: Turned | None = None,
    ):
        self.weight, rule, parts = target
        self.parts = parts if isinstance(parts, FeedForward) else None
        self.rule = rule.beside(self.weight.weight)
        self.observe, self.count, self.expected = observe, count, expected
        self.turned = Turned() if turned is None else turned
        self.zeros: Tensor | None = None
        self.entries = 0
        self._read: Tensor | None = None

    def hooks(self, undo: ExitStack) -> None:
        """Puts it to work until ``undo`` closes."""
        assert self.weight.module is not None
        if self.rule.by_gate:
            assert self.parts is not None
            undo.callback(self.parts.reader.register_forward_pre_hook(self.remember, with_kwargs=True).remove)
            undo.callback(setattr, self, "_read", None)
        undo.callback(self.weight.module.register_forward_pre_hook(self._before).remove)

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """What the feed-forward reads."""
        self._read = args[0] if args else next(x for x in kwargs.values() if isinstance(x, Tensor))

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *rest = args
        if self.observe is not None:
            self.observe(self.rule.scores(self._scored(self.rule.coordinates(x))))
            return None
        masked = self.masked(x)
        self.tally(masked)
        return self.rule.back(masked).to(x.dtype), *rest

    def tally(self, masked: Tensor) -> None:
        """Counts what is 0, where that is asked for."""
        if self.count:
            zeros = (masked == 0).sum()
            self.zeros = zeros if self.zeros is None else self.zeros + zeros
            self.entries += masked.numel()

    def _scored(self, told: Tensor) -> Tensor:
        """What is compared with the limit."""
        if not self.rule.by_gate:
            return told
        assert self.parts is not None and self._read is not None, "a feed-forward is read before its end"
        return self.parts.gates(self._read).view(told.shape)

    def masked(self, x: Tensor) -> Tensor:
        """An input with 0 in place of what is dropped, in the rule's basis."""
        told = x if self.rule.basis_II is None else self.turned.coordinates(self.rule, x)
        return torch.where(self.rule.keep(self._scored(told)), told, 0)


class ExpertSite(Site):
    """The same before the down projections of routed experts, whose rows are of the experts that tokens visit.

    Where so many of the largest stay, they are chosen among all neurons that the token visits.
    """

    def __init__(self, target: Target, *rest: Any, **options: Any):
        super().__init__(target, *rest, **options)
        assert isinstance(target.parts, Experts)
        self.experts = target.parts

    def hooks(self, undo: ExitStack) -> None:
        self.experts.put(undo, self._edited)

    def _edited(self, x_ND: Tensor, rows: ExpertRows) -> Tensor:
        told = self.experts.gates(x_ND, rows) if self.rule.by_gate else rows.act_MF
        rule, visited_M = self.rule.of_rows(rows), rows.weight_M != 0
        if self.observe is not None:
            self.observe(rule.scores(told)[visited_M])
            return rows.act_MF
        if rule.limit.k is None:
            keep = rule.keep(told)
        elif len(told):
            share = rule.limit.k / told.shape[1]
            keep = top_k(share, 0, {"ffn_act": rows._replace(act_MF=told)})["ffn_act"] | told.isnan()
        else:
            return rows.act_MF
        masked = torch.where(keep, rows.act_MF, 0)
        self.tally(masked[visited_M])
        return masked


def site(target: Target, *rest: Any, **options: Any) -> Site:
    """What masks there; arguments are :class:`Site`'s."""
    kind = ExpertSite if isinstance(target.parts, Experts) else Site
    return kind(target, *rest, **options)


class Installed:
    """Masks in a model until :meth:`remove`, after which it is what it was, bit for bit; a context manager.

    Weights are never written to: in a basis V a projection reads V mask(V^T x), of which it makes what W V makes of
    mask(V^T x).

    Args:
        targets: what to mask.
        kernels: up to 8 tokens at a time, without gradients, read only what is active; weights are kept once more for
            that, transposed. Otherwise, and in routed experts, projections are dense and their inputs masked.
        count: count zeros, for :meth:`realised`; not where kernels are used.
        expected: the share of zeros at each masked input, where that is known.

    Raises:
        DataError: kernels, and a feed-forward that does more than is known of it.
    """

    def __init__(
        self,
        view: LayeredModel,
        targets: Mapping[SiteOf, Target],
        kernels: bool = False,
        count: bool = True,
        expected: Mapping[SiteOf, float] | None = None,
    ):
        shares, counts = expected or {}, count and not kernels
        bases: defaultdict[int, Turned] = defaultdict(Turned)
        self.sites = {
            w: site(target, count=counts, expected=shares.get(w), turned=bases[id(target.rule.basis_II)])
            for w, target in targets.items()
        }
        self._undo = ExitStack()
        try:
            run_eagerly(self._undo, view.model)
            for (layer, _), each in self.sites.items():
                forward = _sparse(each) if kernels else None
                if forward is None:
                    each.hooks(self._undo)
                else:
                    forward.put_in(self._undo)
                    _verify(forward, view, layer)
        except BaseException:
            self.remove()
            raise

    def realised(self) -> dict[SiteOf, float]:
        """The share of zeros at each masked input, in all that went through since the installation."""
        return {w: float(s.zeros) / s.entries for w, s in self.sites.items() if s.zeros is not None and s.entries}

    def remove(self) -> None:
        """Takes everything out; twice does no harm."""
        self._undo.close()

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


# --- forwards that skip


class SparseForward:
    """In place of a module's forward; more than 8 rows, or with gradients, go the dense way."""

    def __init__(self, module: nn.Module, site: Site):
        self.module, self.site = module, site
        self.dense: Any = module.forward

    def put_in(self, undo: ExitStack) -> None:
        stand_in(undo, self.module, self)

    def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Any:
        others = x.dtype != self.site.weight.weight.dtype  # under autocast
        if x.numel() > MOST_ROWS * x.shape[-1] or torch.is_grad_enabled() or others:
            return self.masked_dense(x, *rest, **options)
        return self.skipping(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def masked_dense(self, x: Tensor, *rest: Any, **options: Any) -> Any:
        raise NotImplementedError

    def skipping(self, x_BI: Tensor) -> Tensor:
        raise NotImplementedError


class SparseLinear(SparseForward):
    """y = W mask(x) + b; of W those columns are read whose input is not 0."""

    def __init__(self, module: nn.Module, site: Site):
        super().__init__(module, site)
        weight, basis = site.weight.weight, site.rule.basis_II
        turned = weight if basis is None else (weight.to(basis.dtype) @ basis).to(weight.dtype)
        self.weight_IO, self.bias = turned.T.contiguous(), site.weight.bias

    def masked_dense(self, x: Tensor, *rest: Any, **options: Any) -> Any:
        return self.dense(self.site.rule.back(self.site.masked(x)).to(x.dtype), *rest, **options)

    def skipping(self, x_BI: Tensor) -> Tensor:
        from sparsekit.sparsifiers.kernels import rows_matvec

        y_BO = rows_matvec(self.site.masked(x_BI).to(x_BI.dtype), self.weight_IO, self.site.expected)
        return y_BO if self.bias is None else y_BO + self.bias


class SparseFeedForward(SparseForward):
    """y = W_down mask(act(W_gate x) * (W_up x)): the dense gate says which rows of W_up and W_down^T are read."""

    def __init__(self, module: nn.Module, site: Site, parts: FeedForward, up: Weight):
        super().__init__(module, site)
        self.parts, self.up_bias, self.down_bias = parts, up.bias, parts.down.bias
        self.up_FD, self.down_FD = up.weight.contiguous(), parts.down.weight.T.contiguous()

    def masked_dense(self, x: Tensor, *rest: Any, **options: Any) -> Any:
        with ExitStack() as undo:
            self.site.hooks(undo)
            self.site.remember(self.module, (x,), {})  # hooks before the module itself have run by now
            return self.dense(x, *rest, **options)

    def skipping(self, x_BI: Tensor) -> Tensor:
        from sparsekit.sparsifiers.kernels import columns_matvec, rows_matvec

        gate_BF = self.parts.gates(x_BI)
        keep_BF = self.site.rule.keep(gate_BF)
        up_BF = columns_matvec(x_BI, self.up_FD, keep_BF, self.site.expected)
        up_BF = up_BF if self.up_bias is None else up_BF + self.up_bias
        y_BD = rows_matvec(torch.where(keep_BF, gate_BF * up_BF, 0), self.down_FD, self.site.expected)
        return y_BD if self.down_bias is None else y_BD + self.down_bias


def _sparse(site: Site) -> SparseForward | None:
    """A forward for the site's projection, or for its whole feed-forward; None where that is no module of its own."""
    parts, module = site.parts, site.weight.module
    if isinstance(site, ExpertSite):
        return None
    if not site.rule.by_gate:
        assert module is not None
        return SparseLinear(module, site)
    if parts is None or parts.module is None or parts.up is None:
        return None
    return SparseFeedForward(parts.module, site, parts, parts.up)


def _verify(forward: SparseForward, view: LayeredModel, layer: int) -> None:
    """Holds a forward that skips against its masked dense self."""
    width = view.d_model if isinstance(forward, SparseFeedForward) else forward.site.weight.weight.shape[1]
    x_11I = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(layer)).to(view.device, view.dtype)
    rest = (ForwardContext(),) if isinstance(view.model, Decoder) else ()
    with torch.no_grad():
        got, wanted = forward(x_11I, *rest), forward.masked_dense(x_11I, *rest)
    bound = {torch.float64: 1e-9, torch.float32: 1e-4}.get(view.dtype, 3e-2)
    if got.shape != wanted.shape or not (got - wanted).norm() <= bound * wanted.norm() + 1e-6:
        name = type(forward.module).__name__
        raise DataError(f"layer {layer}: {name} does more than its projections say; install without kernels")
