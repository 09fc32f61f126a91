"""From a model to what can be skipped: ``sparsify``, and eval, generate and probe under a sparsifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sparsekit.cli import app, main
from typer.testing import CliRunner

from sparsekit.errors import DataError
from sparsekit.probes.base import Tokens
from sparsekit.probes.cett import read_thresholds
from sparsekit.probes.layered import layered
from sparsekit.probes.results import load
from sparsekit.sparsifiers.base import losses
from sparsekit.sparsifiers.calibration import Calibration
from sparsekit.sparsifiers.report import sparsify, told
from sparsekit.spec.load import validate
from sparsekit.training.run import train

from .models import ids, logits, ours, same, state, theirs

TASKS = Path(__file__).parents[2] / "specs" / "tasks"
TEXT = "it is a truth universally acknowledged, that a single man in possession of a good fortune\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text(TEXT * 100)
    model = {
        "d_model": 32, "n_layers": 2, "vocab_size": 257, "max_seq_len": 64,
        "block": {"attention": {"type": "mha", "n_heads": 4}, "ffn": {"type": "swiglu", "d_ff": 48}},
    }  # fmt: skip
    settings = {
        "max_steps": 6, "micro_batch_size": 4, "schedule": "constant", "callbacks": [], "device": "cpu",
        "optimizer": {"type": "adamw", "lr": 1e-2}, "eval_tokens": 64,
    }  # fmt: skip
    data = {"source": {"type": "text", "path": str(text), "validation_fraction": 0.4}, "seq_len": 32}
    train(validate({"name": "small", "model": model, "data": data, "train": settings}), out=folder / "small")
    return folder / "small"


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


# --- from Python


@pytest.mark.parametrize("make_model", [ours, theirs])
def test_what_is_reported_is_measured(make_model: Any, tmp_path: Path) -> None:
    """Perplexities, sparsity and active neurons, each against a forward of the test's own; on the windows held out."""
    model = make_model()
    before = state(model)
    tokens = ids(8)
    report = sparsify(model, "cett:ppl=0.05", tokens, batch_size=4, out=tmp_path)
    assert same(before, state(model))
    measured, calibrated = tokens[1::2], tokens[::2]
    view = layered(model)

    def perplexity(batch: torch.Tensor) -> float:
        return float(np.exp(losses(view, Tokens.of(batch, 4)).mean()))

    scalars = report.result.scalars
    assert scalars["perplexity_dense"] == pytest.approx(perplexity(measured))
    dense = perplexity(calibrated)
    acts: list[torch.Tensor] = []
    down = view.anatomy(1).down.module
    with Calibration.load(tmp_path).install(model):
        assert scalars["perplexity"] == pytest.approx(perplexity(measured))
        assert report.calibration.meta["perplexity_ratio"] == pytest.approx(perplexity(calibrated) / dense, abs=1e-5)
        handle = down.register_forward_pre_hook(lambda m, args: acts.append(args[0]))
        with torch.no_grad():
            logits(model, measured)
        handle.remove()
    active_BT = (acts[0].view(4, 32, 48) != 0).double().mean(-1)
    assert report.result.matrices["active_neurons"][1] == pytest.approx(active_BT[0].numpy(), abs=0.03)
    assert report.result.per_layer["sparsity_down"][1] == pytest.approx(1 - float(active_BT.mean()), abs=1e-3)
    assert scalars["sparsity"] == pytest.approx(float(report.result.per_layer["sparsity_down"].mean()))
    assert scalars["ffn_speedup"] == pytest.approx(scalars["ffn_us_dense"] / scalars["ffn_us_sparse"])
    assert min(scalars["ffn_us_dense"], scalars["ffn_us_sparse"]) > 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"calibration.json", "thresholds.txt", "report.json", "report.npz", "report.png", "report.svg"} <= names
    thresholds = read_thresholds((tmp_path / "thresholds.txt").read_text(), 3)
    assert thresholds == report.calibration.thresholds(3)
    again = sparsify(model, f"cett:thresholds={tmp_path / 'thresholds.txt'}", tokens, batch_size=4)
    assert again.result.scalars["perplexity"] == scalars["perplexity"]
    assert load(tmp_path / "report.json").matrices["active_neurons"].shape == (3, 32)
    text = told(report)
    count = round(scalars["sparsity"] * 48)
    assert f"cett: {scalars['sparsity']:.1%} of neurons ({count} of 48 a layer) can be skipped at " in text
    assert "searched on other text, where it costs +" in text
    assert "decoding, one token through all feed-forwards: " in text


def test_a_mixture_is_reported_by_what_tokens_visit() -> None:
    mixture = {
        "type": "moe",
        "n_experts": 4,
        "expert": {"type": "swiglu", "d_ff": 24},
        "router": {"type": "top_k", "k": 2},
    }
    between = {"1": {"ffn": {"type": "swiglu", "d_ff": 48}}, "2": {"ffn": {**mixture, "dispatch": "loop"}}}
    report = sparsify(ours(mixture, layers=between), "cats", ids(4))
    assert np.isnan(report.result.per_layer["sparsity_down"]).tolist() == [True, False, True]
    assert np.isnan(report.result.per_layer["sparsity_experts"]).tolist() == [False, True, True]
    assert np.isnan(report.result.matrices["active_neurons"]).all(1).tolist() == [True, False, True]
    share = report.result.scalars["sparsity"]
    text = told(report)
    assert f"cats: {share:.1%} of visited neurons ({share * 48:.0f} of 48 a layer) can be skipped at " in text
    assert "note: layer 2: not masked: its experts run one after the other, not as one grouped product" in text


def test_a_feed_forward_that_is_no_module_has_no_speed() -> None:
    report = sparsify(theirs("opt"), "top_k:k=0.5", ids(4))
    assert "ffn_speedup" not in report.result.scalars
    assert "note: no speed: no layer's feed-forward is a module of its own" in told(report)


def test_another_text_to_calibrate_on() -> None:
    model = ours()
    report = sparsify(model, "teal:sparsity=0.5", ids(4), calibration=ids(6, seed=9))
    assert report.calibration.meta["sequences"] == 6
    assert report.result.meta["sequences"] == 4
    with pytest.raises(DataError) as caught:
        sparsify(model, "teal", ids(1))
    assert str(caught.value) == (
        "data: one sequence cannot be calibrated on and measured; give more text or --calibration"
    )


# --- as a user types it


def test_one_command(run_folder: Path) -> None:
    done = call("sparsify", run_folder, "--sequences", 8, "--seq-len", 32, "--sparsifier", "chess:sparsity=0.5")
    assert done.exit_code == 0
    assert "chess: " in done.stdout and " a layer) can be skipped at " in done.stdout
    assert done.stdout.splitlines()[0].split() == ["layer", "zeros", "at", "down"]
    folder = run_folder / "sparsify" / "chess"
    assert f"written to {folder}; used again with --sparsifier {folder}" in done.stderr
    with safe_open(folder / "calibration.safetensors", "pt") as tensors:
        assert sorted(tensors.keys()) == ["0.down", "1.down"]
    again = call(
        "sparsify", run_folder, "--sequences", 8, "--sparsifier", folder, "--json", "--out", folder.parent / "b"
    )
    assert json.loads(again.stdout)["sparsity"] == pytest.approx(0.5, abs=0.05)


def test_generation_under_a_sparsifier(run_folder: Path) -> None:
    options = ("generate", run_folder, "--prompt", "it is", "--max-new-tokens", 30, "--temperature", 1)
    dense = call(*options).stdout
    nothing = call(*options, "--sparsifier", "cats:sparsity=0")
    assert nothing.stdout == dense
    assert "cats: " in nothing.stderr and "of what is masked is 0 on the calibration text" in nothing.stderr
    assert call(*options, "--sparsifier", "top_k:k=0.03").stdout != dense


def test_probes_under_a_sparsifier(run_folder: Path, tmp_path: Path) -> None:
    options = (
        "--probe",
        "activation_sparsity:metric=nonzero",
        "--sequences",
        4,
        "--seq-len",
        32,
        "--json",
        "--no-plots",
    )
    found = {}
    for share in (0, 0.75):
        sparsifier = ("--sparsifier", f"top_k:sparsity={share}")
        done = call("probe", run_folder, *options, *sparsifier, "--out", tmp_path / str(share))
        found[share] = json.loads(done.stdout)["activation_sparsity"]["activation_ratio"]
    assert found == {0: 1.0, 0.75: pytest.approx(0.25)}


def test_evaluation_under_a_sparsifier(run_folder: Path, tmp_path: Path) -> None:
    """The records of dense and sparse stand beside each other."""
    pytest.importorskip("lm_eval")
    options = ("--tasks", "austen_lambada", "--include-path", TASKS, "--limit", 4, "--json")
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT * 40)
    records = {}
    for way in (None, "cats:sparsity=0", "top_k:k=0.02"):
        sparsifier = () if way is None else ("--sparsifier", way, "--calibration", text)
        done = call("eval", run_folder, *options, *sparsifier)
        records[way] = json.loads(done.stdout[done.stdout.index("{") :])
    perplexities = [record["results"]["austen_lambada"]["perplexity,none"] for record in records.values()]
    assert perplexities[0] == perplexities[1] != perplexities[2]
    assert records["top_k:k=0.02"]["within"] == {
        "name": "top_k", "params": {"k": 0.02, "sparsity": None}, "sparsity": pytest.approx(1 - 1 / 48, abs=1e-4),
    }  # fmt: skip
    assert "within" not in records[None]
    names = {path.name.partition(".")[2] for path in (run_folder / "eval").iterdir()}
    assert names == {f"austen_lambada{end}.json" for end in ("", "+under-cats", "+under-top_k")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sparsifier", "cats:sparsty=0.5"], "sparsifier.sparsty: unknown key"),
        (["--sparsifier", "wena"], "unknown sparsifier 'wena' (did you mean 'wina'?); registered: "),
        (["--sparsifier", "teal:sparsity=1.5"], "sparsifier.sparsity: Input should be less than 1"),
        (["--calibration", "text.txt"], "--calibration: is for a --sparsifier; give one"),
        (["--sparsifier", "not/there"], "not/there: no such calibration; sparsekit sparsify writes one"),
        (["--sparsifier", "cats", "--calibration", "not/there.txt"], "not/there.txt: no such text; give a text file"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "probe"])
def test_mistakes_are_a_line(
    verb: str, arguments: list[str], says: str, run_folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["sparsekit", verb, str(run_folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len([line for line in told if line.startswith("error: ")]) == 1
    assert says in told[-1]
