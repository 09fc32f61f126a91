"""What is read of a run's folder is what was written there."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from sparsekit.errors import DataError
from sparsekit.model.accounting import describe
from sparsekit.probes import results
from sparsekit.probes.base import ProbeResult
from sparsekit.reports.costs import Costs, costs_of
from sparsekit.reports.folder import read
from sparsekit.spec.load import load_spec


def test_rows_columns_and_layers(make_run):
    folder = read(make_run(rows=20, layers=3))
    assert [row["step"] for row in folder.rows] == list(range(1, 21))
    rows, values = folder.column("val_loss")
    assert rows.tolist() == [4, 9, 14, 19], "each fifth row was evaluated"
    assert values.tolist() == [folder.rows[row]["val_loss"] for row in rows]
    assert folder.last("val_loss") == folder.rows[-1]["val_loss"]
    assert folder.last("unheard_of") is None
    rows, values = folder.by_layer("variance/resid")
    assert rows.tolist() == [4, 9, 14, 19]
    np.testing.assert_array_equal(values, [[5.0 * 2**l * n for n in (1, 2, 3, 4)] for l in range(3)])  # noqa: E741
    assert folder.by_layer("nothing")[1].shape == (0, 0)
    assert folder.n_layers == 3
    assert f"{folder.ended:%Y-%m-%d}" == "2025-10-09", "of the log, not of now"


def test_a_layer_that_lacks_a_statistic_is_nan(make_run):
    log = make_run(rows=5, layers=3) / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    del rows[4]["density/layer_0"]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.testing.assert_array_equal(read(log.parent).by_layer("density")[1], [[np.nan], [0.5], [0.5]])


def test_layers_past_the_ninth_are_in_order(make_run):
    values = read(make_run(rows=5, layers=12)).by_layer("variance/resid")[1][:, 0]
    assert values.tolist() == [5.0 * 2**layer for layer in range(12)]


def test_a_row_that_a_kill_cut_short_is_left_out(make_run):
    log = make_run(rows=5) / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "loss"')
    assert len(read(log.parent).rows) == 5
    log.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(DataError) as error:
        read(log.parent)
    assert str(error.value) == f"{log}:2: is damaged; mend the line, or remove it"


def test_results_are_those_of_the_probes(make_run):
    folder = make_run(probes=("variance", "causal"))
    large = ProbeResult(
        {"a": float("nan"), "b": 2.0}, {"t": np.array([1.0, np.nan])},
        {"big": np.arange(80.0 * 70).reshape(80, 70), "small": np.eye(2)}, {"a": None, "b": (1.0, 3.0)},
    )  # fmt: skip
    results.save(large, folder / "probes", "similarity-step-00000050", plots=False)
    found = read(folder).probes
    assert list(found) == ["causal", "similarity", "variance"]
    for path in (folder / "probes").glob("*.json"):
        saved = results.load(path)
        told = found[path.stem.partition("-step-")[0]][50]
        np.testing.assert_equal(told.scalars, saved.scalars)
        assert told.intervals == saved.intervals and told.meta == saved.meta
        for group in ("per_layer", "matrices"):
            assert getattr(told, group).keys() == getattr(saved, group).keys()
            for name, values in getattr(saved, group).items():
                np.testing.assert_array_equal(getattr(told, group)[name], values)


def test_steps_of_a_probe_are_in_order_and_results_may_stand_alone(make_run, tmp_path):
    folder = make_run(probes=())
    for step in (100, 20):
        results.save(ProbeResult({"x": float(step)}), folder / "probes", f"variance-step-{step:08d}", plots=False)
    assert list(read(folder).probes["variance"]) == [20, 100]
    results.save(ProbeResult({"x": 1.0}, meta={"layers": 7}), tmp_path / "theirs", "variance", plots=False)
    alone = read(tmp_path / "theirs")
    assert (alone.probes["variance"][-1].scalars, alone.spec, alone.rows, alone.n_layers) == ({"x": 1.0}, {}, [], 7)


def test_mistakes_are_told_in_a_line(make_run, tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path / "nowhere")
    mend = "give that of a run, such as runs/tiny, or of a study that has begun"
    assert str(error.value) == f"{tmp_path}/nowhere: no such folder; {mend}"
    study = tmp_path / "study.json"
    study.write_text("{}")
    with pytest.raises(DataError) as error:
        read(study)
    assert str(error.value) == f"{study}: is no folder; {mend}"
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert str(error.value) == f"{tmp_path}: is a study, which has a page of its own: sparsekit report {tmp_path}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        read(tmp_path / "empty")
    assert str(error.value) == (
        f"{tmp_path}/empty: holds neither a run (spec.json) nor results of probes; give a run's folder"
    )
    folder = make_run()
    (folder / "probes" / "causal-step-00000050.json").write_text('{"scalars": 1')
    with pytest.raises(DataError, match=r"causal-step-00000050\.json: is damaged \(.*\); mend or remove it"):
        read(folder)
    told = {"scalars": [], "intervals": {}, "per_layer": {}, "matrices": {}, "arrays": {}, "meta": {}}
    (folder / "probes" / "causal-step-00000050.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="is not the result of a probe, or is damaged"):
        read(folder)


def test_costs_are_those_of_describe(make_run):
    spec = make_run(layers=2, overrides=["model.block.attention.window=8"]) / "spec.json"
    told = describe(load_spec(spec))
    found = costs_of(json.loads(spec.read_text()))
    assert found == Costs(told.parameters, told.active_parameters, told.training_flops_per_token)
    assert costs_of({}) is None
    assert costs_of({"model": {"block": {"ffn": "of_a_package_that_is_not_here"}}}) is None


def test_folders_are_read_without_torch(make_run):
    folder = make_run()
    code = "import sys; from sparsekit.reports.folder import read; read(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
