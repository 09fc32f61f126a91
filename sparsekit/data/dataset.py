"""From the ``data`` section of a spec to what a run reads: source, tokenizer, training order and validation texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.data.mixing import join, readers
from sparsekit.data.sources import Source
from sparsekit.data.token_set import Tokens, TokenSet
from sparsekit.data.tokenizers import Tokenizer
from sparsekit.errors import DataError
from sparsekit.spec.run import DataSpec
from sparsekit.spec.slot import Choice

if TYPE_CHECKING:
    from sparsekit.data.loader import Loader
    from sparsekit.data.streaming import StreamLoader

OWN = "val"  # the name of the validation text that the training source itself holds out


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    Attributes:
        spec: the ``data`` section it comes from.
        source: what fills ``data.source``.
        tokenizer: fitted.
        train: the training streams with their weights; none where they are read while training.
        validation: by name; the first is OWN, the source's.
    """

    spec: DataSpec
    source: Source
    tokenizer: Tokenizer
    train: list[tuple[Tokens, float]]
    validation: dict[str, Tokens]

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that are equal exactly where training would be, by which a resume knows changed text."""
        told: dict[str, Any] = {f"train.{i}": _identity(tokens) for i, (tokens, _) in enumerate(self.train)}
        told |= {name: _identity(tokens) for name, tokens in self.validation.items()}
        return told | {"tokenizer": self.tokenizer.fingerprint}

    def loader(
        self, seq_len: int, seed: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Loader | StreamLoader:
        """This rank's training batches; see :class:`~sparsekit.data.loader.Batches` for what both can do."""
        mask = self.spec.document_mask
        if self.spec.streaming is None:
            from sparsekit.data.loader import Loader
            from sparsekit.data.packing import Windows

            windows = [(Windows(tokens, seq_len, mask), weight) for tokens, weight in self.train]
            return Loader(windows, seed, micro_batch_size, rank, world_size)
        from sparsekit.data.streaming import StreamLoader, Text

        text = Text(readers(self.source), self.tokenizer, seq_len, mask, self.spec.streaming.buffer, seed)
        return StreamLoader(text, micro_batch_size, self.spec.streaming.workers, rank, world_size)


def load_data(spec: DataSpec, tokenizer_path: Path | None = None) -> RunData:
    """Reads and encodes what a run needs before it starts.

    Args:
        spec: the ``data`` section.
        tokenizer_path: where the run keeps its tokenizer. It is loaded from there if it is there, as a resumed run
            must not train another; else it is fitted on the training documents and saved there.

    Raises:
        DataError: the text or the tokenizer cannot be read, or a split has no text.
    """
    source: Source = spec.source.cls(spec.source.params)
    tokenizer = load_tokenizer(spec.tokenizer, source, tokenizer_path)
    train = source.streams("train", tokenizer) if spec.streaming is None else []
    validation = {OWN: _validation(source, tokenizer, spec)}
    for name, choice in spec.validation.items():
        try:
            validation[name] = _validation(choice.cls(choice.params), tokenizer, spec)
        except DataError as error:
            raise DataError(f"data.validation.{name}: {error}") from None
    return RunData(spec, source, tokenizer, train, validation)


def load_tokenizer(tokenizer: Choice, source: Source, path: Path | None = None) -> Tokenizer:
    """The tokenizer of a run, loaded from ``path`` or else fitted on the source and saved there."""
    if path is not None and path.exists():
        loaded: Tokenizer = tokenizer.cls.load(tokenizer.params, path)
        return loaded
    fitted: Tokenizer = tokenizer.cls(tokenizer.params)
    fitted.fit(source.learning_text())
    if path is not None:
        fitted.save(path)
    return fitted


def _validation(source: Source, tokenizer: Tokenizer, spec: DataSpec) -> Tokens:
    if spec.streaming is None or spec.streaming.validation_tokens is None:
        return join(source.streams("validation", tokenizer))
    return TokenSet.from_documents(source.documents("validation"), tokenizer, spec.streaming.validation_tokens)


def _identity(tokens: Tokens) -> dict[str, Any]:
    return {"tokens": len(tokens), "fingerprint": tokens.fingerprint}
