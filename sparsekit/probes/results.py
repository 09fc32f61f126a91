"""What a probe found, on disk: JSON with the arrays beside it, a table of layers, and pictures."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.errors import DataError
from sparsekit.files import write_json, written_whole
from sparsekit.probes.base import Array, ProbeResult

INLINE = 4096  # entries up to which a matrix stands in the JSON too


def save(result: ProbeResult, folder: Path, stem: str, plots: bool = True) -> list[Path]:
    """Writes ``<stem>.json``, ``.npz`` (where there is more than the JSON holds), ``.csv`` and the pictures.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    arrays = _named({"matrices": result.matrices, "arrays": result.arrays, "per_layer": result.per_layer})
    if result.matrices or result.arrays:
        written.append(folder / f"{stem}.npz")
        with written_whole(written[-1]) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
    if result.per_layer:
        written.append(folder / f"{stem}.csv")
        with written_whole(written[-1]) as temporary, temporary.open("w", encoding="utf-8", newline="") as text:
            csv.writer(text).writerows(table(result))
    if plots:
        from sparsekit.probes.plots import draw

        written += draw(result, folder, stem)
    written.append(folder / f"{stem}.json")  # last: what is read first is there only if all is
    write_json(written[-1], as_json(result))
    return written


def as_json(result: ProbeResult) -> dict[str, Any]:
    """Plain JSON values; nan is null, and of arrays too large to stand here the shape is told."""
    return {
        "scalars": _plain(result.scalars),
        "intervals": _plain(result.intervals),
        "per_layer": _plain(result.per_layer),
        "matrices": {
            name: _plain(m) if m.size <= INLINE else {"shape": m.shape} for name, m in result.matrices.items()
        },
        "arrays": {name: {"shape": a.shape} for name, a in result.arrays.items()},
        "meta": _plain(result.meta),
    }


def load(path: Path) -> ProbeResult:
    """What :func:`save` wrote, from its JSON file and what stands beside it.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        arrays: dict[str, dict[str, Array]] = {"matrices": {}, "arrays": {}, "per_layer": {}}
        if told["matrices"] or told["arrays"]:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
                for name in stored.files:
                    group, _, own = name.partition("/")
                    arrays[group][own] = stored[name]
        for name, values in told["per_layer"].items():
            arrays["per_layer"].setdefault(name, np.array([math.nan if v is None else v for v in values]))
        scalars = {name: math.nan if value is None else value for name, value in told["scalars"].items()}
        intervals = {name: None if pair is None else tuple(pair) for name, pair in told["intervals"].items()}
        return ProbeResult(
            scalars, arrays["per_layer"], arrays["matrices"], intervals, arrays["arrays"], told["meta"]
        )  # fmt: skip
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such file; is {path} the result of a probe?") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: is not the result of a probe, or is damaged ({error})") from None


def table(result: ProbeResult) -> list[list[Any]]:
    """Rows of a table of layers, the first its header."""
    names = list(result.per_layer)
    n_layers = max(len(values) for values in result.per_layer.values())
    columns = [[*_plain(result.per_layer[name]), *[None] * (n_layers - len(result.per_layer[name]))] for name in names]
    return [["layer", *names], *([layer, *row] for layer, row in enumerate(zip(*columns, strict=True)))]


def comparison(results: Mapping[str, Mapping[str, ProbeResult]]) -> list[list[Any]]:
    """Rows of a table of targets by scalars, the first its header; None where a target has not that scalar."""
    names = list(
        dict.fromkeys((probe, name) for found in results.values() for probe, r in found.items() for name in r.scalars)
    )
    rows: list[list[Any]] = [["target", *(f"{probe}/{name}" for probe, name in names)]]
    for target, found in results.items():
        of = [found[probe].scalars.get(name) if probe in found else None for probe, name in names]
        rows.append([target, *_plain(of)])
    return rows


def _named(groups: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    return {f"{group}/{name}": array for group, arrays in groups.items() for name, array in arrays.items()}


def _plain(value: Any) -> Any:
    """JSON has no nan and no arrays."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
