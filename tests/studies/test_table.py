"""What is collected of runs, and the figures that show it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from typing import Any

import pyarrow.parquet
import pytest

from sparsekit.reports.plots import LinesPicture, Plot
from sparsekit.studies import table
from sparsekit.studies.conduct import states_of
from sparsekit.studies.figures import draw
from sparsekit.studies.plan import Plan, PlannedRun
from sparsekit.studies.stages import Stage, note_done, note_failed, stages, state
from sparsekit.studies.study import finish

from .conftest import HEADS, LAYERS

Planned = Callable[..., Plan]
Done = Callable[..., None]


def told(run: PlannedRun) -> dict[str, Any]:
    """What a run of those heads and that seed says; layer l has 1 + l."""
    heads, n = int(run.labels["n_kv_heads"]), run.resolved["model"]["n_layers"]
    value = heads + run.seed / 10
    rows = [
        {"step": step, "tokens": 64 * step, "loss": value / step, "tokens_per_second": 3.14, "memory_resident_gib": 1.0,
         "mfu": 0.5, "data_wait": 0.1, "grad_norm": None,
         **{f"variance/resid/layer_{layer}": value * step * (1 + layer) for layer in range(n)}}
        for step in (3, 6)
    ]  # fmt: skip
    rows[-1] |= {"val_loss": value, "val_bits_per_byte": 1.5, "novel_loss": 2.0}
    return {
        "rows": rows, "scalars": {"mean": value, "undefined": None}, "intervals": {"mean": [value - 1, value + 1]},
        "per_layer": {"resid": [value * (1 + layer) for layer in range(n - 1)] + [None]},
    }  # fmt: skip


def lines_of(plan: Plan) -> list[dict[str, str]]:
    with (plan.study.folder / "table.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_the_table_says_what_the_runs_say(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    plan = planned(raw)
    done(plan, told)
    results = finish(plan, report=False)
    rows = lines_of(plan)
    first = [row for row in rows if row["run"] == plan.runs[0].id]
    found = {(row["measure"], row["layer"]): (row["value"], row["low"], row["high"]) for row in first}
    assert found == {
        ("train/loss", ""): (repr(4.0 / 6), "", ""),
        ("train/variance/resid", "0"): ("24.0", "", ""),
        ("train/variance/resid", "1"): ("48.0", "", ""),
        ("val_loss", ""): ("4.0", "", ""),
        ("val_perplexity", ""): (repr(math.exp(4.0)), "", ""),
        ("val_bits_per_byte", ""): ("1.5", "", ""),
        ("novel_loss", ""): ("2.0", "", ""),
        ("novel_perplexity", ""): (repr(math.exp(2.0)), "", ""),
        ("variance/mean", ""): ("4.0", "3.0", "5.0"),
        ("variance/resid", "0"): ("4.0", "", ""),
    }
    assert {(row["n_kv_heads"], row["seed"], row["status"], row["step"], row["tokens"]) for row in first} == {
        ("4", "0", "done", "6", "384")
    }
    assert {int(row["parameters"]) for row in first} == {plan.runs[0].parameters}
    assert results.missing == 0
    typed = pyarrow.parquet.read_table(plan.study.folder / "table.parquet").to_pylist()
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in typed] == rows


def test_runs_that_are_missing_or_failed_have_a_row(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    plan = planned(raw)
    done(plan, lambda run: told(run) if run.seed == 0 else {})
    note_failed(plan.runs[3].folder, "step 3: training has diverged")
    results = finish(plan, report=False)
    rows = {row["run"]: row for row in lines_of(plan) if row["seed"] == "1"}
    assert [(row["status"], row["measure"], row["value"]) for row in rows.values()] == [
        ("missing", "", ""),
        ("failed", "", ""),
    ]
    assert results.failed == {plan.runs[3].id: "step 3: training has diverged"}
    assert "2 of 4 runs are not done, 1 of them failed; the numbers are of the others." in results.summary.remarks
    assert f"{plan.runs[3].id} failed: step 3: training has diverged" in results.summary.remarks


def test_of_a_study_without_runs_only_the_reason_is_told(raw: dict[str, Any], planned: Planned) -> None:
    raw["figures"] = [{"type": "by_axis", "measures": ["val_loss"]}]
    plan = planned(raw)
    for run in plan.runs[:2]:
        note_failed(run.folder, "no such text")
    note_failed(plan.runs[2].folder, "diverged")
    *_, counted, both, one = finish(plan).summary.remarks
    assert counted == "4 of 4 runs are not done, 3 of them failed; the numbers are of the others."
    assert both == f"{plan.runs[0].id} and 1 more run failed: no such text"
    assert one == f"{plan.runs[2].id} failed: diverged"


def test_the_table_knows_neither_times_nor_places(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    plan = planned(raw)
    done(plan, told)
    finish(plan, report=False)
    text = (plan.study.folder / "table.csv").read_text()
    assert not any(word in text for word in ("second", "mfu", "data_wait", "memory", str(plan.study.folder)))


def test_evaluations_have_intervals_of_their_standard_error(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    plan = planned(raw | {"evaluate": {"tasks": ["austen_arc"]}}, "seeds=[0]")
    done(plan, told)
    stage = stages(plan)[-1]
    assert stage.name == "eval austen_arc"
    path = plan.runs[0].folder / "eval.json"
    scores = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 0.25, "em_stderr,strict": "N/A"}
    path.write_text(json.dumps({"results": {"austen_arc": scores}}))
    note_done(plan.runs[0].folder, stage, path)
    found = {v.measure: v for v in table.collect(plan, states_of(plan))[plan.runs[0].folder] if "eval" in v.measure}
    assert set(found) == {"eval/austen_arc/acc", "eval/austen_arc/em,strict"}
    acc = found["eval/austen_arc/acc"]
    assert (acc.value, acc.low, acc.high) == (0.5, pytest.approx(0.304004, abs=1e-6), pytest.approx(0.695996, abs=1e-6))
    assert found["eval/austen_arc/em,strict"].low is None


def test_a_layer_is_named_from_either_end() -> None:
    values = table.by_name(
        [table.Value("v", layer, float(layer)) for layer in range(4)] + [table.Value("v", None, 9.0)]
    )
    names = ("v", "v[0]", "v[-1]", "v[-4]", "v[-5]", "v[4]")
    found = [table.lookup(values, name) for name in names]
    assert [None if value is None else value.value for value in found] == [9.0, 0.0, 3.0, 0.0, None, None]
    assert table.lookup(values, "w[0]") is None


def test_what_was_asked_otherwise_is_not_done(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    plan = planned(raw)
    done(plan, told)
    run = plan.runs[0]
    for change, missing in (
        ({}, []),
        ({"probes": ["variance", "moments"]}, ["probe moments"]),
        ({"probes": []}, []),
        ({"probe_on": {"sequences": 5, "seq_len": 16}}, ["probe variance"]),
        ({"evaluate": {"tasks": ["a", "b"]}}, ["eval a", "eval b"]),
        ({"probes": ["variance", "variance"]}, ["probe variance-2"]),
    ):
        now = state(run, stages(planned(raw | change)))
        assert [stage.name for stage in now.missing] == missing
    (run.folder / "probes/variance-step-00000006.json").unlink()
    assert [stage.name for stage in state(run, stages(plan)).missing] == ["probe variance"]
    (run.folder / ".study/done.json").write_text("{")
    assert [stage.name for stage in state(run, stages(plan)).missing] == ["train", "probe variance"]


def test_what_a_probe_could_not_look_at_is_told_once(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    plan = planned(raw)
    done(plan, lambda run: {"val_loss": 1.0, "meta": {"not_applicable": "no experts"} if run.seed else {}})
    ids = [run.id for run in plan.runs if run.seed]
    assert table.not_applicable(plan) == [f"variance: not applicable: no experts ({ids[0]} and 1 more run)"]


# --- figures


def drawn(plan: Plan) -> tuple[dict[str, LinesPicture], list[str]]:
    plots, remarks = draw(plan, table.collect(plan, states_of(plan)))
    assert all(isinstance(plot, Plot) for plot in plots)
    return {plot.name: plot.picture for plot in plots if isinstance(plot.picture, LinesPicture)}, remarks


def test_by_axis_shows_means_seeds_and_the_paired_interval(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"], raw["seeds"] = {HEADS: [4, 1], LAYERS: [2, 3]}, [0, 1, 2]
    raw["figures"] = [{"type": "by_axis", "measures": ["val_loss", "variance/resid[0]", "nothing"]}]
    plan = planned(raw)

    def noisy(run: PlannedRun) -> dict[str, Any]:
        found = told(run)
        found["rows"][-1]["val_loss"] += 0.01 * run.seed**2 * int(run.labels["n_kv_heads"])
        return found

    done(plan, noisy)
    pictures, remarks = drawn(plan)
    assert remarks == ["figures.0: no run has the measure nothing"]
    picture = next(p for name, p in pictures.items() if "val_loss" in name)
    assert len(pictures) == 2
    assert [line.label for line in picture.lines] == ["n_layers 2", "n_layers 3"]
    assert picture.ticks == {4.0: "4", 1.0: "1"}
    line = picture.lines[0]
    means = {h: sum(h + s / 10 + 0.01 * s**2 * h for s in range(3)) / 3 for h in (4, 1)}
    assert list(line.x) == [1.0, 4.0]
    assert list(line.y) == pytest.approx([means[1], means[4]])
    marks = sorted((float(h), h + s / 10 + 0.01 * s**2 * h) for h in (4, 1) for s in range(3))
    assert [x for x, _ in sorted(line.marks)] == [x for x, _ in marks]
    assert [y for _, y in sorted(line.marks)] == pytest.approx([y for _, y in marks])
    from scipy import stats

    test = stats.ttest_rel([1 + 0.01 * s**2 for s in range(3)], [4 + 0.04 * s**2 for s in range(3)])
    low, high = test.confidence_interval(0.95)
    assert line.low is not None
    assert line.high is not None
    assert (line.low[0], line.high[0]) == pytest.approx((means[4] + low, means[4] + high))
    assert (line.low[1], line.high[1]) == pytest.approx((means[4], means[4])), "against itself there is nothing to tell"


def test_published_values_stand_beside_as_parts_of_the_first(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["claims"] = [
        {"says": "s", "measure": "val_loss", "axis": HEADS, "direction": "falls", "published": {"16": 8.0, "1": 2.0}}
    ]
    raw["figures"] = [{"type": "by_axis", "measures": ["val_loss"]}]
    plan = planned(raw)
    done(plan, told)
    pictures, _ = drawn(plan)
    here, published = next(p for name, p in pictures.items() if "published" in name).lines
    assert (list(published.x), list(published.y)) == ([1.0, 16.0], [0.25, 1.0])
    assert list(here.x) == [1.0, 4.0]
    assert list(here.y) == pytest.approx([1.05 / 4.05, 1.0])


def test_along_training_has_the_mean_and_the_spread_of_seeds(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["figures"] = [
        {"type": "along_training", "metric": "variance/resid", "layer": -1},
        {"type": "along_training", "metric": "variance/resid"},
        {"type": "along_training", "metric": "variance/mean"},
    ]
    plan = planned(raw)
    done(plan, told)
    pictures, remarks = drawn(plan)
    layers = next(p for name, p in pictures.items() if name.startswith("1-")).lines
    assert [line.label for line in layers] == ["n_kv_heads 4", "n_kv_heads 1"]
    assert list(layers[0].x) == [192.0, 384.0]
    assert list(layers[0].y) == pytest.approx([4.05 * 3 * 2, 4.05 * 6 * 2])
    assert layers[0].low is not None
    assert list(layers[0].low) == pytest.approx([4.0 * 3 * 2, 4.0 * 6 * 2])
    (probed,) = {tuple(line.x) for line in pictures["3-variance-mean-along-training"].lines}
    assert probed == (384.0,), "what is not in metrics.jsonl is read from the probe's own files"
    assert [text.partition(":")[0] for text in remarks] == ["figures.1"]
    assert "give its layer" in remarks[0]


def test_per_layer_has_a_line_for_each_variant(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"] = {LAYERS: [3, 5], HEADS: [4]}
    raw["figures"] = [{"type": "per_layer", "measures": ["variance/resid", "train/variance/resid", "variance/none"]}]
    plan = planned(raw)
    done(plan, told)
    pictures, remarks = drawn(plan)
    found = {line.label: (list(line.x), list(line.y)) for line in pictures["1-variance-resid-per-layer"].lines}
    assert found["n_layers 3, n_kv_heads 4"] == ([0.0, 1.0], pytest.approx([4.05, 8.1]))
    assert found["n_layers 5, n_kv_heads 4"] == ([0.0, 1.0, 2.0, 3.0], pytest.approx([4.05, 8.1, 12.15, 16.2]))
    assert pictures["1-train-variance-resid-per-layer"].order == (
        "n_layers 3, n_kv_heads 4",
        "n_layers 5, n_kv_heads 4",
    )
    assert remarks == ["figures.0: no run has the measure variance/none by layers"]


def test_a_study_without_axes_has_nothing_to_compare(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"] = {}
    raw["figures"] = [
        {"type": "by_axis", "measures": ["val_loss"]},
        {"type": "per_layer", "measures": ["variance/resid"]},
    ]
    plan = planned(raw)
    assert [run.id for run in plan.runs] == ["seed=0", "seed=1"]
    done(plan, lambda run: {"val_loss": 1.0, "per_layer": {"resid": [1.0, 2.0]}})
    results = finish(plan, report=False)
    assert results.summary.comparisons == []
    assert [
        plot.picture.lines[0].label for plot in results.summary.figures if isinstance(plot.picture, LinesPicture)
    ] == ["all seeds"]
    assert "figures.0: the study has no axes; nothing to draw against" in results.summary.remarks


def test_a_stage_is_named_by_what_it_does() -> None:
    stage = Stage("probe permutation-2", {"probe": {"type": "permutation"}})
    assert (stage.kind, stage.of) == ("probe", "permutation-2")
