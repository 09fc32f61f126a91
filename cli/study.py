"""``study``: many runs as one file, from the plan to the verdicts."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json

FIRST, LAST = 10, 3  # rows of a long plan that are shown
STATUSES = ("done", "failed", "begun", "to run", "differs")


def study(
    path: Annotated[
        str, typer.Argument(metavar="STUDY", help="A study's file, or its folder.", show_default=False)
    ],
    plan_only: Annotated[bool, typer.Option("--plan", help="Only shows what would run, and what it costs.")] = False,
    collect: Annotated[bool, typer.Option("--collect", help="Only collects what is there.")] = False,
    overrides: Annotated[
        list[str],
        typer.Option("--set", metavar="PATH=VALUE", help="Changes the study: seeds=[0], base.train.max_steps=100."),
    ] = [],  # noqa: B006 (typer reads it)
    out: Annotated[Path | None, typer.Option(help="Its folder; by default runs/NAME.", show_default=False)] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Runs whose name fits, such as '*seed=0'.", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time on this machine; by default launch.jobs.", show_default=False),
    ] = None,
    devices: Annotated[
        str,
        typer.Option(metavar="NAME,NAME", help="Given to the jobs in turn; by default every GPU.", show_default=False),
    ] = "",
    slurm: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUE,…", help="Queues the runs as a SLURM array: partition=a100,time=120,gpus=1.",
                     show_default=False),
    ] = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Runs what is missing of a study, compares over seeds, and judges its claims."""
    from sparsekit.studies.conduct import chosen_runs
    from sparsekit.studies.plan import expand
    from sparsekit.studies.spec import load_study

    plan = expand(load_study(path, overrides, out))
    runs = chosen_runs(plan, only)
    jobs = jobs or plan.study.spec.launch.jobs
    given = [name for name in (part.strip() for part in devices.split(",")) if name]
    if plan_only:
        _print_plan(plan, jobs, given, as_json)
        gc.freeze()  # else what torch has made is collected as the process ends, which takes half a second
        return
    if slurm is not None:
        _submit(plan, runs, slurm, path)
        return
    from sparsekit.studies.study import finish, run

    stopped = False
    if not collect:
        _tell_what_runs(plan, runs, jobs, given)
        stopped = run(plan, runs, jobs, given, _say).stopped
    results = finish(plan, report=report and not stopped)
    if as_json:
        print(json.dumps(_results_json(results), indent=2))
    else:
        _print_results(results)
    if stopped:
        _say(f"stopped; the same command goes on ({results.missing} of {len(plan.distinct)} runs are missing)")
    if stopped or results.failed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    from sparsekit.studies.conduct import say

    say(line)


def _tell_what_runs(plan: Any, runs: Sequence[Any], jobs: int, devices: Sequence[str]) -> None:
    from sparsekit.studies.conduct import states_of
    from sparsekit.studies.stages import LOG

    states = states_of(plan)
    left = sum(bool(states[run.folder].missing) for run in runs)
    if not left:
        _say(f"{plan.study.name}: {'all ' if len(runs) > 1 else ''}{len(runs)} run{'s' * (len(runs) > 1)} done")
        return
    done = f", {len(runs) - left} done before" if left < len(runs) else ""
    _say(f"{plan.study.name}: {left} run{'s' * (left > 1)} to do{done}; {_time(plan, states, jobs, devices)}")
    _say(f"what each is at: {plan.study.folder / 'RUN' / LOG}")


def _time(plan: Any, states: Any, jobs: int, devices: Sequence[str]) -> str:
    """How long the rest takes, and from what that is reckoned."""
    from sparsekit.studies.conduct import in_words, visible_devices
    from sparsekit.studies.estimate import reckon

    n_devices = max(1, len(set(devices or visible_devices(jobs))), plan.study.spec.launch.nproc)
    told = reckon(plan, states, jobs, n_devices)
    if not told.left:
        return "nothing left to train" if not told.unknown else "the length of its runs is known only when text is read"
    unknown = f", beside {told.unknown} runs whose length is known only when text is read" if told.unknown else ""
    if told.seconds is None:
        return f"{told.left:.3g} FLOPs to train{unknown}; {told.how}"
    return f"about {in_words(told.seconds)} of training ({told.left:.3g} FLOPs{unknown}; {told.how}), probes on top"


def _print_plan(plan: Any, jobs: int, devices: Sequence[str], as_json: bool) -> None:
    from sparsekit.studies.conduct import states_of
    from sparsekit.studies.estimate import reckon
    from sparsekit.studies.study import plan_rows

    spec, states, rows = plan.study.spec, states_of(plan), []
    rows = plan_rows(plan, states)
    if as_json:
        cost = asdict(reckon(plan, states, jobs))
        print(json.dumps({"name": spec.name, "folder": str(plan.study.folder), "cost": cost, "runs": rows}, indent=2))
        return
    statuses = [states[run.folder].status for run in plan.distinct]
    counts = ", ".join(f"{statuses.count(name)} {name}" for name in STATUSES if name in statuses)
    settings = len(plan.runs) // len(spec.seeds)
    same = f", {len(plan.runs) - len(statuses)} of them the same as another" if len(plan.runs) > len(statuses) else ""
    flops = [run.flops for run in plan.distinct if run.flops is not None]
    facts = [("study", spec.name), ("", spec.question)] if spec.question else [("study", spec.name)]
    facts += [
        ("axis" if index == 0 else "", f"{axis.name}: {_shortened([p.label for p in axis.points])}")
        for index, axis in enumerate(plan.axes)
    ]
    facts += [
        ("seeds", _shortened([str(seed) for seed in spec.seeds])),
        ("at the end", ", ".join([*plan.probes, *(spec.evaluate.tasks if spec.evaluate else [])]) or "validation loss"),
        ("claims", str(len(spec.claims))),
        ("runs", f"{len(plan.runs)} ({settings} settings x {len(spec.seeds)} seeds){same}: {counts}"),
        ("FLOPs", f"{sum(flops):.3g} in all" + ("" if len(flops) == len(statuses) else ", as far as known")),
        ("time", _time(plan, states, jobs, devices)),
        ("folder", str(plan.study.folder)),
    ]
    for name, text in facts:
        print(f"{name:12}{text}")
    print()
    shown = rows if len(rows) <= FIRST + LAST + 1 else [*rows[:FIRST], None, *rows[-LAST:]]
    table = [("run", "parameters", "active", "tokens", "FLOPs", "status")]
    for row in shown:
        if row is None:
            table.append((f"… {len(rows) - FIRST - LAST} more", "", "", "", "", ""))
            continue
        tokens = "?" if row["tokens"] is None else f"{row['tokens']:,}"
        flops_told = "?" if row["flops"] is None else f"{row['flops']:.3g}"
        counted = f"{row['parameters']:,}", f"{row['active_parameters']:,}"
        table.append((row["run"], *counted, tokens, flops_told, row["status"]))
    _print_table(table, left=(0, 5))
    differing = [run for run in plan.distinct if states[run.folder].differs]
    for run in differing[:3]:
        print(f"{run.id}: its folder holds a run of another spec ({states[run.folder].differs}); give another --out")


def _shortened(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 12 else f"{', '.join(labels[:8])}, … {labels[-1]} ({len(labels)})"


def _submit(plan: Any, runs: Sequence[Any], options: str, path: str) -> None:
    from sparsekit.studies.slurm import LOGS, submit
    from sparsekit.studies.study import prepare

    prepare(plan, runs)
    queued = submit(plan, runs, options)
    if not queued:
        _say(f"{plan.study.name}: nothing is missing; sparsekit study {path} --collect makes its tables")
        return
    array = str(queued[0].job_id).partition("_")[0]
    _say(f"{plan.study.name}: queued {len(queued)} runs as job {array}; logs in {plan.study.folder / LOGS}")
    _say(f"sparsekit study {path} --plan shows how far they are, --collect makes tables and report of what is there")


def _results_json(results: Any) -> dict[str, Any]:
    return {
        "claims": [asdict(claim) for claim in results.summary.claims],
        "remarks": list(results.summary.remarks),
        "failed": dict(results.failed),
        "missing": results.missing,
        "written": {name: str(path) for name, path in results.written.items()},
        "notes": list(results.notes),
    }


def _print_results(results: Any) -> None:
    for claim in results.summary.claims:
        print(f"{claim.verdict:15} {claim.says}")
        if claim.difference is not None:
            between = "" if claim.low is None else f", 95% [{claim.low:.4g}, {claim.high:.4g}]"
            first, *_, last = claim.found
            seeds = f"{claim.seeds} seed{'s' * (claim.seeds != 1)}"
            print(
                f"{'':15} {claim.measure} along {claim.axis}, claimed: {claim.expected}; "
                f"{last} against {first}: {claim.difference:+.4g}{between}, {seeds}"
            )
            print(f"{'':15} here       {_values(claim.found)}")
            if claim.published:
                print(f"{'':15} published  {_values(claim.published)}{f' ({claim.source})' if claim.source else ''}")
        if len(claim.neighbours) > 1 and len(claim.found) > 1:
            steps = ", ".join(f"{a} to {b} {verdict}" for a, b, verdict in claim.neighbours)
            print(f"{'':15} step by step: {steps}")
        if claim.settings:
            print(f"{'':15} where {', '.join(f'{name} {verdict}' for name, verdict in claim.settings)}")
    if results.summary.claims:
        print()
    for remark in results.summary.remarks:
        print(f"note: {remark}")
    for note in results.notes:
        print(f"note: {note}")
    print("written: " + ", ".join(str(path) for path in results.written.values()))


def _values(found: dict[str, float]) -> str:
    return ", ".join(f"{name}: {value:.4g}" for name, value in found.items())


def _print_table(lines: Sequence[tuple[str, ...]], left: Sequence[int]) -> None:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [f"{c:{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
