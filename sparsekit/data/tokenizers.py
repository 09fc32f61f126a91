"""From text to token ids and back.

Every tokenizer has one token that stands for no text, the end of a document; whatever a text says, it cannot
produce that id, and decoding leaves it out.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, model_validator

from sparsekit import spec
from sparsekit.errors import DataError, did_you_mean
from sparsekit.files import written_whole
from sparsekit.spec.facts import Facts

Ids = np.ndarray[Any, np.dtype[Any]]
Self = TypeVar("Self", bound="Tokenizer")
REPLACEMENT = "\ufffd"  # what an id outside the vocabulary decodes to, as invalid bytes do


class Tokenizer(ABC):
    """Base of every tokenizer: text -> ids, ids -> text, and a state that one JSON file holds.

    A tokenizer that learns nothing implements ``encode_batch``, ``decode`` and the two sizes; one that learns also
    ``fit``, ``state`` and ``restore``.
    """

    class Params(spec.Params):
        pass

    name: ClassVar[str] = ""  # as users know it, for errors

    def __init__(self, params: Any):
        self.params = params

    @classmethod
    def count(cls, params: Any) -> int | None:
        """How many tokens it will have at most, where that is known before it is fitted."""
        return None

    @classmethod
    def check(cls, params: Any, facts: Facts) -> None:
        """Compares the vocabulary with the model's, ``facts["vocab_size"]``.

        Raises:
            ValueError: the model's is smaller.
        """
        model, ours = facts.get("vocab_size"), cls.count(params)
        if model is not None and ours is not None and model < ours:
            raise ValueError(
                f"model.vocab_size is {model}, but the {cls.name or cls.__name__} tokenizer has {ours} tokens; "
                f"set it to at least {ours}"
            )

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids: each is below it."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """The id that ends a document."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The narrowest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, [n_tokens] of :attr:`dtype`, without an end of text.

        Raises:
            DataError: a text holds half a surrogate pair, which no UTF-8 can say.
        """

    def encode(self, text: str) -> Ids:
        """The ids of one text; as :meth:`encode_batch`."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """The text of ids; ends of text are left out, and what is no id or no UTF-8 becomes U+FFFD."""

    def fit(self, documents: Iterable[str]) -> None:  # noqa: B027 - most tokenizers learn nothing
        """Learns the vocabulary from the training documents; nothing to do for one that has it."""

    def state(self) -> dict[str, Any]:
        """What was learnt, as JSON values."""
        return {"type": self.name or type(self).__name__, **self.params.model_dump(mode="json")}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes on what :meth:`state` gave.

        Raises:
            ValueError: it is another tokenizer's.
        """
        mine = self.name or type(self).__name__
        if state.get("type") != mine:
            raise ValueError(f"not the file of a {mine} tokenizer; give the one that it saved")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what determines the ids: two tokenizers that share it encode alike."""
        content = [self.name or type(self).__name__, self.eos_id, self.state()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the state as one JSON file, whole or not at all."""
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(self.state(), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls: type[Self], params: Any, path: Path) -> Self:
        """The tokenizer that :meth:`save` wrote.

        Raises:
            DataError: the file is missing, damaged, or another tokenizer's.
        """
        tokenizer = cls(params)
        tokenizer._restore_from(path)
        return tokenizer

    def _restore_from(self, path: Path) -> None:
        try:
            self.restore(read_state(path))
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None


def read_state(path: Path) -> dict[str, Any]:
    """The object in a tokenizer's JSON file.

    Raises:
        DataError: it is missing or no JSON object.
    """
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = [file.name for file in path.parent.glob("*.json")] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings)
        raise DataError(f"{path}: no such tokenizer file{near}; paths are relative to {Path.cwd()}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not a JSON file: {error}"
        raise DataError(f"{path}: cannot be read as a tokenizer: {reason}; give a tokenizers JSON file") from None
    if not isinstance(state, dict):
        raise DataError(f"{path}: cannot be read as a tokenizer: expected a JSON object; give a tokenizers JSON file")
    return state


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        lone = f"U+{ord(text[error.start]):04X}"
        raise DataError(
            f"text holds half a surrogate pair ({lone} at character {error.start}), which is no Unicode text; remove it"
        ) from None


def _checked(text: str) -> str:
    _utf8(text)
    return text


class ByteTokenizer(Tokenizer):
    """Each byte of the UTF-8 text is a token, 0 to 255, and 256 ends a text.

    Source: Xue et al. 2021, arXiv 2105.13626
    """

    name = "byte"
    vocab_size = 257
    eos_id = 256

    @classmethod
    def count(cls, params: Any) -> int:
        return cls.vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(_utf8(text), np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: ArrayLike) -> str:
        flat = _flat(ids)
        flat = flat[flat != self.eos_id]
        known = (flat >= 0) & (flat < 256)
        # 0xFF is in no UTF-8 text, so what is no id turns into U+FFFD
        return np.where(known, flat, 0xFF).astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding: bytes, of which the most frequent adjacent pair is merged again and again.

    Either ``vocab_size`` is given and the vocabulary learnt from the training documents (it stays smaller where they
    have no more pairs to merge), or ``path``, a ready tokenizers JSON file, whose end of text is ``eos_token``.

    Source: Sennrich, Haddow & Birch 2016, arXiv 1508.07909, alg. 1; on bytes: Radford et al. 2019 (GPT-2), sec. 2.2
    """

    class Params(Tokenizer.Params):
        vocab_size: Annotated[int, Field(ge=257)] | None = None
        path: str | None = None
        eos_token: Annotated[str, Field(min_length=1)] = "<|endoftext|>"

        @model_validator(mode="after")
        def _one_origin(self) -> BPETokenizer.Params:
            if (self.vocab_size is None) == (self.path is None):
                raise ValueError("give either vocab_size, to train a vocabulary, or path, to read one")
            return self

    name = "bpe"

    @classmethod
    def count(cls, params: Any) -> int | None:
        if params.vocab_size is not None:
            return int(params.vocab_size)
        # A run folder may be read where the file is not: its spec stays valid, and fit tells what is missing.
        path = Path(os.path.expanduser(params.path))
        if not path.is_file():
            return None
        try:
            return cls.load(params, path).vocab_size
        except DataError as error:
            raise ValueError(str(error)) from None

    def __init__(self, params: Any):
        super().__init__(params)
        self._state: dict[str, Any] | None = None
        self._backend: Any = None
        self._eos_id = self._vocab_size = 0

    def fit(self, documents: Iterable[str]) -> None:
        if self.params.path is not None:
            self._restore_from(Path(os.path.expanduser(self.params.path)))
            return
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.params.vocab_size,
            special_tokens=[self.params.eos_token],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte, also those not in the text
            show_progress=False,
        )
        backend.train_from_iterator(map(_checked, documents), trainer)
        self.restore(json.loads(backend.to_str()))

    def state(self) -> dict[str, Any]:
        self._ready()
        assert self._state is not None
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        if not isinstance(state.get("model"), dict):
            raise ValueError("not a file of the library tokenizers, as it has no model; give the tokenizer.json of one")
        # What a file may set and a corpus cannot bear: a text that is cut or filled up, and merges left to chance.
        model = {**state["model"], "dropout": None} if "dropout" in state["model"] else state["model"]
        state = {**state, "truncation": None, "padding": None, "model": model}
        try:
            backend = Backend.from_str(json.dumps(state))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(
                f"the library tokenizers cannot read it ({' '.join(str(error).split())}); give another"
            ) from None
        special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        if self.params.eos_token not in special:
            known = ", ".join(map(repr, special)) or "none"
            near = did_you_mean(self.params.eos_token, special)
            raise ValueError(
                f"{self.params.eos_token!r} is none of its special tokens{near}; special tokens: {known}; "
                "set data.tokenizer.eos_token"
            )
        vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        if self.params.vocab_size is not None and vocab_size > self.params.vocab_size:
            raise ValueError(
                f"has {vocab_size} tokens, more than data.tokenizer.vocab_size, {self.params.vocab_size}; "
                "set that to what the file was trained with"
            )
        backend.encode_special_tokens = True  # a text that spells a special token is still text
        self._state, self._backend = state, backend
        self._eos_id, self._vocab_size = special[self.params.eos_token], vocab_size

    def _ready(self) -> Any:
        if self._backend is None:
            raise DataError("the bpe tokenizer has no vocabulary yet; call fit(documents), or load it from a file")
        return self._backend

    @property
    def vocab_size(self) -> int:
        self._ready()
        return self._vocab_size

    @property
    def eos_id(self) -> int:
        self._ready()
        return self._eos_id

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        backend = self._ready()
        # add_special_tokens is about templates ("<s> text </s>"); packing sets the document ends itself
        encoded = backend.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [np.array(item.ids, dtype=self.dtype) for item in encoded]

    def decode(self, ids: ArrayLike) -> str:
        backend, flat = self._ready(), _flat(ids)
        outside = np.flatnonzero((flat < 0) | (flat >= self._vocab_size))
        runs = [run[run < self._vocab_size] for run in np.split(np.where(flat < 0, self._vocab_size, flat), outside)]
        return REPLACEMENT.join(backend.decode(run.tolist(), skip_special_tokens=True) for run in runs)


def _flat(ids: ArrayLike) -> Ids:
    """Ids as one row of int64: unsigned ones would wrap in comparisons and differences."""
    return np.asarray(ids).reshape(-1).astype(np.int64)
