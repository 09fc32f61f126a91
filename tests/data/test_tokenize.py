"""The job writes the ids that ``tokenizers`` gives, in one order, whoever works on it and however often it stops."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data import tokenize as job
from sparsekit.data import word_cache, workers
from sparsekit.data.shards import open_shards, read_manifest, verify_shards
from sparsekit.data.sources import JSONLines, TextFiles
from sparsekit.data.tables import Datasets, Parquet
from sparsekit.data.tokenize import tokenize
from sparsekit.data.tokenizers import BPETokenizer, Tokenizer
from sparsekit.errors import DataError
from sparsekit.spec.slot import Slot

WORDS = [
    *("the", "cat's", "12345", "mats,", "they'LL", "(re)turn;", "naïve", "café", "漢字かな", "😀👩\u200d👧"),
    *("e\u0301", "\xa0\u2003", "<|endoftext|>\r\n\tx", "", "y"),
]
TEXTS = [" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) + f" number {i * 7919}\n" * (i % 3 + 1) for i in range(200)]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(*texts: Any) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def run(out: str, source: Any = None, tokenizer: Any = "byte", **options: Any) -> dict[str, Any]:
    """The job over a.jsonl, which holds TEXTS unless it is there."""
    if source is None:
        source = {"type": "jsonl", "path": "a.jsonl"}
        if not Path("a.jsonl").exists():
            Path("a.jsonl").write_text(rows(*TEXTS))
    slots = Slot("source").validate(source), Slot("tokenizer").validate(tokenizer)
    return tokenize(*slots, Path(out), **{"workers": 1, "shard_tokens": 1500, **options})


def content(folder: str) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}


def decoded(folder: str, split: str = "train") -> list[str]:
    """The documents of a folder of byte tokens."""
    stream = open_shards(folder, split)
    return [bytes(stream.document(i)[:-1].astype(np.uint8)).decode() for i in range(stream.n_documents)]


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the ids are those of tokenizers ----

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_backend(kind: str) -> Any:
    from tokenizers import Regex, models, normalizers, trainers
    from tokenizers import Tokenizer as Backend
    from tokenizers import pre_tokenizers as pre

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=kind == "prefix")
    patterns = {"llama3": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", ""), "own": r"\w+|\W"}
    if kind in patterns:
        split = pre.Split(Regex(patterns[kind]), "isolated")
        backend.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    if kind == "nfc":
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if kind == "added":
        backend.add_tokens(["cat's 1"])
    return backend


BACKENDS = {kind: make_backend(kind) for kind in ("gpt2", "llama3", "qwen2", "own", "nfc", "prefix", "added")}
KNOWN = ("gpt2", "llama3", "qwen2")


def ours(kind: str) -> BPETokenizer:
    tokenizer = BPETokenizer(BPETokenizer.Params(path="unused"))
    tokenizer.restore(json.loads(BACKENDS[kind].to_str()))
    return tokenizer


ENCODERS = {kind: word_cache.encoder(ours(kind)) for kind in BACKENDS}


def test_only_what_is_known_is_cut_by_us() -> None:
    known = [kind for kind in BACKENDS if word_cache._pattern(ours(kind).state()) is not None]
    assert known == list(KNOWN)


SPACES = [*" \n\r\t\v\f\x1c\x1f\x85\xa0\u180e\u2003\u2028\u200b\u3000"]
SIGNS = ["'s", "'S", "'ſ", "'ll", "'", "_", "-", ".", "!?", "\0", "\x7f", "\ufeff", "<|endoftext|>", "cat's 1"]
LETTERS = ["a", "Bc", "ſ", "K", "é", "e\u0301", "漢", "ǅ", "😀", "👩\u200d👧", "\u0378", "\U000e0001"]
NUMBERS = ["1", "23456", "٣", "²", "Ⅷ"]
CHARACTERS = st.sampled_from(SPACES + SIGNS + LETTERS + NUMBERS) | st.characters(exclude_categories=["Cs"])
TEXT = st.lists(CHARACTERS, max_size=24).map("".join)


@pytest.mark.parametrize("kind", BACKENDS)
@given(texts=st.lists(TEXT | st.text(), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_tokenizers(kind: str, texts: list[str]) -> None:
    backend = BACKENDS[kind]
    backend.encode_special_tokens = True
    wanted = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    for _ in range(2):  # the second time every piece is known
        assert [np.frombuffer(ids, np.uint16).tolist() for ids in ENCODERS[kind](texts)] == wanted


def test_a_full_cache_and_long_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MAX_ENTRIES", 20)
    tokenizer = ours("gpt2")
    pieces = word_cache.Pieces(tokenizer.state(), word_cache.GPT2, tokenizer)
    texts = [*TEXTS[:20], "a" * 500, "漢" * 500]
    assert [pieces.encode(t) for t in texts] == [ids.tobytes() for ids in tokenizer.encode_batch(texts)]
    assert len(pieces) == 20 and max(map(len, pieces)) <= word_cache.MAX_LENGTH


def test_a_vocabulary_beyond_16_bits_does_not_wrap() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"<|endoftext|>": 70_000}
    backend = Backend(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save("words.json")
    Path("a.jsonl").write_text(rows("w1 w65535 w65536 w69999", "w65537", "w2 w3"))
    manifest = run("out", tokenizer={"type": "bpe", "path": "words.json"}, source=two_files(["w65537"]))
    stream = open_shards("out", "train")
    assert (manifest["dtype"], stream.dtype) == ("uint32", np.uint32)
    assert stream.rows(np.array([0]), len(stream))[0].tolist() == [1, 65535, 65536, 69999, 70000, 2, 3, 70000]


def two_files(validation: list[str]) -> dict[str, Any]:
    """a.jsonl with a validation file of its own."""
    Path("v.jsonl").write_text(rows(*validation))
    return {"type": "jsonl", "path": "a.jsonl", "validation_path": "v.jsonl"}


# ---- one order, whoever works ----


@pytest.mark.parametrize("tokenizer", ["byte", {"type": "bpe", "vocab_size": 400}])
def test_the_files_do_not_depend_on_the_workers(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", 700)
    one = run("one", tokenizer=tokenizer, workers=1)
    run("three", tokenizer=tokenizer, workers=3)
    assert content("one") == content("three") and len(content("one")) > 12
    train, validation = (
        list(JSONLines(JSONLines.Params(path="a.jsonl")).documents(s)) for s in ("train", "validation")
    )
    assert [one["splits"][s]["n_documents"] for s in ("train", "validation")] == [len(train), len(validation)]
    assert one["splits"]["train"]["n_bytes"] == sum(len(text.encode()) for text in train)
    if tokenizer == "byte":
        assert decoded("one") == train and decoded("one", "validation") == validation
    assert (one["eos"], one["validation_fraction"], one["documents_removed_from_train"]) == ("end", 0.05, 0)
    assert verify_shards("one") == one


def test_a_lone_document_is_cut_as_in_training() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    Path("a.txt").write_text(text)
    run("out", {"type": "text", "path": "a.txt"})
    source = TextFiles(TextFiles.Params(path="a.txt"))
    assert decoded("out") == list(source.documents("train"))
    assert decoded("out") + decoded("out", "validation") == [text[:750], text[750:]]


def test_training_documents_that_validation_holds_are_left_out_and_counted() -> None:
    Path("a.jsonl").write_text(rows("one", "two", "three", "two", "four"))
    manifest = run("out", two_files(["two", "other", "four"]))
    assert (decoded("out"), decoded("out", "validation")) == (["one", "three"], ["two", "other", "four"])
    assert manifest["documents_removed_from_train"] == 3 and manifest["validation_fraction"] is None
    message = error_of(lambda: run("none", two_files(["one", "two", "three", "four"])))
    assert message == (
        "none: the train split got no documents; all 5 of them are validation documents too: give others"
    )


def test_blank_documents_are_counted_where_they_may_be_skipped() -> None:
    Path("a.jsonl").write_text(rows("one", "", "two", " \n", "three", ""))
    source = {**two_files(["v"]), "skip_blank": True}
    assert run("out", source)["blank_documents_skipped"] == 3 and decoded("out") == ["one", "two", "three"]
    message = error_of(lambda: run("other", {**source, "skip_blank": False}))
    assert message == (
        "a.jsonl:2 (byte 16): field 'text' holds no text; fill it or remove the line, or set data.source.skip_blank"
    )


@pytest.mark.parametrize("max_tokens", [1, 700, 1500, 3001])
def test_max_tokens_stops_behind_the_document_that_reaches_it(max_tokens: int) -> None:
    Path("a.jsonl").write_text(rows(*TEXTS))
    texts = [text for text in TEXTS if text != TEXTS[3]]
    manifest = run("out", two_files([TEXTS[3]]), max_tokens=max_tokens)
    lengths = np.cumsum([len(text.encode()) + 1 for text in texts])
    kept = int(np.argmax(lengths >= max_tokens)) + 1
    assert decoded("out") == texts[:kept] and manifest["splits"]["train"]["n_tokens"] == lengths[kept - 1]


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_wrong_behind_the_last_document_needed_does_no_harm(count: int) -> None:
    Path("a.jsonl").write_text(rows("one", "two", 3))
    source = two_files(["v"])
    run("out", source, workers=count, max_tokens=8)
    assert decoded("out") == ["one", "two"]
    seen: list[int] = []
    message = error_of(lambda: run("all", source, workers=count, progress=lambda p: seen.append(p.documents)))
    assert "is a number, not a string" in message and seen[-1] == 3, "what comes before it is encoded first"


# ---- killed, and gone on with ----


class Killed(Exception):
    pass


def stop(*_: Any) -> None:
    raise Killed


def stop_at(document: Any) -> Callable[[Any], None]:
    return lambda progress: stop() if progress.documents == document else None


@pytest.mark.parametrize("options", [{}, {"max_tokens": 22000}, {"tokenizer": {"type": "bpe", "vocab_size": 300}}])
@pytest.mark.parametrize("document", [0, 30, 77, 150, "before the manifest", "after the manifest"])
def test_a_job_that_stops_anywhere_goes_on_to_the_same_files(document: Any, options: Any) -> None:
    whole = run("whole", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        if document == 0:
            patch.setattr(job, "_prepare_tokenizer", stop)
        elif document == "before the manifest":
            patch.setattr(job, "write_json", stop)
        elif document == "after the manifest":
            patch.setattr(job.Journal, "end", stop)
        run("killed", **options, progress=stop_at(document))
    done = Path("killed/journal.jsonl").read_text().count("\n") - 1
    encoded: list[int] = []
    assert run("killed", **options, progress=lambda p: encoded.append(p.documents)) == whole
    assert content("killed") == content("whole")
    if done > 2 and document != "after the manifest":
        assert encoded[0] > 20, "finished shards were encoded again"


def test_killed_by_the_system() -> None:
    """SIGKILL, workers and all: what was journalled stays, nobody is left behind, and the end is the same."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sparsekit.data import tokenize as job, workers\n"
        "from sparsekit.spec.slot import Slot\nimport multiprocessing\n"
        "def slow(p):\n    time.sleep(0.01)\n"
        "    print(*(c.pid for c in multiprocessing.active_children()), flush=True)\n"
        "if __name__ == '__main__':\n    workers.CHUNK_BYTES = 500\n"
        "    source = Slot('source').validate({'type': 'jsonl', 'path': 'a.jsonl'})\n"
        "    job.tokenize(source, Slot('tokenizer').validate('byte'), Path('killed'), workers=2, shard_tokens=1500,"
        " progress=slow)\n"
    )
    Path("slow.py").write_text(code)
    run("whole")
    child = subprocess.Popen([sys.executable, "slow.py"], stdout=subprocess.PIPE, text=True)
    journal = Path("killed/journal.jsonl")
    deadline = time.monotonic() + 20
    while not (journal.exists() and journal.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    told, _ = child.communicate()
    workers = [int(pid) for pid in told.splitlines()[-1].split()]
    assert len(workers) == 2 and not Path("killed/manifest.json").exists()
    (Path("killed") / ".train-00009.npy.123.tmp").write_bytes(b"half")  # what a kill in mid-write leaves
    with journal.open("a") as file:
        file.write('{"split": "tr')
    run("killed")
    assert content("killed") == content("whole")
    while any(map(alive, workers)) and time.monotonic() < deadline + 10:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody asked after does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_that_dies_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_begin_worker", os._exit)  # which takes no such arguments, so a worker cannot begin
    message = error_of(lambda: run("out", workers=2))
    assert message.startswith("a worker process died, perhaps for want of memory; run the same command again to go on")


def test_other_settings_are_refused_with_the_difference() -> None:
    run("out")
    assert error_of(lambda: run("out", shard_tokens=999)) == (
        "out: holds the shards of another job: its shard_tokens is 1500, and this one's 999; "
        "give a new folder as --out, or the same settings"
    )
    before = content("out")
    assert run("out") == read_manifest(Path("out")) and content("out") == before, "the same job again does nothing"
    with Path("a.jsonl").open("a") as file:
        file.write(rows("more"))
    size = Path("a.jsonl").stat().st_size
    assert f'and this one\'s [["a.jsonl", {size}]]' in error_of(lambda: run("out"))


def test_a_started_job_is_not_gone_on_with_by_another() -> None:
    with pytest.raises(Killed):
        run("out", progress=stop_at(60))
    message = error_of(lambda: run("out", max_tokens=5))
    assert message.startswith("out: holds a part of another job: its max_tokens is null, and this one's 5; ")
    next(Path("out").glob("train-00000.npy")).unlink()
    assert error_of(lambda: run("out")).endswith("is not as the job wrote it; remove out and start over")


def test_a_job_that_failed_before_its_first_shard_may_be_changed() -> None:
    Path("a.jsonl").write_text(rows("one", 5))
    assert "is a number, not a string" in error_of(lambda: run("out", tokenizer={"type": "bpe", "vocab_size": 300}))
    Path("a.jsonl").write_text(rows(*TEXTS))
    run("out", tokenizer={"type": "bpe", "vocab_size": 290})
    assert read_manifest(Path("out"))["tokenizer"]["vocab_size"] == 290


def test_a_folder_with_other_things_is_left_alone() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("years of work")
    assert error_of(lambda: run("out")) == ("out: holds thesis.tex and no journal of a job; give a new folder as --out")


def test_a_vocabulary_is_learnt_from_a_bounded_part(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(job, "LEARN_BYTES", 300)
    monkeypatch.setattr(BPETokenizer, "fit", lambda self, documents: given.extend(documents) or genuine(self, given))
    run("out", tokenizer={"type": "bpe", "vocab_size": 300})
    assert 300 <= sum(map(len, given)) < 300 + max(map(len, TEXTS))


genuine: Callable[[Tokenizer, Any], None] = BPETokenizer.fit


# ---- compressed files, Parquet, datasets ----


def zst(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_hold_the_same_documents(suffix: str) -> None:
    Path("d").mkdir()
    data = rows(*TEXTS).encode()
    Path(f"d/a.jsonl{suffix}").write_bytes(PACK[suffix](data[: data.index(b"\n", 999) + 1]))
    Path("d/b.jsonl").write_bytes(data[data.index(b"\n", 999) + 1 :])
    source = JSONLines(JSONLines.Params(path="d"))
    assert sorted([*source.documents("train"), *source.documents("validation")]) == sorted(TEXTS)
    Path(f"t.txt{suffix}").write_bytes(PACK[suffix]("één\n\x1e\ntwee\n".encode()))
    Path("v.txt").write_text("v")
    text = TextFiles(TextFiles.Params(path=f"t.txt{suffix}", validation_path="v.txt", separator="\x1e"))
    assert list(text.documents("train")) == ["één\n", "twee\n"]
    Path(f"bad.jsonl{suffix}").write_bytes(PACK[suffix](data)[:-20])
    message = error_of(lambda: list(JSONLines(JSONLines.Params(path=f"bad.jsonl{suffix}")).documents("train")))
    assert message.startswith(f"bad.jsonl{suffix}: cannot be read: ")


def parquet(name: str, **columns: list[Any]) -> str:
    import pyarrow
    import pyarrow.parquet

    Path(name).parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), name)
    return name


def table_sources(**params: Any) -> list[Any]:
    """A Parquet file and the same as a data set in a local folder."""
    where = {"path": "set/train-0.parquet"}
    return [Parquet(Parquet.Params(**where, **params)), Datasets(Datasets.Params(path="set", **params))]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
def test_tables_split_as_json_lines_do() -> None:
    parquet("set/train-0.parquet", text=TEXTS, number=list(range(len(TEXTS))))
    Path("a.jsonl").write_text(rows(*TEXTS))
    wanted = JSONLines(JSONLines.Params(path="a.jsonl"))
    for source in table_sources():
        for split in ("train", "validation"):
            assert list(source.documents(split)) == list(wanted.documents(split))


@pytest.mark.usefixtures("offline")
def test_a_data_set_with_a_validation_split_becomes_shards() -> None:
    parquet("set/train-0.parquet", body=["one", "two", None, "three"])
    parquet("set/validation-0.parquet", body=["two", "v"])
    source = {"type": "datasets", "path": "set", "field": "body", "validation_split": "validation", "skip_blank": True}
    manifest = run("out", source)
    assert (decoded("out"), decoded("out", "validation")) == (["one", "three"], ["two", "v"])
    assert (manifest["blank_documents_skipped"], manifest["documents_removed_from_train"]) == (1, 1)


@pytest.mark.usefixtures("offline")
def test_what_tables_refuse() -> None:
    parquet("set/train-0.parquet", text=["one", None, "two"], number=[1, 2, 3])
    for source in table_sources():
        assert ": row 1: field 'text' holds no text; fill it or remove the line, or set" in error_of(
            lambda source=source: list(source.documents("train"))
        )
    for source in table_sources(field="texts"):
        message = error_of(lambda source=source: list(source.documents("train")))
        assert "no field 'texts' (did you mean 'text'?); fields: 'text', 'number'; set data.source.field" in message
    for source in table_sources(field="number"):
        message = error_of(lambda source=source: list(source.documents("train")))
        assert "field 'number' is" in message and "string; set data.source.field" in message
    Path("bad.parquet").write_bytes(b"PAR1 not at all")
    message = error_of(lambda: list(Parquet(Parquet.Params(path="bad.parquet")).documents("train")))
    assert message.startswith("bad.parquet: cannot be read as Parquet: ")
    message = error_of(lambda: list(Datasets(Datasets.Params(path="set", split="trian")).documents("train")))
    assert message.startswith("hf:set: datasets cannot read split 'trian': ")
    assert "no such file" in error_of(lambda: list(Parquet(Parquet.Params(path="none.parquet")).documents("train")))
