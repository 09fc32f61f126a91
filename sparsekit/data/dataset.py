"""From the ``data`` section of a spec to tokens: source read, tokenizer fitted or found, both splits encoded."""

from __future__ import annotations

from pathlib import Path

from sparsekit.data.sources import Source
from sparsekit.data.token_set import TokenSet
from sparsekit.data.tokenizers import Tokenizer
from sparsekit.spec.slot import Choice


def load_text(
    source: Choice, tokenizer: Choice, tokenizer_path: Path | None = None
) -> tuple[Tokenizer, TokenSet, TokenSet]:
    """The fitted tokenizer, the training tokens and the validation tokens.

    Args:
        source: fills the slot ``data.source``.
        tokenizer: fills the slot ``data.tokenizer``.
        tokenizer_path: where the run keeps its tokenizer. It is loaded from there if it is there, as a resumed run
            must not train another; else it is fitted on the training documents and saved there.

    Raises:
        DataError: the text or the tokenizer cannot be read, or a split has no text.
    """
    reader: Source = source.cls(source.params)
    encoder = load_tokenizer(tokenizer, reader, tokenizer_path)
    train, validation = (TokenSet.from_documents(reader.documents(split), encoder) for split in ("train", "validation"))
    return encoder, train, validation


def load_tokenizer(tokenizer: Choice, source: Source, path: Path | None = None) -> Tokenizer:
    """The tokenizer of a run, loaded from ``path`` or else fitted on the source and saved there."""
    if path is not None and path.exists():
        loaded: Tokenizer = tokenizer.cls.load(tokenizer.params, path)
        return loaded
    fitted: Tokenizer = tokenizer.cls(tokenizer.params)
    fitted.fit(source.documents("train"))
    if path is not None:
        fitted.save(path)
    return fitted
