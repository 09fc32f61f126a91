"""Watches that loss and gradients stay finite, and that the loss does not leap, without making anybody wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPIKE_SIGMAS = 6.0
SPIKE_MEMORY = 0.98  # of the running mean and variance of the loss
SPIKE_AFTER = 50  # steps that are watched before any is called a leap


@dataclass(frozen=True)
class StepReport:
    """What the device told of a step, a step late.

    Attributes:
        step: which.
        losses: each rank's part of the loss.
        squares: the squared norm of each gradient.
        names: of the parameters these are.
    """

    step: int
    losses: Sequence[float]
    squares: Sequence[float]
    names: Sequence[str]

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) if all(map(math.isfinite, self.losses)) else math.nan

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(sum(self.squares))

    @property
    def bad_rank(self) -> int | None:
        """The first whose loss is not finite."""
        return next((rank for rank, loss in enumerate(self.losses) if not math.isfinite(loss)), None)

    @property
    def bad_parameter(self) -> str | None:
        """The last, in the order of the forward, whose gradient is not finite: there the backward went wrong."""
        found = [name for name, square in zip(self.names, self.squares, strict=True) if not math.isfinite(square)]
        return found[-1] if found else None


class Late:
    """Numbers of a device, read a step after they were written."""

    def __init__(self, device: torch.device):
        self._pinned = device.type == "cuda"
        self._event = torch.cuda.Event() if self._pinned else None
        self._held: tuple[int, Tensor, int, list[str]] | None = None

    def put(self, step: int, values: Tensor, n_losses: int, names: list[str]) -> StepReport | None:
        """Sends a step's [losses, squares] on their way; returns what was sent the call before."""
        told = self.take()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._pinned)
        host.copy_(values.detach(), non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._held = step, host, n_losses, names
        return told

    def take(self) -> StepReport | None:
        """What is still on its way."""
        if self._held is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        step, host, n_losses, names = self._held
        self._held = None
        values = host.tolist()
        return StepReport(step, values[:n_losses], values[n_losses:], names)


@dataclass
class SpikeWatch:
    """Tells when the loss lies SPIKE_SIGMAS running standard deviations above its running mean."""

    mean: float = 0.0
    variance: float = 0.0
    n_steps: int = 0
    leaps: list[int] = field(default_factory=list)

    def see(self, step: int, loss: float) -> str | None:
        """A line if this loss is a leap."""
        told = None
        if self.n_steps >= SPIKE_AFTER and loss > self.mean + SPIKE_SIGMAS * math.sqrt(self.variance) + 1e-3:
            told = f"step {step}: the loss leapt to {loss:.4g} from about {self.mean:.4g}"
            self.leaps.append(step)
        weight = 1 - SPIKE_MEMORY if self.n_steps else 1.0
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)
        self.n_steps += 1
        return told


def first_not_finite(model: torch.nn.Module, run: Callable[[], object]) -> str | None:
    """The first module, in the order in which they end, whose output is not finite while ``run()`` is called."""
    found: list[str] = []

    def watching(name: str):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(first, Tensor) and not first.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watching(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
