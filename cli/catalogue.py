"""``list`` and ``show``: what there is to name in a spec. Neither torch nor a plug-in is imported for a list."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
import textwrap
from typing import Annotated, Any

import typer

from sparsekit.errors import SparsekitError
from sparsekit.registry import KINDS, Entry, registry

from .options import Json

CHECK_SECONDS = 60


def list_entries(
    kind: Annotated[str | None, typer.Argument(help="Only this kind.", show_default=False)] = None,
    as_json: Json = False,
    check: Annotated[bool, typer.Option("--check", help="Imports every plug-in and says which fail.")] = False,
) -> None:
    """Lists what a spec can name, with a line on each."""
    registries = [registry(kind)] if kind else [registry(each) for each in KINDS]
    entries = [entry for each in registries for entry in each.entries()]
    if as_json:
        keys = ("kind", "name", "summary", "source", "owner")
        print(json.dumps([{key: getattr(entry, key) for key in keys} for entry in entries], indent=2))
    else:
        _print_table(entries)
    problems = [line for each in registries for line in each.collisions()]
    if check:
        problems += [line for entry in entries if not entry.built_in for line in _import_problem(entry)]
    for line in problems:
        print(f"problem: {line}", file=sys.stderr)
    if check and problems:
        raise typer.Exit(1)


def _print_table(entries: list[Entry]) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    column = max((len(entry.name) for entry in entries), default=0) + 2
    kind = None
    for entry in entries:
        if entry.kind != kind:
            kind = entry.kind
            print(f"\n{kind}")
        owner = "" if entry.built_in else f"[{entry.owner} {entry.version}] "
        text = f"{owner}{entry.summary}" + (f" ({entry.source})" if entry.source else "")
        lines = textwrap.wrap(text, max(40, width - column - 2)) or [""]
        print(f"  {entry.name:{column}}{lines[0]}")
        for line in lines[1:]:
            print(" " * (column + 2) + line)


def _import_problem(entry: Entry) -> list[str]:
    """A line if a plug-in's entry cannot be imported, tried in a process of its own, which may crash or hang."""
    code = (
        "import sys; from sparsekit.errors import SparsekitError; from sparsekit.registry import registry\n"
        "try: registry(sys.argv[1]).get(sys.argv[2])\n"
        "except SparsekitError as error: sys.exit(str(error))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, entry.kind, entry.name], capture_output=True, text=True, timeout=CHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [f"{entry.kind} {entry.name!r} of {entry.owner} does not import within {CHECK_SECONDS} s"]
    return [done.stderr.strip().splitlines()[-1]] if done.returncode else []


def show(
    kind: Annotated[str, typer.Argument(help="The kind, such as ffn.", show_default=False)],
    name: Annotated[str, typer.Argument(help="The name, such as swiglu.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Tells what an entry is and which parameters it takes."""
    entry = registry(kind).entry(name)
    cls = registry(kind).get(name)
    parameters = [_parameter(key, field) for key, field in cls.Params.model_fields.items()]
    traits = {key: getattr(cls, key) for key in ("causal", "batch_coupled", "grouped") if hasattr(cls, key)}
    if as_json:
        told = {"kind": kind, "name": name, "owner": entry.owner, "version": entry.version, "source": entry.source}
        print(json.dumps({**told, "doc": inspect.getdoc(cls), "parameters": parameters, **traits}, indent=2))
        return
    print(f"{kind} {name}, of {entry.owner} {entry.version} ({entry.target})\n")
    print(inspect.getdoc(cls) or "no description")
    print("\nparameters" if parameters else "\nno parameters")
    for each in parameters:
        default = "required" if each["required"] else f"= {json.dumps(each['default'])}"
        print(f"  {each['name']:16}{each['type']:32}{default}")
    if traits:
        print("\n" + "  ".join(f"{key}: {'yes' if value else 'no'}" for key, value in traits.items()))


def _parameter(name: str, field: Any) -> dict[str, Any]:
    from sparsekit.spec.slot import slot_of

    slot = slot_of(field)
    optional = " or null" if field.default is None and not field.is_required() else ""
    text = f"slot {slot.kind}{optional}" if slot else _type_name(field.annotation)
    limits = ", ".join(_limit(mark) for mark in field.metadata if _limit(mark))
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    return {
        "name": name,
        "type": f"{text} ({limits})" if limits else text,
        "required": field.is_required(),
        "default": default,
    }


def _limit(mark: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return ", ".join(f"{sign} {getattr(mark, key)}" for key, sign in signs.items() if hasattr(mark, key))


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    text = str(annotation).replace("typing.", "").replace("NoneType", "null").replace("None", "null")
    if text.startswith("Literal["):
        return " | ".join(repr(value) for value in annotation.__args__)
    return (
        text.split("Annotated[")[-1].split(",")[0].rstrip("]") + (" | null" if "null" in text else "")
        if "Annotated[" in text
        else text
    )


__all__ = ["SparsekitError", "list_entries", "show"]
