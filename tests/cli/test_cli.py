"""The command line as a user meets it, judged by what it prints and exits with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from sparsekit.cli import main

from sparsekit import describe, load_spec

ROOT = Path(__file__).parents[2]
SPECS = sorted(p for p in (ROOT / "specs").rglob("*.json") if p.parent.name != "studies")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in this process: what it prints and exits with, as a shell would see it."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(unittest.mock.patch.object(sys, "argv", ["sparsekit", *arguments]))
        try:
            main()
        except SystemExit as exit:
            code = exit.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def tell(*arguments: str, cwd: Path | None = None) -> str:
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 30)
    return {
        "model": {
            "d_model": 16, "n_layers": 2, "vocab_size": 257, "max_seq_len": 16,
            "block": {
                "attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2},
                "ffn": {"type": "moe", "n_experts": 4, "router": {"k": 2}, "expert": {"type": "swiglu", "d_ff": 8}},
            },
        },
        "data": {"source": {"type": "text", "path": str(tmp_path / "a.txt")}},
        "train": {"max_steps": 3, "micro_batch_size": 2, "callbacks": ["progress", "tensorboard"]},
    }  # fmt: skip


def write(folder: Path, spec: Any) -> str:
    path = folder / "spec.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return str(path)


# ---- what needs no torch ----


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["train", "--help"]])
def test_no_torch_for_help_and_list(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom sparsekit.cli import main\nsys.argv = ['sparsekit', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_verb() -> None:
    text = tell("--help")
    for verb in ("describe", "validate", "train", "generate", "list", "show", "schema"):
        assert verb in text


def test_list() -> None:
    entries = json.loads(tell("list", "--json"))
    assert set(entries[0]) == {"kind", "name", "summary", "source", "owner"}
    assert {"mha", "gqa", "mqa"} <= {e["name"] for e in entries if e["kind"] == "attention"}
    assert all(e["summary"] for e in entries)
    assert {e["kind"] for e in json.loads(tell("list", "ffn", "--json"))} == {"ffn"}
    assert "swiglu" in tell("list", "ffn")
    assert tell("list", "--check") == "no plug-in is installed\n"
    lines = tell("list").splitlines()
    assert lines[lines.index("sparsifier") + 1].split()[0] == "cats"
    assert tell("--version") == f"sparsekit {importlib.metadata.version('sparsekit')}\n"


def test_show() -> None:
    text = tell("show", "attention", "gqa")
    assert "n_kv_heads" in text and "required" in text and "arXiv 2305.13245" in text
    told = json.loads(tell("show", "router", "top_k", "--json"))
    assert {p["name"]: p["required"] for p in told["parameters"]}["k"] is True


def test_show_a_section_of_a_spec() -> None:
    text = tell("show", "train")
    assert text.startswith("train, a section of a spec\n\nHow a model is trained.")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in text.partition("parameters\n")[2].splitlines()}
    assert rows["checkpoint_every"] == "int (> 0) | 'auto' | null = \"auto\""
    assert rows["keep"] == 'KeepSpec = {"last": 2, "every": null, "best": true}'
    assert rows["callbacks"].startswith("list of slot callback = [")
    told = json.loads(tell("show", "keep", "last", "--json"))
    assert told["parameters"] == [{"name": "last", "type": "int (> 0)", "required": False, "default": 2}]
    for section in ("run", "model", "block", "data", "parallel", "streaming", "batch_ramp", "statistics"):
        assert tell("show", section)
    refused("show", "train", "checkpont", says="train: unknown field 'checkpont' (did you mean 'checkpoint_every'?)")
    refused("show", "ffn", says="show ffn: give one of its names (sparsekit list ffn), or a section of a spec: run, ")


# ---- specs ----


def test_describe_is_the_same_table_from_python() -> None:
    path = ROOT / "specs/runs/tiny.json"
    assert tell("describe", str(path)) == f"{describe(load_spec(path))}\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ['model.block.ffn.router={"type": "expert_choice"}'],
            "model.allow_leak: layers.0.ffn.router is not causal, so the loss would mean nothing; set it to true",
        ),
        (
            ['model.block.ffn={"type": "swiglu", "d_ff": 8}', "parallel.expert=2"],
            "parallel.expert: the model has no experts to divide; leave it at 1",
        ),
    ],
)
def test_validate_refuses_what_training_would(
    small: dict[str, Any], tmp_path: Path, changes: list[str], says: str
) -> None:
    path = write(tmp_path, small)
    assert "valid" in tell("validate", path)
    refused("validate", path, *(part for change in changes for part in ("--set", change)), says=says)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_spec(path: Path) -> None:
    resolved = json.loads(tell("validate", str(path), "--json"))
    assert ("d_model" in resolved) == (path.parent.name == "models")
    told = json.loads(tell("describe", str(path), "--json"))
    assert told["parameters"] >= told["active_parameters"] > 0


def test_resolved_spec_is_a_fixed_point(tmp_path: Path) -> None:
    first = tell("validate", str(ROOT / "specs/runs/tiny.json"), "--json")
    assert tell("validate", write(tmp_path, first), "--json") == first


def test_reference_counts() -> None:
    """[CoD]'s table, to the last parameter."""
    for name, parameters, active in (
        ("dense_1b", 1_279_854_592, 1_279_854_592),
        ("dense_400m", 475_448_832, 475_448_832),
        ("moe_400m_2b", 1_983_996_672, 398_549_760),
        ("moe_1b_7b", 7_982_644_320, 1_238_989_920),
        ("moe_2b_13b", 13_361_547_264, 2_087_258_112),
    ):
        told = json.loads(tell("describe", str(ROOT / f"specs/runs/{name}.json"), "--json"))
        assert (told["parameters"], told["active_parameters"]) == (parameters, active), name


def test_schema_accepts_what_is_valid_and_rejects_what_is_not() -> None:
    schema = json.loads(tell("schema"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in SPECS:
        problems = [error.message for error in validator.iter_errors(json.loads(path.read_text()))]
        assert problems == [], path
    good = json.loads((ROOT / "specs/models/tiny.json").read_text())
    for where, value in (
        (("block", "attention", "type"), "gpa"),
        (("block", "attention", "n_headz"), 4),
        (("block", "norm"), "rmsnorms"),
        (("block", "ffn", "d_ff"), "wide"),
        (("n_layerz",), 4),
        (("n_layers",), 0),
    ):
        bad = json.loads(json.dumps(good))
        inner = bad
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        assert not validator.is_valid(bad), where


# ---- a user's mistakes: a line each, exit code 2, no traceback ----


def refused(*arguments: str, says: str, lines: int = 1, cwd: Path | None = None) -> None:
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr + done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == lines and "Traceback" not in done.stderr, done.stderr
    assert says in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.block.attention.type=gpa", "model.block.attention: unknown attention 'gpa' (did you mean 'gqa'?)"),
        ("model.block.ffn.routr=top_k", "unknown key 'routr' (did you mean 'router'?)"),
        (
            "model.d_modl=16",
            "model: unknown key 'd_modl' (did you mean 'd_model'?)",
        ),
        ("model.n_layers=two", 'model.n_layers: expected a valid integer, got "two"'),
        ("train.optimizer.lr=NaN", "train.optimizer.lr: expected a finite number, got NaN"),
        ("model.block.attention.n_kv_heads=3", "n_heads (4) is not divisible by n_kv_heads (3)"),
        ("model.block.ffn.router.k=5", "model.block.ffn.router: k (5) is above n_experts (4)"),
        ("model.vocab_size=200", "data.tokenizer: model.vocab_size is 200"),
        ("data.seq_len=32", "data.seq_len: 32 is longer than model.max_seq_len, 16"),
        ("train.global_batch_tokens=100", "train.global_batch_tokens: 100 is not a multiple of"),
        ("train.max_tokens=5", "give one of max_steps, max_tokens, max_epochs"),
        ("nonsense", "--set nonsense: expected path=value"),
    ],
)
def test_spec_mistakes(small: dict[str, Any], tmp_path: Path, override: str, says: str) -> None:
    refused("validate", write(tmp_path, small), "--set", override, says=says)


def test_every_mistake_is_a_line(small: dict[str, Any], tmp_path: Path) -> None:
    small["model"]["d_model"] = "wide"
    small["model"]["block"]["ffn"]["expert"]["d_ff"] = -1
    small["train"]["seed"] = 1.5
    refused("validate", write(tmp_path, small), says="model.block.ffn.expert.d_ff: expected greater than 0", lines=3)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"model": {}, "model": {}}', "stands twice"),
        ('{"extends": "elsewhere.json"}', "elsewhere.json: no such file"),
        ('{"extends": "spec.json"}', "extends itself"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, says: str) -> None:
    refused("validate", write(tmp_path, content), says=says)


def test_missing_files(small: dict[str, Any], tmp_path: Path) -> None:
    refused("train", str(tmp_path / "sepc.json"), says="sepc.json: no such file")
    refused("train", str(tmp_path), says="is neither a run nor a checkpoint")
    refused("list", "fnn", says="unknown kind 'fnn' (did you mean 'ffn'?)")
    refused("show", "ffn", "swigl", says="did you mean 'swiglu'?")
    small["data"]["source"]["path"] = str(tmp_path / "b.txt")
    refused("train", write(tmp_path, small), says="b.txt: no such file (did you mean 'a.txt'?)", cwd=tmp_path)


def test_bad_text(small: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, small)
    (tmp_path / "a.txt").write_text("")
    refused("train", path, says="a.txt: holds no text", cwd=tmp_path)
    (tmp_path / "a.txt").write_bytes(b"fine\nfine\n\xff\xfe")
    refused("train", path, says="not UTF-8 text (byte 10", cwd=tmp_path)


def test_a_mistake_in_a_process_of_its_own(small: dict[str, Any], tmp_path: Path) -> None:
    small["model"]["block"]["ffn"]["type"] = "mo"
    command = [sys.executable, "-m", "sparsekit.cli", "validate", write(tmp_path, small)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: model.block.ffn: unknown ffn 'mo' (did you mean 'moe'?); registered: ")
    assert done.stderr.count("\n") == 1


def test_devices_that_are_not_there(small: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, small)
    for device in ("tpu", *([] if torch.cuda.is_available() else ["cuda"])):
        refused("generate", path, "--device", device, says=f"--device: {device!r} cannot be used (")
        refused("train", path, "--set", f"train.device={device}", says=f"train.device: {device!r} cannot be used (")


def test_folders_that_cannot_be_written(small: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, small)
    refused("train", path, "--out", "/proc/x", says="/proc/x: cannot be written (No such file or directory: /proc/x); ")
    refused("train", path, "--out", path, says=f"{path}: cannot be written (File exists: {path}); give another --out\n")


def test_a_kernel_that_is_not_installed_is_told_before_anything_else(small: dict[str, Any], tmp_path: Path) -> None:
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("it is installed")
    done = run("train", write(tmp_path, small), "--set", "model.block.attention.kernel=flash", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: kernel 'flash' needs the package flash_attn: ")
    assert done.stderr.count("\n") == 1


def test_a_spec_has_no_weights(small: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, small)
    refused("generate", path, says=f"{path}: a spec has no weights; train it first, or give a run's folder")


# ---- the whole way ----


def test_a_bare_model_says_what_it_is_trained_on(small: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, small["model"])
    source = f"data.source={json.dumps(small['data']['source'])}"
    done = run("train", path, "--set", source, "--set", "train.max_steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(
        f"{path}: holds a model alone, to be trained with source text, tokenizer byte, max_steps 1; "
        "--set data.source=…, data.tokenizer=… or train.max_steps=… changes that\n"
    )


def test_train_generate_and_damage(small: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, small)
    done = run("train", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr and "bits/byte" in done.stderr
    folder = tmp_path / "runs" / "spec"
    assert {p.name for p in folder.iterdir()} >= {"spec.json", "metrics.jsonl", "tb", "checkpoints", "tokenizer.json"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "val_loss", "val_bits_per_byte"} <= set(rows[-1])

    for target in (folder, folder / "checkpoints" / "step-00000003"):
        text = tell("generate", str(target), "--prompt", "one two", "--max-new-tokens", "5", "--temperature", "0")
        assert text.startswith("one two")
    assert "parameters" in tell("describe", str(folder))
    refused("generate", str(folder), "--top-k", "0", says="", lines=0)

    # a run's own folder is a target to go on with
    done = run("train", str(folder), "--set", "train.max_steps=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (folder / "checkpoints" / "step-00000005").is_dir()

    refused("train", path, "--set", "model.d_model=32", cwd=tmp_path, says="a checkpoint of another spec")
    refused("train", path, "--resume", "nowhere", cwd=tmp_path, says="nowhere: no such checkpoint")
    newest, older = (folder / "checkpoints" / f"step-{step:08d}" for step in (5, 4))
    weights = max((newest / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("generate", str(newest), says="bytes where")
    done = run("generate", str(folder), "--max-new-tokens", "1")
    assert done.returncode == 0 and done.stderr.endswith(f" were written; passed over for {older}\n")
    done = run("train", path, "--set", "train.max_steps=6", cwd=tmp_path)
    assert done.returncode == 0 and "runs/spec: going on from step 4 (" in done.stderr
