"""A tokenizer of 300 tokens, learnt once."""

from __future__ import annotations

from typing import Any

import pytest

from sparsekit.data.tokenizers import BPETokenizer

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"


@pytest.fixture(scope="session")
def tokenizer() -> dict[str, Any]:
    made = BPETokenizer(BPETokenizer.Params(vocab_size=300))
    made.fit([TEXT] * 3)
    return made.state()
