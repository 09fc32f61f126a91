"""What a study says of itself to its report: plain values, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sparsekit.reports.plots import Plot

Cell = str | int | float | None
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim of a study and what its runs say to it.

    Attributes:
        says, measure, axis: what is claimed: that the measure ``expected`` ("rises", "falls") along the axis.
        verdict: "holds", "reversed", "cannot be told", and why in brackets where that is not plain.
        difference, low, high: of the axis' last value against its first, seeds paired, with its 95% interval; None
            where there are too few seeds.
        seeds: how many pairs of seeds that rests on.
        found: the mean over seeds at each value of the axis, by the value's label.
        published: values by the same labels, or others where the paper had other settings; ``source`` says which.
        neighbours: (from, to, verdict) of each step along the axis.
        settings: (setting, verdict) at each setting of the other axes, where the claim averages over several.
    """

    says: str
    measure: str
    axis: str
    expected: str
    verdict: str
    difference: float | None
    low: float | None
    high: float | None
    seeds: int
    found: Mapping[str, float]
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    neighbours: Sequence[tuple[str, str, str]] = ()
    settings: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class StudySummary:
    """All that a study's report shows beside its runs.

    Attributes:
        plan: a row for each planned run: its name, its axes, seed, status, parameters, tokens, FLOPs.
        labels: by the run's folder name, what it is on each axis, the seed last: ``{"n_kv_heads": "4", "seed": "0"}``.
        comparisons: a row for each measure, axis and pair of values, as in comparisons.csv.
        claims: with verdicts.
        figures: the study's own, in the order asked for.
        remarks: what a reader should know of the numbers, a sentence each.
    """

    name: str
    question: str
    source: str
    plan: Sequence[Row]
    labels: Mapping[str, Mapping[str, str]]
    comparisons: Sequence[Row]
    claims: Sequence[ClaimVerdict]
    figures: Sequence[Plot]
    remarks: Sequence[str]
