"""Sources whose tokens lie ready: shards with a manifest, and raw ones of others."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from sparsekit.data.paths import find_files
from sparsekit.data.shards import MEND, NPY_MAGIC, Shard, TokenFiles, open_shards, read_manifest
from sparsekit.data.sources import SPLITS, Source
from sparsekit.data.token_set import Tokens
from sparsekit.data.tokenizers import Tokenizer
from sparsekit.errors import DataError, did_you_mean
from sparsekit.files import MANIFEST, write_json
from sparsekit.registry import registry

TOKENIZER = "tokenizer.json"
SAMPLES, SAMPLE_BYTES = 64, 1 << 12  # of a raw file, for its fingerprint: a page is what a disk reads at least
COUNTS = ".sparsekit-counts.json"  # beside raw files
PathText = Annotated[str, Field(min_length=1)]


class Shards(Source):
    """A folder that ``sparsekit tokenize`` wrote: its tokens are read as they lie there, and no text is encoded.

    ``path`` is the folder. The run's tokenizer must be the one the shards were made with, DIR/tokenizer.json.
    """

    class Params(Source.Params):
        path: PathText

    @property
    def folder(self) -> Path:
        return Path(self.params.path).expanduser()

    def streams(self, split: str, tokenizer: Tokenizer) -> list[tuple[Tokens, float]]:
        manifest = read_manifest(self.folder)
        theirs, ours = _tokenizer_of(self.folder, manifest)["fingerprint"], tokenizer.fingerprint
        if ours != theirs:
            raise DataError(
                f"{self.folder}: was made with tokenizer {theirs[:12]}, and the run's is {ours[:12]}; {self._mend()}"
            )
        if _known(split) not in manifest["splits"]:
            told = f"{self.folder}: holds no {split} tokens"
            raise DataError(f"{told}; make some with sparsekit tokenize --validation or --validation-fraction")
        return [(open_shards(self.folder, split, tokenizer.vocab_size), 1.0)]

    def learning_text(self) -> Iterator[str]:
        """Refused when read: there is a tokenizer already."""
        yield from _refused(f"{self.folder}: was made with a tokenizer of its own; {self._mend()}")

    def _mend(self) -> str:
        return f"set data.tokenizer to {json.dumps(tokenizer_slot(self.folder, read_manifest(self.folder)))}"

    def documents(self, split: str) -> Iterator[str]:
        """The documents, decoded: what was encoded, where the tokenizer loses nothing (byte-level ones do not)."""
        tokens = open_shards(self.folder, split)
        tokenizer = shards_tokenizer(self.folder)
        for number in range(tokens.n_documents):
            yield tokenizer.decode(tokens.document(number))


def _tokenizer_of(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    told = manifest.get("tokenizer")
    if (
        not isinstance(told, dict)
        or not isinstance(told.get("fingerprint"), str)
        or not isinstance(told.get("type"), str)
    ):
        raise DataError(f"{folder / MANIFEST}: is damaged; {MEND}")
    return told


def tokenizer_slot(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What ``data.tokenizer`` must be in a spec that reads these shards."""
    told = {key: value for key, value in _tokenizer_of(folder, manifest).items() if key != "fingerprint"}
    name = told.pop("type")
    if name == "bpe":
        told.update(vocab_size=None, path=f"{folder}/{TOKENIZER}")
    params = registry("tokenizer").get(name).Params(**told)
    return {"type": name, **params.model_dump(mode="json", exclude_defaults=True)}


def shards_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a folder of shards was made with.

    Raises:
        DataError: its file is missing, damaged, or was exchanged.
    """
    manifest = read_manifest(folder)
    slot = tokenizer_slot(folder, manifest)
    cls = registry("tokenizer").get(slot.pop("type"))
    tokenizer: Tokenizer = cls.load(cls.Params(**slot), folder / TOKENIZER)
    if tokenizer.fingerprint != _tokenizer_of(folder, manifest)["fingerprint"]:
        raise DataError(f"{folder / TOKENIZER}: is not the tokenizer of these shards; restore the file")
    return tokenizer


class RawShards(Source):
    """Files of nothing but token ids, as OLMo and others keep them: little-endian, an end of text after each document.

    ``path`` and ``validation_path`` name files, globs, or folders (their *.bin). ``eos_id`` is the id that ends a
    document, and must be the run's tokenizer's. How many bytes of text a split to validate on has is found by decoding
    all of it, and kept in a hidden file beside, where that can be written; training text is read where it is needed.
    """

    class Params(Source.Params):
        path: PathText | list[PathText]
        validation_path: PathText | list[PathText]
        eos_id: NonNegativeInt
        dtype: Literal["uint16", "uint32"] = "uint16"

    def streams(self, split: str, tokenizer: Tokenizer) -> list[tuple[Tokens, float]]:
        if tokenizer.eos_id != self.params.eos_id:
            raise DataError(
                f"data.source.eos_id is {self.params.eos_id}, and the tokenizer's end of text is {tokenizer.eos_id}; "
                "set data.tokenizer to the one that the files were made with"
            )
        return [(RawTokens(self._shards(split), tokenizer), 1.0)]

    def documents(self, split: str) -> Iterator[str]:
        """Refused when read: the files do not tell by which tokenizer they are to be decoded."""
        told = f"raw_shards has tokens and no text for {_known(split)}"
        yield from _refused(f"{told}; give data.tokenizer the path of the one they were made with")

    def _shards(self, split: str) -> list[Shard]:
        name = "path" if _known(split) == "train" else "validation_path"
        dtype = np.dtype(self.params.dtype).newbyteorder("<")
        shards = []
        for path in find_files(getattr(self.params, name), name, ".bin"):
            try:
                size = path.stat().st_size
                with path.open("rb") as file:
                    magic = file.read(len(NPY_MAGIC))
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}; mend data.source.{name}") from None
            if magic == NPY_MAGIC:
                raise DataError(f"{path}: is a .npy file with a header, not raw tokens; use the source shards")
            if size == 0 or size % dtype.itemsize:
                raise DataError(f"{path}: has {size} bytes, which is no number of {self.params.dtype}; mend it")
            shards.append(Shard(path, dtype, size // dtype.itemsize, None, self.params.eos_id))
        return shards


class RawTokens(TokenFiles):
    """The tokens of raw files; a :class:`~sparsekit.data.token_set.Tokens`.

    ``fingerprint`` is of the sizes of the files and of 64 pages of each, the first, the last and others evenly spread:
    hashing 10 billion tokens would take minutes at every start. A file that is cut, has grown, was exchanged, or has
    changed at its end or over a 63rd of its length has another; a smaller change within may pass unseen, as there is
    no manifest to tell (the source ``shards`` has one). A copy elsewhere has the same.

    ``n_bytes`` is counted once by decoding all, and then believed as long as fingerprint, tokenizer, and the files'
    times of change are the same.

    Raises:
        DataError: the last token ends no document, or one is outside the tokenizer's vocabulary (when it is read).
    """

    def __init__(self, shards: Sequence[Shard], tokenizer: Tokenizer):
        super().__init__(shards, tokenizer.vocab_size, "mend data.tokenizer or data.source.dtype")
        self.tokenizer = tokenizer
        last = int(shards[-1].tokens[-1])
        if last != tokenizer.eos_id:
            raise DataError(
                f"{shards[-1].path}: its last token is {last}, not the end of text, {tokenizer.eos_id}; "
                "mend data.source.eos_id or dtype"
            )

    @cached_property
    def n_bytes(self) -> int:
        times = [shard.path.stat().st_mtime_ns for shard in self.shards]
        key = hashlib.sha256(f"{self.fingerprint} {self.tokenizer.fingerprint} {times}".encode()).hexdigest()
        path = self.shards[0].path.parent / COUNTS
        try:
            known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            known = {}
        if not isinstance(known.get(key), int):
            numbers = range(self.n_documents)
            counted = sum(len(self.tokenizer.decode(self.document(number)).encode()) for number in numbers)
            known[key] = counted
            with contextlib.suppress(OSError):  # others' data, perhaps: then it is counted anew next time
                write_json(path, known)
        n_bytes: int = known[key]
        return n_bytes

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.dtype.str} {self.tokenizer.eos_id}".encode())
        for shard in self.shards:
            size = shard.n_tokens * shard.dtype.itemsize
            digest.update(f" {size} ".encode())
            try:
                with shard.path.open("rb", buffering=0) as file:  # not mapped: that would read on around each page
                    for place in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64):
                        file.seek(place)
                        digest.update(file.read(SAMPLE_BYTES))
            except OSError as error:
                raise DataError(f"{shard.path}: cannot be read: {error.strerror}; restore the file") from None
        return digest.hexdigest()


def _refused(told: str) -> Iterator[str]:
    raise DataError(told)


def _known(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}{did_you_mean(split, SPLITS)}; splits: {', '.join(SPLITS)}")
    return split
