"""Training that begins with an imported model, or with another run's; and what hf: stands for on the command line."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sparsekit.cli import app
from typer.testing import CliRunner

from sparsekit.errors import CheckpointError, SparsekitError, SpecError
from sparsekit.interop.importing import import_folder
from sparsekit.model.targets import Run, load_model, resolve
from sparsekit.spec.load import fingerprint, load_spec
from sparsekit.training.run import train
from tests.interop.hf_models import folder

SETTINGS = {
    "data.seq_len": 32, "train.max_steps": 3, "train.micro_batch_size": 2, "train.callbacks": "[]",
    "train.log_every": 1, "train.device": "cpu",
}  # fmt: skip


@pytest.fixture
def imported(tmp_path, tokenizer) -> Path:
    import_folder(str(folder("qwen3", tmp_path / "hf", tokenizer)), tmp_path / "in")
    (tmp_path / "mine.txt").write_text("It was a truth, and it was a fortune, in want of a single man.\n" * 60)
    return tmp_path / "in"


def settings(text: Path, **more: Any) -> list[str]:
    source = json.dumps({"type": "text", "path": str(text)})
    given = {**SETTINGS, "data.source": source, **more}
    return [f"{path}={value}" for path, value in given.items()]


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [*map(str, words)])


def sets(options: list[str]) -> list[str]:
    return [part for option in options for part in ("--set", option)]


def weights(target: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(target).state_dict())


def test_from_a_folder_of_theirs_to_a_folder_of_theirs(imported, tmp_path):
    """The first loss is the imported model's own; the text is read with its tokenizer; it goes back as its family."""
    options = sets(settings(tmp_path / "mine.txt"))
    done = command("train", imported, "--out", tmp_path / "run", *options)
    assert done.exit_code == 0, done.output
    run = Run(tmp_path / "run")
    assert run.spec.init_from == str(imported)
    assert run.spec.model == resolve(imported).spec.model
    tokenizers = [json.loads((path / "tokenizer.json").read_text()) for path in (imported, run.folder)]
    assert tokenizers[0] == tokenizers[1]

    fresh = train(load_spec(run.spec.model_dump(mode="json") | {"init_from": None}), out=tmp_path / "fresh")
    still = [f"init_from={imported}", *settings(tmp_path / "mine.txt", **{"train.optimizer.lr": 1e-9})]
    (tmp_path / "still.json").write_text("{}")
    there = train(load_spec({"init_from": str(imported)}, still), out=tmp_path / "still")
    before, after = weights(imported), weights(there.folder)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert there.metrics[0]["loss"] == run.metrics[0]["loss"]
    assert abs(fresh.metrics[0]["loss"] - run.metrics[0]["loss"]) > 0.1
    moved = weights(run.folder)
    assert any(not torch.allclose(before[name], moved[name], atol=1e-6) for name in before)

    done = command("export", run.folder, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen3"
    kept = load_file(tmp_path / "out/model.safetensors")["model.norm.weight"]
    assert torch.equal(kept, moved["norm.weight"])


def test_it_goes_on_where_it_stopped(imported, tmp_path):
    """Also once the folder it began with is gone; as a run in one go does, bit for bit."""
    longer = {"train.max_steps": 4, "train.schedule.type": "constant"}
    text = tmp_path / "mine.txt"
    whole = train(load_spec({"init_from": str(imported)}, settings(text, **longer)), out=tmp_path / "whole")
    short = {**longer, "train.max_steps": 2}
    train(load_spec({"init_from": str(imported)}, settings(text, **short)), out=tmp_path / "parts")
    shutil.rmtree(imported)
    done = command("train", tmp_path / "parts", "--set", "train.max_steps=4")
    assert done.exit_code == 0, done.output
    one, two = weights(whole.folder), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_begins_with_another_run_and_keeps_its_tokenizer(tmp_path):
    """One that was learnt from the first text is not learnt anew from the second."""
    for name, words in (("first", "alpha beta gamma delta "), ("second", "one two three four five ")):
        (tmp_path / f"{name}.txt").write_text(f"{words}\n" * 100)
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 16}}
    model = {"d_model": 16, "n_layers": 2, "vocab_size": 300, "max_seq_len": 32, "block": block}
    spec = {"model": model, "data": {"tokenizer": {"type": "bpe", "vocab_size": 270}}}
    first = train(load_spec(spec, settings(tmp_path / "first.txt")), out=tmp_path / "first")
    begun = load_spec({"init_from": str(first.folder)}, settings(tmp_path / "second.txt"))
    second = train(begun, out=tmp_path / "second")
    one, two = (json.loads((run.folder / "tokenizer.json").read_text()) for run in (first, second))
    assert one == two
    another = {"init_from": str(first.folder), "data": {"tokenizer": {"type": "bpe", "vocab_size": 265}}}
    third = train(load_spec(another, settings(tmp_path / "second.txt")), out=tmp_path / "third")
    assert json.loads((third.folder / "tokenizer.json").read_text()) != one


def test_a_spec_of_before_has_the_fingerprint_it_had(tiny):
    spec = load_spec(tiny(vocab_size=257))
    told = {k: v for k, v in spec.model_dump(mode="json").items() if k not in ("name", "packages", "init_from")}
    assert fingerprint(spec) == hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert fingerprint(spec) != fingerprint(spec.model_copy(update={"init_from": "x"}))


def test_mistakes(imported, tmp_path, tiny):
    with pytest.raises(SpecError, match=r"init_from: nowhere: is neither a run nor a checkpoint \(it holds no spec"):
        load_spec({"init_from": "nowhere"})
    told = "init_from: hf:x: bring it in first: sparsekit import hf:x FOLDER; then give FOLDER"
    with pytest.raises(SpecError, match=told):
        load_spec({"init_from": "hf:x"})
    spec = load_spec({"init_from": str(imported), "model": tiny(vocab_size=300)}, settings(tmp_path / "mine.txt"))
    with pytest.raises(CheckpointError, match="is it a checkpoint of another spec"):
        train(spec, out=tmp_path / "other")
    gone = spec.model_copy(update={"init_from": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        train(gone, out=tmp_path / "another")
    shard = next((imported / "weights").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    spec = load_spec({"init_from": str(imported)}, settings(tmp_path / "mine.txt"))
    with pytest.raises(CheckpointError, match="model.safetensors"):
        train(spec, out=tmp_path / "third")


# --- hf: on the command line


def test_their_folder_as_a_target(tmp_path, tokenizer, monkeypatch):
    there = folder("gpt2", tmp_path / "hf", tokenizer)
    import_folder(str(there), tmp_path / "in")
    one, two = (json.loads(command("describe", path, "--json").stdout) for path in (f"hf:{there}", tmp_path / "in"))
    assert one["parameters"] == two["parameters"]
    assert (
        json.loads(command("validate", f"hf:{there}", "--json").stdout)["model"]
        == json.loads((tmp_path / "in/spec.json").read_text())["model"]
    )
    asked = ["--prompt", "It is", "--max-new-tokens", 5, "--temperature", 0]
    assert command("generate", f"hf:{there}", *asked).stdout == command("generate", tmp_path / "in", *asked).stdout
    for verb in (["train"], ["export", tmp_path / "out"]):
        done = command(verb[0], f"hf:{there}", *verb[1:])
        assert isinstance(done.exception, SparsekitError)
    assert not (tmp_path / "out").exists()


def test_a_family_that_is_not_known(tmp_path):
    there = folder("llama", tmp_path / "hf")
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    with pytest.raises(CheckpointError) as error:
        import_folder(str(there), tmp_path / "in")
    told = str(error.value)
    assert told.startswith(
        f"hf:{there}: model type 'lama' is not known (did you mean 'llama'?); known: sparsekit, llama,"
    )
    assert told.endswith("; sparsekit probe and eval take the folder as it is")
