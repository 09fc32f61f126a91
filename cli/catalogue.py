"""``list`` and ``show``: what there is to name in a spec. Neither torch nor a plug-in is imported for a list."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import os
import shutil
import sys
import textwrap
import time
import types
from multiprocessing.connection import Connection
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from sparsekit.errors import SparsekitError, did_you_mean
from sparsekit.registry import KINDS, Entry, Registry, registry

from .options import Json

CHECK_SECONDS = 60.0
SLOW_SECONDS = 3.0
TRAITS = ("causal", "batch_coupled", "stateful", "token_wise", "grouped", "caches", "fullgraph")


def list_entries(
    kind: Annotated[str | None, typer.Argument(help="Only this kind.", show_default=False)] = None,
    as_json: Json = False,
    check: Annotated[bool, typer.Option("--check", help="Imports every plug-in, and says only which fail.")] = False,
) -> None:
    """Lists what a spec can name, with a line on each."""
    registries = [registry(kind)] if kind else [registry(each) for each in KINDS]
    entries = [entry for each in registries for entry in each.entries()]
    if check:
        _check(entries, [line for each in registries for line in each.collisions()])
        return
    if as_json:
        keys = ("kind", "name", "summary", "source", "owner")
        print(json.dumps([{key: getattr(entry, key) for key in keys} for entry in entries], indent=2))
    else:
        column = max((len(entry.name) for entry in entries), default=0) + 2
        for each in registries:
            _print_kind(each, column)
        _tell([line for each in registries for line in each.collisions()])


def _print_kind(kind: Registry, column: int) -> None:
    width = shutil.get_terminal_size((120, 24)).columns
    print(f"\n{kind.kind}")
    if not kind.names():
        print("  (none yet)")
    for entry in kind.entries():
        owner = "" if entry.built_in else f"[{entry.owner} {entry.version}] "
        text = f"{owner}{entry.summary}" + (f" ({entry.source})" if entry.source else "")
        lines = textwrap.wrap(text, max(40, width - column - 2)) or [""]
        print(f"  {entry.name:{column}}{lines[0]}")
        for line in lines[1:]:
            print(" " * (column + 2) + line)


def _check(entries: list[Entry], problems: list[str]) -> None:
    packages: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.built_in:
            packages.setdefault(entry.owner, []).append(entry)
    if packages:
        import sparsekit.components.contracts  # noqa: F401 (torch, once for all that are tried)
    problems = problems + [line for each in packages.values() for line in _import_problems(each)]
    _tell(problems)
    if problems:
        raise typer.Exit(1)
    n = len(packages)
    count = sum(map(len, packages.values()))
    works = f"all {count} entries of {n} package{'s' if n > 1 else ''} work" if count > 1 else "the one entry works"
    print(works if packages else "no plug-in is installed")


def _tell(problems: list[str]) -> None:
    for line in problems:
        print(f"problem: {line}", file=sys.stderr)


def _import_problems(entries: list[Entry]) -> list[str]:
    """A line for each of a package's entries that cannot be imported.

    They are tried in a process of the package's own, which may crash or hang; what comes after that is not tried.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_try_imports, args=(entries, sender))
    process.start()
    sender.close()
    problems: list[str] = []
    for i, entry in enumerate(entries):
        began = time.monotonic()
        what = f"{entry.kind} {entry.name!r} of package {entry.owner} {entry.version}"
        rest = f"; not tried: its {len(entries) - i - 1} other entries" if i + 1 < len(entries) else ""
        try:
            if not receiver.poll(CHECK_SECONDS):
                problems.append(f"{what} does not import within {CHECK_SECONDS:.0f} s{rest}")
                break
            problem = receiver.recv()
        except EOFError:
            process.join()
            problems.append(f"{what} ends the process that imports it (exit code {process.exitcode}){rest}")
            break
        seconds = time.monotonic() - began
        if problem:
            problems.append(problem)
        elif seconds > SLOW_SECONDS:
            print(f"slow: {what} takes {seconds:.1f} s to import, whenever it is used", file=sys.stderr)
    process.kill()
    process.join()
    return problems


def _try_imports(entries: list[Entry], sender: Connection) -> None:
    """Sends for each what is wrong with it, or nothing."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what it prints is not ours to print
        os.dup2(nothing, stream)
    for entry in entries:
        try:
            cls = registry(entry.kind).get(entry.name)
            ours = hasattr(getattr(cls, "Params", None), "model_fields")
            what = f"{entry.kind} {entry.name!r} of package {entry.owner} ({entry.target})"
            sender.send("" if ours else f"{what} has no Params that derive from sparsekit.Params")
        except SparsekitError as error:
            sender.send(str(error))


def show(
    kind: Annotated[
        str, typer.Argument(help="The kind, such as ffn; or a section of a spec, such as train.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Argument(help="The name, such as swiglu; or a field of the section.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Tells what an entry or a section of a spec is, and which parameters it takes."""
    sections = _sections()
    if kind in sections:
        _show_section(kind, sections[kind], name, as_json)
        return
    if name is None:
        known = f"give one of its names (sparsekit list {registry(kind).kind})"
        raise SparsekitError(f"show {kind}: {known}, or a section of a spec: {', '.join(sections)}")
    entry = registry(kind).entry(name)
    cls = registry(kind).get(name)
    if not hasattr(getattr(cls, "Params", None), "model_fields"):
        what = f"{kind} {name!r} of package {entry.owner} ({entry.target})"
        raise SparsekitError(f"{what} has no Params that derive from sparsekit.Params")
    parameters = [_parameter(key, field) for key, field in cls.Params.model_fields.items()]
    traits = {key: getattr(cls, key) for key in TRAITS if isinstance(getattr(cls, key, None), bool)}
    (slot, use), runs = _example(kind, name), _runs_on(kind, name, cls)
    if as_json:
        source = entry.source or _source(cls)
        told: dict[str, Any] = {"kind": kind, "name": name, "owner": entry.owner, "version": entry.version}
        told |= {"source": source, "doc": inspect.getdoc(cls), "parameters": parameters}
        told |= {**traits, **runs, "example": slot}
        print(json.dumps(told, indent=2))
        return
    print(f"{kind} {name}, of {entry.owner} {entry.version} ({entry.target})\n")
    print(inspect.getdoc(cls) or "no description")
    _print_parameters(parameters)
    if traits:
        print("\n" + "  ".join(f"{key}: {'yes' if value else 'no'}" for key, value in traits.items()))
    if runs:
        print("\n" + "\n".join(f"{key}: {', '.join(values) or 'none'}" for key, values in runs.items()))
    print(f"\nexample\n  {use}")


def _source(cls: Any) -> str:
    """The paragraph of a docstring that says where a method comes from."""
    paragraphs = (inspect.getdoc(cls) or "").split("\n\n")
    return next((" ".join(p.split()).removeprefix("Source: ") for p in paragraphs if p.startswith("Source: ")), "")


def _runs_on(kind: str, name: str, cls: Any) -> dict[str, list[str]]:
    """Of a kernel where it runs and what it can do; of an attention that has kernels, which of them do as it is."""
    from sparsekit.components.kernels import able_to
    from sparsekit.examples import example_slot
    from sparsekit.spec.slot import Slot

    if kind == "kernel":
        dtypes = [str(dtype).removeprefix("torch.") for dtype in cls.dtypes]
        told = {"devices": list(cls.devices), "gradients": list(cls.gradients), "dtypes": dtypes}
        told["features"] = sorted(cls.features)
        package = cls.package
        return told | ({"needs": [f"{package[0]} (pip install 'sparsekit[{package[1]}]')"]} if package else {})
    if kind == "attention" and hasattr(cls, "rule"):
        params = Slot(kind).validate(example_slot(kind, name)).params
        return {"kernels": able_to(cls.rule(params, 64).features)}
    return {}


def _example(kind: str, name: str) -> tuple[dict[str, Any] | None, str]:
    """A slot that validates, and how it is used: as a part of a spec or on a command line."""
    from sparsekit.examples import example_slot, fragment, inline

    try:
        slot = example_slot(kind, name)
    except ValueError as error:
        return None, f"none: {error}"
    part = fragment(kind, slot)
    return slot, json.dumps(part) if part is not None else f"sparsekit sparsify RUN --sparsifier {inline(slot)}"


def _print_parameters(parameters: list[dict[str, Any]]) -> None:
    print("\nparameters" if parameters else "\nno parameters")
    names = max((len(each["name"]) + 2 for each in parameters), default=0)
    kinds = max((len(each["type"]) + 2 for each in parameters), default=0)
    for each in parameters:
        default = "required" if each["required"] else f"= {json.dumps(each['default'])}"
        print(f"  {each['name']:{max(16, names)}}{each['type']:{max(32, kinds)}}{default}")


def _sections() -> dict[str, Any]:
    """The parts of a spec by name: its own sections, and the objects within these."""
    from sparsekit.spec.model import BlockSpec
    from sparsekit.spec.run import RunSpec
    from sparsekit.spec.typed import params_at

    found: dict[str, Any] = {"run": RunSpec, "block": BlockSpec}
    for name, section in RunSpec.model_fields.items():
        if cls := params_at(section.annotation, None, None):
            found[name] = cls
            inner = {key: params_at(field.annotation, None, None) for key, field in cls.model_fields.items()}
            found |= {key: params for key, params in inner.items() if params is not None}
    return found


def _show_section(section: str, cls: Any, field: str | None, as_json: bool) -> None:
    if field is not None and field not in cls.model_fields:
        near = did_you_mean(field, cls.model_fields)
        raise SparsekitError(f"{section}: unknown field {field!r}{near}; fields: {', '.join(cls.model_fields)}")
    names = cls.model_fields if field is None else [field]
    parameters = [_parameter(name, cls.model_fields[name]) for name in names]
    if as_json:
        print(json.dumps({"section": section, "doc": inspect.getdoc(cls), "parameters": parameters}, indent=2))
        return
    print(f"{section}, a section of a spec\n\n{inspect.getdoc(cls)}")
    _print_parameters(parameters)


def _parameter(name: str, field: Any) -> dict[str, Any]:
    from sparsekit.spec.slot import Params, slot_of

    slot = slot_of(field)
    optional = " or null" if field.default is None and not field.is_required() else ""
    text = f"slot {slot.kind}{optional}" if slot else _type_name(field.annotation)
    limits = ", ".join(_limit(mark) for mark in field.metadata if _limit(mark))
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, Params):
        default = default.model_dump(mode="json")
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
    """A type in a line: ``int (> 0) | 'auto' | null``."""
    from sparsekit.spec.slot import Slot

    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = ", ".join(_limit(mark) for mark in parts[1:] if _limit(mark))
        slot = next((f"slot {mark.kind}" for mark in parts[1:] if isinstance(mark, Slot)), None)
        return slot or _type_name(parts[0]) + (f" ({limits})" if limits else "")
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(part) for part in parts)
    if origin is Literal:
        return " | ".join(repr(value) for value in parts)
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {_type_name(parts[1] if origin is dict else parts[0])}"
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")


__all__ = ["SparsekitError", "list_entries", "show"]
