"""The whole of a study: planned, run, collected, judged, drawn and reported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.files import writable, write_json
from sparsekit.reports.study_summary import StudySummary
from sparsekit.studies import compare, table
from sparsekit.studies.conduct import Outcome, Tell, chosen_runs, conduct, say, states_of
from sparsekit.studies.plan import Plan, PlannedRun, expand
from sparsekit.studies.spec import STUDY, load_study
from sparsekit.studies.stages import State, demand_own_runs

NEEDED = {"scipy": "intervals", "pyarrow": "table.parquet", "matplotlib": "figures"}
MOST_REPORTED = 48  # runs in a page; of a larger study those of the first seeds


@dataclass(frozen=True)
class Results:
    """What came of a study.

    Attributes:
        summary: what its report says.
        written: the files, by what they are.
        failed: why, by run, of those that did not come to their end when last tried.
        missing: how many runs are not done.
        notes: what could not be made of it.
    """

    summary: StudySummary
    written: Mapping[str, Path]
    failed: Mapping[str, str]
    missing: int
    notes: Sequence[str]


def study(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    only: str | None = None,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    report: bool = True,
    tell: Tell = say,
) -> Results:
    """Runs what is missing of a study and says what came of it.

    A script calls this below ``if __name__ == "__main__":``, as its runs have processes of their own.

    Args:
        path: its file, or its folder.
        overrides: laid over it, ``"seeds=[0]"`` or ``"base.train.max_steps=100"``.
        out: its folder; by default ``runs/<name>``.
        only: a part of a run's name, or a pattern of it.
        jobs: runs at a time, by default the study's ``launch.jobs``; given the ``devices`` in turn (by default every
            GPU, if several run at a time).

    Raises:
        SparsekitError: a mistake of the user's, in one line.
    """
    plan = expand(load_study(path, overrides, out))
    run(plan, chosen_runs(plan, only), jobs or plan.study.spec.launch.jobs, devices, tell)
    return finish(plan, report)


def run(plan: Plan, runs: Sequence[PlannedRun], jobs: int, devices: Sequence[str], tell: Tell) -> Outcome:
    """Begins or goes on with a study's runs."""
    prepare(plan, runs)
    with writable(plan.study.folder):
        return conduct(plan, runs, jobs, devices, tell)


def prepare(plan: Plan, runs: Sequence[PlannedRun]) -> None:
    """Looks, before anything runs, whether it can be brought to its end; and writes the study down.

    Raises:
        SparsekitError: a package is missing, or a folder holds a run of another spec.
    """
    demand_packages(plan)
    demand_own_runs(list(runs), states_of(plan))
    with writable(plan.study.folder):
        write_json(plan.study.folder / STUDY, resolved(plan))


def report_again(folder: str | Path, out: str | Path | None = None) -> Path:
    """The report of a study's folder, from what is there now.

    Raises:
        SparsekitError: it is no study's folder, no run is trained, or a package is missing.
    """
    plan = expand(load_study(folder))
    results = finish(plan, report=True, out=out)
    if "report" not in results.written:
        raise SparsekitError(f"{folder}: {'; '.join(results.notes) or 'none of its runs is trained yet'}")
    return results.written["report"]


def demand_packages(plan: Plan) -> None:
    """Refuses where what is needed at the end is not installed."""
    for package, what in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise SparsekitError(f"a study's {what} need {package}: pip install 'sparsekit[studies]'")
    if plan.study.spec.evaluate is not None and importlib.util.find_spec("lm_eval") is None:
        raise SparsekitError("evaluate needs the package lm_eval: pip install 'sparsekit[eval]'")


def resolved(plan: Plan) -> dict[str, Any]:
    """The study as JSON that reads no other file."""
    spec = plan.study.spec
    return {**spec.model_dump(mode="json"), "base": dict(plan.base)}


def finish(plan: Plan, report: bool = True, out: str | Path | None = None) -> Results:
    """Collects what is there into the table, compares, judges and draws; also of a study that is not at its end.

    Args:
        out: where the report goes; by default into the study's folder.
    """
    demand_packages(plan)
    folder, states = plan.study.folder, states_of(plan)
    values = table.collect(plan, states)
    comparer = compare.Comparer(plan, values)
    written: dict[str, Path] = {}
    with writable(folder):
        names, lines = table.header(plan), list(table.table(plan, values, states))
        written["table"] = table.write(folder, "table", names, lines)
        written["parquet"] = table.write_parquet(folder, "table", names, lines)
        comparisons = list(comparer.all(compare.measures_of(plan, values)))
        rows = [comparison.row() for comparison in comparisons]
        written["comparisons"] = table.write(
            folder, "comparisons", compare.COLUMNS, [[row[name] for name in compare.COLUMNS] for row in rows]
        )
        claims = [comparer.judge(claim) for claim in plan.study.spec.claims]
        written["claims"] = folder / "claims.json"
        write_json(written["claims"], {"judged": len(claims), "claims": [asdict(claim) for claim in claims]})
        begun = any(state.trained for state in states.values())
        plots, remarks = _drawn(plan, values) if begun else ([], [])
        for plot in plots:
            plot.save(folder / "figures")
        if plots:
            written["figures"] = folder / "figures"
        remarks = [*_remarks(plan, states, len(claims)), *table.not_applicable(plan), *remarks]
        labels = {run.folder.name: {**run.labels, "seed": str(run.seed)} for run in reversed(plan.runs)}
        summary = StudySummary(
            plan.study.name, plan.study.spec.question, plan.study.spec.source, plan_rows(plan, states), labels, rows,
            claims, plots, remarks,
        )  # fmt: skip
        notes = []
        if report:
            try:
                written |= _reported(plan, states, summary, out)
            except SparsekitError as error:  # the numbers are there all the same
                notes.append(f"no report: {error}")
    undone = [run for run in plan.distinct if states[run.folder].missing]
    failed = {run.id: states[run.folder].failed for run in undone if states[run.folder].status == "failed"}
    return Results(summary, written, failed, len(undone), notes)


def plan_rows(plan: Plan, states: Mapping[Path, State]) -> list[dict[str, Any]]:
    """A row for each planned run."""
    return [
        {
            "run": run.id, **run.labels, "seed": run.seed, "status": states[run.folder].status,
            "parameters": run.parameters, "active_parameters": run.active_parameters, "tokens": run.tokens,
            "flops": run.flops,
        }
        for run in plan.runs
    ]  # fmt: skip


def _drawn(plan: Plan, values: table.Values) -> tuple[list[Any], list[str]]:
    from sparsekit.studies.figures import draw

    return draw(plan, values)


def _remarks(plan: Plan, states: Mapping[Path, State], n_claims: int) -> list[str]:
    """What a reader should know of the numbers."""
    runs = plan.distinct
    undone = [run for run in runs if states[run.folder].missing]
    found = []
    if n_claims:
        found.append(
            f"{n_claims} claim{'s were' if n_claims > 1 else ' was'} judged, each at 95%; "
            f"nothing is corrected for their number."
        )
    if len(plan.study.spec.seeds) == 1:
        found.append("One seed: what a seed does cannot be told from what an axis does.")
    if undone:
        failed = [run for run in undone if states[run.folder].status == "failed"]
        more = f", {len(failed)} of them failed" if failed else ""
        found.append(f"{len(undone)} of {len(runs)} runs are not done{more}; the numbers are of the others.")
        reasons: dict[str, list[str]] = {}
        for run in failed:
            reasons.setdefault(states[run.folder].failed, []).append(run.id)
        found += [f"{table.named(ids)} failed: {why}" for why, ids in list(reasons.items())[:5]]
    if len(plan.runs) > len(runs):
        found.append(f"{len(plan.runs) - len(runs)} settings are the same run as another, and were run once.")
    return found


def _reported(
    plan: Plan, states: Mapping[Path, State], summary: StudySummary, out: str | Path | None
) -> dict[str, Path]:
    from sparsekit.reports.build import report

    trained = [run for run in plan.distinct if states[run.folder].trained]
    by_seed = sorted(trained, key=lambda run: plan.study.spec.seeds.index(run.seed))[:MOST_REPORTED]
    kept = {run.folder for run in by_seed}
    folders = [run.folder for run in trained if run.folder in kept]
    target = plan.study.folder / "report.html" if out is None else Path(out)
    return {"report": report(folders, out=target, study=summary)} if folders else {}
