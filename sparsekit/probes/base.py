"""What a probe is: it looks at a model by layers on some tokens, and says what it found.

Shapes, here and in every probe: S sequences, B of them a batch, T tokens, D d_model, L layers, H heads, G key-value
heads, K head_dim, F d_ff, E experts, M tokens by the experts they visit, N any multiple of B.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparsekit import spec

if TYPE_CHECKING:
    from sparsekit.probes.layered import LayeredModel, Pass

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tokens:
    """What is measured on.

    Attributes:
        ids_ST: int64 [sequences, tokens], on the CPU.
        batch_size: sequences at a time, where a probe has no reason for another number.
        fingerprint: SHA-256 of the ids: equal exactly where they are.
        report: told which share of a pass is done.
    """

    ids_ST: Tensor
    batch_size: int
    fingerprint: str
    report: Callable[[float], None] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, ids_ST: Tensor, batch_size: int = 8) -> Tokens:
        ids_ST = ids_ST.to(device="cpu", dtype=torch.int64).contiguous()
        return cls(ids_ST, batch_size, hashlib.sha256(ids_ST.numpy().astype("<i8").tobytes()).hexdigest())

    def batches(self, size: int | None = None) -> Iterator[Tensor]:
        """[B, T] after another, each sequence once; the last may hold fewer."""
        done = 0
        for ids_BT in self.ids_ST.split(size or self.batch_size):
            yield ids_BT
            done += len(ids_BT)
            if self.report is not None:
                self.report(done / len(self.ids_ST))

    def watched(self, report: Callable[[float], None]) -> Tokens:
        """The same, telling after each batch which share of the sequences is done."""
        return replace(self, report=report)

    def select(self, which: slice) -> Tokens:
        """Some of the sequences, such as every other one."""
        return replace(Tokens.of(self.ids_ST[which], self.batch_size), report=self.report)


@dataclass
class ProbeResult:
    """What a probe found.

    Attributes:
        scalars: one number for the model, by name.
        per_layer: [L] by name; what a layer has not is nan, and ``meta["remarks"]`` says why.
        matrices: [L, L], or as the measure says.
        intervals: 95% over sequences, of the scalars that are functions of per-sequence sums; None where a scalar has
            none, with the reason in ``meta["remarks"]``.
        arrays: all else, of any shape.
        meta: what it was measured on, which the runner fills in, and the probe's own remarks.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    per_layer: dict[str, Array] = field(default_factory=dict)
    matrices: dict[str, Array] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def remark(self, text: str) -> None:
        """Adds a line to what should be known of the numbers, once."""
        remarks = self.meta.setdefault("remarks", [])
        if text not in remarks:
            remarks.append(text)


class Probe:
    """A measure: ``run`` looks at a model by layers on some tokens.

    It runs without gradients, in evaluation mode; one that wants gradients takes ``torch.enable_grad()``. Random
    numbers come from generators that it seeds by ``seed``. Whatever it does to the model's parameters, buffers and
    mode is undone by who runs it.

    Attributes:
        seed: of what it draws; the runner sets it.
    """

    seed: int = 0

    class Params(spec.Params):
        pass

    def __init__(self, params: Any = None):
        self.params: Any = self.Params() if params is None else params

    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        raise NotImplementedError


class Observer:
    """What one probe gathers in a dense pass, which several share: batch after batch, layer after layer.

    Attributes:
        sites: what it wants to see of each layer (see :meth:`LayeredModel.sites`); of a layer where a site is not
            applicable ``seen`` lacks it.
    """

    sites: Sequence[str] = ()

    def begin(self, batch: Pass) -> None:
        """Before layer 0; the stream is ``batch.h_0``."""

    def layer(self, batch: Pass, layer: int, h_BTD: Tensor, out_BTD: Tensor, seen: Mapping[str, Any]) -> None:
        """After a layer: the stream before and after it, and what stood at the sites."""

    def end(self, batch: Pass, h_BTD: Tensor) -> None:
        """After the last layer, before the final norm."""

    def result(self) -> ProbeResult:
        raise NotImplementedError


class DenseProbe(Probe):
    """A measure of the undisturbed model: all that run together share one pass over the tokens.

    Attributes:
        shares: whether it does; one that must see the tokens in batches of its own size says False.
    """

    shares: ClassVar[bool] = True

    def observer(self, view: LayeredModel, tokens: Tokens) -> Observer:
        raise NotImplementedError

    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        return dense_pass(view, tokens, [self.observer(view, tokens)])[0]


@torch.no_grad()
def dense_pass(view: LayeredModel, tokens: Tokens, observers: Sequence[Observer]) -> list[ProbeResult]:
    """Runs the model once over all tokens while observers look on."""
    wanted = list(dict.fromkeys(site for observer in observers for site in observer.sites))
    open_ = [[site for site in wanted if view.sites(layer).get(site) is None] for layer in range(view.n_layers)]
    for ids_BT in tokens.batches():
        batch = view.start(ids_BT)
        for observer in observers:
            observer.begin(batch)
        h = batch.h_0
        for layer in range(view.n_layers):
            out, seen = batch.observe(layer, h, open_[layer]) if open_[layer] else (batch.layer(layer, h), {})
            for observer in observers:
                observer.layer(batch, layer, h, out, seen)
            h = out
        for observer in observers:
            observer.end(batch, h)
    return [observer.result() for observer in observers]


def mean(samples_S: Array) -> Any:
    """Over sequences, the first axis."""
    return np.mean(samples_S, axis=0)


def bootstrap(
    samples_S: Array, statistic: Callable[[Array], Any] = mean, seed: int = 0, draws: int = 1000
) -> tuple[float, float]:
    """A 95% interval of a statistic by resampling sequences, [S] or [S, ...] with sequences first.

    (percentile 2.5, percentile 97.5) of statistic(samples[indices]), indices drawn with replacement ``draws`` times.

    Source: Efron 1979, Annals of Statistics 7(1), percentile method
    """
    generator = np.random.default_rng(seed)
    n = len(samples_S)
    drawn = [float(statistic(samples_S[generator.integers(0, n, n)])) for _ in range(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
