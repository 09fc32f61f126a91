"""From a file to a resolved spec: read, ``extends``, ``--set``, validate; and a spec's identity."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sparsekit.errors import SpecError, did_you_mean
from sparsekit.registry import OURSELVES, registry
from sparsekit.spec.facts import walk
from sparsekit.spec.merge import merge
from sparsekit.spec.model import ModelSpec
from sparsekit.spec.run import RunSpec
from sparsekit.spec.slot import Params, find_slot
from sparsekit.spec.typed import fields_at, type_at

# What a resumed run may change: none of these moves a weight that is already trained.
MAY_CHANGE = (
    "name", "packages", "train.max_steps", "train.max_tokens", "train.max_epochs", "train.log_every",
    "train.eval_every", "train.eval_tokens", "train.checkpoint_every", "train.keep", "train.callbacks", "train.device",
    "train.on_nonfinite", "train.statistics", "train.peak_flops", "parallel",
)  # fmt: skip


def load_spec(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunSpec:
    """The validated run spec of a file or of a dict.

    A model spec (one with no ``model`` key) becomes a run of that model with every other field at its default.

    Args:
        source: a JSON file, or its content.
        overrides: ``"train.optimizer.lr=3e-4"``, laid over the file in order, each value typed by the schema.

    Raises:
        SpecError: one line for each mistake, with its JSON path.
    """
    raw = read_raw(source, overrides)
    if "name" not in raw and isinstance(source, (str, Path)):
        raw["name"] = Path(source).stem
    return validate(raw)


def read_raw(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON of a spec with ``extends`` and overrides applied, always in the shape of a run spec."""
    if isinstance(source, (str, Path)):
        raw = _expand(read_json(Path(source)), Path(source).resolve().parent, (Path(source).resolve(),))
    else:
        raw = _expand(dict(source), Path.cwd(), ())
    if "model" not in raw:
        raw = {"model": raw}
    for text in overrides:
        raw = _override(raw, text)
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        SpecError: no such file, not UTF-8, not JSON (with line and column), a key twice, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise SpecError([f"{path}: the key {twice!r} stands twice in one object"])
        return dict(pairs)

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise SpecError([f"{path}: no such file{_nearby(path)}"]) from None
    except IsADirectoryError:
        raise SpecError([f"{path}: is a folder, not a JSON file"]) from None
    except UnicodeDecodeError as error:
        raise SpecError([f"{path}: not UTF-8 text (byte {error.start})"]) from None
    except json.JSONDecodeError as error:
        raise SpecError([f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}"]) from None
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from None
    if not isinstance(raw, dict):
        raise SpecError([f"{path}: expected a JSON object"])
    return raw


def _nearby(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
    return did_you_mean(path.name, siblings)


def _expand(value: Any, folder: Path, chain: tuple[Path, ...]) -> Any:
    """Applies ``"extends": "file.json"`` at any depth; paths are relative to the file that says it."""
    if isinstance(value, list):
        return [_expand(item, folder, chain) for item in value]
    if not isinstance(value, dict):
        return value
    own = {key: _expand(item, folder, chain) for key, item in value.items() if key != "extends"}
    if "extends" not in value:
        return own
    if not isinstance(value["extends"], str):
        raise SpecError([f"extends: expected the path of a JSON file, got {value['extends']!r}"])
    path = (folder / value["extends"]).resolve()
    if path in chain:
        raise SpecError([f"extends: {path.name} extends itself, by way of {' -> '.join(p.name for p in chain)}"])
    return merge(_expand(read_json(path), path.parent, (*chain, path)), own)


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """``raw`` with one ``path=value`` laid over it."""
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise SpecError([f"--set {text}: expected path=value, such as train.optimizer.lr=3e-4"])
    over = _typed_value(value, type_at(RunSpec, path, raw))
    try:
        laid: dict[str, Any] = _lay(raw, path, over)
    except IndexError as error:
        raise SpecError([f"--set {text}: {error}"]) from None
    return laid


def _lay(raw: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return merge(raw, value)
    head, rest = path[0], path[1:]
    if isinstance(raw, list):
        if not (head.lstrip("-").isdigit() and -len(raw) <= int(head) < len(raw)):
            raise IndexError(f"there is no item {head} in a list of {len(raw)}")
        index = int(head) % len(raw)
        return [_lay(item, rest, value) if i == index else item for i, item in enumerate(raw)]
    if rest and isinstance(raw, dict) and isinstance(raw.get(head), (dict, list)):
        return {**raw, head: _lay(raw[head], rest, value)}
    over: Any = value
    for part in reversed(path):
        over = {part: over}
    return merge(raw, over)


def _typed_value(text: str, annotation: Any) -> Any:
    """The text as JSON or as a string, whichever the schema takes at this place."""
    candidates: list[Any] = [text]
    with contextlib.suppress(json.JSONDecodeError):
        candidates.insert(0, json.loads(text))
    if annotation is not None and find_slot(annotation) is None and len(candidates) > 1:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        for candidate in candidates:
            try:
                adapter.validate_python(candidate, strict=True)
                return candidate
            except ValidationError:
                continue
    return candidates[0]


def validate(raw: Mapping[str, Any]) -> RunSpec:
    """A run spec from plain JSON values.

    Raises:
        SpecError: one line for each mistake.
    """
    try:
        return RunSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(_explain(error, RunSpec, raw) + _missing_packages(raw)) from None


def validate_model(raw: Mapping[str, Any]) -> ModelSpec:
    """A model spec from plain JSON values; as :func:`validate`."""
    try:
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(_explain(error, ModelSpec, raw)) from None


def _explain(error: ValidationError, root: type[Params], raw: Any) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            known = fields_at(root, path[:-1], raw)
            message = f"unknown key {path[-1]!r}{did_you_mean(path[-1], known)}"
            message += f"; keys: {', '.join(known)}" if known else ""
            path = path[:-1]
        elif problem["type"] == "missing":
            message = "required"
        elif problem["type"] in ("slot_name", "slot_type", "slot_class", "spec", "value_error"):
            message = problem["msg"].removeprefix("Value error, ")
        else:
            got = json.dumps(problem["input"], default=repr)
            message = f"{problem['msg'].replace('Input should be', 'expected')}, got {got}"
        line = f"{'.'.join(path) or 'spec'}: {message}"
        if line not in lines:
            lines.append(line)
    return lines


def _missing_packages(raw: Mapping[str, Any]) -> list[str]:
    """Which packages a saved spec was made with and this environment lacks."""
    wanted = raw.get("packages")
    lines = []
    for package, version in (wanted if isinstance(wanted, dict) else {}).items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"packages: made with {package} {version}, which is not installed: pip install {package}")
    return lines


def dump(spec: Params) -> dict[str, Any]:
    """The resolved spec as plain JSON values, every default filled in."""
    return spec.model_dump(mode="json")


def with_packages(spec: RunSpec) -> RunSpec:
    """The spec with the version of every plug-in package that it uses."""
    owners = {}
    for section in (spec.model, spec.data, spec.train, *spec.model.per_layer):
        for _, choice in walk(section):
            entry = registry(choice.kind).entry(choice.type)
            if entry.owner != OURSELVES and entry.version:
                owners[entry.owner] = entry.version
    return spec.model_copy(update={"packages": owners})


def fingerprint(spec: Params) -> str:
    """SHA-256 of the resolved spec; a run's name and the versions it was made with are no part of it."""
    content = {key: value for key, value in dump(spec).items() if key not in ("name", "packages")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
