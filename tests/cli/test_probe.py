"""``sparsekit probe`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sparsekit.cli import app
from sparsekit.cli.probe import _listed
from typer.testing import CliRunner

SPEC: dict[str, Any] = {
    "d_model": 32, "n_layers": 2, "vocab_size": 257, "max_seq_len": 16,
    "block": {"attention": {"type": "mha", "n_heads": 4}, "ffn": {"type": "swiglu", "d_ff": 48}},
}  # fmt: skip


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SPEC))
    (tmp_path / "text.txt").write_text("it is a truth universally acknowledged\n" * 30)
    return path


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)], catch_exceptions=False)


def test_scalars_as_json_and_files(spec_file: Path, tmp_path: Path) -> None:
    options = ("--data", tmp_path / "text.txt", "--sequences", 4, "--out", tmp_path / "out", "--json", "--no-plots")
    done = call(spec_file, "--probes", "variance,similarity:sample=9,lens=false,contributions", *options)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert list(told) == ["variance", "similarity", "contributions"]
    assert told["variance"]["resid_last"] > 0
    assert (tmp_path / "out" / "similarity.npz").exists()
    again = call(spec_file, "--probe", "variance", "--probe", "similarity:sample=9,lens=false", *options)
    assert json.loads(again.stdout)["similarity"] == told["similarity"]


def test_several_targets_side_by_side(spec_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**SPEC, "init": {"type": "normal", "std": 0.1}}))
    options = (
        "--probe",
        "variance",
        "--data",
        tmp_path / "text.txt",
        "--sequences",
        4,
        "--out",
        tmp_path / "out",
        "--no-plots",
    )
    done = call(spec_file, other, *options, "--json")
    told = json.loads(done.stdout)
    assert list(told) == [str(spec_file), str(other)]
    assert told[str(other)]["variance"]["resid_last"] > told[str(spec_file)]["variance"]["resid_last"]
    table = call(spec_file, other, *options).stdout.splitlines()
    assert table[0].split() == ["target", str(spec_file), str(other)]
    assert table[1].split()[0] == "variance/resid_mean"
    assert (tmp_path / "out" / "other" / "variance.json").exists()


def test_intervals_are_printed_and_results_have_a_place(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call(spec_file, "--probe", "variance", "--data", "text.txt", "--sequences", 4, "--no-plots")
    assert "95% [" in done.stdout
    assert (tmp_path / "probes" / "small" / "variance.json").exists()


def test_a_list_of_probes_keeps_parameters_together() -> None:
    assert _listed("a,b:x=1,y=2,c,d:z=[1]") == ["a", "b:x=1,y=2", "c", "d:z=[1]"]
    assert _listed("") == []
