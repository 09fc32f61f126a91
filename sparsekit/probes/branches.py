"""Ways through the layers that leave the undisturbed one somewhere: they ride along with it in one batch.

Shapes: R branches, B sequences of a batch, T tokens, D d_model, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import PositiveFloat
from torch import Tensor

from sparsekit import spec
from sparsekit.probes.base import Array, Tokens
from sparsekit.probes.layered import LayeredModel, Pass

# of a layer's intermediate values, in units of d_model: the norms' outputs, q, k, v, gate, up and their product
WIDTH_OF_A_LAYER = 24
# beyond which a matrix product gains nothing, while caches overflow
MOST_TOKENS_ON_CPU = 1024


class BranchParams(spec.Params):
    """What measures that run branches have in common.

    Attributes:
        memory_gb: what branches may take beside the model and one batch, in GB (10^9 bytes); half of it holds their
            states, the other half is what a layer needs for those it takes at a time.
        compile: compile the layers, for the time of the measure.
    """

    memory_gb: PositiveFloat = 2.0
    compile: bool = False


@dataclass(frozen=True)
class Plan:
    """How many go through a layer at a time.

    Attributes:
        sequences: of a batch, B.
        states: branches whose states are held at a time.
        branches: that go through a layer at a time.
    """

    sequences: int
    states: int
    branches: int

    @classmethod
    def of(
        cls, view: LayeredModel, tokens: Tokens, params: Any, states: int, dtype: torch.dtype, apart: bool = False
    ) -> Plan:
        """For measures that would hold ``states`` states of a batch.

        Where memory does not allow it there are fewer sequences a batch, and of one sequence fewer states.

        Args:
            dtype: of the states.
            apart: batches keep their size, and branches go through a layer one by one.
        """
        half = params.memory_gb * 1e9 / 2
        length = tokens.ids_ST.shape[1]
        state = length * view.d_model * dtype.itemsize
        sequences = min(tokens.batch_size, len(tokens.ids_ST))
        if not apart:
            sequences = max(1, min(sequences, int(half // (states * state))))
        fit = max(2, min(states, int(half // (sequences * state))))
        most = half // (WIDTH_OF_A_LAYER * view.d_model * max(view.dtype.itemsize, 2))
        if view.device.type == "cpu":
            most = min(most, MOST_TOKENS_ON_CPU)
        return cls(sequences, fit, 1 if apart else max(1, int(most // (sequences * length))))


def groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of at most a size."""
    for first in range(0, len(items), max(1, size)):
        yield items[first : first + max(1, size)]


def empty_states(batch: Pass, n: int, dtype: torch.dtype | None = None) -> Tensor:
    """[R, B, T, D], unwritten."""
    return batch.h_0.new_empty((n, *batch.h_0.shape), dtype=dtype or batch.h_0.dtype)


def through(batch: Pass, layer: int, states_RBTD: Tensor, at_a_time: int) -> None:
    """Sends branches through a layer, in place."""
    for first in range(0, len(states_RBTD), at_a_time):
        some = states_RBTD[first : first + at_a_time]
        some.copy_(batch.layer(layer, some.flatten(0, 1)).view_as(some))


def losses(batch: Pass, states_RBTD: Tensor, at_a_time: int) -> Tensor:
    """[R, B] mean next-token cross-entropy of each branch's sequences, from h_L."""
    pieces = [batch.losses(some.flatten(0, 1)).view(some.shape[:2]) for some in states_RBTD.split(at_a_time)]
    return torch.cat(pieces)


@contextmanager
def compiled(view: LayeredModel, wanted: bool) -> Iterator[None]:
    """The view's layers compiled if wanted; afterwards they are what they were."""
    kept = [block._compiled_call_impl for block in view.blocks]
    try:
        if wanted:
            for block in view.blocks:
                block.compile(dynamic=True)
        yield
    finally:
        for block, impl in zip(view.blocks, kept, strict=True):
            block._compiled_call_impl = impl


def interval(samples: Array, statistic: Callable[[Array], Any], seed: int, draws: int = 1000) -> tuple[float, float]:
    """:func:`~sparsekit.probes.base.bootstrap` of what is a function of means over sequences, ``statistic(mean)``.

    The same draws; their means come from one product, [draws, S] times what a draw takes of each sequence.
    """
    n = len(samples)
    generator = np.random.default_rng(seed)
    counts = np.stack([np.bincount(generator.integers(0, n, n), minlength=n) for _ in range(draws)])
    means = (counts / n) @ samples.reshape(n, -1)
    drawn = [float(statistic(mean.reshape(samples.shape[1:]))) for mean in means]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


class Counted:
    """How many layers branches went through from here on, held against the fewest with which a measure can be had."""

    def __init__(self, view: LayeredModel):
        self.view, self.before = view, view.layer_calls
        self.floor = 0

    def told(self) -> dict[str, int]:
        """Of all batches together; the floor takes no layer twice that has the same input twice."""
        return {"layer_applications": self.view.layer_calls - self.before, "layer_applications_floor": self.floor}
