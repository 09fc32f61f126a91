"""Seed-paired comparisons against scipy's own paired t-test, and what claims come to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from sparsekit.studies import table
from sparsekit.studies.compare import MOST_SETTINGS, Comparer, interval
from sparsekit.studies.conduct import states_of
from sparsekit.studies.plan import Plan
from sparsekit.studies.spec import ClaimSpec

from .conftest import HEADS, LAYERS

Planned = Callable[..., Plan]
Done = Callable[..., None]
NUMBERS = st.floats(-1e3, 1e3, allow_subnormal=False)


def comparer(plan: Plan, done: Done, value: Callable[[Mapping[str, str], int], float | None]) -> Comparer:
    """Of runs whose validation loss is a function of their labels and seed; those of None are not there."""

    def tell(run: Any) -> dict[str, Any]:
        told = value(run.labels, run.seed)
        return {} if told is None else {"val_loss": told}

    done(plan, tell)
    return Comparer(plan, table.collect(plan, states_of(plan)))


def claim(measure: str = "val_loss", axis: str = HEADS, **more: Any) -> ClaimSpec:
    return ClaimSpec.model_validate({"says": "so", "measure": measure, "axis": axis, **more})


@given(st.lists(NUMBERS, min_size=2, max_size=12))
def test_the_interval_is_students(samples: list[float]) -> None:
    mean, low, high = interval(samples)
    wanted = stats.t.interval(0.95, len(samples) - 1, loc=np.mean(samples), scale=stats.sem(samples))
    scale = max(1.0, *map(abs, samples))
    assert mean == pytest.approx(np.mean(samples), abs=1e-9 * scale)
    if stats.sem(samples) > 0:
        assert (low, high) == pytest.approx(wanted, abs=1e-9 * scale, rel=1e-9)


def test_one_sample_has_no_interval() -> None:
    assert interval([3.0]) == (3.0, None, None)


@given(st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_comparison_is_scipys_paired_one(
    raw: dict[str, Any], planned: Planned, done: Done, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 2, 1], LAYERS: [2, 3]}, [0, 1, 5], []
    plan = planned(raw)
    plan = _moved(plan, tmp_path_factory.mktemp("study"))
    drawn = data.draw(st.lists(NUMBERS, min_size=18, max_size=18, unique=True))
    losses = dict(
        zip(((run.labels["n_kv_heads"], run.labels["n_layers"], run.seed) for run in plan.runs), drawn, strict=True)
    )
    found = comparer(plan, done, lambda labels, seed: losses[labels["n_kv_heads"], labels["n_layers"], seed])
    for against, value in itertools.combinations(("4", "2", "1"), 2):
        a, b = (["4", "2", "1"].index(text) for text in (against, value))
        whole = found.compare("val_loss", 0, a, b)
        assert whole is not None
        each = [[np.mean([losses[h, n, s] for n in "23"]) for s in (0, 1, 5)] for h in (against, value)]
        test = stats.ttest_rel(each[1], each[0])
        low, high = test.confidence_interval(0.95)
        assert whole.difference == pytest.approx(np.mean(each[1]) - np.mean(each[0]), abs=1e-9)
        assert (whole.low, whole.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)
        assert (whole.mean_against, whole.mean) == pytest.approx((np.mean(each[0]), np.mean(each[1])), abs=1e-9)
        assert (whole.seeds, whole.pairs, whole.where) == (3, 6, "")
        spread = [np.var([losses[h, n, s] for s in (0, 1, 5)], ddof=1) for h in (against, value) for n in "23"]
        assert whole.seed_sd == pytest.approx(math.sqrt(np.mean(spread)), rel=1e-6)
        held = found.compare("val_loss", 0, a, b, {1: 1})
        assert held is not None
        alone = stats.ttest_rel(*([losses[h, "3", s] for s in (0, 1, 5)] for h in (value, against)))
        assert (held.low, held.high) == pytest.approx(tuple(alone.confidence_interval(0.95)), rel=1e-6, abs=1e-6)
        assert held.where == "n_layers=3"


def _moved(plan: Plan, folder: Path) -> Plan:
    """The same with its runs elsewhere, as an example writes them."""
    from dataclasses import replace

    return replace(plan, runs=tuple(replace(run, folder=folder / run.id) for run in plan.runs))


def test_pairing_takes_out_what_a_seed_does_to_both(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["seeds"], raw["probes"] = list(range(5)), []
    found = comparer(
        planned(raw), done, lambda labels, seed: 10.0 * seed + (0.01 + seed / 1e6) * int(labels["n_kv_heads"])
    )
    step = found.compare("val_loss", 0, 0, 1)
    assert step is not None
    assert step.low is not None
    assert step.high is not None
    assert step.difference == pytest.approx(-0.030006)
    assert step.high - step.low < 2e-5
    assert step.seed_sd == pytest.approx(np.std([0, 10, 20, 30, 40], ddof=1), rel=1e-6)
    assert found.judge(claim(direction="falls")).verdict == "holds"


NOISE = {0: 0.0, 1: 0.002, 2: -0.001}
SHARES = {"4": 1, "2": -1, "1": -2}


@pytest.mark.parametrize(
    ("values", "more", "verdict"),
    [
        ({"4": 1.0, "2": 1.1, "1": 1.2}, {"direction": "rises"}, "holds"),
        ({"4": 1.0, "2": 1.1, "1": 1.2}, {"direction": "falls"}, "reversed"),
        ({"4": 1.0, "2": 9.9, "1": 1.2}, {"direction": "rises"}, "holds"),
        ({"4": 1.0, "2": 1.1, "1": 1.0001}, {"direction": "rises"}, "cannot be told"),
        ({"4": 1.0, "2": 1.1, "1": 1.2}, {"order": ["4", "2", "1"]}, "holds"),
        ({"4": 1.0, "2": 1.1, "1": 1.2}, {"order": [1, 2, 4]}, "reversed"),
        ({"4": 1.0, "2": 1.1, "1": 1.2}, {"order": [1, 2, 4], "direction": "falls"}, "holds"),
        ({"4": 1.0, "2": 9.9, "1": 1.2}, {"order": ["4", "2", "1"]}, "cannot be told"),
    ],
)
def test_verdicts(
    raw: dict[str, Any], planned: Planned, done: Done, values: dict[str, float], more: dict[str, Any], verdict: str
) -> None:
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 2, 1]}, [0, 1, 2], []

    def loss(labels: Mapping[str, str], seed: int) -> float:
        heads = labels["n_kv_heads"]
        return values[heads] + seed + NOISE[seed] * SHARES[heads]

    told = comparer(planned(raw), done, loss).judge(claim(**more))
    assert told.verdict == verdict
    assert told.seeds == 3
    assert told.found == pytest.approx({h: v + 1 + 0.001 / 3 * SHARES[h] for h, v in values.items()})


def test_neighbours_are_told_beside_the_whole(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 2, 1]}, [0, 1, 2], []
    losses = {"4": 1.0, "2": 9.0, "1": 2.0}
    found = comparer(planned(raw), done, lambda labels, seed: losses[labels["n_kv_heads"]] * (1 + seed * 0.01))
    assert found.judge(claim(direction="rises")).neighbours == [("4", "2", "holds"), ("2", "1", "reversed")]


@pytest.mark.parametrize("step", [0.0, 0.25, 1 / 3])
def test_differences_that_are_alike_cannot_tell(raw: dict[str, Any], planned: Planned, done: Done, step: float) -> None:
    """As of a share that moves by one layer: there is no spread to judge by, whatever rounding makes of it."""
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 1]}, [0, 1, 2], []
    found = comparer(planned(raw), done, lambda labels, seed: 0.1 * seed + step * (labels["n_kv_heads"] == "4"))
    told = found.judge(claim(direction="falls"))
    assert told.verdict == "cannot be told (alike with every seed)" or (step == 0 and told.verdict == "cannot be told")
    assert told.difference == pytest.approx(-step)


def test_one_seed_cannot_tell(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["seeds"], raw["probes"] = [0], []
    told = comparer(planned(raw), done, lambda labels, seed: float(labels["n_kv_heads"])).judge(
        claim(direction="falls")
    )
    assert told.verdict == "cannot be told (one seed)"
    assert (told.difference, told.low, told.high) == (-3.0, None, None)


def test_a_claim_of_what_no_run_has(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    told = comparer(planned(raw), done, lambda *_: 1.0).judge(claim("usefulness/usefulness", direction="falls"))
    assert (told.verdict, told.difference, told.seeds) == ("cannot be told (no runs to compare)", None, 0)


def test_only_seeds_with_both_runs_count(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 1], LAYERS: [2, 3]}, [0, 1, 2], []
    lost = {("1", "3", 1)}

    def loss(labels: Mapping[str, str], seed: int) -> float | None:
        place = (labels["n_kv_heads"], labels["n_layers"], seed)
        return (
            None if place in lost else float(labels["n_kv_heads"]) + 100 * seed + 0.1 * seed * int(labels["n_layers"])
        )

    found = comparer(planned(raw), done, loss)
    whole, held = found.compare("val_loss", 0, 0, 1), found.compare("val_loss", 0, 0, 1, {1: 0})
    assert whole is not None
    assert held is not None
    assert (whole.seeds, whole.pairs, whole.difference) == (2, 4, pytest.approx(-3.0))
    assert (held.seeds, held.pairs) == (3, 3)


def test_a_setting_that_never_came_to_an_end_is_left_out(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 1], LAYERS: [2, 3]}, [0, 1], []
    found = comparer(planned(raw), done, lambda labels, seed: None if labels["n_layers"] == "3" else 1.0 + seed)
    whole = found.compare("val_loss", 0, 0, 1)
    assert whole is not None
    assert (whole.seeds, whole.pairs) == (2, 2)
    assert found.compare("val_loss", 1, 0, 1) is None


def test_where_holds_another_axis(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 1], LAYERS: [2, 3]}, [0, 1], []

    def loss(labels: Mapping[str, str], seed: int) -> float:
        return (float(labels["n_kv_heads"]) + 0.01 * seed) ** 2 * (
            1 if labels["n_layers"] == "2" else 0.02 * seed - 1.01
        )

    found = comparer(planned(raw), done, loss)
    averaged, held = found.judge(claim(direction="falls")), found.judge(claim(direction="falls", where={LAYERS: 2}))
    assert averaged.verdict == "cannot be told"
    assert averaged.settings == [("n_layers=2", "holds"), ("n_layers=3", "reversed")]
    assert (held.verdict, held.settings) == ("holds", [])
    assert found.judge(claim(direction="falls", where={"n_layers": "3"})).verdict == "reversed"


def test_all_comparisons_are_there_once(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 2, 1], LAYERS: [2, 3]}, [0, 1], []
    found = list(comparer(planned(raw), done, lambda labels, seed: 1.0 + seed).all(["val_loss"]))
    told = [(c.axis, c.where, c.against, c.value) for c in found]
    heads = [("4", "2"), ("4", "1"), ("2", "1")]
    wanted = [("n_kv_heads", where, a, b) for where in ("", "n_layers=2", "n_layers=3") for a, b in heads]
    wanted += [("n_layers", where, "2", "3") for where in ("", *(f"n_kv_heads={h}" for h in "421"))]
    assert told == wanted


def test_too_many_settings_are_only_averaged(raw: dict[str, Any], planned: Planned, done: Done) -> None:
    rates = [i / 1000 for i in range(1, MOST_SETTINGS + 2)]
    raw["axes"], raw["seeds"], raw["probes"] = {HEADS: [4, 1], "train.optimizer.lr": rates}, [0], []
    found = list(comparer(planned(raw), done, lambda labels, seed: 1.0).all(["val_loss"]))
    assert [c.where for c in found if c.axis == "n_kv_heads"] == [""]
    assert {c.where for c in found if c.axis == "lr"} == {"", "n_kv_heads=4", "n_kv_heads=1"}
