"""Shards hold what was written, are read without being loaded, and tell what is wrong with them in one line."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.data.dataset import load_data
from sparsekit.data.shard_sources import COUNTS, SAMPLE_BYTES, SAMPLES, RawShards, Shards
from sparsekit.data.shards import ShardWriter, npy_header, open_shards, read_manifest, verify_shards
from sparsekit.data.token_set import Tokens, TokenSet
from sparsekit.data.tokenize import tokenize
from sparsekit.data.tokenizers import BPETokenizer, ByteTokenizer
from sparsekit.errors import DataError
from sparsekit.spec.run import DataSpec
from sparsekit.spec.slot import Slot

EOS = 256
TEXTS = ["one two", "drei vier fünf", "六", "seven eight nine ten " * 20, "x", "eleven twelve"]


def write(
    folder: Path, documents: list[list[int]], shard_tokens: int, dtype: str = "uint16", layout: Any = "npy"
) -> None:
    """A folder of one split, as the job writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    writer = ShardWriter(folder, "train", layout, np.dtype(dtype), EOS, shard_tokens)
    for ids in documents:
        writer.add(np.array(ids, dtype).tobytes(), 2 * len(ids))
    writer.close()
    told = {"format": 1, "layout": layout, "dtype": dtype, "eos_id": EOS, "splits": {"train": writer.totals()}}
    (folder / "manifest.json").write_text(json.dumps(told))


def reference(documents: list[list[int]]) -> TokenSet:
    tokens = np.array([i for ids in documents for i in [*ids, EOS]])
    starts = np.cumsum([0, *(len(ids) + 1 for ids in documents)])
    return TokenSet(tokens, starts, sum(2 * len(ids) for ids in documents))


def error_of(run: Any) -> str:
    with pytest.raises(DataError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set", [[1, 2, 3], [4], [5, 6], [], [7] * 9], 6)
    return tmp_path / "set"


@pytest.fixture
def text_job(tmp_path: Path) -> Any:
    """Makes a folder of shards from TEXTS: (folder, source slot)."""
    for name, texts in (("train", TEXTS), ("validation", ["held out", "and this"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"type": "jsonl", "path": f"{tmp_path}/train.jsonl", "validation_path": f"{tmp_path}/validation.jsonl"}

    def make(tokenizer: Any = "byte", **options: Any) -> tuple[Path, dict[str, Any]]:
        slots = Slot("source").validate(source), Slot("tokenizer").validate(tokenizer)
        tokenize(*slots, tmp_path / "out", workers=1, **options)
        return tmp_path / "out", source

    return make


# ---- what was written is what is read ----


@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=12), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 40),
    dtype=st.sampled_from(["uint16", "uint32"]),
    layout=st.sampled_from(["npy", "raw"]),
    data=st.data(),
)
@settings(max_examples=120, deadline=None)
def test_a_sharded_stream_is_the_stream(
    tmp_path_factory: pytest.TempPathFactory, documents: Any, shard_tokens: int, dtype: str, layout: str, data: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "property"
    write(folder, documents, shard_tokens, dtype, layout)
    wanted = reference(documents)
    if layout == "npy":
        stream: Any = open_shards(folder, "train")
    else:
        params = RawShards.Params(path=f"{folder}/train-*.bin", validation_path="none", eos_id=EOS, dtype=dtype)
        ((stream, _),) = RawShards(params).streams("train", ByteTokenizer(ByteTokenizer.Params()))
    assert len(stream) == len(wanted) and stream.n_documents == wanted.n_documents
    places = st.integers(0, len(wanted) + 3)
    begins = np.array(data.draw(st.lists(st.integers(0, len(wanted) - 1), max_size=5)), dtype=np.int64)
    length = data.draw(st.integers(1, len(wanted) + 5))
    rows = stream.rows(begins, length)
    assert rows.dtype == dtype and np.array_equal(rows, wanted.rows(begins, length))
    asked = np.array(data.draw(st.lists(st.tuples(places, places), max_size=6)), dtype=np.int64).reshape(-1, 2)
    assert np.array_equal(stream.documents(asked), wanted.documents(asked))
    for number, ids in enumerate(documents):
        assert stream.document(number).tolist() == [*ids, EOS]
    with pytest.raises(IndexError):
        stream.document(len(documents))


def test_shards_are_plain_npy_files_of_whole_documents(folder: Path) -> None:
    tokens = [np.load(folder / f"train-{i:05}.npy") for i in range(3)]
    starts = [np.load(folder / f"train-{i:05}.starts.npy") for i in range(3)]
    assert [t.tolist() for t in tokens] == [[1, 2, 3, EOS, 4, EOS], [5, 6, EOS, EOS], [7] * 9 + [EOS]]
    assert [s.tolist() for s in starts] == [[0, 4], [0, 3], [0]], "the last document is longer than a shard, and whole"
    assert {t.dtype.str for t in tokens} == {"<u2"} and {s.dtype.str for s in starts} == {"<u8"}
    assert sorted(p.name for p in folder.iterdir() if "tmp" in p.name) == []


def test_a_stream_is_typed_as_tokens(folder: Path) -> None:
    stream: Tokens = open_shards(folder, "train")
    assert (stream.n_bytes, stream.n_documents, len(stream)) == (30, 5, 20)


def test_rows_are_a_copy(folder: Path) -> None:
    stream = open_shards(folder, "train")
    stream.rows(np.array([0]), 3)[:] = 9
    assert stream.rows(np.array([0]), 3).tolist() == [[1, 2, 3]]


def test_a_copy_elsewhere_has_the_same_fingerprint_and_other_tokens_another(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    first = open_shards(folder, "train").fingerprint
    assert open_shards(tmp_path / "copy", "train").fingerprint == first
    write(folder, [[1, 2, 3], [4], [5, 6], [], [7] * 8 + [8]], 6)
    assert open_shards(folder, "train").fingerprint != first


def test_ten_billion_tokens_open_at_once(tmp_path: Path) -> None:
    """A sparse file: what is not written reads as zeros and takes no space."""
    n_tokens, place = 10_000_000_000, 9_876_543_210
    files = []
    for name, dtype, count in (("t.npy", np.dtype("<u2"), n_tokens), ("s.npy", np.dtype("<u8"), 10_000_000)):
        header = npy_header(dtype, count)
        with (tmp_path / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + count * dtype.itemsize)
            if count == n_tokens:
                file.seek(len(header) + place * dtype.itemsize)
                file.write(np.array([11, 22, 33], dtype).tobytes())
        files.append({"name": name, "bytes": (tmp_path / name).stat().st_size, "sha256": ""})
    counts = {"n_tokens": n_tokens, "n_documents": 10_000_000, "n_bytes": 4 * n_tokens}
    told = {"format": 1, "layout": "npy", "dtype": "uint16", "eos_id": EOS}
    splits = {"train": {**counts, "shards": [{**counts, "files": files}]}}
    (tmp_path / "manifest.json").write_text(json.dumps({**told, "splits": splits}))
    began = time.perf_counter()
    stream = open_shards(tmp_path, "train")
    row = stream.rows(np.array([place]), 3)
    assert time.perf_counter() - began < 0.5  # 3 ms where nobody else works; benchmarks/tokenization.py measures it
    assert row.tolist() == [[11, 22, 33]] and len(stream) == n_tokens


# ---- as sources ----


@pytest.mark.parametrize("tokenizer", ["byte", {"type": "bpe", "vocab_size": 300}])
def test_shards_train_as_their_text_does(text_job: Any, tokenizer: Any) -> None:
    out, text = text_job(tokenizer, shard_tokens=50)
    slot = "byte" if tokenizer == "byte" else {"type": "bpe", "path": f"{out}/tokenizer.json"}
    ready = load_data(DataSpec.model_validate({"source": {"type": "shards", "path": str(out)}, "tokenizer": slot}))
    fresh = load_data(DataSpec.model_validate({"source": text, "tokenizer": tokenizer}))
    assert ready.tokenizer.fingerprint == fresh.tokenizer.fingerprint
    pairs = [(ready.train[0][0], fresh.train[0][0]), (ready.validation["val"], fresh.validation["val"])]
    for mine, theirs in pairs:
        assert (len(mine), mine.n_documents, mine.n_bytes) == (len(theirs), theirs.n_documents, theirs.n_bytes)
        zero = np.array([0])
        assert np.array_equal(mine.rows(zero, len(mine)), theirs.rows(zero, len(mine)))
        places = np.arange(len(mine) + 2)
        assert np.array_equal(mine.documents(places), theirs.documents(places))
    assert list(ready.source.documents("train")) == TEXTS


def test_a_tokenizer_that_would_learn_is_refused_before_it_does(text_job: Any) -> None:
    out, _ = text_job({"type": "bpe", "vocab_size": 300})
    learning = BPETokenizer(BPETokenizer.Params(vocab_size=280))
    source = Shards(Shards.Params(path=str(out)))
    told = error_of(lambda: learning.fit(source.learning_text()))
    assert told.startswith(f"{out}: was made with a tokenizer of its own; set data.tokenizer to {{")
    ready = BPETokenizer(BPETokenizer.Params(path=str(out / "tokenizer.json")))
    ready.fit(source.learning_text())
    assert len(source.streams("train", ready)[0][0]) > 0


def test_another_tokenizer_is_refused_with_the_mend(text_job: Any) -> None:
    out, _ = text_job({"type": "bpe", "vocab_size": 300})
    byte = ByteTokenizer(ByteTokenizer.Params())
    made = read_manifest(out)["tokenizer"]["fingerprint"]
    assert error_of(lambda: Shards(Shards.Params(path=str(out))).streams("train", byte)) == (
        f"{out}: was made with tokenizer {made[:12]}, and the run's is {byte.fingerprint[:12]}; "
        f'set data.tokenizer to {{"type": "bpe", "path": "{out}/tokenizer.json"}}'
    )


def test_raw_shards_hold_the_same_stream(text_job: Any, tmp_path: Path) -> None:
    out, _ = text_job({"type": "bpe", "vocab_size": 300}, layout="raw", shard_tokens=30)
    assert sorted(p.suffix for p in out.glob("train*")) == [".bin"] * len(list(out.glob("train*")))
    tokenizer = BPETokenizer.load(BPETokenizer.Params(path="x"), out / "tokenizer.json")
    source = RawShards(RawShards.Params(path=f"{out}/train-*.bin", validation_path=f"{out}/validation-*.bin", eos_id=0))
    for split, texts in (("train", TEXTS), ("validation", ["held out", "and this"])):
        ((stream, weight),) = source.streams(split, tokenizer)
        wanted = TokenSet.from_documents(texts, tokenizer)
        assert weight == 1.0 and (stream.n_documents, stream.n_bytes) == (wanted.n_documents, wanted.n_bytes)
        assert np.array_equal(stream.rows(np.array([0]), len(stream))[0], wanted.tokens)
        assert np.array_equal(np.fromfile(sorted(out.glob(f"{split}*"))[0], "<u2")[:5], wanted.tokens[:5])
    first = source.streams("train", tokenizer)[0][0].fingerprint
    assert source.streams("train", tokenizer)[0][0].fingerprint == first
    path = sorted(out.glob("train*"))[0]
    path.write_bytes(path.read_bytes()[:-4] + b"\x07\x00\x00\x00")
    assert source.streams("train", tokenizer)[0][0].fingerprint != first
    assert "set data.source to" in error_of(lambda: open_shards(out, "train"))
    assert "has tokens and no text" in error_of(lambda: list(source.documents("train")))


def raw_stream(path: Path) -> Any:
    """Of raw files of bytes."""
    source = RawShards(RawShards.Params(path=str(path), validation_path=str(path), eos_id=EOS))
    return source.streams("validation", ByteTokenizer(ByteTokenizer.Params()))[0][0]


def test_ten_billion_raw_tokens_are_told_apart_at_once(tmp_path: Path) -> None:
    path, n_tokens = tmp_path / "a.bin", 10_000_000_000
    with path.open("wb") as file:
        file.truncate(2 * n_tokens)
        file.seek(2 * n_tokens - 2)
        file.write(np.array([EOS], "<u2").tobytes())
    began = time.perf_counter()
    stream = raw_stream(path)
    assert len(stream) == n_tokens and len(stream.fingerprint) == 64
    assert time.perf_counter() - began < 0.5  # 1 ms where nobody else works


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw file of which a fingerprint reads a tenth."""
    path = tmp_path_factory.mktemp("raw") / "a.bin"
    tokens = np.random.default_rng(0).integers(0, 256, 5 * SAMPLES * SAMPLE_BYTES // 1000 * 1000).astype("<u2")
    tokens[999::1000] = EOS
    tokens.tofile(path)
    return path


@settings(max_examples=30)
@given(data=st.data())
def test_raw_files_that_were_changed_have_another_fingerprint(data: Any, large: Path) -> None:
    content = large.read_bytes()
    n = len(content)
    reach = n // (SAMPLES - 1)
    begin = data.draw(st.one_of(st.integers(0, n - reach), st.sampled_from([0, n - 4])), "begin")
    end = min(begin + reach, n - 2) if begin < n - 4 else n - 3  # the last token must stay an end of text
    changed = bytearray(content)
    changed[begin:end] = bytes(byte ^ 1 for byte in content[begin:end])
    path = large.with_name("changed.bin")
    path.write_bytes(changed)
    assert raw_stream(path).fingerprint != raw_stream(large).fingerprint
    path.write_bytes(content)
    assert raw_stream(path).fingerprint == raw_stream(large).fingerprint, "a copy"
    path.write_bytes(content[: -2 * data.draw(st.sampled_from([1000, 2000, n // 4000 * 1000]))])
    assert raw_stream(path).fingerprint != raw_stream(large).fingerprint, "cut"


def test_the_bytes_of_raw_files_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["some", "text ü", ""]
    path = tmp_path / "a.bin"
    ids = [i for text in texts for i in [*text.encode(), EOS]]
    np.array(ids, "<u2").tofile(path)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert raw_stream(path).n_bytes == n_bytes
    asked: list[Any] = []
    real = ByteTokenizer.decode
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: asked.append(ids) or real(self, ids))

    def counted() -> int:
        asked.clear()
        assert raw_stream(path).n_bytes == n_bytes
        return len(asked)

    assert counted() == 0
    os.utime(path, ns=(0, 0))
    assert (counted(), counted()) == (3, 0)
    for spoilt in ("{", "[]", "3", "{}"):
        (tmp_path / COUNTS).write_text(spoilt)
        assert (counted(), counted()) == (3, 0)
    (tmp_path / COUNTS).unlink()
    (tmp_path / COUNTS).mkdir()  # where nothing can be written
    assert (counted(), counted()) == (3, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [COUNTS, "a.bin"]


# ---- what can be wrong ----

MEND = "tokenize it anew, or restore the file"


def test_files_are_held_against_the_manifest(folder: Path) -> None:
    assert verify_shards(folder) == read_manifest(folder)
    path = folder / "train-00001.npy"
    whole = path.read_bytes()
    n = len(whole)
    for damaged, said in [
        (whole[:-2], f"{path}: is cut short: it has {n - 2} bytes where {n} were written; {MEND}"),
        (whole + b"\0", f"{path}: has grown: it has {n + 1} bytes where {n} were written; {MEND}"),
    ]:
        path.write_bytes(damaged)
        assert error_of(lambda: open_shards(folder, "train")) == said == error_of(lambda: verify_shards(folder))
    path.write_bytes(whole[:-1] + b"\x09")
    open_shards(folder, "train")  # nobody reads all of it to open it
    assert error_of(lambda: verify_shards(folder)) == f"{path}: is not what was written (its hash differs); {MEND}"
    path.unlink()
    assert error_of(lambda: open_shards(folder, "train")) == f"{path}: is missing from the shards; {MEND}"


def test_a_header_that_is_not_what_was_written(folder: Path) -> None:
    path = folder / "train-00000.npy"
    whole = path.read_bytes()
    for old, new, said in [
        (b"<u2", b"<i2", "holds int16 of shape (6,) where one row of uint16 was written"),
        (b"(6,)", b"(5,)", "its header tells of 5 tokens where 6 were written"),
        (b"NUMPY", b"NYMPH", "has no .npy header"),
    ]:
        path.write_bytes(whole.replace(old, new))
        assert f"{path}: {said}" in error_of(lambda: open_shards(folder, "train").rows(np.array([0]), 2))


def test_what_is_no_folder_of_shards(folder: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert error_of(lambda: open_shards(nowhere, "train")) == (
        f"{nowhere}/manifest.json: no such file; give a folder that sparsekit tokenize wrote"
    )
    with pytest.raises(ValueError, match=r"unknown split 'trian' \(did you mean 'train'\?\)"):
        open_shards(folder, "trian")
    manifest = folder / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**told, "format": 2}))
    assert "is of format 2, and this version of sparsekit reads 1" in error_of(lambda: read_manifest(folder))
    for spoilt in (
        {"layout": "npz"}, {"dtype": "int8"}, {"eos_id": "0"}, {"splits": {"train": 3}}, {"splits": {"train": {}}},
        {"splits": {"train": {**told["splits"]["train"], "shards": [{"n_tokens": 6, "files": []}]}}},
        {"splits": {"train": {**told["splits"]["train"], "shards": [{"n_tokens": 6, "files": [3, 4]}]}}},
    ):  # fmt: skip
        manifest.write_text(json.dumps({**told, **spoilt}))
        assert error_of(lambda: read_manifest(folder)) == f"{manifest}: is damaged; {MEND}"
    manifest.write_text("[]")
    assert "is no manifest of shards" in error_of(lambda: read_manifest(folder))
    manifest.write_text("{")
    assert "cannot be read" in error_of(lambda: read_manifest(folder))
    manifest.unlink()
    (folder / "journal.jsonl").write_text("{}\n")
    assert error_of(lambda: read_manifest(folder)) == (
        f"{folder}: is not finished; run the same sparsekit tokenize again to go on"
    )


def test_a_shard_whose_content_was_spoilt(text_job: Any) -> None:
    """As far as that can be seen when it is read: an id that there is not."""
    out, _ = text_job("byte", shard_tokens=50)
    source, byte = Shards(Shards.Params(path=str(out))), ByteTokenizer(ByteTokenizer.Params())
    path = sorted(out.glob("train-*[0-9].npy"))[1]
    content = bytearray(path.read_bytes())
    content[-3] = 0xFF
    path.write_bytes(content)
    stream = source.streams("train", byte)[0][0]
    first = np.load(sorted(out.glob("train-*[0-9].npy"))[0]).size
    assert stream.rows(np.array([0]), 3).shape == (1, 3)
    highest = int(np.load(path).max())
    assert highest >= 257
    assert error_of(lambda: stream.rows(np.array([0, first]), np.load(path).size)) == (
        f"{path}: it or the file after it holds token {highest}, and the tokenizer has 257; "
        f"restore what sparsekit tokenize --verify {out} names"
    )


def test_a_folder_without_text_to_validate_on(text_job: Any) -> None:
    out, _ = text_job("byte")
    told = read_manifest(out)
    byte = ByteTokenizer(ByteTokenizer.Params())
    source = Shards(Shards.Params(path=str(out)))
    del told["splits"]["validation"]
    (out / "manifest.json").write_text(json.dumps(told))
    assert error_of(lambda: source.streams("validation", byte)) == (
        f"{out}: holds no validation tokens; make some with sparsekit tokenize --validation or --validation-fraction"
    )
    (out / "manifest.json").write_text(json.dumps({**told, "tokenizer": {}}))
    assert error_of(lambda: source.streams("train", byte)) == f"{out}/manifest.json: is damaged; {MEND}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.array([1, 2, EOS, 3], "<u2").tobytes(), "its last token is 3, not the end of text, 256"),
        (np.array([1, 2, EOS], "<u2").tobytes() + b"\1", "has 7 bytes, which is no number of uint16"),
        (b"", "has 0 bytes"),
        (b"\x93NUMPY" + bytes(122), "is a .npy file with a header, not raw tokens; use the source shards"),
        (np.array([1, 999, EOS], "<u2").tobytes(), "holds token 999, and the tokenizer has 257"),
    ],
)
def test_raw_files_that_are_none(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    source = RawShards(RawShards.Params(path=str(path), validation_path=str(path), eos_id=EOS))
    byte = ByteTokenizer(ByteTokenizer.Params())
    message = error_of(lambda: source.streams("train", byte)[0][0].rows(np.array([0]), 2))
    assert message.startswith(str(path)) and said in message


def test_raw_files_of_another_end_of_text(tmp_path: Path) -> None:
    source = RawShards(RawShards.Params(path="a.bin", validation_path="b.bin", eos_id=50279))
    message = error_of(lambda: source.streams("train", ByteTokenizer(ByteTokenizer.Params())))
    assert message.startswith("data.source.eos_id is 50279, and the tokenizer's end of text is 256; ")


def test_a_tokenizer_file_that_was_exchanged(text_job: Any) -> None:
    out, _ = text_job({"type": "bpe", "vocab_size": 300})
    other = BPETokenizer(BPETokenizer.Params(vocab_size=260))
    other.fit(["aaa aaa"])
    other.save(out / "tokenizer.json")
    source = Shards(Shards.Params(path=str(out)))
    assert "is not the tokenizer of these shards" in error_of(lambda: list(source.documents("train")))
