"""The JSON Schema of a spec, for editors: every registered entry of this environment included."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.registry import KINDS, registry
from sparsekit.spec.model import BlockSpec, ModelSpec, Partial
from sparsekit.spec.run import RunSpec
from sparsekit.spec.slot import Params, Slot

REF = "#/$defs/"
PARTIAL = "partial."


def json_schema(packages: Container[str] | None = None) -> dict[str, Any]:
    """JSON Schema 2020-12 of a run spec or of a bare model spec; of all packages' entries, or of some packages' only.

    Each registry is one ``$defs/<kind>``, to which slots refer (expanded in place they would recurse for ever:
    moe -> expert -> ffn -> moe). Every definition has a twin ``partial.<name>`` in which nothing is required, at any
    depth: of an object that ``extends`` a file, and of what ``layers`` lays over a block.
    """
    definitions: dict[str, Any] = {}
    for cls in (RunSpec, ModelSpec, BlockSpec):
        definitions[cls.__name__] = _collect(cls, definitions)
    for kind in KINDS:
        definitions[kind] = _kind_schema(kind, definitions, packages)
    definitions = {name: _with_extends(_resolve(body)) for name, body in definitions.items()}
    partial = {PARTIAL + name: _partial(body) for name, body in definitions.items() if name not in KINDS}
    for kind in KINDS:
        names = [name for name in registry(kind).names() if f"{kind}.{name}" in definitions]
        options = [{"$ref": f"{REF}{PARTIAL}{kind}.{name}"} for name in names]
        partial[PARTIAL + kind] = {"title": kind, "anyOf": [*options, {"enum": names}]}
    whole = {name: _extendable(name, body) for name, body in definitions.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparsekit spec",
        "type": "object",
        # one branch and not anyOf, so that an editor reports the mistake and not "matches neither"
        "if": {"anyOf": [{"required": [name]} for name in RunSpec.model_fields]},
        "then": {"$ref": f"{REF}RunSpec"},
        "else": {"$ref": f"{REF}ModelSpec"},
        "$defs": {**whole, **partial},
    }


def _collect(params: type[Params], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one class; those it refers to go to the definitions."""
    schema = params.model_json_schema(ref_template=REF + "{model}")
    definitions.update(schema.pop("$defs", {}))
    return schema


def _kind_schema(kind: str, definitions: dict[str, Any], packages: Container[str] | None) -> dict[str, Any]:
    """Any entry of a kind: an object for each, and the names alone where every parameter has a default."""
    options: list[dict[str, Any]] = []
    short: list[str] = []
    for entry in registry(kind).entries():
        name = entry.name
        if packages is not None and entry.owner not in packages:
            continue  # not even imported
        try:
            params = getattr(registry(kind).get(name), "Params", None)
        except SparsekitError:
            continue  # a plug-in that cannot be imported costs only its own names
        if not (isinstance(params, type) and issubclass(params, Params)):
            continue
        body = _collect(params, definitions)
        if not body.get("required"):
            short.append(name)
        body["properties"] = {"type": {"const": name}, **body.get("properties", {})}
        body["required"] = ["type", *body.get("required", [])]
        body["title"] = f"{kind}:{name}"
        definitions[f"{kind}.{name}"] = body
        options.append({"$ref": f"{REF}{kind}.{name}"})
    if short:
        options.append({"enum": short})
    # an object without a type changes parameters of the field's default entry
    typeless = {"type": "object", "properties": {"type": False}, "$ref": f"{REF}{PARTIAL}{kind}"}
    return {"title": kind, "anyOf": [*options, typeless]}


def _resolve(node: Any) -> Any:
    """Turns the marks that slots and partial objects left into references."""
    if isinstance(node, list):
        return [_resolve(item) for item in node]
    if not isinstance(node, dict):
        return node
    if Slot.schema_key in node:
        return {"$ref": REF + node[Slot.schema_key]}
    if Partial.schema_key in node:
        return {"$ref": REF + PARTIAL + node[Partial.schema_key]}
    return {key: _resolve(value) for key, value in node.items() if key != "default"}


def _with_extends(body: dict[str, Any]) -> dict[str, Any]:
    if "properties" not in body:
        return body
    return {**body, "properties": {"extends": {"type": "string"}, **body["properties"]}}


def _partial(node: Any) -> Any:
    """The same with nothing required, here and in what is referred to."""
    if isinstance(node, list):
        return [_partial(item) for item in node]
    if not isinstance(node, dict):
        return node
    loose = {key: _partial(value) for key, value in node.items() if not (key == "required" and isinstance(value, list))}
    if isinstance(loose.get("$ref"), str):
        loose["$ref"] = REF + PARTIAL + loose["$ref"].removeprefix(REF).removeprefix(PARTIAL)
    return loose


def _extendable(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """What an object extends may hold what it lacks."""
    if "properties" not in body:
        return body
    return {"if": {"required": ["extends"]}, "then": {"$ref": f"{REF}{PARTIAL}{name}"}, "else": body}
