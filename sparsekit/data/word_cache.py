"""The ids of a text from the ids of its pieces, each of which the tokenizer sees once.

Byte-pair encoding never merges across the pieces that its pattern cuts a text into, so the ids of a text are those
of its pieces, one after the other, and a piece that is known costs a look in a dictionary. What is cut here must be
a cut of the tokenizer too:

* In ASCII text the pattern's classes are plain ranges, so the pattern itself can be run, by Python's ``re``.
* Elsewhere they depend on a Unicode version. There only one cut is used: between a character that is white space in
  no version of Unicode and a blank. No alternative of a known pattern takes a blank after something else, or looks
  past its own end other than after white space; so every piece ends there, whatever stands before or after.

A tokenizer of which anything is not known to fit is used as it is.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sparsekit.data.tokenizers import BPETokenizer, Tokenizer

MAX_ENTRIES = 1 << 19  # about 100 MB
MAX_LENGTH = 40  # characters: what is longer hardly comes again
TYPECODES = {2: "H", 4: "I"}

# what is white space, a control or a format character in some version of Unicode, ASCII's white space apart
EXOTIC = "\x00-\x08\x0e-\x1f\x7f-\xa0\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff"
WHITE = "\t\n\v\f\r "


class Pattern(NamedTuple):
    """A known pattern: what it is on ASCII text, and the blanks before which it always cuts."""

    ascii: str
    blanks: str


GPT2 = Pattern(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", " \n\r\t")
_LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _on_ascii(pattern: str) -> str:
    in_class = pattern.replace(r"\n\p{L}\p{N}]", r"\nA-Za-z0-9]").replace(r"\s\p{L}\p{N}]", r"\sA-Za-z0-9]")
    return in_class.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]")


# their third alternative takes line ends after punctuation, so a line end is no blank of theirs
PATTERNS = {pattern: Pattern(_on_ascii(pattern), " ") for pattern in (_LLAMA3, _QWEN2)}


def encoder(tokenizer: Tokenizer) -> Callable[[Sequence[str]], list[bytes]]:
    """What ``tokenizer.encode_batch`` does, with the bytes of each text's ids; by known pieces where that is exact."""
    if isinstance(tokenizer, BPETokenizer):
        state = tokenizer.state()
        pattern = _pattern(state)
        if pattern is not None:
            pieces = Pieces(state, pattern, tokenizer)
            return lambda texts: [pieces.encode(text) for text in texts]
    return lambda texts: [ids.tobytes() for ids in tokenizer.encode_batch(texts)]


def _pattern(state: dict[str, Any]) -> Pattern | None:
    """The pattern of a byte-level BPE without any other step, if it is known."""
    model = state["model"]
    plain = (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and state.get("normalizer") is None
        and all(token["special"] for token in state.get("added_tokens", ()))  # those are only text, see restore
    )
    steps = state.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if not plain or not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1 and steps[0].get("use_regex", True):
        return GPT2
    if len(steps) != 2 or steps[1].get("use_regex", True) or steps[0].get("type") != "Split":
        return None
    split = steps[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    return PATTERNS.get(split.get("pattern", {}).get("Regex", ""))


class Pieces(dict[str, bytes]):
    """The bytes of the ids of each piece seen; a new one is encoded when it is asked for."""

    def __init__(self, state: dict[str, Any], pattern: Pattern, tokenizer: BPETokenizer):
        import json

        from tokenizers import Tokenizer as Backend

        super().__init__()
        self._tokenizer = tokenizer
        self._model = Backend.from_str(json.dumps(state)).model
        self._typecode = TYPECODES[tokenizer.dtype.itemsize]
        self._ascii = re.compile(pattern.ascii, re.ASCII)
        blanks = re.escape(pattern.blanks)
        exotic = EXOTIC + "".join(re.escape(char) for char in WHITE if char not in pattern.blanks)
        # blanks, then the rest of a piece; one that ends in what may be white space goes on over the next blanks
        piece = f"[{blanks}]*[^{blanks}]+(?:(?<=[{exotic}])[{blanks}]+[^{blanks}]*)*|[{blanks}]+"
        ascii_run = f"[\\x00-\\x7f]*[!-~](?=[{blanks}]|\\Z)"  # as long as it can be and end before a cut
        self._runs = re.compile(f"{ascii_run}|{piece}")

    def encode(self, text: str) -> bytes:
        """The bytes of a text's ids."""
        if text.isascii():
            return b"".join(map(self.__getitem__, self._ascii.findall(text)))
        return b"".join(
            b"".join(map(self.__getitem__, self._ascii.findall(run))) if run.isascii() else self[run]
            for run in self._runs.findall(text)
        )

    def __missing__(self, piece: str) -> bytes:
        if piece.isascii():
            tokens = self._model.tokenize(piece.translate(BYTE_LEVEL))
            ids = array(self._typecode, [token.id for token in tokens]).tobytes()
        else:
            ids = self._tokenizer.encode_batch([piece])[0].tobytes()
        if len(piece) <= MAX_LENGTH and len(self) < MAX_ENTRIES:
            self[piece] = ids
        return ids


def _byte_level() -> dict[int, str]:
    """How byte-level BPE writes ASCII: what is printable as itself, the other bytes in order from U+0100 on."""
    others = [byte for byte in range(128) if not 33 <= byte <= 126]
    return {byte: chr(256 + index) for index, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()
