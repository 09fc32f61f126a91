"""``sparsekit tokenize`` as a user meets it, judged by what it prints, exits with and leaves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekit.data.dataset import load_data
from sparsekit.data.shards import ShardWriter, open_shards
from sparsekit.spec.run import DataSpec
from tests.cli.test_cli import run, tell

TEXTS = [f"document number {i} says {'hello ' * (i % 4)}é\n" for i in range(60)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(rows(TEXTS))


def rows(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


def refused(*arguments: str) -> str:
    done = run("tokenize", *arguments)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def tokens(out: str, split: str = "train") -> bytes:
    stream = open_shards(Path(out), split)
    return stream.rows(np.array([0]), len(stream)).tobytes()


def test_what_it_prints_is_what_a_spec_needs() -> None:
    printed = tell("tokenize", "a.jsonl", "--train-bpe", "300", "--out", "set", "--workers", "1")
    train, validation, last = printed.splitlines()
    manifest = json.loads(Path("set/manifest.json").read_text())
    for line, split in ((train, "train"), (validation, "validation")):
        told = manifest["splits"][split]
        numbers = [f"{told[f'n_{what}']:,} {what}" for what in ("tokens", "documents", "bytes")]
        assert line.split() == [split, *" ".join(numbers).split(), "in", "1", "shards"]
    begin, _, data = last.partition('"data": ')
    assert begin == "set: done; train on it with "
    loaded = load_data(DataSpec.model_validate(json.loads(data)))
    assert list(loaded.source.documents("train")) + list(loaded.source.documents("validation")) != []
    assert len(loaded.train[0][0]) == manifest["splits"]["train"]["n_tokens"]
    again = run("tokenize", "a.jsonl", "--train-bpe", "300", "--out", "set", "--workers", "1")
    assert (again.returncode, again.stdout, again.stderr) == (0, printed, ""), "finished, and nothing was done"


def test_progress_tells_tokens_a_second() -> None:
    done = run("tokenize", "a.jsonl", "--tokenizer", "byte", "--out", "set", "--workers", "1")
    n_tokens = sum(len(text.encode()) + 1 for text in TEXTS)
    assert done.stderr.startswith(f"60 documents  {n_tokens:,} tokens  ") and "tokens/s" in done.stderr


def test_what_an_earlier_run_wrote_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ("tokenize", "a.jsonl", "--tokenizer", "byte", "--workers", "1", "--shard-tokens", "300", "--out", "set")

    def write(writer: ShardWriter, name: str, parts: Any) -> Any:
        if name.startswith("train-00002"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(writer, name, parts)

    real = ShardWriter._write
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_write", write)
        assert refused(*shared[1:]) == (
            "set: cannot be written (No space left on device); make room and run the same command again, "
            "or give another --out"
        )
    records = Path("set/journal.jsonl").read_text().splitlines()[1:]
    n_before = sum(json.loads(line)["record"]["n_tokens"] for line in records)
    assert n_before > 0
    done = run(*shared)
    assert done.returncode == 0 and f"  ({n_before:,} tokens were there)" in done.stderr


def test_verify() -> None:
    tell("tokenize", "a.jsonl", "--tokenizer", "byte", "--out", "set", "--workers", "1")
    assert "set: every file is what was written; " in tell("tokenize", "set", "--verify")
    path = Path("set/train-00000.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert refused("set", "--verify") == (
        "set/train-00000.npy: is not what was written (its hash differs); tokenize it anew, or restore the file"
    )


@pytest.mark.parametrize("source", ["d", "d/*.txt", "d/a.txt"])
def test_a_folder_a_glob_and_a_file_are_told_apart_by_suffix(source: str) -> None:
    Path("d").mkdir()
    Path("d/a.txt").write_text("one\n--\ntwo\n--\nthree\n")
    Path("d/notes.md").write_text("not a text of mine")
    Path("v.txt").write_text("two\n")
    arguments = ("--tokenizer", "byte", "--separator", "--", "--validation", "v.txt", "--out", "set", "--workers", "1")
    printed = tell("tokenize", source, *arguments)
    assert "left out                   1 training documents that validation holds too" in printed
    ids = np.frombuffer(tokens("set"), np.uint16)
    assert ids.tolist() == [*b"one\n", 256, *b"three\n", 256]


def test_the_end_of_text_of_a_hugging_face_folder() -> None:
    tell("tokenize", "a.jsonl", "--train-bpe", "300", "--eos-token", "</s>", "--out", "first", "--workers", "1")
    Path("hf").mkdir()
    Path("first/tokenizer.json").rename("hf/tokenizer.json")
    shared = ("a.jsonl", "--tokenizer", "hf", "--workers", "1", "--out")
    assert "'<|endoftext|>' is none of its special tokens; special tokens: '</s>'" in refused(*shared, "none")
    Path("hf/tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    printed = tell("tokenize", *shared, "second")
    assert '"tokenizer": {"type": "bpe", "path": "second/tokenizer.json", "eos_token": "</s>"}' in printed
    assert tokens("first") == tokens("second")


def test_raw_files_are_the_same_tokens_without_a_header() -> None:
    shared = ("tokenize", "a.jsonl", "--tokenizer", "byte", "--workers", "1", "--out")
    tell(*shared, "set")
    printed = tell(*shared, "raw", "--format", "raw")
    assert Path("raw/train-00000.bin").read_bytes() == tokens("set")
    loaded = load_data(DataSpec.model_validate(json.loads(printed.partition('"data": ')[2])))
    assert loaded.train[0][0].n_documents == open_shards(Path("set"), "train").n_documents


def test_a_data_set_of_the_library_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    Path("local").mkdir()
    Path("local/train.jsonl").write_text(rows(TEXTS, "body"))
    shared = ("--tokenizer", "byte", "--workers", "1", "--out")
    told: dict[str, Any] = json.loads(tell("tokenize", "hf:local", "--text-field", "body", "--json", *shared, "set"))
    assert told["settings"]["source"] == {
        "type": "datasets", "path": "local", "config": None, "split": "train", "validation_split": None,
        "field": "body", "skip_blank": True, "validation_fraction": 0.05,
    }  # fmt: skip
    tell("tokenize", "a.jsonl", *shared, "same")
    assert tokens("set") == tokens("same") and tokens("set", "validation") == tokens("same", "validation")


def test_blank_documents_are_told() -> None:
    Path("a.jsonl").write_text(rows([*TEXTS, " ", ""]))
    printed = tell("tokenize", "a.jsonl", "--tokenizer", "byte", "--out", "set", "--workers", "1")
    assert "left out                   2 documents without text" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.jsonl", "--tokenizer", "byte"], "sparsekit tokenize: --out is missing; give a folder for the shards"),
        (["a.jsonl", "--out", "x"], "sparsekit tokenize: give either --tokenizer or --train-bpe"),
        (
            ["a.csv", "--tokenizer", "byte", "--out", "x"],
            "a.csv: no file of a known suffix; known: .txt, .text, .jsonl, .ndjson, .parquet; "
            "or give hf:NAME, or embedded",
        ),
        (
            ["a.jsonl", "--tokenizer", "bite", "--out", "x"],
            "bite: no such tokenizer file (did you mean 'byte'?); "
            "give byte, a tokenizers JSON file or a folder with one",
        ),
        (
            ["a.jsonl", "--tokenizer", "byte", "--out", "x", "--eos", "none"],
            "--eos none: not supported, as training expects an end of text after each document; use end",
        ),
        (
            ["a.jsonl", "--tokenizer", "byte", "--out", "x", "--format", "rwa"],
            "--format rwa: unknown (did you mean 'raw'?); give npy or raw",
        ),
        (
            ["mixed", "--tokenizer", "byte", "--out", "x"],
            "mixed: holds files of several kinds (jsonl, text); give a glob, such as mixed/*.jsonl",
        ),
        (
            ["a.jsonl", "--tokenizer", "byte", "--out", "x", "--max-tokens", "1", "--validation-fraction", "0.0001"],
            "x: the validation split got no documents; raise --max-tokens",
        ),
        (
            ["nope", "--tokenizer", "byte", "--out", "x"],
            "nope: no such file; paths are relative to {here}",
        ),
        (
            ["a.json", "--tokenizer", "byte", "--out", "x"],
            "a.json: no such file (did you mean 'a.jsonl'?); paths are relative to {here}",
        ),
        (
            ["body.jsonl", "--tokenizer", "byte", "--out", "x"],
            "body.jsonl:1 (byte 0): no field 'text'; fields: 'body'; set --text-field",
        ),
        (
            ["a.jsonl", "--tokenizer", "byte", "--out", "/proc/x"],
            "/proc/x: cannot be written (No such file or directory: /proc/x); give another --out",
        ),
        (["nowhere", "--verify"], "nowhere/manifest.json: no such file; give a folder that sparsekit tokenize wrote"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], said: str) -> None:
    Path("mixed").mkdir()
    Path("a.csv").write_text("x")
    Path("body.jsonl").write_text(rows(["one", "two"], "body"))
    for name in ("a.txt", "b.jsonl"):
        Path("mixed", name).write_text("x")
    assert refused(*arguments) == said.replace("{here}", str(Path.cwd()))
