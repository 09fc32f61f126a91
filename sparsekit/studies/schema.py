"""The JSON Schema of a study, for editors."""

from __future__ import annotations

from typing import Any

from sparsekit.spec.model import Partial
from sparsekit.spec.schema import PARTIAL, REF, json_schema
from sparsekit.spec.slot import Slot
from sparsekit.studies.spec import StudySpec


def study_schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a study's file; the base is a run's spec of which anything may be left out."""
    whole = json_schema()
    own = StudySpec.model_json_schema(ref_template=REF + "{model}")
    definitions = own.pop("$defs", {})
    resolved = _resolved({**own, "$defs": {**whole["$defs"], **definitions}})
    return {"$schema": whole["$schema"], **resolved, "title": "sparsekit study"}


def _resolved(node: Any) -> Any:
    """Turns the marks of slots and partial objects into references."""
    if isinstance(node, list):
        return [_resolved(item) for item in node]
    if not isinstance(node, dict):
        return node
    if isinstance(node.get(Slot.schema_key), str):
        return {"$ref": REF + node[Slot.schema_key]}
    if isinstance(node.get(Partial.schema_key), str):
        return {"$ref": REF + PARTIAL + node[Partial.schema_key]}
    return {key: _resolved(value) for key, value in node.items() if key != "default"}
