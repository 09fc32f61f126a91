"""How rope reaches past the length a model was trained at: other frequencies for the same pairs of channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from sparsekit import spec
from sparsekit.components.contracts import Build


class RopeScaling:
    """A map of rope's frequencies, called once, when its tables are made."""

    class Params(spec.Params):
        factor: float = Field(default=2.0, ge=1)

    def __init__(self, params: Any, build: Build):
        self.params = params

    def __call__(self, frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        """(frequencies in radians a position, fastest first, [R/2]; a factor on cosine and sine)."""
        raise NotImplementedError


class Linear(RopeScaling):
    """Every frequency divided by factor: positions are squeezed into the trained range.

    Source: Chen et al. 2023, arXiv 2306.15595, eq. 4
    """

    def __call__(self, frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        return frequency / self.params.factor, 1.0


class NTK(RopeScaling):
    """theta becomes theta * factor^(R/(R-2)), R the channels that turn: the slowest pair is divided by factor.

    Source: Peng et al. 2023, arXiv 2309.00071, def. 1 (NTK-aware interpolation)
    """

    def __call__(self, frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        half = frequency.shape[0]
        if half == 1:
            return frequency, 1.0
        pair = torch.arange(half, dtype=frequency.dtype, device=frequency.device)
        return frequency * self.params.factor ** (-pair / (half - 1)), 1.0


class YaRN(RopeScaling):
    """Pairs that turn often in the trained length stay, those that hardly do are divided by factor, the rest is mixed.

    A pair's turns are r = original_max_seq_len * frequency / 2 pi; the mix is linear in the pair's index between where
    r is ``beta_fast`` and where it is ``beta_slow``, as in the authors' code and the models trained with it (def. 2
    mixes linearly in r). Cosine and sine are multiplied by 0.1 ln(factor) + 1.

    Source: Peng et al. 2023, arXiv 2309.00071, def. 3 and eq. 22
    """

    class Params(RopeScaling.Params):
        original_max_seq_len: PositiveInt = 2048
        beta_fast: PositiveFloat = 32.0
        beta_slow: PositiveFloat = 1.0

    def __call__(self, frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        half, p = frequency.shape[0], self.params
        low, high = (
            half * math.log(p.original_max_seq_len / (turns * 2 * math.pi)) / math.log(theta)
            for turns in (p.beta_fast, p.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * half - 1)
        pair = torch.arange(half, dtype=frequency.dtype, device=frequency.device)
        slow = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        return frequency * (1 - slow) + frequency / p.factor * slow, 0.1 * math.log(p.factor) + 1.0


class Llama3(RopeScaling):
    """Pairs that turn often in the trained length stay, those that hardly do are divided by factor, the rest is mixed.

    As yarn, but mixed linearly in the turns r = original_max_seq_len * frequency / 2 pi, between ``low_turns`` and
    ``high_turns``, and with cosine and sine as they are.

    Source: Grattafiori et al. 2024, arXiv 2407.21783, sec. 3.4.2 (Llama 3.1)
    """

    class Params(RopeScaling.Params):
        factor: float = Field(default=8.0, ge=1)
        original_max_seq_len: PositiveInt = 8192
        low_turns: PositiveFloat = 1.0
        high_turns: PositiveFloat = 4.0

        @model_validator(mode="after")
        def _ordered(self) -> Llama3.Params:
            if self.low_turns >= self.high_turns:
                raise ValueError(f"low_turns ({self.low_turns}) is not below high_turns ({self.high_turns})")
            return self

    def __call__(self, frequency: Tensor, theta: float) -> tuple[Tensor, float]:
        p = self.params
        turns = frequency * p.original_max_seq_len / (2 * math.pi)
        fast = ((turns - p.low_turns) / (p.high_turns - p.low_turns)).clamp(0, 1)
        return frequency * fast + frequency / p.factor * (1 - fast), 1.0
