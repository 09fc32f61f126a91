"""What fills a slot, as it is typed on a command line: ``name:key=value,key=value``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ValidationError, create_model

from sparsekit.errors import SpecError
from sparsekit.spec.slot import Choice, Params, Slot


def chosen(kind: str, given: str | Mapping[str, Any] | Choice) -> Choice:
    """A choice of a kind, from a line, a dict with a ``type``, or itself.

    Raises:
        SpecError: a name or a parameter is unknown, or a value is of the wrong type; a line for each.
    """
    if isinstance(given, Choice):
        return given
    raw = parsed(kind, given) if isinstance(given, str) else dict(given)
    field: Any = (Annotated[Choice, Slot(kind)], ...)
    one: Any = create_model("One", __base__=Params, **{kind: field})
    try:
        choice: Choice = getattr(one.model_validate({kind: raw}), kind)
    except ValidationError as error:
        raise SpecError([line.removeprefix(f"{kind}.") for line in explained(error, kind)]) from None
    return choice


def parsed(kind: str, text: str) -> dict[str, Any]:
    """``name:key=value,key=value`` as a dict; values are JSON or else strings.

    Raises:
        SpecError: a part has no "=".
    """
    name, _, rest = text.partition(":")
    raw: dict[str, Any] = {"type": name.strip()}
    for part in _split(rest):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise SpecError([f"{kind} {text!r}: expected name:key=value,key=value, got {part!r}"])
        try:
            raw[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            raw[key.strip()] = value.strip()
    return raw


def _split(text: str) -> list[str]:
    """At commas that stand in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part for part in parts if part.strip()]


def explained(error: ValidationError, where: str) -> list[str]:
    """A line for each mistake in what was given on the command line or from Python."""
    lines = []
    for problem in error.errors(include_url=False):
        path = ".".join((where, *map(str, problem["loc"])))
        told = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{path}: {told.removeprefix('Value error, ')}")
    return lines
