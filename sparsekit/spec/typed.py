"""Which type a path of a spec has: for typed overrides, default types, and naming the nearest key in an error."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from sparsekit.errors import PluginError, UnknownNameError
from sparsekit.registry import registry
from sparsekit.spec.model import Partial
from sparsekit.spec.slot import Params, find_slot, slot_of

Place = tuple[Any, Any]  # (annotation, default) of a field; (None, None) for what is no part of a spec


def type_at(root: type[Params], path: Sequence[str], raw: Any) -> Any:
    """The annotation at ``path`` below ``root``, following ``raw`` through slots; None where the path leads nowhere."""
    return _descend((root, None), path, raw)[0]


def default_type(place: Place, path: Sequence[str], raw: Any) -> str | None:
    """What fills the slot at ``path`` below a place where nothing is said; None where that is no slot or has none."""
    annotation, default = _descend(place, path, raw)
    return default.get("type") if isinstance(default, dict) and find_slot(annotation) is not None else None


def _descend(place: Place, path: Sequence[str], raw: Any) -> Place:
    for part in path:
        place, raw = below(place, part, raw), _item(raw, part)
    return place


def below(place: Place, part: str, raw: Any) -> Place:
    """The place of a key or an item of ``raw``, which stands at a place."""
    found, default = place
    params = params_at(found, default, raw)
    if params is None:
        return _item_type(found), None
    if part == "type" and find_slot(found) is not None:
        return str, None
    if part not in params.model_fields:
        return None, None
    field = params.model_fields[part]
    slot = slot_of(field)
    annotation = Annotated[field.annotation, slot] if slot else field.annotation
    # what a partial object leaves out is not the default, but what it is merged over
    return annotation, None if _is_partial(found) else field.default


def params_at(annotation: Any, default: Any, raw: Any) -> type[Params] | None:
    """The class whose fields are the keys at a place: a spec's own, or what fills the slot there."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, Params):
            return option
        for mark in getattr(option, "__metadata__", ()):
            if isinstance(mark, Partial):
                return mark.of
    slot = find_slot(annotation)
    if slot is None:
        return None
    name = raw if isinstance(raw, str) else raw.get("type") if isinstance(raw, dict) else None
    if name is None and isinstance(default, dict):
        name = default.get("type")
    try:
        cls = registry(slot.kind).get(str(name))
    except (UnknownNameError, PluginError):
        return None
    return getattr(cls, "Params", None)


def fields_at(root: type[Params], path: Sequence[str], raw: Any) -> list[str]:
    """The keys that may stand at a path."""
    here = raw
    for part in path:
        here = _item(here, part)
    place = _descend((root, None), path, raw)
    params = params_at(*place, here)
    own = ["type"] if find_slot(place[0]) is not None else []
    return list(params.model_fields) + own if params else []


def _is_partial(annotation: Any) -> bool:
    return any(isinstance(mark, Partial) for mark in getattr(annotation, "__metadata__", ()))


def _options(annotation: Any) -> Sequence[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _item_type(annotation: Any) -> Any:
    """The type of what a list or dict holds."""
    for option in _options(annotation):
        args = get_args(option)
        if get_origin(option) is list:
            return args[0]
        if get_origin(option) is dict:
            return args[1]
    return None


def _item(raw: Any, part: str) -> Any:
    if isinstance(raw, dict):
        return raw.get(part)
    if isinstance(raw, list) and part.lstrip("-").isdigit() and -len(raw) <= int(part) < len(raw):
        return raw[int(part)]
    return None
