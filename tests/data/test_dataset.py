"""From the data section of a spec to tokens, and again from what a run kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekit.data.dataset import load_text
from sparsekit.data.token_set import TokenSet
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


def test_the_defaults_read_austen_as_bytes() -> None:
    data = data_spec()
    tokenizer, train, validation = load_text(data.source, data.tokenizer)
    assert (train.n_documents, validation.n_documents) == (5, 1)
    assert len(train) == train.n_bytes + 5 and tokenizer.decode(validation.tokens[:200]).split()[0] == "Persuasion"


def test_fitted_once_and_then_loaded(corpus: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_spec(source=corpus, tokenizer=BPE)
    path = tmp_path / "run" / "tokenizer.json"
    first, train, validation = load_text(data.source, data.tokenizer, path)
    assert path.is_file() and first.vocab_size <= 300
    assert [first.decode(s.tokens) for s in (train, validation)] == ["the cat sat on the mat; " * 40,
                                                                     "the dog sat on the cat"]  # fmt: skip
    monkeypatch.setattr(BPETokenizer, "fit", lambda *_: pytest.fail("a resumed run trained another tokenizer"))
    second, again, _ = load_text(data.source, data.tokenizer, path)
    assert second.fingerprint == first.fingerprint and np.array_equal(again.tokens, train.tokens)


def test_the_tokenizer_learns_from_the_training_text_only(corpus: dict[str, str]) -> None:
    data = data_spec(source=corpus, tokenizer=BPE)
    tokenizer, _, _ = load_text(data.source, data.tokenizer)
    alone = BPETokenizer(data.tokenizer.params)
    alone.fit(["the cat sat on the mat; " * 40])
    assert tokenizer.fingerprint == alone.fingerprint


def test_a_tokenizer_of_another_kind_in_the_run_folder(corpus: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte, bpe = data_spec(source=corpus), data_spec(source=corpus, tokenizer=BPE)
    load_text(byte.source, byte.tokenizer, path)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a file of the library tokenizers"):
        load_text(bpe.source, bpe.tokenizer, path)


def test_a_source_that_fails_leaves_no_tokenizer_behind(corpus: dict[str, str], tmp_path: Path) -> None:
    data = data_spec(source={**corpus, "path": f"{tmp_path}/nothing.txt"}, tokenizer=BPE)
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        load_text(data.source, data.tokenizer, tmp_path / "tokenizer.json")
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
    data = data_spec(source=corpus, tokenizer=BPE)
    assert DataSpec.model_validate(data.model_dump(mode="json")) == data
    assert isinstance(load_text(data.source, data.tokenizer)[1], TokenSet)


def test_sources_and_tokenizers_import_neither_torch_nor_tokenizers() -> None:
    code = (
        "import sys, sparsekit.data.sources, sparsekit.data.tokenizers as t\n"
        "t.ByteTokenizer(t.ByteTokenizer.Params()).encode('a')\n"
        "print(sorted({'torch', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"
