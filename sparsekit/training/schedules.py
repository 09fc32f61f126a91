"""How the learning rate moves over a run, as a factor of its peak."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, NonNegativeInt

from sparsekit import spec


class Schedule:
    """A factor in [0, 1] for each step; warm-up is linear, and its last step runs at the peak."""

    class Params(spec.Params):
        warmup_steps: NonNegativeInt = 0

    def __init__(self, params: Any):
        self.params = params

    def factor(self, step: int, total_steps: int) -> float:
        """The factor of step 0 .. total_steps - 1."""
        warmup = self.params.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step - warmup, max(1, total_steps - warmup))

    def after_warmup(self, step: int, n_steps: int) -> float:
        """The factor of step 0 .. n_steps - 1 after the warm-up."""
        raise NotImplementedError


class Constant(Schedule):
    """1 after the warm-up."""

    def after_warmup(self, step: int, n_steps: int) -> float:
        return 1.0


class Cosine(Schedule):
    """final + (1 - final)(1 + cos(pi t))/2, with t from 0 to 1 after the warm-up.

    Source: Loshchilov & Hutter 2016, arXiv 1608.03983, eq. 5
    """

    class Params(Schedule.Params):
        final: float = Field(default=0.1, ge=0, le=1)

    def after_warmup(self, step: int, n_steps: int) -> float:
        final: float = self.params.final
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_steps)))


class WarmupStableDecay(Schedule):
    """1, then linearly to final over the last decay_share of the steps.

    Source: Hu et al. 2024, arXiv 2404.06395, sec. 4
    """

    class Params(Schedule.Params):
        decay_share: float = Field(default=0.1, ge=0, le=1)
        final: float = Field(default=0.0, ge=0, le=1)

    def after_warmup(self, step: int, n_steps: int) -> float:
        decay_steps = self.params.decay_share * n_steps
        left = n_steps - step
        if left >= decay_steps:
            return 1.0
        final: float = self.params.final
        return final + (1 - final) * max(0.0, left / decay_steps)
