"""From a file to a resolved spec: read, ``extends``, ``--set``, validate; and a spec's identity."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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
from sparsekit.spec.typed import Place, below, default_type, fields_at, type_at

# What a resumed run may change, all that is below included: how long it trains, what it tells and keeps, and with how
# much memory and time. None of these moves a weight that is already trained, nor changes an update but by rounding.
MAY_CHANGE = (
    "name", "packages", "probes", "train.max_steps", "train.max_tokens", "train.max_epochs", "train.log_every",
    "train.eval_every", "train.eval_tokens", "train.checkpoint_every", "train.keep", "train.callbacks", "train.device",
    "train.on_nonfinite", "train.statistics", "train.peak_flops", "parallel", "train.compile", "train.deterministic",
    "train.objective.chunk_tokens", "model.*.attention.kernel", "model.*.ffn.dispatch",
)  # fmt: skip


BEGINS, SAVED = "init_from", "spec.json"
HUGGING_FACE = "hf:"  # before the name or the folder of a model that is not in our format


def may_change(path: str) -> bool:
    """Whether a resumed run may have another value at a path of its spec."""
    return any(fnmatchcase(path, free) or fnmatchcase(path, f"{free}.*") for free in MAY_CHANGE)


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
    raw = _expanded(source)
    if "model" not in raw and BEGINS not in raw:
        raw = {"model": raw}
    first = [text for text in overrides if text.partition("=")[0].strip() == BEGINS]
    for text in first:
        raw = _override(raw, text)
    raw = _begun(raw)
    for text in overrides:
        raw = raw if text in first else _override(raw, text)
    return raw


def _begun(raw: dict[str, Any]) -> dict[str, Any]:
    """With the model and the tokenizer of ``init_from``, each where the spec gives none."""
    folder, data = raw.get(BEGINS), raw.get("data", {})
    if not isinstance(folder, str) or not isinstance(data, dict) or ("model" in raw and "tokenizer" in data):
        return raw
    path = Path(folder) / SAVED
    if folder.startswith(HUGGING_FACE):
        raise SpecError([f"{BEGINS}: {folder}: bring it in first: sparsekit import {folder} FOLDER; then give FOLDER"])
    if not path.exists():
        raise SpecError([f"{BEGINS}: {folder}: is neither a run nor a checkpoint (it holds no {SAVED})"])
    saved = read_json(path)
    tokenizer = {} if "model" in raw else {"tokenizer": saved["data"]["tokenizer"]}
    return {**raw, "model": raw.get("model", saved["model"]), "data": {**tokenizer, **data}}


def is_bare_model(source: str | Path | Mapping[str, Any]) -> bool:
    """Whether a spec is a model's alone, and everything else of a run of it has to be filled in."""
    return not {"model", BEGINS} & _expanded(source).keys()


def _expanded(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(source, (str, Path)):
        path = Path(source)
        whole: dict[str, Any] = _expand(read_json(path), path.resolve().parent, (path.resolve(),))
    else:
        whole = _expand(dict(source), Path.cwd(), ())
    return whole


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


def _nearby(path: Path, but: Sequence[Path] = ()) -> str:
    siblings = [p.name for p in path.parent.glob("*.json") if p not in but] if path.parent.is_dir() else []
    return did_you_mean(path.name, siblings)


def _expand(
    value: Any, folder: Path, chain: tuple[Path, ...], place: Place | None = None, keys: tuple[str, ...] = ()
) -> Any:
    """Applies ``"extends": "file.json"`` at any depth; paths are relative to the file that says it.

    ``place`` is where in a spec the value stands, None for a whole one; ``keys`` are those to it in its file, the last
    of ``chain``.
    """
    if isinstance(value, list) and place is not None:
        return [
            _expand(item, folder, chain, below(place, str(i), value), (*keys, str(i))) for i, item in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    root = ModelSpec if ModelSpec.model_fields.keys() & value.keys() else RunSpec
    here = place or (root, None)
    own = {
        key: _expand(item, folder, chain, below(here, key, value), (*keys, key))
        for key, item in value.items()
        if key != "extends"
    }
    if "extends" not in value:
        return own
    if not isinstance(value["extends"], str):
        raise SpecError([f"extends: expected the path of a JSON file, got {value['extends']!r}"])
    path = (folder / value["extends"]).resolve()
    if path in chain:
        raise SpecError([f"extends: {path.name} extends itself, by way of {' -> '.join(p.name for p in chain)}"])
    if not path.exists():
        asking = ": ".join((*map(str, chain[-1:]), ".".join((*keys, "extends"))))
        raise SpecError([f"{asking}: {path}: no such file{_nearby(path, chain)}"])
    base = _expand(read_json(path), path.parent, (*chain, path), place)
    return merge(base, own, lambda path: default_type(here, path, base))


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """``raw`` with one ``path=value`` laid over it."""
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or not all(path):
        raise SpecError([f"--set {text}: expected path=value, such as train.optimizer.lr=3e-4"])
    try:
        over = _typed_value(value, type_at(RunSpec, path, raw))
    except json.JSONDecodeError as error:
        raise SpecError([f"--set {text}: the value is not JSON: {error.msg} at its character {error.colno}"]) from None
    try:
        laid: dict[str, Any] = _lay(raw, path, over, (RunSpec, None))
    except IndexError as error:
        raise SpecError([f"--set {text}: {error}"]) from None
    return laid


def laid(raw: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A run spec's JSON with a value laid over what is at a dotted path, as ``--set`` does.

    Raises:
        IndexError: the path names an item that a list has not.
    """
    whole: dict[str, Any] = _lay(raw, path.split("."), value, (RunSpec, None))
    return whole


def _lay(raw: Any, path: Sequence[str], value: Any, place: Place) -> Any:
    """``raw``, which stands at a place, with a value laid over what is at a path below.

    An object that names its type is a whole slot, and nothing of what was there stays; all else is merged.
    """
    if not path:
        whole = find_slot(place[0]) is not None and isinstance(value, dict) and "type" in value
        return value if whole else merge(raw, value, lambda path: default_type(place, path, raw))
    head, rest = path[0], path[1:]
    inside = below(place, head, raw)
    if isinstance(raw, list):
        if not (head.lstrip("-").isdigit() and -len(raw) <= int(head) < len(raw)):
            raise IndexError(f"there is no item {head} in a list of {len(raw)}")
        index = int(head) % len(raw)
        return [_lay(item, rest, value, inside) if i == index else item for i, item in enumerate(raw)]
    if isinstance(raw, dict) and isinstance(raw.get(head), (dict, list)):
        return {**raw, head: _lay(raw[head], rest, value, inside)}
    over: Any = value
    for part in reversed(path):
        over = {part: over}
    return merge(raw, over, lambda path: default_type(place, path, raw))


def _typed_value(text: str, annotation: Any) -> Any:
    """The text as JSON or as a string, whichever the schema takes at this place.

    Raises:
        JSONDecodeError: it begins as an object or a list does and is none, where no string can stand.
    """
    is_slot = annotation is not None and find_slot(annotation) is not None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        if text.lstrip().startswith(("{", "[")) and (is_slot or not _takes(annotation, text)):
            raise
        return text
    if is_slot or _takes(annotation, value) or not _takes(annotation, text):
        return value
    return text


def _takes(annotation: Any, value: Any) -> bool:
    """Whether a value may stand where that type is; None, a place that there is not, takes any."""
    if annotation is None:
        return True
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def validate(raw: Mapping[str, Any]) -> RunSpec:
    """A run spec from plain JSON values.

    Raises:
        SpecError: one line for each mistake.
    """
    try:
        return RunSpec.model_validate(raw)
    except ValidationError as error:
        missing, other = packages_then_and_now(raw)
        raise SpecError(missing + other + _explain(error, RunSpec, raw, names=not missing)) from None


def validate_model(raw: Mapping[str, Any]) -> ModelSpec:
    """A model spec from plain JSON values; as :func:`validate`."""
    try:
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(_explain(error, ModelSpec, raw)) from None


def _explain(error: ValidationError, root: type[Params], raw: Any, names: bool = True) -> list[str]:
    """A line for each mistake; those in ``names`` only if asked for, as a missing package explains them."""
    lines = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "slot_name" and not names:
            continue
        path = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            known = fields_at(root, path[:-1], raw)
            homes = _sections_with(path[-1]) if root is RunSpec and len(path) == 1 else []
            near = did_you_mean(homes[0], homes) if homes else did_you_mean(path[-1], known)
            message = f"unknown key {path[-1]!r}{near}"
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


def _sections_with(key: str) -> list[str]:
    """Where in a run spec a key may stand one level down: ``["model.allow_leak"]``."""
    sections = {name: field.annotation for name, field in RunSpec.model_fields.items()}
    return [
        f"{name}.{key}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Params) and key in section.model_fields
    ]


def packages_then_and_now(raw: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Of the ``packages`` that something was made with, which are missing here, and which are of another version."""
    wanted = raw.get("packages")
    missing, other = [], []
    for package, version in (wanted if isinstance(wanted, dict) else {}).items():
        made = f"packages: made with {package} {version}"
        try:
            here = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{made}, which is not installed; install that package")
            continue
        if here != version:
            other.append(f"{made}, and {here} is installed; install that version")
    return missing, other


def dump(spec: Params) -> dict[str, Any]:
    """The resolved spec as plain JSON values, every default filled in."""
    return spec.model_dump(mode="json")


def package_of(kind: str, name: str) -> dict[str, str]:
    """The version of the plug-in package that brings an entry, by its name; of what is built in, nothing."""
    entry = registry(kind).entry(name)
    return {entry.owner: entry.version} if entry.owner != OURSELVES and entry.version else {}


def with_packages(spec: RunSpec) -> RunSpec:
    """The spec with the version of every plug-in package that it uses."""
    owners: dict[str, str] = {}
    for section in (spec.model, spec.data, spec.train, *spec.probes, *spec.model.per_layer):
        for _, choice in walk(section):
            owners |= package_of(choice.kind, choice.type)
    return spec.model_copy(update={"packages": owners})


def fingerprint(spec: Params) -> str:
    """SHA-256 of the resolved spec; a run's name and the versions it was made with are no part of it."""
    content = {key: value for key, value in dump(spec).items() if key not in ("name", "packages")}
    if content.get(BEGINS, "") is None:
        del content[BEGINS]  # which specs did not always have
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
