"""Text from tokens: whole characters, stop strings wherever tokens begin and end, and the command that prints it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsekit.cli import app
from typer.testing import CliRunner

from sparsekit.data.tokenizers import BPETokenizer, ByteTokenizer
from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model
from sparsekit.model.generate import generate
from sparsekit.model.text import TextStream, generate_text
from sparsekit.spec.load import load_spec
from sparsekit.training.run import train

BYTE = ByteTokenizer(ByteTokenizer.Params())
LETTERS = st.text("ab\né€", max_size=12)


def cut(text, stops):
    """Before the stop string that is complete first, and of several the longest."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(LETTERS, st.lists(LETTERS.filter(bool), max_size=3))
def test_a_stream_ends_before_the_first_stop_string(text, stops):
    stream, told = TextStream(BYTE, stops), ""
    for token in BYTE.encode(text):
        told += stream.push(int(token))
        assert told == stream.text
        assert cut(text, stops).startswith(told), "what was given out is never taken back"
        if stream.stopped:
            break
    told += stream.close()
    assert told == cut(text, stops)
    assert stream.stopped == any(s in text for s in stops)


def test_tokens_of_several_characters():
    tokenizer = BPETokenizer(BPETokenizer.Params(vocab_size=300))
    tokenizer.fit(["the end of the end"] * 20)
    ids = tokenizer.encode("the end of the end")
    assert len(ids) < 12
    stream = TextStream(tokenizer, ["d of"])
    assert "".join(stream.push(int(token)) for token in ids) == "the en"


def test_half_a_character_waits_and_is_told_in_the_end():
    stream = TextStream(BYTE)
    assert [stream.push(b) for b in "a€".encode()[:-1]] == ["a", "", ""]
    assert stream.close() == "\ufffd"


@pytest.fixture
def model(tiny):
    spec = tiny(vocab_size=257, max_seq_len=64, init={"type": "normal", "std": 0.3})
    return build_model(spec, dtype=torch.float64).eval()


def test_texts_are_the_tokens_of_each_prompt(model):
    prompts, pieces = ["one two", "", "é"], [[], [], []]
    texts = generate_text(model, BYTE, prompts, 20, temperature=0, on_text=lambda i, text: pieces[i].append(text))
    for prompt, text, heard in zip(prompts, texts, pieces, strict=True):
        ids = list(BYTE.encode(prompt)) or [BYTE.eos_id]
        assert text == BYTE.decode(list(generate(model, ids, 20, temperature=0, stop_id=BYTE.eos_id)))
        assert "".join(heard) == text


def test_a_stop_string_ends_one_prompt(model):
    prompts = ["one two", "three"]
    whole = generate_text(model, BYTE, prompts, 30, seed=3)
    stop = whole[0][4:6]
    assert generate_text(model, BYTE, prompts, 30, seed=3, stop=[stop]) == [cut(text, [stop]) for text in whole]


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step, which changes little of what it starts from."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("one two three four five six seven\n" * 30)
    block = {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 48}}
    model = {"d_model": 32, "n_layers": 2, "vocab_size": 257, "max_seq_len": 32, "block": block}
    spec = {
        "model": {**model, "init": {"type": "normal", "std": 0.3}},
        "data": {"source": {"type": "text", "path": str(folder / "text.txt")}},
        "train": {"max_steps": 1, "micro_batch_size": 1, "callbacks": []},
    }
    train(load_spec(spec), out=folder / "run")
    return str(folder / "run")


def tell(*arguments):
    done = CliRunner().invoke(app, ["generate", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_command_streams_one_prompt(run):
    options = ["--prompt", "one", "--max-new-tokens", "12", "--top-p", "0.9", "--min-p", "0.05", "--seed", "4"]
    text = tell(run, *options)
    assert text == tell(run, *options)
    assert text.startswith("one") and len(text) > 6
    stop = text[5]
    assert tell(run, *options, "--stop", stop) == cut(text[3:-1], [stop]).join(("one", "\n"))


def test_the_command_takes_a_file_of_prompts(run, tmp_path):
    lines, listed = tmp_path / "prompts.txt", tmp_path / "prompts.json"
    lines.write_text("one\n\ntwo words\n")
    listed.write_text(json.dumps(["one", "two words"]))
    options = ["--max-new-tokens", "5", "--temperature", "0"]
    text = tell(run, "--prompts", str(lines), *options)
    assert text == tell(run, "--prompts", str(listed), *options)
    alone = [tell(run, "--prompt", prompt, *options) for prompt in ("one", "two words")]
    assert text == f"--- 1\n{alone[0]}--- 2\n{alone[1]}"


def test_mistakes(run, tmp_path):
    empty, numbers = tmp_path / "empty.txt", tmp_path / "numbers.json"
    empty.write_text("\n")
    numbers.write_text("[1, 2]")
    for arguments, told in [
        (["--prompts", str(empty)], f"{empty}: holds no prompts; give a line of text"),
        (["--prompts", str(numbers)], f"{numbers}: holds no prompts; give a JSON list of strings"),
        (
            ["--prompts", str(tmp_path / "none")],
            f"{tmp_path / 'none'}: cannot be read as prompts (No such file or directory); "
            "give a text file, a prompt a line",
        ),
        (["--prompts", str(empty), "--prompt", "a"], "--prompt and --prompts: give one of them"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
    ]:
        with pytest.raises(SparsekitError) as error:
            tell(run, *arguments)
        assert str(error.value) == told
