"""Fills a page such as benchmarks/REPRODUCTION.md with what came of the studies: tables, verdicts, figures; reports."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduction.pool import NOTES, minutes_of, say, status, unpack
from benchmarks.reproduction.protocol import STUDIES, question
from sparsekit.errors import DataError
from sparsekit.files import written_whole
from sparsekit.reports.study_summary import ClaimVerdict
from sparsekit.studies import stages, study, table
from sparsekit.studies.compare import Comparer, deviation
from sparsekit.studies.laws import PUBLISHED, RELU, SILU, Law, fit_relu, fit_silu, points_of
from sparsekit.studies.plan import Plan, PlannedRun, expand
from sparsekit.studies.spec import ClaimSpec, label, load_study

PAGE = Path(__file__).resolve().parents[1] / "REPRODUCTION.md"  # of which others are copies

# what is told of every study: a column's title and its measure
MEASURES = {
    "perplexity": "val_perplexity",
    "last variance": "variance/resid_last",
    "useful share": "usefulness/usefulness",
    "affine loss": "usefulness/mean_log_loss_ratio",
    "causal": "causal/causal",
    "permutation": "permutation/permutation",
    "Jacobian": "jacobian/identity_deviation",
    "useful share, released": "usefulness-2/usefulness",
    "active share": "activation_sparsity/activation_ratio",
    "active share, released": "activation_sparsity-2/activation_ratio",
}


def write(out: Path, page: Path | None = None, figures: Path | None = None) -> None:
    """Fills the page's parts between their markers, and writes the figures and each study's report.

    Args:
        out: where the studies are.
        page: by default ``REPRODUCTION.md`` there, a copy of this repository's where there is none yet.
        figures: by default ``figures`` there; ``runs.csv`` goes with them.

    Raises:
        DataError: there is no study in ``out`` with one seed to its end.
    """
    page, figures = page or out / PAGE.name, figures or out / "figures"
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    parts: dict[str, str] = {}
    verdicts: list[str] = []
    runs: list[list[Any]] = []
    moved: list[tuple[bool, str]] = []
    for name in STUDIES:
        told = Told.of(out, name)
        if told is None:
            parts[name] = "Not run, or not with one seed to its end."
            verdicts.append(f"| {name} | | not run | | |")
            continue
        runs += told.run_lines()
        verdicts += told.verdicts()
        moved += told.moved()
        parts[name] = "\n\n".join(
            [told.head(), told.settings(), told.claims(), *told.drawn(figures, page.parent), *told.laws()]
        )
        say(f"{name}: {told.results.written.get('report', 'no report')}")
    if not runs:
        raise DataError(f"{out}: holds no study with one seed to its end; run one first, or give another folder")
    head = ["| study | claim | verdict | difference, 95% | seed sd |", "|---|---|---|---|---|"]
    parts["verdicts"] = "\n".join(head + verdicts)
    if moved:
        differ = [line for differs, line in moved if differs]
        sentence = f"With the released code's measures {len(differ)} of {len(moved)} verdicts are others"
        parts["verdicts"] += "\n\n" + "\n".join([f"{sentence}{':' if differ else '.'}", *(f"* {d}" for d in differ)])
    columns = ["study", "run", "status", "step", "tokens", "parameters", *MEASURES.values()]
    table.write(figures, "runs", columns, runs)
    text = filled(text, parts)
    with written_whole(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The text with each part between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        ValueError: a part has no such place.
    """
    for name, part in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        places = [match.span() for match in pattern.finditer(text)]
        if len(places) != 1:
            raise ValueError(f"the page has no one place {begin} … {end}")
        first, last = places[0]
        text = f"{text[:first]}{begin}\n{part}\n{end}{text[last:]}"
    return text


def complete_seeds(plan: Plan) -> list[int]:
    """The seeds with which every variant is done, but for those that failed with each, as what diverges does."""
    told: dict[Any, dict[int, str]] = {}
    for run in plan.runs:
        told.setdefault(run.place, {})[run.seed] = status(plan, run)
    able = [by_seed for by_seed in told.values() if set(by_seed.values()) != {"failed"}]
    return [seed for seed in plan.study.spec.seeds if able and all(by_seed[seed] == "done" for by_seed in able)]


class Told:
    """What came of one study, in words."""

    def __init__(self, name: str, whole: Plan, plan: Plan):
        self.name, self.whole, self.plan = name, whole, plan
        self.results = study.finish(plan)
        self.comparer = Comparer(plan, table.collect(plan, self.states(plan)))

    @classmethod
    def of(cls, out: Path, name: str) -> Told | None:
        """Of what is in its folder; nothing where there is none, or no seed that every variant has."""
        folder = unpack(out, name)
        if folder is None:
            return None
        whole = expand(load_study(folder))
        seeds = complete_seeds(whole)
        if not seeds:
            return None
        return cls(
            name, whole, expand(load_study(folder, [f"seeds={json.dumps(seeds)}", f"question={question(name)}"]))
        )

    @staticmethod
    def states(plan: Plan) -> dict[Path, stages.State]:
        return {run.folder: stages.state(run, stages.stages(plan)) for run in plan.distinct}

    def head(self) -> str:
        calls = stages.read_small(self.plan.study.folder / NOTES).get("calls", [])
        where = ", ".join(
            dict.fromkeys(f"{c['device']}, torch {c['torch']}, commit {c['commit'] or '?'}" for c in calls)
        )
        states = self.states(self.whole).values()
        done = sum(state.status == "done" for state in states)
        failed = [f"{run_id}: {why}" for run_id, why in self.results.failed.items()]
        seeds = self.plan.study.spec.seeds
        lines = [
            f"{done} of {len(states)} runs done; {len(seeds)} seeds that every variant has, of "
            f"{len(self.whole.study.spec.seeds)} planned; {minutes_of(self.plan.study.folder):.1f} minutes of the GPU, "
            f"shared ({where}).",
            *(f"Failed: {line}." for line in failed),
        ]
        return "\n".join(lines)

    @property
    def measures(self) -> dict[str, str]:
        return {title: measure for title, measure in MEASURES.items() if self.comparer.at(measure)}

    def settings(self) -> str:
        """A row for each setting: mean and deviation over seeds of every measure."""
        names = ", ".join(axis.name for axis in self.plan.axes)
        lines = [f"| {names} | parameters | {' | '.join(self.measures)} |", "|---" * (2 + len(self.measures)) + "|"]
        for place in dict.fromkeys(run.place for run in self.plan.runs):
            first = next(run for run in self.plan.runs if run.place == place)
            cells = [
                spread([v for (p, _), v in self.comparer.at(m).items() if p == place]) for m in self.measures.values()
            ]
            lines.append(
                f"| {', '.join(first.labels.values())} | {first.parameters / 1e6:.1f}M | {' | '.join(cells)} |"
            )
        return "\n".join(lines)

    @property
    def judged(self) -> Iterator[tuple[ClaimSpec, ClaimVerdict]]:
        yield from zip(self.plan.study.spec.claims, self.results.summary.claims, strict=True)

    def claims(self) -> str:
        lines = ["| claim | published | here | difference, 95% | verdict | as released |", "|---" * 6 + "|"]
        for claim, told in self.judged:
            again = self.released(claim)
            same = again is not None and word(again) == word(told)
            released = "" if again is None else f"{'the same' if same else f'**{again.verdict}**'}, {difference(again)}"
            published = ", ".join(f"{name}: {value:g}" for name, value in claim.published.items())
            cells = [claim.says, published, values(told.found), difference(told), steps(told), released]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def released(self, claim: ClaimSpec) -> ClaimVerdict | None:
        """The verdict by the same probe with compat "released", where the study has it."""
        probe, _, scalar = claim.measure.partition("/")
        again = f"{probe}-2/{scalar}"
        if f"{probe}-2" not in self.plan.probes or not self.comparer.at(again):
            return None
        return self.comparer.judge(claim.model_copy(update={"measure": again}))

    def moved(self) -> Iterator[tuple[bool, str]]:
        """Of each claim that is judged with both: whether the verdict differs, and how."""
        for claim, told in self.judged:
            again = self.released(claim)
            if again is not None:
                yield word(again) != word(told), f"{self.name}: {claim.says} ({told.verdict}; {again.verdict})"

    def verdicts(self) -> list[str]:
        lines = []
        for claim, told in self.judged:
            cells = [self.name, claim.says, f"**{told.verdict}**", difference(told), self.seed_spread(claim)]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def seed_spread(self, claim: ClaimSpec) -> str:
        """Deviation from seed to seed of one setting, pooled over those that the claim is of."""
        at, factors = self.comparer.at(claim.measure), self.plan.factors
        held = {self.plan.factor(name): label(value) for name, value in claim.where.items()}
        settings = [
            p for p in dict.fromkeys(p for p, _ in at) if all(factors[i].label(p[i]) == v for i, v in held.items())
        ]
        places = [[v for (p, _), v in at.items() if p == setting] for setting in settings]
        several = [deviation(found) ** 2 for found in places if len(found) > 1]
        return plain(math.sqrt(math.fsum(several) / len(several)), 2) if several else ""

    def run_lines(self) -> Iterator[list[Any]]:
        """Every run that was planned, also of seeds that not every variant has."""
        states = self.states(self.whole)
        every = Comparer(self.whole, table.collect(self.whole, states))
        for run in self.whole.runs:
            told = states[run.folder]
            found = [every.at(measure).get((run.place, run.seed)) for measure in MEASURES.values()]
            trained = [told.trained.get("step"), told.trained.get("tokens")]
            yield [self.name, run.id, told.status, *trained, run.parameters, *found]

    def drawn(self, figures: Path, beside: Path) -> Iterator[str]:
        """The study's own figures as SVG, as a page in the folder ``beside`` shows them."""
        figures.mkdir(parents=True, exist_ok=True)
        for number, plot in enumerate(self.results.summary.figures):
            source = self.plan.study.folder / "figures" / f"{plot.name}.svg"
            target = figures / f"{self.name}-{number}.svg"
            with written_whole(target) as temporary:
                temporary.write_bytes(source.read_bytes())
            yield f"![{plot.title}]({Path(os.path.relpath(target, beside)).as_posix()})"

    def laws(self) -> Iterator[str]:
        """Sparsing Law's A(D), fitted to what each longest run measured of itself while its learning rate was full."""
        if "activation" not in {axis.name for axis in self.plan.axes}:
            return
        longest = max(run.tokens or 0 for run in self.plan.runs)
        lines = ["The two laws, D in billions of tokens:", ""]
        lines += ["| law | run | points | first and last | coefficients, 95% | error |", "|---" * 6 + "|"]
        for law in (RELU, SILU):
            runs = [run for run in self.plan.runs if run.tokens == longest and run.labels["activation"] == law.name]
            points = [stable_points(run) for run in runs]
            lines += [law_line(law, f"seed {run.seed}", at) for run, at in zip(runs, points, strict=True)]
            if len(runs) > 1:
                lines.append(law_line(law, "all seeds", sorted(point for at in points for point in at)))
            for size, found in PUBLISHED[law.name].items():
                told = ", ".join(f"{name} {value:.3g}" for name, value in zip(law.coefficients, found, strict=True))
                lines.append(f"| {law.name} | published, {size} | | | {told} | |")
        yield "\n".join(lines)


def stable_points(run: PlannedRun, probe: str = "activation_sparsity") -> list[tuple[float, float]]:
    """(D in billions of tokens, A) between warm-up and decay, those left out where the search was saturated."""
    schedule, whole = run.resolved["train"]["schedule"], (run.tokens or 0) / 1e9
    first, last = whole * schedule["warmup_share"], whole * (1 - schedule["decay_share"])
    told = [stages.read_small(file) for file in sorted((run.folder / "probes").glob(f"{probe}-step-*.json"))]
    saturated = [one["meta"].get("status") == "saturated" for one in told if "activation_ratio" in one["scalars"]]
    points = zip(*points_of(run.folder, probe), saturated, strict=True)
    return [(float(d), float(a)) for d, a, at_end in points if first <= d <= last * (1 + 1e-9) and not at_end]


def law_line(law: Law, name: str, points: Sequence[tuple[float, float]]) -> str:
    ends = f"{points[0][1]:.3g}, {points[-1][1]:.3g}" if points else ""
    cells = [law.name, name, str(len(points)), ends]
    try:
        found = (fit_relu if law.name == "relu" else fit_silu)([d for d, _ in points], [a for _, a in points])
    except DataError as error:
        return f"| {' | '.join([*cells, str(error), ''])} |"
    told = (
        f"{coefficient} {value:.3g} [{low:.3g}, {high:.3g}]"
        for (coefficient, value), (low, high) in zip(found.coefficients.items(), found.intervals.values(), strict=True)
    )
    return f"| {' | '.join([*cells, ', '.join(told), f'{found.error:.2g}'])} |"


def spread(found: Sequence[float]) -> str:
    """``1.23 ± 0.04`` over seeds."""
    if not found:
        return ""
    mean = plain(math.fsum(found) / len(found))
    return f"{mean} ± {plain(deviation(found), 1)}" if len(found) > 1 else mean


def plain(value: float, digits: int = 3) -> str:
    """To so many digits that count, without an exponent as long as it can be read: 1300, not 1.3e+03."""
    return f"{float(f'{value:.{digits}g}'):g}"


def values(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name}: {plain(value)}" for name, value in found.items())


def difference(told: ClaimVerdict) -> str:
    """Of the last value against the first."""
    if told.difference is None:
        return ""
    sign = "+" if told.difference >= 0 else ""
    if told.low is None or told.high is None:
        return f"{sign}{plain(told.difference)}"
    return f"{sign}{plain(told.difference)} [{plain(told.low)}, {plain(told.high)}]"


def word(told: ClaimVerdict) -> str:
    """The verdict without its reason."""
    return told.verdict.partition(" (")[0]


def steps(told: ClaimVerdict) -> str:
    """The verdict; and step by step, where these say other things."""
    each = [verdict for *_, verdict in told.neighbours]
    if set(each) <= {told.verdict}:
        return f"**{told.verdict}**"
    return f"**{told.verdict}** ({', '.join(f'{a} to {b} {verdict}' for a, b, verdict in told.neighbours)})"
