"""How the learning rate moves over a run, as a factor of its peak; how the batch grows at its beginning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sparsekit import spec
from sparsekit.errors import SpecError
from sparsekit.spec.model import raise_problems
from sparsekit.spec.run import BatchRampSpec


@dataclass(frozen=True)
class Place:
    """Where a step stands in its run.

    Attributes:
        step, total_steps: 0 .. total_steps - 1.
        tokens: seen before this step.
        step_tokens: what it sees itself.
        total_tokens: what the run sees.
    """

    step: int
    total_steps: int
    tokens: int
    step_tokens: int
    total_tokens: int


class Schedule:
    """A factor in [0, 1] for each step; warm-up is linear, and its last step runs at the peak.

    The warm-up is ``warmup_steps``, ``warmup_tokens``, or ``warmup_share`` of the steps. What comes after it is
    measured as it is: in tokens where ``warmup_tokens`` is given, else in steps, which is the same unless the batch
    grows.
    """

    class Params(spec.Params):
        warmup_steps: NonNegativeInt = 0
        warmup_tokens: NonNegativeInt | None = None
        warmup_share: float | None = Field(default=None, ge=0, le=1)

        @model_validator(mode="after")
        def _one_warmup(self) -> Any:
            absent = {"warmup_steps": 0, "warmup_tokens": None, "warmup_share": None}
            given = [name for name, nothing in absent.items() if getattr(self, name) != nothing]
            if len(given) > 1:
                mend = f"set {given[0]} to {'0' if given[0] == 'warmup_steps' else 'null'}"
                raise_problems([((given[1],), f"a run warms up once, and {given[0]} is given too; {mend}")])
            return self

    def __init__(self, params: Any):
        self.params = params

    def factor(self, place: Place | int, total_steps: int | None = None) -> float:
        """The factor of a step, given its place, or its number and that of all where nothing counts tokens."""
        if not isinstance(place, Place):
            if self.params.warmup_tokens is not None or total_steps is None:
                raise TypeError("a schedule that counts tokens wants a Place")
            place = Place(place, total_steps, place, 1, total_steps)
        if self.params.warmup_tokens is not None:
            start, end, total = place.tokens, place.tokens + place.step_tokens, place.total_tokens
        else:
            start, end, total = place.step, place.step + 1, place.total_steps
        warmup = self.warmup(total)
        if start < warmup:
            return min(1.0, end / warmup)
        return self.after_warmup(start - warmup, max(1, total - warmup), warmup)

    def warmup(self, total: int) -> int:
        """Its length, in steps or tokens, of a run of ``total``."""
        if self.params.warmup_tokens is not None:
            return int(self.params.warmup_tokens)
        if self.params.warmup_share is not None:
            return round(self.params.warmup_share * total)
        return int(self.params.warmup_steps)

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        """The factor after ``done`` of the ``total`` steps (or tokens) that follow a warm-up of ``warmup``."""
        raise NotImplementedError


class Constant(Schedule):
    """1 after the warm-up."""

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        return 1.0


class Linear(Schedule):
    """final + (1 - final)(1 - t), with t from 0 to 1 after the warm-up.

    Source: Bergsma et al. 2025, arXiv 2502.15938
    """

    class Params(Schedule.Params):
        final: float = Field(default=0.0, ge=0, le=1)

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        final: float = self.params.final
        return final + (1 - final) * (1 - min(1.0, done / total))


class Cosine(Schedule):
    """final + (1 - final)(1 + cos(pi t))/2, with t from 0 to 1 after the warm-up.

    Source: Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5
    """

    class Params(Schedule.Params):
        final: float = Field(default=0.1, ge=0, le=1)

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        final: float = self.params.final
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done / total)))


class WarmupStableDecay(Schedule):
    """1, then to final over the last decay_share of the steps: final + (1 - final) d(t), with t from 0 to 1.

    ``decay`` says how: "linear" d = 1 - t, "1-sqrt" d = 1 - sqrt(t), "cosine" d = (1 + cos(pi t))/2.

    Source: Hu et al. 2024, arXiv 2404.06395, sec. 4; 1-sqrt: Hägele et al. 2024, arXiv 2405.18392
    """

    class Params(Schedule.Params):
        decay_share: float = Field(default=0.1, ge=0, le=1)
        decay: Literal["linear", "1-sqrt", "cosine"] = "linear"
        final: float = Field(default=0.0, ge=0, le=1)

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        decay = self.params.decay_share * total
        left = max(0, total - done)
        if left >= decay:
            return 1.0
        t = 1 - left / decay
        shape = {"linear": left / decay, "1-sqrt": 1 - math.sqrt(t), "cosine": 0.5 * (1 + math.cos(math.pi * t))}
        final: float = self.params.final
        return final + (1 - final) * shape[self.params.decay]


class InverseSqrt(Schedule):
    """sqrt(T / (T + s)), s the steps (or tokens) after the warm-up and T ``timescale``, or the warm-up's length.

    It does not depend on how long the run is.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 3
    """

    class Params(Schedule.Params):
        timescale: PositiveInt | None = None

    def after_warmup(self, done: int, total: int, warmup: int) -> float:
        timescale = self.params.timescale or max(1, warmup)
        return math.sqrt(timescale / (timescale + done))


@dataclass(frozen=True)
class BatchRamp:
    """How many tokens each step of a run takes.

    After s tokens a batch has start + (full - start) k / increments tokens, k = floor(s increments / ramp_tokens) and
    at most increments, rounded down to whole micro-batches on every process.

    Attributes:
        spec: None for a batch that is full from the start.
        full: tokens of a batch after the ramp.
        unit: tokens of a micro-batch on each process, on all of them together.
    """

    spec: BatchRampSpec | None
    full: int
    unit: int

    def __post_init__(self) -> None:
        """Checks that the sizes fit.

        Raises:
            SpecError: the full batch is no multiple of the unit, or the first one is below it or above the full one.
        """
        if self.full % self.unit:
            told = f"{self.full} is not a multiple of {self.unit}, a micro-batch on each process"
            raise SpecError([f"train.global_batch_tokens: {told}"])
        start = self.full if self.spec is None else self.spec.start_tokens
        if not self.unit <= start <= self.full:
            least = f"{self.unit} (a micro-batch on each process)"
            raise SpecError([f"train.batch_ramp.start_tokens: {start} is not between {least} and {self.full}"])

    def batch_tokens(self, seen: int) -> int:
        """Tokens of the step that begins after ``seen`` of them."""
        if self.spec is None or seen >= self.spec.ramp_tokens:
            return self.full
        risen = seen * self.spec.increments // self.spec.ramp_tokens
        grown = (self.full - self.spec.start_tokens) * risen // self.spec.increments
        return (self.spec.start_tokens + grown) // self.unit * self.unit

    def steps(self, tokens: int) -> int:
        """How many steps a run takes to see at least so many tokens."""
        count = 0
        for seen, batch, n_steps in self._levels():
            if n_steps is None or seen + batch * n_steps >= tokens:
                return count + max(0, -(-(tokens - seen) // batch))
            count += n_steps
        raise AssertionError("the last level has no end")

    def tokens(self, steps: int) -> int:
        """How many tokens a run of so many steps sees."""
        for seen, batch, n_steps in self._levels():
            if n_steps is None or n_steps >= steps:
                return seen + batch * steps
            steps -= n_steps
        raise AssertionError("the last level has no end")

    def _levels(self) -> Iterator[tuple[int, int, int | None]]:
        """(tokens seen before it, batch, steps) of each stretch of equal batches; the last has no end."""
        seen = 0
        while self.spec is not None and seen < self.spec.ramp_tokens:
            batch = self.batch_tokens(seen)
            risen = seen * self.spec.increments // self.spec.ramp_tokens
            end = -(-(risen + 1) * self.spec.ramp_tokens // self.spec.increments)  # where one more increment is due
            n_steps = -(-(end - seen) // batch)
            yield seen, batch, n_steps
            seen += batch * n_steps
        yield seen, self.full, None
