"""How long a study takes, and from what that is reckoned."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekit.studies.plan import Plan
from sparsekit.studies.stages import State

# Of a GPU's peak, what training reaches: so much for each channel, up to a limit. Measured (benchmarks/RESULTS.md): 7%
# at width 256, six runs sharing a GPU; 46% at 768; 50% at 1536.
GPU_SHARE, MOST_OF_GPU = 0.3 / 1024, 0.45
CPU_SHARE = 0.5  # of what a product of matrices reaches


@dataclass(frozen=True)
class Estimate:
    """Training alone, without probes and evaluations.

    Attributes:
        flops: of the runs whose length is known; ``unknown`` says how many others there are.
        left: of those, what is not trained yet.
        seconds: what is left takes at this speed; None where nothing is left, or no length is known.
        how: from what it is reckoned.
    """

    flops: float
    left: float
    unknown: int
    seconds: float | None
    how: str


def reckon(plan: Plan, states: Mapping[Path, State], jobs: int = 1, n_devices: int = 1) -> Estimate:
    """From the speed of the study's finished runs where there are any, else from what the device can do."""
    runs = plan.distinct
    to_train = [run for run in runs if not states[run.folder].trained]
    flops, left = sum(run.flops or 0 for run in runs), sum(run.flops or 0 for run in to_train)
    unknown = sum(run.flops is None for run in to_train)
    if not left:
        return Estimate(flops, left, unknown, None, "")
    speeds = sorted(
        run.flops_per_token * states[run.folder].trained["tokens_per_second"]
        for run in runs
        if states[run.folder].trained.get("tokens_per_second")
    )
    if speeds:
        speed = speeds[len(speeds) // 2]
        n = f"{len(speeds)} finished run{'s' * (len(speeds) > 1)} of this study"
        return Estimate(flops, left, unknown, left / speed / jobs, f"from {n}, {speed:.3g} FLOP/s each")
    device, peak = plan.device or "", plan.peak_flops
    if device and peak:
        shares = [min(MOST_OF_GPU, GPU_SHARE * run.resolved["model"]["d_model"]) for run in to_train]
        seconds = sum((run.flops or 0) / share for run, share in zip(to_train, shares, strict=True)) / peak / n_devices
        share = left / (seconds * peak * n_devices)
        how = f"at {share:.0%} of the peak of {n_devices} x {device}, {peak:.3g} FLOP/s"
        return Estimate(flops, left, unknown, seconds, how)
    if device:
        return Estimate(flops, left, unknown, None, f"the peak of {device} is not known")
    speed = _product()
    how = f"on this CPU, at {CPU_SHARE:.0%} of the {speed:.3g} FLOP/s of a product of matrices, measured now"
    return Estimate(flops, left, unknown, left / (CPU_SHARE * speed), how)


def _product(n: int = 512, times: int = 5) -> float:
    """FLOP/s of a float32 product of n x n matrices; the fastest of some."""
    import numpy as np

    a = np.ones((n, n), np.float32)
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best
