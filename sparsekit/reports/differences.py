"""In what the specs of runs differ, by path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

MISSING: Any = object()  # what a spec lacks, such as a layer's exception
APART = ("name", "train.seed", "packages")  # what says nothing of a run, or is told elsewhere


def differences(specs: Sequence[Mapping[str, Any]], apart: Sequence[str] = APART) -> dict[str, list[str | None]]:
    """The paths in which specs differ, and each one's value there in words; None where a spec has no such path.

    Objects are opened, lists are not. A slot that different types fill is one path, with what fills it in words.
    """
    found: dict[str, list[str | None]] = {}

    def compare(values: Sequence[Any], path: str) -> None:
        if path in apart or all(value == values[0] for value in values):
            return
        opened = all(value is MISSING or isinstance(value, Mapping) for value in values)
        types = {value.get("type") for value in values if isinstance(value, Mapping)}
        if not opened or len(types) > 1 or MISSING in values:
            found[path] = [None if value is MISSING else words(value) for value in values]
            return
        for key in dict.fromkeys(key for value in values for key in value):
            compare([value.get(key, MISSING) for value in values], f"{path}.{key}" if path else str(key))

    if specs:
        compare(specs, "")
    return found


def words(value: Any) -> str:
    """A spec's value: ``moe (n_experts 8, router top_k (k 2), …)``; null params of a slot are left out."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        params = [f"{key} {words(item)}" for key, item in value.items() if key != "type" and item is not None]
        told = f"({', '.join(params)})" if params else ""
        return f"{value.get('type', '')} {told}".strip() or "{}"
    if isinstance(value, list) and value:
        return ", ".join(words(item) for item in value)
    return json.dumps(value, ensure_ascii=False)
