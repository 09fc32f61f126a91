"""Every document arrives once, as it stands in the file, on one side only; and mistakes are told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sparsekit.data import sources
from sparsekit.data.sources import NOVELS, Embedded, JSONLines, Source, TextFiles
from sparsekit.errors import DataError

LOCAL: list[Any] = [TextFiles, JSONLines]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def rows(*texts: str) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def text_source(**params: Any) -> TextFiles:
    return TextFiles(TextFiles.Params(**params))


def jsonl_source(**params: Any) -> JSONLines:
    return JSONLines(JSONLines.Params(**params))


def both(source: Source) -> tuple[list[str], list[str]]:
    return list(source.documents("train")), list(source.documents("validation"))


def error_of(run: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


def train_error(source: Source) -> str:
    return error_of(lambda: list(source.documents("train")))


# ---- embedded ----


def test_embedded_has_five_novels_and_holds_out_persuasion() -> None:
    train, validation = both(Embedded(Embedded.Params()))
    assert [text.lstrip()[:40].splitlines()[0] for text in train] == [
        "EMMA", "MANSFIELD PARK", "NORTHANGER ABBEY", "PRIDE AND PREJUDICE", "SENSE AND SENSIBILITY",
    ]  # fmt: skip
    assert validation[0].lstrip().startswith("Persuasion") and "Kellynch Hall" in validation[0]
    n_bytes = [len(text.encode()) for text in train]
    assert sum(n_bytes) == 3_558_170 and len(validation[0].encode()) == 466_853  # nothing was cut on the way in


def test_embedded_trains_on_a_subset_in_the_order_given() -> None:
    whole = dict(zip(NOVELS, Embedded(Embedded.Params()).documents("train"), strict=True))
    chosen, validation = both(Embedded(Embedded.Params(novels=["pride_and_prejudice", "emma"])))
    assert chosen == [whole["pride_and_prejudice"], whole["emma"]] and len(validation) == 1


@pytest.mark.parametrize(
    ("novels", "said"),
    [
        (["ema"], "unknown novel 'ema' (did you mean 'emma'?)"),
        (["persuasion"], "held out as validation"),
        ([], "names no novel"),
        (["emma", "emma"], "twice"),
    ],
)
def test_embedded_refuses(novels: list[str], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Embedded.Params(novels=novels)
    assert said in caught.value.errors()[0]["msg"]


def test_an_unknown_split_is_the_callers_mistake() -> None:
    for source in (Embedded(Embedded.Params()), text_source(path="x.txt")):
        with pytest.raises(ValueError, match=r"unknown split 'valid' \(did you mean 'validation'\?\)"):
            next(source.documents("valid"))


# ---- how local files become documents ----


def test_text_is_passed_on_byte_for_byte() -> None:
    content = "a\r\nb\x0c\u2028c\u0085\r\0d\n\n  \U0001f600 e\u0301 \ufeff end without newline"
    write("a.txt", content)
    write("v.txt", "v")
    train, validation = both(text_source(path="a.txt", validation_path="v.txt"))
    assert (train, validation) == ([content], ["v"])


def test_a_byte_order_mark_is_no_text() -> None:
    write("a.txt", b"\xef\xbb\xbfhello")
    write("a.jsonl", b"\xef\xbb\xbf" + rows("hello").encode())
    write("v.txt", "v")
    assert both(text_source(path="a.txt", validation_path="v.txt"))[0] == ["hello"]
    write("v.jsonl", rows("v"))
    assert both(jsonl_source(path="a.jsonl", validation_path="v.jsonl"))[0] == ["hello"]


def test_a_separator_line_divides_documents() -> None:
    write("a.txt", "one\ntwo\n\x1e\nthree \x1e four\n\x1e\r\n\n \n\x1e\nfive")
    write("v.txt", "v")
    train, _ = both(text_source(path="a.txt", validation_path="v.txt", separator="\x1e"))
    assert train == ["one\ntwo\n", "three \x1e four\n", "five"]


@pytest.mark.parametrize("separator", ["", "a\nb", "\r"])
def test_a_separator_is_what_one_line_holds(separator: str) -> None:
    with pytest.raises(ValidationError, match="what one line holds"):
        TextFiles.Params(path="a.txt", separator=separator)


def test_jsonl_reads_one_field_and_skips_blank_lines() -> None:
    write("a.jsonl", '\n{"body": "a\\u2028b\\n", "text": 1}\r\n  \n{"body": " c ", "n": [1, NaN]}')
    write("v.jsonl", '{"body": "v"}')
    train, validation = both(jsonl_source(path="a.jsonl", validation_path="v.jsonl", field="body"))
    assert (train, validation) == (["a\u2028b\n", " c "], ["v"])


def test_a_raw_line_separator_inside_json_does_not_end_the_line() -> None:
    write("a.jsonl", '{"text": "a\u2028b\u0085c"}\n')
    write("v.jsonl", rows("v"))
    assert both(jsonl_source(path="a.jsonl", validation_path="v.jsonl"))[0] == ["a\u2028b\u0085c"]


def test_files_globs_and_folders_each_file_once_in_order() -> None:
    for name in ("d/b.txt", "d/a.txt", "d/deep/c.txt", "d/not.md", "e.txt", "odd[1].txt", "v.txt"):
        write(name, name)
    write("d/._a.txt", b"\xff")
    (Path("d") / "folder.txt").mkdir()

    def found(path: str | list[str]) -> list[str]:
        return both(text_source(path=path, validation_path="v.txt"))[0]

    assert found("d") == ["d/a.txt", "d/b.txt"]
    assert found("d/**/*.txt") == ["d/a.txt", "d/b.txt", "d/deep/c.txt"]
    assert found(["e.txt", "d/*.txt", "d/../e.txt", "d/b.txt"]) == ["e.txt", "d/a.txt", "d/b.txt"]
    assert found("odd[1].txt") == ["odd[1].txt"]
    write("j/a.jsonl", rows("in j"))
    write("j/a.txt", "not json")
    write("v.jsonl", rows("v"))
    assert both(jsonl_source(path="j", validation_path="v.jsonl"))[0] == ["in j"]


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a.txt", "at home")
    write("v.txt", "v")
    assert both(text_source(path="~/a.txt", validation_path="~/v.txt"))[0] == ["at home"]


# ---- the split ----


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_every_document_is_on_one_side_and_adding_documents_moves_none(texts: list[str], fraction: float) -> None:
    source = jsonl_source(path="a.jsonl", validation_fraction=fraction)

    def sides(shown: list[str]) -> dict[str, list[str]]:
        write("a.jsonl", rows(*shown))
        found = {}
        for split in ("train", "validation"):
            try:
                found[split] = list(source.documents(split))
            except DataError:
                found[split] = []
        return found

    before, after = sides(texts), sides(["something new", *reversed(texts)])
    assert sorted(before["train"] + before["validation"]) == sorted(texts)
    assert not set(before["train"]) & set(before["validation"])
    for split, others in after.items():
        assert sorted(before[split]) == sorted(text for text in others if text != "something new")


def test_the_fraction_is_about_what_was_asked_and_the_order_is_kept() -> None:
    texts = [f"document {i}" for i in range(2000)]
    write("a.jsonl", rows(*texts))
    train, validation = both(jsonl_source(path="a.jsonl", validation_fraction=0.1))
    assert 140 < len(validation) < 260
    assert train == [text for text in texts if text in set(train)]


def test_text_and_jsonl_split_alike() -> None:
    texts = [f"document {i}\n" for i in range(60)]
    write("a.jsonl", rows(*texts))
    write("a.txt", "---\n".join(texts))
    for i, text in enumerate(texts):
        write(f"many/{i:02}.txt", text)
    expected = both(jsonl_source(path="a.jsonl", validation_fraction=0.3))
    assert both(text_source(path="a.txt", separator="---", validation_fraction=0.3)) == expected
    assert both(text_source(path="many", validation_fraction=0.3)) == expected


@settings(max_examples=150, deadline=None)
@given(st.text("ab \n", min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_a_lone_document_is_cut_at_the_line_end_nearest_to_the_fraction(text: str, fraction: float) -> None:
    write("a.txt", text)
    source = text_source(path="a.txt", validation_fraction=fraction)
    cuts = [i + 1 for i, c in enumerate(text) if c == "\n" and text[: i + 1].strip() and text[i + 1 :].strip()]
    if not cuts:
        train_error(source)
        return
    (train,), (validation,) = both(source)
    goal = round(len(text) * (1 - fraction))
    assert train + validation == text and len(train) in cuts
    assert abs(len(train) - goal) == min(abs(cut - goal) for cut in cuts)


def test_a_lone_document_gives_its_last_fraction() -> None:
    lines = [f"line {i:04}\n" for i in range(1000)]
    write("a.txt", "".join(lines))
    write("a.jsonl", rows("".join(lines)))
    expected = (["".join(lines[:900])], ["".join(lines[900:])])
    assert both(text_source(path="a.txt", validation_fraction=0.1)) == expected
    assert both(jsonl_source(path="a.jsonl", validation_fraction=0.1)) == expected


def test_a_large_file_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", rows(*(f"document {i}" for i in range(1000))))
    read = 0
    genuine = sources.decode

    def counting(*args: Any) -> str:
        nonlocal read
        read += 1
        return genuine(*args)

    monkeypatch.setattr(sources, "decode", counting)
    next(jsonl_source(path="a.jsonl").documents("train"))
    assert 0 < read < 20


# ---- what a user can do wrong ----


@pytest.mark.parametrize("source", LOCAL)
def test_a_missing_file_names_its_nearest_sibling(source: Any, tmp_path: Path) -> None:
    write("corpus.txt", "x")
    message = train_error(source(source.Params(path="corpsu.txt")))
    assert message.startswith("corpsu.txt: no such file (did you mean 'corpus.txt'?)") and str(tmp_path) in message
    assert "no such file;" in train_error(source(source.Params(path="nowhere/corpus.txt")))


@pytest.mark.parametrize("source", LOCAL)
def test_a_glob_or_folder_or_list_without_files(source: Any) -> None:
    Path("empty").mkdir()
    assert "data.source.path" in train_error(source(source.Params(path="*.nothing")))
    message = train_error(source(source.Params(path="empty")))
    assert message.startswith(f"empty: the folder has no *{source.suffix} file") and "data.source.path" in message
    assert "data.source.path: names no file" in train_error(source(source.Params(path=[])))
    write("a" + source.suffix, rows("a"))
    source = source(source.Params(path="a" + source.suffix, validation_path="*.nothing"))
    assert "*.nothing: matches no file" in train_error(source) and "data.source.validation_path" in train_error(source)
    with pytest.raises(ValidationError):
        source.Params(path="")


def test_what_cannot_be_opened() -> None:
    write("a.txt", "x")
    assert train_error(text_source(path="a.txt/b.txt")).startswith("a.txt/b.txt: cannot be read: Not a directory; ")


@pytest.mark.parametrize("content", ["", " \n\t\n", "\x1e\n\x1e\n"])
def test_empty_text(content: str) -> None:
    write("good.txt", "x")
    write("a.txt", content)
    message = train_error(text_source(path=["good.txt", "a.txt"], separator="\x1e"))
    assert message == "a.txt: holds no text; fill it or leave it out"
    write("a.jsonl", "\n\n")
    assert train_error(jsonl_source(path="a.jsonl")) == "a.jsonl: holds no text; fill it or leave it out"


@pytest.mark.parametrize("separator", [None, "---"])
def test_invalid_utf8_tells_line_and_byte_of_the_file(separator: str | None) -> None:
    write("a.txt", "grüße\nzwei\n".encode() + b"caf\xe9 au lait\n")
    message = train_error(text_source(path="a.txt", separator=separator))
    assert message.startswith("a.txt:3: not UTF-8 text (byte 16, 0xe9: ") and "iconv" in message


def test_invalid_utf8_in_jsonl() -> None:
    write("a.jsonl", rows("good").encode() + b'{"text": "caf\xe9"}\n')
    message = train_error(jsonl_source(path="a.jsonl"))
    assert message.startswith(f"a.jsonl:2: not UTF-8 text (byte {len(rows('good')) + 13}, 0xe9: ")


def test_utf8_that_is_cut_at_the_end_of_the_file() -> None:
    write("a.txt", "caf\u00e9".encode()[:-1])
    assert train_error(text_source(path="a.txt")).startswith("a.txt:1: not UTF-8 text (byte 3, 0xc3: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{'text': 1}", "not JSON: Expecting property name enclosed in double quotes at column 2; mend the line"),
        ("[1]", "expected a JSON object with the field 'text', got an array"),
        ("7", "expected a JSON object with the field 'text', got a number"),
        ('{"texts": "a", "id": 1}', "no field 'text' (did you mean 'texts'?); fields: 'texts', 'id'; set data.source."),
        ("{}", "no field 'text'; fields: none"),
        ('{"text": null}', "field 'text' is null, not a string; set data.source.field"),
        ('{"text": true}', "field 'text' is a boolean, not a string"),
        ('{"text": {"a\\n": 1}}', "field 'text' is an object, not a string"),
        ('{"text": " \\n"}', "field 'text' holds no text; fill it or remove the line"),
        ('{"text": "a\\ud83d"}', "field 'text' holds half a surrogate pair (U+D83D); mend the line"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "JSON that cannot be read: "),
        ("[" * 100_000, "JSON that cannot be read: "),
    ],
)
def test_a_line_that_is_no_document(line: str, said: str) -> None:
    write("a.jsonl", rows("good") + "\n" + line + "\n")
    message = train_error(jsonl_source(path="a.jsonl"))
    assert message.startswith(f"a.jsonl:3 (byte {len(rows('good')) + 1}): {said}") and len(message) < 250


def test_a_side_without_documents_says_which_fraction_would_do() -> None:
    write("a.jsonl", rows("one", "two", "three"))
    write("same.jsonl", rows("one", "one"))

    def message(path: str, split: str, fraction: float) -> str:
        return error_of(lambda: list(jsonl_source(path=path, validation_fraction=fraction).documents(split)))

    for split, name, fraction in (("validation", "validation", 1e-9), ("train", "training", 1 - 1e-9)):
        said = message("a.jsonl", split, fraction)
        assert said.startswith(f"a.jsonl: no {name} documents") and "none of the 3" in said
        advised = float(said.partition("set validation_fraction to ")[2].partition(",")[0])
        train, validation = both(jsonl_source(path="a.jsonl", validation_fraction=advised))
        assert train and validation
        said = message("same.jsonl", split, fraction)
        assert "set validation_fraction" not in said and said.endswith("give validation_path")


def test_a_lone_line_cannot_be_split() -> None:
    write("a.txt", "one line only\n")
    assert train_error(text_source(path="a.txt")).startswith("a.txt: no validation documents: ")
    assert "give validation_path" in train_error(text_source(path="a.txt"))
    write("a.jsonl", "\n" + rows("one line only"))
    assert train_error(jsonl_source(path="a.jsonl")).startswith("a.jsonl:2: no validation documents: ")


def test_a_file_in_both_parts() -> None:
    write("d/a.txt", "a")
    write("d/v.txt", "v")
    message = train_error(text_source(path="d", validation_path="d/../d/v.txt"))
    assert "d/v.txt: is in both path and validation_path; take it out of one" in message


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_the_fraction_is_a_part(fraction: float) -> None:
    with pytest.raises(ValidationError):
        TextFiles.Params(path="a.txt", validation_fraction=fraction)
