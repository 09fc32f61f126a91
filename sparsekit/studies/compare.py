"""Seed-paired comparisons along each axis, and what they say to a study's claims.

For a measure m, values a and b of an axis and each seed s: d_s = the mean over the settings o of the other axes of
m(b, o, s) - m(a, o, s). The difference is the mean of d_s, its 95% interval mean ± t(0.975, n - 1) · sd(d_s) / sqrt(n)
over n seeds. Pairing removes what a seed does to both.

Source: Student 1908, Biometrika 6(1), for the paired t interval
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.reports.study_summary import ClaimVerdict
from sparsekit.studies.plan import Plan
from sparsekit.studies.spec import ClaimSpec, label
from sparsekit.studies.table import Values, by_name, lookup, scalars

MOST_SETTINGS = 24  # of the other axes, up to which a comparison is made at each by itself
ROUNDING = 1e-9  # of a difference
HOLDS, REVERSED, CANNOT = "holds", "reversed", "cannot be told"


@dataclass(frozen=True)
class Comparison:
    """A measure at one value of an axis against another.

    Attributes:
        axis, against, value: the labels; ``value`` minus ``against`` is the difference.
        where: the setting of the other axes, empty for the mean over all of them.
        mean_against, mean: over seeds (those that have both).
        difference, low, high: with its 95% interval; None where there are too few seeds.
        seeds, pairs: how many seeds, and pairs of runs, it rests on.
        seed_sd: standard deviation of the measure from seed to seed, pooled over the settings; None with one seed.
    """

    measure: str
    axis: str
    against: str
    value: str
    where: str
    mean_against: float
    mean: float
    difference: float
    low: float | None
    high: float | None
    seeds: int
    pairs: int
    seed_sd: float | None

    @property
    def direction(self) -> int:
        """1 or -1 where the interval lies on that side of zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    @property
    def alike(self) -> bool:
        """Every seed has the same difference but for rounding, as of a share that moves in steps: there is no t."""
        if self.low is None or self.high is None:
            return False
        return self.high - self.low <= ROUNDING * abs(self.difference)

    def row(self) -> dict[str, Any]:
        return asdict(self)


COLUMNS = tuple(Comparison.__dataclass_fields__)


def interval(samples: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean with its 95% Student-t interval; without one of fewer than two samples.

    Raises:
        SparsekitError: scipy is not installed.
    """
    n = len(samples)
    mean = math.fsum(samples) / n
    if n < 2:
        return mean, None, None
    try:
        from scipy.special import stdtrit  # not scipy.stats, which takes a second to import
    except ImportError:
        raise SparsekitError("intervals over seeds need scipy: pip install 'sparsekit[studies]'") from None
    margin = float(stdtrit(n - 1, 0.975)) * deviation(samples) / math.sqrt(n)
    return mean, mean - margin, mean + margin


def deviation(samples: Sequence[float]) -> float:
    """Unbiased: sqrt(sum (x - mean)^2 / (n - 1))."""
    mean = math.fsum(samples) / len(samples)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (len(samples) - 1))


class Comparer:
    """Compares measures over the runs of a plan."""

    def __init__(self, plan: Plan, values: Values):
        self.plan, self.values = plan, values
        self._runs = {(run.place, run.seed): run for run in plan.runs}
        self._by_name = {folder: by_name(found) for folder, found in values.items()}
        self._found: dict[str, dict[tuple[tuple[int, ...], int], float]] = {}

    def at(self, measure: str) -> Mapping[tuple[tuple[int, ...], int], float]:
        """A measure by (place, seed), where a run has it."""
        if measure not in self._found:
            found = {key: lookup(self._by_name[run.folder], measure) for key, run in self._runs.items()}
            there = {key: value.value for key, value in found.items() if value is not None}
            self._found[measure] = {key: value for key, value in there.items() if math.isfinite(value)}
        return self._found[measure]

    def others(self, factor: int, where: Mapping[int, int] | None = None) -> list[tuple[int, ...]]:
        """Every setting of the other factors (0 stands for the factor itself), those in ``where`` held."""
        ranges: list[Sequence[int]] = [range(len(f)) for f in self.plan.factors]
        for index, held in (where or {}).items():
            ranges[index] = [held]
        ranges[factor] = [0]
        return list(itertools.product(*ranges))

    def compare(
        self, measure: str, factor: int, against: int, value: int, where: Mapping[int, int] | None = None
    ) -> Comparison | None:
        """One value of an axis against another; None where no seed has both.

        A setting of the other axes where no seed has both is left out; a seed counts if it has both at all others.
        """
        at, seeds = self.at(measure), self.plan.study.spec.seeds
        places = [(_with(o, factor, against), _with(o, factor, value)) for o in self.others(factor, where)]
        places = [pair for pair in places if any(all((p, s) in at for p in pair) for s in seeds)]
        whole = [s for s in seeds if places and all((p, s) in at for pair in places for p in pair)]
        if not whole:
            return None
        differences = [_mean([at[b, s] - at[a, s] for a, b in places]) for s in whole]
        difference, low, high = interval(differences)
        several = len(whole) > 1
        spreads = [deviation([at[p, s] for s in whole]) ** 2 for pair in places for p in pair] if several else []
        factors = self.plan.factors
        held = factors[factor]
        told = ",".join(f"{factors[index].name}={factors[index].label(v)}" for index, v in (where or {}).items())
        return Comparison(
            measure, held.name, held.label(against), held.label(value), told,
            _mean([at[a, s] for a, _ in places for s in whole]), _mean([at[b, s] for _, b in places for s in whole]),
            difference, low, high, len(whole), len(whole) * len(places), math.sqrt(_mean(spreads)) if spreads else None,
        )  # fmt: skip

    def all(self, measures: Sequence[str]) -> Iterator[Comparison]:
        """Each measure along each axis: each value against the first and against the one before it.

        First the mean over the settings of the other axes, then, where these are several and not too many, at each.
        """
        for measure, factor in itertools.product(measures, range(len(self.plan.factors))):
            free = [i for i, f in enumerate(self.plan.factors) if i != factor and len(f) > 1]
            settings: list[dict[int, int]] = [{}]
            if free and len(self.others(factor)) <= MOST_SETTINGS:
                settings += [{i: other[i] for i in free} for other in self.others(factor)]
            for where, (against, value) in itertools.product(settings, _pairs(len(self.plan.factors[factor]))):
                found = self.compare(measure, factor, against, value, where)
                if found is not None:
                    yield found

    def judge(self, claim: ClaimSpec) -> ClaimVerdict:
        """What the runs say to a claim.

        It holds only if the interval of the last value against the first, or with an ``order`` that of every next one
        against the one before, excludes zero on the side that is claimed; it is reversed if on the other. A difference
        without spread over seeds cannot be told.
        """
        factor = self.plan.factor(claim.axis)
        held = self.plan.factors[factor]
        where = {}
        for name, value in claim.where.items():
            index = self.plan.factor(name)
            where[index] = self.plan.factors[index].labels.index(label(value))
        free = [i for i, f in enumerate(self.plan.factors) if i not in (factor, *where) and len(f) > 1]
        order = [held.labels.index(text) for text in claim.order] if claim.order else list(range(len(held)))
        pairs = list(itertools.pairwise(order))
        steps = [self.compare(claim.measure, factor, a, b, where) for a, b in pairs]
        whole = self.compare(claim.measure, factor, order[0], order[-1], where)
        sign = 1 if claim.direction == "rises" else -1
        decisive = pairs if claim.order else [(order[0], order[-1])]
        others = self.others(factor, where) if free else []
        at_each = []
        for other in others if len(others) <= MOST_SETTINGS else []:
            held_there = {**where, **{i: other[i] for i in free}}
            found_there = [self.compare(claim.measure, factor, a, b, held_there) for a, b in decisive]
            name = ", ".join(f"{self.plan.factors[i].name}={self.plan.factors[i].label(other[i])}" for i in free)
            at_each.append((name, _verdict(found_there, sign)))
        neighbours = [
            (held.label(a), held.label(b), _verdict([step], sign)) for (a, b), step in zip(pairs, steps, strict=True)
        ]
        found = {held.label(i): self._mean_at(claim.measure, factor, i, where) for i in order}
        verdict = _verdict(steps if claim.order else [whole], sign)
        if len(order) < 2:
            verdict = f"{CANNOT} (the axis has one value)"
        return ClaimVerdict(
            says=claim.says, measure=claim.measure, axis=held.name,
            expected=claim.direction + (f" in the order {', '.join(claim.order)}" if claim.order else ""),
            verdict=verdict,
            difference=whole.difference if whole else None,
            low=whole.low if whole else None, high=whole.high if whole else None, seeds=whole.seeds if whole else 0,
            found={name: value for name, value in found.items() if value is not None},
            published=claim.published, source=claim.source, neighbours=neighbours,
            settings=at_each,
        )  # fmt: skip

    def _mean_at(self, measure: str, factor: int, value: int, where: Mapping[int, int]) -> float | None:
        at = self.at(measure)
        keys = [(_with(o, factor, value), s) for o in self.others(factor, where) for s in self.plan.study.spec.seeds]
        found = [at[key] for key in keys if key in at]
        return _mean(found) if found else None


def _verdict(comparisons: Sequence[Comparison | None], sign: int) -> str:
    if any(c is None for c in comparisons):
        return f"{CANNOT} (no runs to compare)"
    told = [c for c in comparisons if c is not None]
    if any(c.seeds < 2 for c in told):
        return f"{CANNOT} (one seed)"
    if any(c.alike for c in told):
        return f"{CANNOT} (alike with every seed)"
    sides = {c.direction * sign for c in told}
    return HOLDS if sides == {1} else REVERSED if sides == {-1} else CANNOT


def _pairs(n: int) -> list[tuple[int, int]]:
    """(against, value): the first with each, then neighbours that are not among these."""
    return [(0, i) for i in range(1, n)] + [(i - 1, i) for i in range(2, n)]


def _with(place: tuple[int, ...], factor: int, value: int) -> tuple[int, ...]:
    return (*place[:factor], value, *place[factor + 1 :])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def measures_of(plan: Plan, values: Values) -> list[str]:
    """What is compared: every scalar that is measured at the end, and what else a claim or a figure names."""
    spec = plan.study.spec
    named = [claim.measure for claim in spec.claims] + [m for figure in spec.figures for m in figure.measures]
    return list(dict.fromkeys([*(m for m in scalars(values) if not m.startswith("train/")), *named]))
