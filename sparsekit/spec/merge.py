"""How one piece of JSON lies over another: ``extends``, ``--set`` and per-layer exceptions all merge this way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

Path = tuple[str, ...]
DefaultType = Callable[[Path], str | None]  # of the slot at a path, if there is one that has a default


def merge(base: Any, over: Any, default_type: DefaultType = lambda path: None, path: Path = ()) -> Any:
    """``over`` laid upon ``base``: objects merge key by key, everything else (lists too) is replaced.

    A slot whose ``type`` changes is replaced whole, since the parameters of one component mean nothing to another;
    the shorthand ``"rmsnorm"`` is read as ``{"type": "rmsnorm"}`` wherever the other side is an object, and a slot of
    ``base`` that names no type as of its default one. Neither argument is changed.

    Args:
        default_type: asked only where it matters.
        path: from where ``default_type`` counts to ``base``.
    """
    if isinstance(base, str) and isinstance(over, dict):
        base = {"type": base}
    named = over.get("type") if isinstance(over, dict) else over
    if isinstance(named, str) and isinstance(base, dict) and "type" not in base:
        default = default_type(path)
        base = base if default is None else {"type": default, **base}
    if isinstance(over, str) and isinstance(base, dict) and "type" in base:
        over = {"type": over}
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    if "type" in over and "type" in base and over["type"] != base["type"]:
        return copy.deepcopy(over)
    merged = {key: copy.deepcopy(value) for key, value in base.items() if key not in over}
    for key, value in over.items():
        below = (*path, key)
        merged[key] = merge(base[key], value, default_type, below) if key in base else copy.deepcopy(value)
    return {key: merged[key] for key in [*base, *(key for key in over if key not in base)]}


def differences(left: Any, right: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two JSON values differ: ``{"model.d_model": (256, 512)}``; None stands for a key that is absent."""
    if isinstance(left, dict) and isinstance(right, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*left, *(key for key in right if key not in left)]:
            below = f"{path}.{key}" if path else key
            found.update(differences(left.get(key), right.get(key), below))
        return found
    return {} if left == right else {path: (left, right)}
