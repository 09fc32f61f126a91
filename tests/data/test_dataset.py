"""From the data section of a spec to what a run reads, and again from what it kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekit.data.dataset import RunData, load_data
from sparsekit.data.loader import Loader
from sparsekit.data.mixing import Joined
from sparsekit.data.streaming import StreamLoader
from sparsekit.data.token_set import Tokens
from sparsekit.data.tokenizers import BPETokenizer
from sparsekit.errors import DataError, SpecError
from sparsekit.spec.load import load_spec
from sparsekit.spec.run import DataSpec

BPE = {"type": "bpe", "vocab_size": 300}


def data_spec(**fields: Any) -> DataSpec:
    return DataSpec.model_validate(fields)


@pytest.fixture
def corpus(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "train.txt").write_text("the cat sat on the mat; " * 40)
    (tmp_path / "validation.txt").write_text("the dog sat on the cat")
    return {"type": "text", "path": f"{tmp_path}/train.txt", "validation_path": f"{tmp_path}/validation.txt"}


def all_of(tokens: Tokens) -> np.ndarray[Any, Any]:
    return tokens.rows(np.array([0]), len(tokens))[0]


def train_text(data: RunData) -> str:
    ((tokens, _),) = data.train
    return data.tokenizer.decode(all_of(tokens))


def test_the_defaults_read_austen_as_bytes() -> None:
    data = load_data(data_spec())
    ((train, weight),) = data.train
    assert weight == 1.0 and list(data.validation) == ["val"]
    assert (train.n_documents, data.validation["val"].n_documents) == (5, 1)
    assert len(train) == train.n_bytes + 5
    assert data.tokenizer.decode(all_of(data.validation["val"])[:200]).split()[0] == "Persuasion"


def test_fitted_once_and_then_loaded(corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = data_spec(source=corpus, tokenizer=BPE)
    path = tmp_path / "run" / "tokenizer.json"
    first = load_data(spec, path)
    assert path.is_file() and first.tokenizer.vocab_size <= 300
    assert train_text(first) == "the cat sat on the mat; " * 40
    assert first.tokenizer.decode(all_of(first.validation["val"])) == "the dog sat on the cat"
    monkeypatch.setattr(BPETokenizer, "fit", lambda *_: pytest.fail("a resumed run trained another tokenizer"))
    second = load_data(spec, path)
    assert second.identity == first.identity and np.array_equal(all_of(second.train[0][0]), all_of(first.train[0][0]))


def test_the_tokenizer_learns_from_the_training_text_only(corpus: dict[str, str]) -> None:
    spec = data_spec(source=corpus, tokenizer=BPE)
    alone = BPETokenizer(spec.tokenizer.params)
    alone.fit(["the cat sat on the mat; " * 40])
    assert load_data(spec).tokenizer.fingerprint == alone.fingerprint


def test_a_tokenizer_of_another_kind_in_the_run_folder(corpus: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte, bpe = data_spec(source=corpus), data_spec(source=corpus, tokenizer=BPE)
    load_data(byte, path)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a file of the library tokenizers"):
        load_data(bpe, path)


def test_a_source_that_fails_leaves_no_tokenizer_behind(corpus: dict[str, str], tmp_path: Path) -> None:
    data = data_spec(source={**corpus, "path": f"{tmp_path}/nothing.txt"}, tokenizer=BPE)
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        load_data(data, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_model_too_small_for_its_tokenizer_is_told_with_the_spec(tiny: Any) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({"model": tiny(vocab_size=200)})
    expected = "model.vocab_size is 200, but the byte tokenizer has 257 tokens; set it to at least 257"
    assert error.value.problems == [f"data.tokenizer: {expected}"]
    with pytest.raises(SpecError, match="the bpe tokenizer has 300 tokens"):
        load_spec({"model": tiny(vocab_size=299), "data": {"tokenizer": BPE}})
    load_spec({"model": tiny(vocab_size=300), "data": {"tokenizer": BPE}})


def test_params_survive_the_spec_file(corpus: dict[str, str]) -> None:
    data = data_spec(
        source={"type": "mix", "sources": [corpus, "embedded"], "weights": [1.5, 0.5]},
        tokenizer=BPE,
        validation={"austen": "embedded"},
        streaming={"buffer": 64},
    )
    assert DataSpec.model_validate(data.model_dump(mode="json")) == data
    assert [path for path, _ in data.slots()] == ["source", "tokenizer", "validation.austen"]


# ---- further validation texts, and mixtures ----


def test_validation_texts_by_name(corpus: dict[str, str]) -> None:
    """Each is what its source holds out; the run's own comes first."""
    data = load_data(data_spec(source=corpus, validation={"zebra": corpus, "austen": "embedded"}))
    assert list(data.validation) == ["val", "zebra", "austen"]
    assert data.validation["austen"].n_bytes == 466_853 and data.validation["zebra"].n_bytes == 22
    assert {name: told["tokens"] for name, told in data.identity.items() if isinstance(told, dict)} == {
        "train.0": 961, "val": 23, "zebra": 23, "austen": 466_854,
    }  # fmt: skip


def test_a_named_text_that_cannot_be_read_is_named(corpus: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"^data\.validation\.wiki: .*nothing\.txt: no such file"):
        load_data(data_spec(source=corpus, validation={"wiki": {"type": "text", "path": "nothing.txt"}}))


@pytest.mark.parametrize("name", ["val", "", "Wiki", "a.b", "1st", "a/b"])
def test_names_that_would_not_do(name: str, tiny: Any) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({"model": tiny(vocab_size=257), "data": {"validation": {name: "embedded"}}})
    expected = f"data.validation: {name!r}: a name is of small letters, digits and _, and not 'val', the source's own"
    assert error.value.problems == [expected]


def test_a_mistake_in_a_named_text_is_told_with_its_place(tiny: Any) -> None:
    with pytest.raises(SpecError) as error:
        load_spec({"model": tiny(vocab_size=257), "data": {"validation": {"wiki": {"type": "jsonl", "pth": "x"}}}})
    assert error.value.problems[0] == "data.validation.wiki.path: required"
    assert error.value.problems[1].startswith("data.validation.wiki: unknown key 'pth' (did you mean 'path'?)")


def test_a_mixture(corpus: dict[str, str]) -> None:
    """Two thirds of the windows from the small text, again and again, each window as often as each other."""
    data = load_data(data_spec(source={"type": "mix", "sources": [corpus, "embedded"], "weights": [2, 1]}))
    assert isinstance(data.validation["val"], Joined) and data.validation["val"].n_documents == 2
    loader = data.loader(seq_len=32, seed=0, micro_batch_size=512)
    assert isinstance(loader, Loader) and loader.n_windows == 960 // 32 + -(-(3_558_170 + 4) // 32)
    cats = [b"cat" in bytes(row.tolist()) for _ in range(8) for row in loader.next().tokens_BT1.to(int).clamp(max=255)]
    assert sum(cats) >= 4096 * 2 // 3


def test_loaders_of_ranks_continue_one_order(corpus: dict[str, str]) -> None:
    data = load_data(data_spec(source=corpus, document_mask=True))
    alone = data.loader(16, 5, 4)
    state = {"position": 0}
    rows = [data.loader(16, 5, 2, rank, 2) for rank in (0, 1)]
    for loader in rows:
        loader.restore(state)
    whole, halves = alone.next().to("cpu"), [loader.next().to("cpu") for loader in rows]
    assert whole.ids_BT.tolist() == [row for half in halves for row in half.ids_BT.tolist()]
    assert whole.documents_BT is not None and rows[0].state() == alone.state() == {"position": 4}


# ---- streaming ----


def test_streaming_reads_no_training_text_before(corpus: dict[str, str]) -> None:
    streaming = {"buffer": 3, "validation_tokens": 10}
    data = load_data(data_spec(source=corpus, streaming=streaming, validation={"austen": "embedded"}))
    assert data.train == [] and set(data.identity) == {"val", "austen", "tokenizer"}
    assert len(data.validation["val"]) == 23 and len(data.validation["austen"]) == 466_854  # whole documents
    loader = data.loader(16, 5, 4)
    assert isinstance(loader, StreamLoader) and not loader.elastic
    batch = loader.next().to("cpu")
    assert batch.ids_BT.shape == (4, 16) and batch.documents_BT is None
    assert all("at" in data.tokenizer.decode(row) for row in batch.ids_BT)


def test_streaming_keeps_validation_to_what_is_asked_for(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text("five5\n%\n" * 100)
    source = {"type": "text", "path": f"{tmp_path}/train.txt", "validation_path": f"{tmp_path}/validation.txt",
              "separator": "%"}  # fmt: skip
    sizes = {}
    for limit in (8, None):
        data = load_data(data_spec(source=source, streaming={"validation_tokens": limit}))
        sizes[limit] = len(data.validation["val"])
    assert sizes == {8: 14, None: 700}


def test_sources_tokenizers_and_loading_import_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys, sparsekit.data.dataset, sparsekit.data.tokenizers as t\n"
        "t.ByteTokenizer(t.ByteTokenizer.Params()).encode('a')\n"
        "print(sorted({'torch', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
