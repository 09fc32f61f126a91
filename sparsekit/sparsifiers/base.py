"""What a sparsifier is: calibrated on a model's activations, it says which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit import spec
from sparsekit.errors import DataError
from sparsekit.model.meanwhile import run_eagerly
from sparsekit.probes.anatomy import Weight
from sparsekit.probes.base import Array, Tokens
from sparsekit.probes.layered import LayeredModel, Pass
from sparsekit.probes.runner import undisturbed
from sparsekit.registry import registry
from sparsekit.sparsifiers.calibration import Calibration, mean_of
from sparsekit.sparsifiers.installed import Installed, SiteOf, Target, site
from sparsekit.sparsifiers.mixtures import Experts
from sparsekit.sparsifiers.rules import Limit, Sample
from sparsekit.sparsifiers.sites import FeedForward
from sparsekit.spec.load import package_of

Parts = FeedForward | Experts | None
Candidates = Mapping[SiteOf, tuple[Weight, Parts]]
ENOUGH = 0.002  # by which a sparsity that is searched for may differ


class Sparsifier:
    """An intervention: ``calibrate(view, tokens)`` finds limits, whose ``install(model)`` masks activations.

    A subclass says which inputs it masks (:meth:`candidates`), by which rule (:meth:`target`), and how limits are
    found (:meth:`fit`).

    Attributes:
        seed: of what it draws.
    """

    seed: int = 0

    class Params(spec.Params):
        pass

    def __init__(self, params: Any = None):
        self.params: Any = self.Params() if params is None else params

    @property
    def name(self) -> str:
        """What it is registered as."""
        entry = registry("sparsifier").entry_of(type(self))
        return type(self).__name__ if entry is None else entry.name

    def candidates(self, view: LayeredModel) -> Candidates:
        """The inputs that can be masked.

        Raises:
            DataError: there are none.
        """
        raise NotImplementedError

    def target(self, view: LayeredModel, where: SiteOf, weight: Weight, parts: Parts, limit: Limit) -> Target:
        """What is masked there by a limit."""
        raise NotImplementedError

    def fit(self, view: LayeredModel, tokens: Tokens, meta: dict[str, Any]) -> Mapping[SiteOf, Limit]:
        """Finds the limits; ``meta`` takes what else there is to say."""
        raise NotImplementedError

    def calibrate(self, view: LayeredModel, tokens: Tokens) -> Calibration:
        """Limits for a model, from its activations on some tokens; the model is left as it was.

        Raises:
            DataError: nothing in it can be masked.
        """
        n, length = tokens.ids_ST.shape
        meta: dict[str, Any] = {"sequences": n, "seq_len": length, "data_fingerprint": tokens.fingerprint}
        with torch.no_grad(), undisturbed(view.model):
            limits = dict(self.fit(view, tokens, meta))
            targets = self.targets(view, limits)
            with Installed(view, targets) as installed:
                losses(view, tokens)
                realised = installed.realised()
        weights = {where: target.numel for where, target in targets.items()}
        params = self.params.model_dump(mode="json")
        if self.name in registry("sparsifier").names():
            meta["packages"] = package_of("sparsifier", self.name)
        return Calibration(self.name, params, limits, realised, weights, meta)

    def targets(self, view: LayeredModel, limits: Mapping[SiteOf, Limit]) -> dict[SiteOf, Target]:
        """What limits mask in a model.

        Raises:
            DataError: it has not what they are for.
        """
        candidates, found = self.candidates(view), {}
        for where, limit in limits.items():
            if where not in candidates:
                told = f"layer {where[0]} has no {where[1]} that {self.name} could mask"
                raise DataError(f"{told}: the calibration is of another model; calibrate on this one")
            weight, parts = candidates[where]
            width = weight.weight[..., 0, :].numel()
            given = 0 if limit.threshold is None else limit.threshold.numel()
            if given > 1 and given != width:
                told = f"layer {where[0]}, {where[1]}: {given} thresholds for {width} inputs"
                raise DataError(f"{told}: the calibration is of another model; calibrate on this one")
            found[where] = self.target(view, where, weight, parts, limit)
        return found


# --- a model on tokens


@torch.no_grad()
def losses(view: LayeredModel, tokens: Tokens) -> Array:
    """[S] the loss of each sequence, with what is installed."""
    found = []
    for ids_BT in tokens.batches():
        batch = view.start(ids_BT)
        h = batch.h_0
        for layer in range(view.n_layers):
            h = batch.layer(layer, h)
        found.append(batch.losses(h).double().cpu().numpy())
    whole: Array = np.concatenate(found)
    return whole


def realised_with(view: LayeredModel, tokens: Tokens, targets: Mapping[SiteOf, Target]) -> float:
    """The share of weights that need not be read, over all tokens."""
    with Installed(view, targets) as installed:
        losses(view, tokens)
        return mean_of(installed.realised(), {w: target.numel for w, target in targets.items()})


def level_for(sparsity: float, realised_at: Callable[[float], float]) -> float:
    """The level in [0, 1] at which a sparsity is realised, by bisection; the nearest one tried."""
    low, high, best, off = 0.0, 1.0, 0.0, float("inf")
    for _ in range(24):
        middle = (low + high) / 2
        found = realised_at(middle)
        if abs(found - sparsity) < off:
            best, off = middle, abs(found - sparsity)
        if off <= ENOUGH:
            break
        low, high = (middle, high) if found < sparsity else (low, middle)
    return best


class InOrder:
    """Calibration layer by layer, on the streams that the masks so far make of the tokens.

    What a mask does to later activations moves their quantiles; limits that were found with it in place come true.
    """

    def __init__(self, view: LayeredModel, tokens: Tokens, seed: int):
        self.view, self.seed = view, seed
        self.batches: list[tuple[Pass, Tensor]] = []
        for ids_BT in tokens.batches():
            batch = view.start(ids_BT)
            self.batches.append((batch, batch.h_0))
        self.layer = 0
        self.masked: dict[str, Target] = {}

    def outputs(
        self, targets: Mapping[str, Target] | None = None, watch: Callable[[ExitStack], None] | None = None
    ) -> list[Tensor]:
        """The layer's output on each batch, with these masks, or those so far."""
        with ExitStack() as undo:
            run_eagerly(undo, self.view.model)
            for target in (self.masked if targets is None else targets).values():
                site(target).hooks(undo)
            if watch is not None:
                watch(undo)
            return [batch.layer(self.layer, h) for batch, h in self.batches]

    def samples(self, targets: Mapping[str, Target]) -> dict[str, Sample]:
        """Scores at inputs that are not masked yet; what their limits are does not matter."""
        found = {name: Sample(len(self.batches), self.seed) for name in targets}

        def watch(undo: ExitStack) -> None:
            for name, target in targets.items():
                site(target, found[name].add).hooks(undo)

        self.outputs(watch=watch)
        return found

    def moment(self, reader: nn.Module, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The mean over tokens of what is made of a module's input, in float64."""
        sums: list[Tensor] = []
        n_tokens = 0

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            nonlocal n_tokens
            x = args[0] if args else next(x for x in kwargs.values() if isinstance(x, Tensor))
            made = of(x.flatten(0, -2)).double()
            n_tokens += len(made)
            sums.append(made.sum(0))

        self.outputs(watch=lambda undo: _callback(undo, reader.register_forward_pre_hook(before, with_kwargs=True)))
        return torch.stack(sums).sum(0) / n_tokens

    @contextmanager
    def first_batch(self) -> Iterator[None]:
        """Makes do with the first batch meanwhile."""
        batches, self.batches = self.batches, self.batches[:1]
        try:
            yield
        finally:
            self.batches = batches

    def mask(self, name: str, target: Target) -> None:
        """Masks an input of this layer from now on."""
        self.masked[name] = target

    def advance(self) -> None:
        """Goes on to the next layer."""
        outputs = self.outputs()
        self.batches = [(batch, h) for (batch, _), h in zip(self.batches, outputs, strict=True)]
        self.layer, self.masked = self.layer + 1, {}


def _callback(undo: ExitStack, handle: Any) -> None:
    undo.callback(handle.remove)
