"""A study as data: a base run, what varies, seeds, what is measured at the end, figures to draw, claims to judge."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from sparsekit.errors import SpecError, did_you_mean
from sparsekit.spec.inline import explained
from sparsekit.spec.load import BEGINS, read_json
from sparsekit.spec.model import Partial
from sparsekit.spec.run import RunSpec
from sparsekit.spec.slot import Params

STUDY = "study.json"
MEASURE = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<layer>-?\d+)\])?")


class ProbeOn(Params):
    """What the probes look at: ``sequences`` windows of ``seq_len`` tokens of what a run validates on, or of ``data``.

    Windows are chosen by ``seed``, the same ones in every run with the same text and tokenizer.
    """

    sequences: PositiveInt = 100
    seq_len: PositiveInt | None = None
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 8
    data: str | dict[str, Any] | None = None


class EvaluateSpec(Params):
    """lm-eval's tasks, or those in the folder ``include_path``, which is read from where the study's file stands."""

    tasks: list[str] = Field(min_length=1)
    include_path: str | None = None
    limit: PositiveInt | None = None
    num_fewshot: NonNegativeInt | None = None


class ClaimSpec(Params):
    """What is expected of a measure along an axis: that it ``rises`` or ``falls`` from the first value to the last.

    With ``order``, labels of the axis' values, that it does so from each of these to the next. ``where`` holds other
    axes at one value each; without it their settings are averaged. ``published`` has a paper's values, by the labels of
    the values that they were found at.
    """

    says: str
    measure: str
    axis: str
    direction: Literal["rises", "falls"] = "rises"
    order: list[str] | None = Field(None, min_length=2)
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    published: dict[str, float] = Field(default_factory=dict)
    source: str = ""

    @model_validator(mode="before")
    @classmethod
    def _says_which_way(cls, data: Any) -> Any:
        if isinstance(data, dict) and "direction" not in data and "order" not in data:
            raise ValueError('give "direction": "rises" or "falls", or the "order" of values in which it rises')
        if isinstance(data, dict) and isinstance(data.get("order"), list):
            data = {**data, "order": [label(value) for value in data["order"]]}
        return data

    _measure_is_named = field_validator("measure")(lambda text: demand_measure(text))


class FigureSpec(Params):
    """A figure: ``by_axis`` and ``per_layer`` of ``measures``, ``along_training`` of one ``metric`` of metrics.jsonl.

    ``axis`` is along which a by_axis figure goes, by default the first. ``layer`` is of which layer a metric is that
    each layer has (``train.statistics``), from the end if negative.
    """

    type: Literal["by_axis", "along_training", "per_layer"]
    measures: list[str] = Field(default_factory=list)
    axis: str | None = None
    metric: str | None = None
    layer: int | None = None

    _measures_are_named = field_validator("measures")(lambda texts: [demand_measure(text) for text in texts])

    @model_validator(mode="after")
    def _has_what_it_shows(self) -> FigureSpec:
        wanted = "metric" if self.type == "along_training" else "measures"
        if not getattr(self, wanted):
            raise ValueError(f"a figure {self.type} needs {wanted!r}")
        takes = {"by_axis": {"measures", "axis"}, "per_layer": {"measures"}, "along_training": {"metric", "layer"}}
        for name in ("measures", "axis", "metric", "layer"):
            if getattr(self, name) not in (None, []) and name not in takes[self.type]:
                raise ValueError(f"a figure {self.type} takes {' and '.join(sorted(takes[self.type]))}, not {name!r}")
        return self


class LaunchSpec(Params):
    """How runs are started: ``jobs`` at a time, each as ``nproc`` processes (torchrun), with ``threads`` on a CPU.

    Small models leave most of a GPU idle, so that several ``jobs`` share it. ``threads`` null divides the machine's
    cores among the runs at work; a run compiles with as many. How a sum is divided among threads moves its last digits:
    a table that is to be the same on every machine says how many.
    """

    jobs: PositiveInt = 1
    nproc: PositiveInt = 1
    threads: PositiveInt | None = None


class _ProbeName:
    """Emits in a schema what a probe's slot would; which probes there are is looked at only when runs are planned."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        return {"x-slot": "probe"}


class StudySpec(Params):
    """A whole study: ``sparsekit study`` needs nothing else.

    ``axes`` are crossed, but for those that ``zip`` names together. The key of an axis is a path into the run's spec
    and its value a list; or it is a name, and its value has variants, each some paths and what stands there. ``seeds``
    are ``train.seed``; runs of one seed are compared with each other.
    """

    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$")
    question: str = ""
    source: str = ""
    base: Annotated[dict[str, Any], Partial(RunSpec)]
    axes: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(default_factory=dict)
    zip: list[list[str]] = Field(default_factory=list)
    seeds: list[NonNegativeInt] = Field([0], min_length=1)
    probes: list[Annotated[str | dict[str, Any], _ProbeName()]] = Field(default_factory=list)
    probe_on: ProbeOn = ProbeOn()
    evaluate: EvaluateSpec | None = None
    launch: LaunchSpec = LaunchSpec()
    claims: list[ClaimSpec] = Field(default_factory=list)
    figures: list[FigureSpec] = Field(default_factory=list)

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands there twice")
        return seeds

    @field_validator("axes", mode="before")
    @classmethod
    def _has_values(cls, axes: Any) -> Any:
        """In one line an axis, where pydantic has one for each member of the union."""
        for name, values in axes.items() if isinstance(axes, dict) else ():
            named = isinstance(values, dict) and all(isinstance(variant, dict) for variant in values.values())
            if not (isinstance(values, list) or named) or not values:
                raise ValueError(f"{name}: expected a list of values, or an object of named variants, each path: value")
            if isinstance(values, list) and len({label(value) for value in values}) < len(values):
                raise ValueError(f"{name}: a value stands there twice, or two look alike; name them as variants")
        return axes


@dataclass(frozen=True)
class Study:
    """A study and where it lies.

    Attributes:
        path: its file, from which ``extends`` and ``include_path`` are read.
        folder: where its runs and results are.
        base_overrides: of ``--set base.…``, laid over the base when runs are planned.
        read: the text of every file that it is made of, by path.
    """

    spec: StudySpec
    path: Path
    folder: Path
    base_overrides: tuple[str, ...]
    read: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.spec.name


def load_study(path: str | Path, overrides: Sequence[str] = (), out: str | Path | None = None) -> Study:
    """A study from its file, or from the folder of one that has begun.

    Args:
        overrides: ``"seeds=[0]"``, ``"base.train.max_steps=10"``; laid over the file in order.
        out: its folder; by default ``runs/<name>``.

    Raises:
        SpecError: one line for each mistake in the study itself; those of its runs are found when they are planned.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / STUDY).exists():
            raise SpecError([f"{path}: is no study's folder (it holds no {STUDY}); give the study's file"])
        path, out = path / STUDY, path if out is None else out
    raw = {"name": path.stem, **read_json(path)}
    if "base" not in raw and {"model", "data", "train"} & raw.keys():
        raise SpecError([f"{path}: is the spec of a run, not of a study; sparsekit train {path} trains it"])
    base_overrides = []
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key.startswith("base.") and key != "base.extends":
            base_overrides.append(text.strip().removeprefix("base."))
        else:
            raw = _laid_over(raw, text)
    try:
        spec = StudySpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError([_in_words(line, raw) for line in explained(error, "study")]) from None
    folder = path.resolve().parent
    base, axes = from_folder(spec.base, folder), _axes_from(spec.axes, folder)
    evaluate = spec.evaluate
    if evaluate is not None and evaluate.include_path is not None:
        there = str(folder / evaluate.include_path)
        evaluate = evaluate.model_copy(update={"include_path": there})
    read = {str(path.resolve()): path.read_text(encoding="utf-8"), **dict(_files([base, axes]))}
    spec = spec.model_copy(update={"base": base, "axes": axes, "evaluate": evaluate})
    return Study(spec, path, Path(out) if out is not None else Path("runs") / spec.name, tuple(base_overrides), read)


def from_folder(value: Any, folder: Path) -> Any:
    """With each ``extends`` as a whole path, read from a folder."""
    if isinstance(value, list):
        return [from_folder(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(folder / item) if key == "extends" and isinstance(item, str) else from_folder(item, folder)
        for key, item in value.items()
    }


def _axes_from(axes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Likewise of axes; values that extend a file become variants, whose names say nothing of where it lies."""
    found = {}
    for key, values in axes.items():
        variants = values
        if isinstance(values, list) and extends({key: values}):
            variants = {label(value): {key: value} for value in values}
        found[key] = from_folder(variants, folder)
    return found


def extends(value: Any) -> bool:
    """Whether anything in a JSON value is built on a file."""
    return '"extends":' in json.dumps(value)


def _files(value: Any, chain: tuple[Path, ...] = ()) -> Iterator[tuple[str, str]]:
    """Every file that a spec is read from: what it ``extends``, and the spec of what it begins with."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key not in ("extends", BEGINS) or not isinstance(item, str):
            yield from _files(item, chain)
            continue
        path = Path(item) / "spec.json" if key == BEGINS else Path(item)
        if path.is_file() and path not in chain:
            yield str(path), path.read_text(encoding="utf-8")
            yield from _files(from_folder(read_json(path), path.parent), (*chain, path))


def _laid_over(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """A study with one ``path=value`` laid over it; the key of an axis has dots of its own."""
    name, equals, value = text.partition("=")
    head, *rest = name.strip().split(".")
    if not equals or not all((head, *rest)):
        raise SpecError([f"--set {text}: expected path=value, such as seeds=[0,1] or base.train.max_steps=100"])
    if head not in StudySpec.model_fields:
        hint = f" (did you mean 'base.{name.strip()}'?)" if head in RunSpec.model_fields else ""
        hint = hint or did_you_mean(head, StudySpec.model_fields)
        raise SpecError([f"--set {text}: a study has no {head!r}{hint}"])
    if head == "axes" and rest:
        known = raw.get("axes", {})
        key = max((k for k in known if f"{'.'.join(rest)}.".startswith(f"{k}.")), key=len, default=".".join(rest))
        rest = [key, *".".join(rest).removeprefix(key).strip(".").split(".")]
        rest = [part for part in rest if part]
    try:
        new: Any = json.loads(value)
    except json.JSONDecodeError:
        new = value
    return _set(raw, [head, *rest], new, text)


def _set(raw: Any, path: Sequence[str], value: Any, text: str) -> Any:
    if not path:
        return value
    head, *rest = path
    if isinstance(raw, list):
        if not head.isdigit() or int(head) >= len(raw):
            raise SpecError([f"--set {text}: there is no item {head} in a list of {len(raw)}"])
        return [_set(item, rest, value, text) if i == int(head) else item for i, item in enumerate(raw)]
    inside = raw if isinstance(raw, dict) else {}
    return {**inside, head: _set(inside.get(head, {}), rest, value, text)}


def _in_words(line: str, raw: Mapping[str, Any]) -> str:
    """A mistake by its path in the study, with the nearest name where a key is unknown."""
    path, _, told = line.removeprefix("study.").partition(": ")
    if told == "unknown key":
        owners: dict[str, type[Params]] = {
            "": StudySpec, "claims": ClaimSpec, "figures": FigureSpec, "probe_on": ProbeOn, "evaluate": EvaluateSpec,
            "launch": LaunchSpec,
        }  # fmt: skip
        *above, key = path.split(".")
        owner = owners.get(above[0] if above else "", StudySpec)
        home = f" (did you mean 'base.{key}'?)" if not above and key in RunSpec.model_fields else ""
        return f"{path}: unknown field{home or did_you_mean(key, owner.model_fields)}"
    return f"{path}: {'required' if told == 'Field required' else told.replace('Input should be', 'expected')}"


def demand_measure(text: str) -> str:
    """The name of a measure: ``val_loss``, ``usefulness/usefulness``, or ``variance/resid[-1]`` of one layer.

    Raises:
        ValueError: it is none.
    """
    if not MEASURE.fullmatch(text):
        raise ValueError(f"{text!r} names no measure; give one such as val_loss, or variance/resid[-1] of one layer")
    return text


def label(value: Any) -> str:
    """A value in a word: of a slot its type, of what extends a file that file's name."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        return str(value["type"])
    if isinstance(value, dict) and isinstance(value.get("extends"), str):
        return Path(value["extends"]).stem
    return json.dumps(value)
