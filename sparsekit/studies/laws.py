"""The laws of Sparsing Law, by which the share of active neurons moves with the tokens trained on, and their fit.

    from sparsekit.studies.laws import fit_relu, points_of

    fit = fit_relu(*points_of("runs/relu"))  # a run that measured itself while it trained; or any D, A
    print(fit)  # coefficients with 95% intervals
    fit(300.0), fit.limit  # the ratio it foretells at 300 billion tokens, and the one it ends at

Shapes: N points, P coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparsekit.errors import DataError, SparsekitError
from sparsekit.studies.stages import read_small, rows

Array = NDArray[np.float64]
TINY, HUGE = 1e-60, 1e60  # of coefficients that are positive: c is of the order of D^a or D^-a, in any unit
STARTS = 6  # places from which the least squares are sought, the best of a grid
CLOSEST = 12  # of the grid's places to a coefficient that is held, of which the best is tried too
FINE = 1e-3  # of an interval's half, to which its ends are found


@dataclass(frozen=True)
class Law:
    """A curve A(D) of P coefficients, of which those in ``positive`` are sought by their logarithm ("inside").

    Attributes:
        bounds: of each coefficient, by name, as the formula has it.
        value: (inside coefficients [P], D [N]) -> A [N].
        slope: the same -> [N, P], the derivative by each coefficient inside.
        starts: (D, A, exponents a) -> where the search may begin, over a grid of a where none are told.
    """

    name: str
    formula: str
    coefficients: tuple[str, ...]
    positive: frozenset[str]
    bounds: Mapping[str, tuple[float, float]]
    value: Callable[[Array, Array], Array]
    slope: Callable[[Array, Array], Array]
    starts: Callable[[Array, Array, Sequence[float]], list[Array]]

    def inside(self, told: Mapping[str, float]) -> Array:
        """Coefficients as the search has them, from those of the formula."""
        return np.array([math.log(told[c]) if c in self.positive else told[c] for c in self.coefficients])

    def squares(self, x: Array, D: Array, A: Array) -> float:
        """The sum of squares about the curve of some inside coefficients."""
        return float(((self.value(x, D) - A) ** 2).sum())

    def told(self, index: int, value: float) -> float:
        """One coefficient as the formula has it; at an end of what is searched, the end of its range."""
        name = self.coefficients[index]
        low, high = self.inside_bounds()
        if value <= low[index] or value >= high[index]:
            return self.bounds[name][int(value >= high[index])]
        return math.exp(value) if name in self.positive else value

    def inside_bounds(self) -> tuple[Array, Array]:
        """The least and the largest of each coefficient, inside."""
        ends = []
        for name in self.coefficients:
            low, high = self.bounds[name]
            if name in self.positive:
                low, high = math.log(max(low, TINY)), math.log(min(high, HUGE))
            ends.append((low, high))
        low_P, high_P = np.array(ends, dtype=float).T
        return low_P, high_P


def _relu(x: Array, D: Array) -> Array:
    a, b, c = math.exp(x[0]), x[1], math.exp(x[2])
    return np.exp(np.minimum(b - c * D**a, 50.0)) + x[3]


def _relu_slope(x: Array, D: Array) -> Array:
    a, c = math.exp(x[0]), math.exp(x[2])
    power = c * D**a
    falling = np.exp(np.minimum(x[1] - power, 50.0))
    return np.stack((-falling * power * np.log(D) * a, falling, -falling * power, np.ones_like(D)), axis=1)


def _relu_starts(D: Array, A: Array, exponents: Sequence[float]) -> list[Array]:
    """A grid of (a, c), with exp(b) and A0, which are linear then; c D^a is of order 1 somewhere within the data."""
    starts = []
    for a in exponents or np.geomspace(0.03, 9, 18).tolist():
        for c in (size / D.max() ** a for size in np.geomspace(0.05, 30 * (D.max() / D.min()) ** a, 18)):
            amplitude, limit = _line(np.exp(-c * D**a), A)
            starts.append(np.array([math.log(a), math.log(max(amplitude, 1e-8)), math.log(c), limit]))
    return starts


def _silu(x: Array, D: Array) -> Array:
    return x[2] - math.exp(x[1]) * D ** -math.exp(x[0])


def _silu_slope(x: Array, D: Array) -> Array:
    a, c = math.exp(x[0]), math.exp(x[1])
    falling = c * D**-a
    return np.stack((falling * np.log(D) * a, -falling, np.ones_like(D)), axis=1)


def _silu_starts(D: Array, A: Array, exponents: Sequence[float]) -> list[Array]:
    starts = []
    for a in exponents or np.geomspace(0.01, 8, 40).tolist():
        slope, limit = _line(D**-a, A)
        starts.append(np.array([math.log(a), math.log(max(-slope, 1e-8)), limit]))
    return starts


def _line(z: Array, A: Array) -> tuple[float, float]:
    """(slope, intercept) of the least-squares line."""
    centred = z - z.mean()
    slope = float(centred @ A / max(float(centred @ centred), 1e-300))
    return slope, float(A.mean() - slope * z.mean())


RELU = Law(
    "relu", "A(D) = exp(-c D^a + b) + A0", ("a", "b", "c", "A0"), frozenset("ac"),
    {"a": (0.0, 10.0), "b": (-40.0, 40.0), "c": (0.0, math.inf), "A0": (0.0, 1.0)},
    _relu, _relu_slope, _relu_starts,
)  # fmt: skip
SILU = Law(
    "silu", "A(D) = -c / D^a + A0", ("a", "c", "A0"), frozenset("ac"),
    {"a": (0.0, 10.0), "c": (0.0, math.inf), "A0": (0.0, 1.0)},
    _silu, _silu_slope, _silu_starts,
)  # fmt: skip


# what the paper fitted, by size, in the order of the law's coefficients, D in billions of tokens; arXiv 2411.02335
PUBLISHED: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "relu": {
        "0.1B": (0.101, -0.0151, 3.20, 0.0614), "0.2B": (0.449, -3.05, 0.286, 0.0674),
        "0.4B": (0.683, -3.46, 0.0790, 0.0690), "0.8B": (1.01, -3.49, 7.97e-3, 0.0721),
        "1.2B": (1.33, -3.89, 9.03e-4, 0.0782),
    },
    "silu": {
        "0.1B": (0.479, 0.102, 0.409), "0.2B": (0.844, 0.208, 0.390), "0.4B": (1.03, 0.420, 0.385),
        "0.8B": (0.995, 0.562, 0.383), "1.2B": (0.967, 0.538, 0.382),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A law fitted to points.

    Attributes:
        intervals: of each coefficient (low, high) at ``level``; an end of its range (a: 0 and 10, b: -40 and 40, c: 0
            and infinity, A0: 0 and 1) where the points do not bound it on that side.
        error: the unbiased estimate of the points' standard deviation about the curve, sqrt(SSE / (N - P)).
    """

    law: Law
    coefficients: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    error: float
    points: int
    level: float

    def __call__(self, D: ArrayLike) -> Array:
        """A(D), D in the unit of the fit, of any shape."""
        return self.law.value(self.law.inside(self.coefficients), np.asarray(D, dtype=float))

    @property
    def limit(self) -> float:
        """A0, the activation ratio in the end."""
        return self.coefficients["A0"]

    def __str__(self) -> str:
        rows = [f"{self.law.formula}, {self.points} points, error {self.error:.3g}"]
        for name, value in self.coefficients.items():
            low, high = self.intervals[name]
            rows.append(f"  {name:3}{value:>10.4g}  {self.level:.0%} [{low:.4g}, {high:.4g}]")
        return "\n".join(rows)


def fit_relu(D: ArrayLike, A: ArrayLike, level: float = 0.95) -> Fit:
    """A(D) = exp(-c D^a + b) + A0 by least squares: how the activation ratio of a ReLU model falls; see :func:`fit`.

    Source: Luo et al. 2024, arXiv 2411.02335
    """
    return fit("relu", D, A, level)


def fit_silu(D: ArrayLike, A: ArrayLike, level: float = 0.95) -> Fit:
    """A(D) = -c / D^a + A0 by least squares: how the activation ratio of a SiLU model rises; see :func:`fit`.

    Source: Luo et al. 2024, arXiv 2411.02335
    """
    return fit("silu", D, A, level)


def fit(law: Literal["relu", "silu"], D: ArrayLike, A: ArrayLike, level: float = 0.95) -> Fit:
    """The coefficients of a law that leave the least sum of squares, and their profile intervals.

    The search begins at the best places of a grid, in which coefficients that enter linearly are solved for, and so
    needs no seed. A coefficient's interval holds the values at which the least sum of squares over the others is at
    most SSE (1 + F / (N - P)), F the ``level`` quantile of F(1, N - P): errors are taken to be independent, normal and
    of one size, and the curve need not be near to linear in its coefficients, which are often all but exchangeable.

    Args:
        D: tokens trained on, [N], in one unit (the published coefficients are of billions); 0 or less is refused.
        A: activation ratios, [N], from 0 to 1.

    Raises:
        DataError: what is given is no such points, or there are not at least P + 1 different D.
        SparsekitError: scipy is missing.

    Source: Bates & Watts 1988, Nonlinear Regression Analysis and Its Applications, ch. 6 (profiles)
    """
    chosen = {"relu": RELU, "silu": SILU}[law]
    D_N, A_N = _points(chosen, D, A)
    low, high = chosen.inside_bounds()
    starts = sorted(
        (np.clip(start, low + 1e-6, high - 1e-6) for start in chosen.starts(D_N, A_N, ())),
        key=lambda x: chosen.squares(x, D_N, A_N),
    )
    best = min((_least(chosen, D_N, A_N, start) for start in starts[:STARTS]), key=lambda found: found[1])
    freedom = len(D_N) - len(chosen.coefficients)
    profile = _Profile(chosen, D_N, A_N, best, starts, level, freedom)
    while True:
        begun_at = profile.best[1]
        intervals = {name: profile.interval(i) for i, name in enumerate(chosen.coefficients)}
        x, squares = profile.best
        if squares >= begun_at * (1 - 1e-6):  # else a profile came to a better minimum
            break
    told = {name: chosen.told(i, float(x[i])) for i, name in enumerate(chosen.coefficients)}
    return Fit(chosen, told, intervals, math.sqrt(squares / freedom), len(D_N), level)


def points_of(run: str | Path, probe: str = "activation_sparsity") -> tuple[Array, Array]:
    """(D in billions of tokens, A) of a run whose spec's ``probes`` measured activation sparsity along training.

    Raises:
        DataError: it did not.
    """
    folder = Path(run)
    row = [{"step": 0, "tokens": 0}, *rows(folder)]
    step_R, tokens_R = ([float(r[key]) for r in row] for key in ("step", "tokens"))
    found = []
    for file in sorted((folder / "probes").glob(f"{probe}-step-*.json")):
        ratio = read_small(file).get("scalars", {}).get("activation_ratio")
        if ratio is not None:
            step = int(file.stem.rpartition("-")[2])
            found.append((float(np.interp(step, step_R, tokens_R)) / 1e9, float(ratio)))
    if not found:
        mend = f'train it with "probes": [{{"type": "{probe}", "every": 100}}] in its spec'
        raise DataError(f"{folder}: holds no activation ratios of {probe} along training; {mend}")
    D_N, A_N = np.array(found).T
    return D_N, A_N


def _points(law: Law, D: ArrayLike, A: ArrayLike) -> tuple[Array, Array]:
    D_N, A_N = np.asarray(D, dtype=float), np.asarray(A, dtype=float)
    if D_N.ndim != 1 or D_N.shape != A_N.shape:
        raise DataError(f"{law.name} law: D and A have shapes {D_N.shape} and {A_N.shape}; give one A for each D")
    if not (np.isfinite(D_N).all() and (D_N > 0).all()):
        raise DataError(f"{law.name} law: D are tokens trained on, above 0; leave out what is not")
    if not (np.isfinite(A_N).all() and (A_N >= 0).all() and (A_N <= 1).all()):
        raise DataError(f"{law.name} law: A are activation ratios, from 0 to 1; leave out what is not")
    needed, different = len(law.coefficients) + 1, len(np.unique(D_N))
    if different < needed:
        raise DataError(
            f"{law.name} law: {len(law.coefficients)} coefficients take points at {needed} different D or more, and "
            f"there are {different}; measure more checkpoints"
        )
    return D_N, A_N


def _least(law: Law, D: Array, A: Array, start: Array, fixed: int | None = None) -> tuple[Array, float]:
    """(coefficients, sum of squares) at the minimum that a start leads to, with one coefficient held or none."""
    optimize: Any = _scipy("optimize")
    low, high = law.inside_bounds()
    free = [i for i in range(len(start)) if i != fixed]

    def whole(y: Array) -> Array:
        x = start.copy()
        x[free] = y
        return x

    found = optimize.least_squares(
        lambda y: law.value(whole(y), D) - A, np.clip(start[free], low[free] + 1e-9, high[free] - 1e-9),
        jac=lambda y: law.slope(whole(y), D)[:, free], bounds=(low[free], high[free]), x_scale="jac",
        ftol=1e-13, xtol=1e-13, gtol=1e-15, max_nfev=2000,
    )  # fmt: skip
    return whole(found.x), 2 * float(found.cost)


class _Profile:
    """The least sum of squares as a function of one coefficient, followed outwards from the minimum."""

    def __init__(
        self, law: Law, D: Array, A: Array, best: tuple[Array, float], starts: list[Array], level: float, freedom: int
    ):
        self.law, self.D, self.A, self.best, self.starts = law, D, A, best, starts
        stats: Any = _scipy("stats")
        self.share = 1 + float(stats.f.ppf(level, 1, freedom)) / freedom
        self.low, self.high = law.inside_bounds()

    def interval(self, index: int) -> tuple[float, float]:
        down, up = (self._end(index, side) for side in (-1, 1))
        return self.law.told(index, down), self.law.told(index, up)

    def _end(self, index: int, side: int) -> float:
        """Where the profile leaves the bearable, by doubling steps and then bisection; else the bound."""
        bound = float((self.low if side < 0 else self.high)[index])
        inside, (x, _) = float(self.best[0][index]), self.best
        step = max(1e-3 * self._error(index), 1e-9)
        while True:
            outside = inside + side * step
            if (outside - bound) * side >= 0:
                outside = bound
            x, bearable = self._at(index, outside, x)
            if not bearable:
                break
            if outside == bound:
                return bound
            inside, step = outside, 2 * step
        for _ in range(40):  # of points that lie on the curve the interval has no width
            middle = (inside + outside) / 2
            if abs(outside - inside) <= FINE * abs(outside - float(self.best[0][index])):
                break
            x, bearable = self._at(index, middle, x)
            inside, outside = (middle, outside) if bearable else (inside, middle)
        return inside

    def _at(self, index: int, value: float, near: Array) -> tuple[Array, bool]:
        """The other coefficients at the least sum of squares with this one held, and whether that is bearable."""
        found = self._held(index, value, near)
        if found[1] > self.best[1] * self.share:  # a minimum followed outwards need not stay the least one
            if self.law.coefficients[index] == "a":
                closest = self.law.starts(self.D, self.A, [math.exp(value)])
            else:
                closest = sorted(self.starts, key=lambda x: abs(float(x[index]) - value))[:CLOSEST]
            best = min(closest, key=lambda x: self.law.squares(x, self.D, self.A))
            again = self._held(index, value, best)
            found = min(found, again, key=lambda one: one[1])
        if found[1] < self.best[1]:
            self.best = found
        return found[0], found[1] <= self.best[1] * self.share

    def _held(self, index: int, value: float, start: Array) -> tuple[Array, float]:
        start = start.copy()
        start[index] = value
        return _least(self.law, self.D, self.A, start, index)

    def _error(self, index: int) -> float:
        """The linear approximation's standard error, by which the first step is sized."""
        slope = self.law.slope(self.best[0], self.D)
        covariance = np.linalg.pinv(slope.T @ slope)
        return math.sqrt(max(float(covariance[index, index]) * self.best[1], 0.0))


def _scipy(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError:
        raise SparsekitError("fitting a law needs scipy: pip install 'sparsekit[studies]'") from None
