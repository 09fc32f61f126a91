"""The JSON Schema of a spec, for editors: every registered entry of this environment included."""

from __future__ import annotations

import copy
from typing import Any

from sparsekit.errors import PluginError, SparsekitError
from sparsekit.registry import KINDS, registry
from sparsekit.spec.model import BlockSpec, ModelSpec, Partial
from sparsekit.spec.run import RunSpec
from sparsekit.spec.slot import Slot

REF = "#/$defs/"


def json_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a run spec or of a bare model spec.

    Each registry is one ``$defs/<kind>``, to which slots refer (expanded in place they would recurse for ever:
    moe -> expert -> ffn -> moe). ``extends`` is allowed in every object, and then nothing there is required.
    """
    definitions: dict[str, Any] = {}
    roots = [_collect(cls.model_json_schema(ref_template=REF + "{model}"), definitions) for cls in (RunSpec, ModelSpec)]
    _collect(BlockSpec.model_json_schema(ref_template=REF + "{model}"), definitions)
    for kind in KINDS:
        definitions[kind] = _kind_schema(kind, definitions)
    definitions["Partial"] = _partial(definitions["BlockSpec"])
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sparsekit spec",
        "$defs": definitions,
    }
    run, model = (_extendable(_resolve(root)) for root in roots)
    definitions.update({name: _extendable(_resolve(body)) for name, body in definitions.items() if name not in KINDS})
    definitions.update({kind: _resolve(definitions[kind]) for kind in KINDS})
    # one branch and not anyOf, so that an editor reports the mistake and not "matches neither"
    schema.update({"if": {"required": ["model"]}, "then": run, "else": model, "type": "object"})
    return schema


def _collect(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    definitions.update(schema.pop("$defs", {}))
    return schema


def _kind_schema(kind: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Any entry of a kind: an object for each, and the names alone where every parameter has a default."""
    options: list[dict[str, Any]] = []
    short: list[str] = []
    typeless: dict[str, Any] = {}
    for name in registry(kind).names():
        try:
            params = registry(kind).get(name).Params
        except (PluginError, SparsekitError):
            continue  # a plug-in that cannot be imported costs only its own names
        body = _collect(params.model_json_schema(ref_template=REF + "{model}"), definitions)
        typeless.update(copy.deepcopy(body.get("properties", {})))
        if not body.get("required"):
            short.append(name)
        body["properties"] = {"type": {"const": name}, **body.get("properties", {})}
        body["required"] = ["type", *body.get("required", [])]
        body["title"] = f"{kind}:{name}"
        definitions[f"{kind}.{name}"] = body
        options.append({"$ref": f"{REF}{kind}.{name}"})
    if short:
        options.append({"enum": short})
    # an object without a type changes parameters of the field's default entry, or of what it is merged over
    keys = dict.fromkeys(typeless, True)
    options.append({"type": "object", "properties": {"type": False, **keys}, "additionalProperties": False})
    return {"title": kind, "anyOf": options}


def _partial(block: dict[str, Any]) -> dict[str, Any]:
    part = copy.deepcopy(block)
    part.pop("required", None)
    part["title"] = "part of a block"
    return part


def _resolve(node: Any) -> Any:
    """Turns the marks that slots and partial objects left into references."""
    if isinstance(node, list):
        return [_resolve(item) for item in node]
    if not isinstance(node, dict):
        return node
    if Slot.schema_key in node:
        return {"$ref": REF + node[Slot.schema_key]}
    if Partial.schema_key in node:
        return {"$ref": REF + "Partial"}
    return {key: _resolve(value) for key, value in node.items() if key != "default"}


def _extendable(body: dict[str, Any]) -> dict[str, Any]:
    """Allows ``extends`` in an object; what it extends may hold the required keys."""
    if body.get("type") != "object" or "properties" not in body:
        return body
    body = {**body, "properties": {"extends": {"type": "string"}, **body["properties"]}}
    required = body.pop("required", [])
    if required:
        body["if"] = {"not": {"required": ["extends"]}}
        body["then"] = {"required": required}
    return body
