"""Any text survives encoding, no text makes an end of text, and BPE ids are those of the library tokenizers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sparsekit.data.sources import Embedded
from sparsekit.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer
from sparsekit.errors import DataError
from sparsekit.spec.facts import Facts

EOS = "<|endoftext|>"
TRICKY = [
    "",
    " ",
    "\n\n \t\r\n",
    "hello  world",
    f"{EOS}",
    f"a{EOS}b {EOS}{EOS}\n",
    "<|endoftext",
    "\0\x01\x7f\x80\xff",
    "\ufeffbyte order mark",
    "\ufffd replacement \ufffe\uffff",
    "e\u0301 \u00e9 \u1e69 s\u0323\u0307",  # composed and decomposed: no normalisation may unite them
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0010ffff",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd",
    "don't DON'T 3.14 it's 'll x'",
    "\u3000full width\u2028line\u2029paragraph\u0085",
    "Ġ Ċ ĠĠ â",  # the letters that byte-level BPE writes bytes with
    "a" * 5000,
]
any_text = st.text(max_size=60)


@cache
def novel() -> str:
    return next(Embedded(Embedded.Params(novels=["northanger_abbey"])).documents("train"))[:120_000]


def documents() -> list[str]:
    return [novel()[:60_000], novel()[60_000:], f"a text about {EOS}, again {EOS} and {EOS}. " * 50]


def new_bpe(**params: Any) -> BPETokenizer:
    return BPETokenizer(BPETokenizer.Params(**params))


@cache
def bpe() -> BPETokenizer:
    tokenizer = new_bpe(vocab_size=500)
    tokenizer.fit(documents())
    return tokenizer


@cache
def raw() -> Backend:
    """The same by the library alone, written from its documentation."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(documents(), trainer)
    return backend


def byte() -> ByteTokenizer:
    return ByteTokenizer(ByteTokenizer.Params())


BOTH: list[Any] = [byte, bpe]


def facts(**extra: Any) -> Facts:
    return Facts(8, 8, 0, 1, extra=extra)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- both ----


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("make", BOTH)
def test_tricky_text_round_trips(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert ids.ndim == 1 and ids.dtype == np.uint16 and tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("make", BOTH)
@settings(max_examples=80, deadline=None)
@given(texts=st.lists(any_text, max_size=4))
def test_any_text_round_trips_alone_and_in_a_batch(make: Any, texts: list[str]) -> None:
    tokenizer = make()
    batch = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in batch] == texts
    for ids, text in zip(batch, texts, strict=True):
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert not ids.size or ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize("make", BOTH)
def test_every_character_round_trips(make: Any) -> None:
    everything = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    tokenizer = make()
    assert tokenizer.decode(tokenizer.encode(everything)) == everything


@pytest.mark.parametrize("make", BOTH)
def test_decoding_leaves_out_ends_of_text_and_marks_what_is_no_id(make: Any) -> None:
    tokenizer = make()
    ids, end = tokenizer.encode("ab").tolist(), tokenizer.eos_id
    a, b = tokenizer.encode("a").tolist(), tokenizer.encode("b").tolist()
    assert tokenizer.decode([end, *ids, end, *ids, end]) == "abab"
    assert tokenizer.decode([*a, tokenizer.vocab_size, *b, -100, 2**31]) == "a\ufffdb\ufffd\ufffd"
    assert tokenizer.decode([]) == ""
    for kind in (list(ids), tuple(ids), np.array(ids, np.uint16), np.array([ids]), torch.tensor(ids)):
        assert tokenizer.decode(kind) == "ab"


@pytest.mark.parametrize("make", BOTH)
def test_half_a_character_decodes_to_a_replacement(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) == 4  # neither knows it as one token
    assert set(tokenizer.decode(ids[:-1])) == {"\ufffd"}


@pytest.mark.parametrize("make", BOTH)
def test_half_a_surrogate_pair_is_no_text(make: Any) -> None:
    with pytest.raises(DataError) as error:
        make().encode_batch(["good", "ab\ud83d"])
    assert "half a surrogate pair (U+D83D at character 2)" in one_line(error) and "remove it" in one_line(error)


@pytest.mark.parametrize("make", BOTH)
def test_saved_and_loaded_it_is_the_same(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    path = tmp_path / "run" / "tokenizer.json"
    tokenizer.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]
    loaded = type(tokenizer).load(tokenizer.params, path)
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.fingerprint == tokenizer.fingerprint and len(loaded.fingerprint) == 64
    for text in TRICKY:
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()
    loaded.save(path)
    assert type(tokenizer).load(tokenizer.params, path).fingerprint == tokenizer.fingerprint


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        byte().save(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("cls", [ByteTokenizer, BPETokenizer])
def test_files_that_are_no_tokenizer(cls: type[Tokenizer], tmp_path: Path) -> None:
    params: Any = BPETokenizer.Params(vocab_size=300) if cls is BPETokenizer else ByteTokenizer.Params()
    path = tmp_path / "tokenizer.json"

    def said(content: str | None) -> str:
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError) as error:
            cls.load(params, path)
        assert one_line(error).startswith(f"{path}: ") and ";" in one_line(error)
        return one_line(error)

    (tmp_path / "tokeniser.json").write_text("{}")
    assert "no such tokenizer file (did you mean 'tokeniser.json'?)" in said(None)
    assert "not a JSON file" in said("{")
    assert "expected a JSON object" in said("[]")
    assert "not" in said('{"type": "other"}') and "give" in said('{"type": "other"}')
    assert "give" in said('{"model": {"type": "BPE"}}')


# ---- byte ----


def test_byte_ids_are_the_bytes() -> None:
    assert byte().encode("aé\n").tolist() == [97, 0xC3, 0xA9, 10]
    assert (byte().vocab_size, byte().eos_id) == (257, 256)
    byte().fit(["nothing to learn"])


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=40))
def test_byte_decodes_any_bytes_as_python_does(data: bytes) -> None:
    assert byte().decode(list(data)) == data.decode("utf-8", errors="replace")


def test_byte_check() -> None:
    with pytest.raises(ValueError) as error:
        ByteTokenizer.check(ByteTokenizer.Params(), facts(vocab_size=200))
    expected = "model.vocab_size is 200, but the byte tokenizer has 257 tokens; set it to at least 257"
    assert str(error.value) == expected
    ByteTokenizer.check(ByteTokenizer.Params(), facts(vocab_size=257))
    ByteTokenizer.check(ByteTokenizer.Params(), facts())


# ---- bpe ----


def test_bpe_ids_are_the_librarys() -> None:
    assert bpe().vocab_size == 500 == raw().get_vocab_size()
    assert bpe().eos_id == raw().token_to_id(EOS)
    for text in [novel(), *(text for text in TRICKY if EOS not in text)]:
        assert bpe().encode(text).tolist() == raw().encode(text).ids


@settings(max_examples=80, deadline=None)
@given(any_text)
def test_bpe_ids_are_the_librarys_for_any_text(text: str) -> None:
    if EOS not in text:
        assert bpe().encode(text).tolist() == raw().encode(text).ids


def test_bpe_never_makes_an_end_of_text_of_text() -> None:
    text = f"x {EOS} y"
    assert raw().token_to_id(EOS) in raw().encode(text).ids  # what the library does unless told otherwise
    assert bpe().eos_id not in bpe().encode(text)
    assert bpe().eos_id not in np.concatenate(bpe().encode_batch([text, *documents()]))


def test_bpe_training_is_deterministic() -> None:
    """Also in another process, with another number of threads and other hashes."""
    code = (
        "import json, sys\n"
        "from sparsekit.data.tokenizers import BPETokenizer\n"
        "t = BPETokenizer(BPETokenizer.Params(vocab_size=500)); t.fit(json.load(sys.stdin)); print(t.fingerprint)"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    text = json.dumps(documents())
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == bpe().fingerprint


def test_other_text_another_fingerprint() -> None:
    other = new_bpe(vocab_size=500)
    other.fit(documents()[:1])
    assert len({other.fingerprint, bpe().fingerprint, byte().fingerprint}) == 3


def test_the_fingerprint_is_of_content_and_not_of_its_layout(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bpe().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))
    assert BPETokenizer.load(bpe().params, path).fingerprint == bpe().fingerprint


def test_little_text_gives_a_smaller_vocabulary() -> None:
    tokenizer = new_bpe(vocab_size=5000)
    tokenizer.fit(["ab ab ab"])
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode("Ünseen")) == "Ünseen"


def test_bpe_needs_to_be_fitted() -> None:
    uses: list[Callable[[BPETokenizer], Any]] = [
        lambda t: t.encode("a"),
        lambda t: t.decode([1]),
        lambda t: t.vocab_size,
        lambda t: t.eos_id,
        lambda t: t.fingerprint,
        lambda t: t.save(Path("nowhere.json")),
    ]
    for use in uses:
        with pytest.raises(DataError, match=r"no vocabulary yet; call fit\(documents\)"):
            use(new_bpe(vocab_size=300))
    assert not Path("nowhere.json").exists()


def test_an_error_in_the_documents_comes_through_training() -> None:
    with pytest.raises(DataError, match="half a surrogate pair"):
        new_bpe(vocab_size=300).fit(["good", "\ud800"])


@pytest.mark.parametrize("given_params", [{}, {"vocab_size": 300, "path": "x.json"}, {"vocab_size": 256}])
def test_bpe_params(given_params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BPETokenizer.Params(**given_params)


def test_bpe_check() -> None:
    with pytest.raises(ValueError) as error:
        BPETokenizer.check(BPETokenizer.Params(vocab_size=500), facts(vocab_size=499))
    assert str(error.value) == "model.vocab_size is 499, but the bpe tokenizer has 500 tokens; set it to at least 500"
    BPETokenizer.check(BPETokenizer.Params(vocab_size=500), facts(vocab_size=500))


# ---- bpe from a ready file ----


def ready(path: Path, **changes: Any) -> str:
    """A file such as others hand out: it cuts, pads, and puts tokens around a text."""
    backend = Backend.from_str(raw().to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 500), ("</s>", 501)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    path.write_text(json.dumps({**json.loads(backend.to_str()), **changes}))
    return str(path)


def test_a_ready_file_gives_its_ids_uncut_and_without_extras(tmp_path: Path) -> None:
    tokenizer = new_bpe(path=ready(tmp_path / "ready.json"), eos_token="</s>")
    tokenizer.fit([])
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (502, 501)
    assert tokenizer.encode(novel()).tolist() == raw().encode(novel()).ids
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {0, 500, 501}.isdisjoint(tokenizer.encode(f"<s> {EOS} </s>").tolist())
    tokenizer.save(tmp_path / "saved.json")
    again = BPETokenizer.load(tokenizer.params, tmp_path / "saved.json")
    assert again.fingerprint == tokenizer.fingerprint and again.encode("a b").tolist() == raw().encode("a b").ids


def test_another_end_of_text_is_another_tokenizer(tmp_path: Path) -> None:
    path = ready(tmp_path / "ready.json")
    prints = set()
    for eos_token in (EOS, "</s>"):
        tokenizer = new_bpe(path=path, eos_token=eos_token)
        tokenizer.fit([])
        prints.add(tokenizer.fingerprint)
    assert len(prints) == 2


def test_a_ready_file_leaves_nothing_to_chance(tmp_path: Path) -> None:
    model = {**json.loads(raw().to_str())["model"], "dropout": 0.9}
    tokenizer = new_bpe(path=ready(tmp_path / "ready.json", model=model))
    tokenizer.fit([])
    assert tokenizer.encode(novel()).tolist() == raw().encode(novel()).ids


def test_a_ready_file_is_compared_with_the_model(tmp_path: Path) -> None:
    params = BPETokenizer.Params(path=ready(tmp_path / "ready.json"))
    with pytest.raises(ValueError, match=r"model\.vocab_size is 501, but the bpe tokenizer has 502 tokens"):
        BPETokenizer.check(params, facts(vocab_size=501))
    BPETokenizer.check(params, facts(vocab_size=502))
    (tmp_path / "ready.json").write_text("{}")
    with pytest.raises(ValueError, match=r"ready\.json: not a file of the library tokenizers"):
        BPETokenizer.check(params, facts(vocab_size=502))
    (tmp_path / "ready.json").unlink()
    BPETokenizer.check(params, facts(vocab_size=1))  # a run folder stays readable where the file is not
    with pytest.raises(DataError, match=r"ready\.json: no such tokenizer file"):
        BPETokenizer(params).fit([])


def test_an_end_of_text_that_the_file_has_not(tmp_path: Path) -> None:
    tokenizer = new_bpe(path=ready(tmp_path / "ready.json"), eos_token="<s/>")
    with pytest.raises(DataError) as error:
        tokenizer.fit([])
    message = one_line(error)
    assert message.startswith(f"{tmp_path / 'ready.json'}: '<s/>' is none of its special tokens (did you mean '<")
    assert f"special tokens: '{EOS}', '<s>', '</s>'; set data.tokenizer.eos_token" in message


def test_a_file_of_another_size_than_the_spec_says(tmp_path: Path) -> None:
    bpe().save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError) as error:
        BPETokenizer.load(BPETokenizer.Params(vocab_size=400), tmp_path / "tokenizer.json")
    assert "has 500 tokens, more than data.tokenizer.vocab_size, 400" in one_line(error)


def test_a_large_vocabulary_takes_wider_ids_and_does_not_wrap(tmp_path: Path) -> None:
    content = json.loads(raw().to_str())
    content["model"]["vocab"].update({f"filler{i}": i for i in range(500, 2**16 + 1)})
    content["added_tokens"].append({**content["added_tokens"][0], "id": 2**16 + 1, "content": "<last>"})
    (tmp_path / "wide.json").write_text(json.dumps(content))
    tokenizer = new_bpe(path=str(tmp_path / "wide.json"), eos_token="<last>")
    tokenizer.fit([])
    assert tokenizer.dtype == np.uint32 == tokenizer.encode("a").dtype
    assert tokenizer.eos_id == 2**16 + 1 == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode(novel())) == novel()
