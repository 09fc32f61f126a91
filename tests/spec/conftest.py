"""A run spec to make mistakes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sparsekit.errors import SpecError
from sparsekit.spec.load import load_spec


@pytest.fixture
def raw(tiny) -> dict[str, Any]:
    """A valid run spec of four layers; the byte tokenizer needs the vocabulary."""
    return {"name": "test", "model": tiny(n_layers=4, vocab_size=300)}


@pytest.fixture
def problems() -> Callable[..., list[str]]:
    """The lines that a spec's mistakes are told in."""

    def tell(raw: Any, overrides: Any = ()) -> list[str]:
        with pytest.raises(SpecError) as caught:
            load_spec(raw, overrides)
        assert str(caught.value).splitlines() == caught.value.problems, "one line for each mistake"
        return caught.value.problems

    return tell
