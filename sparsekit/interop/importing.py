"""From a Hugging Face folder to one of ours: the spec that its config describes, and its weights under our names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsekit.errors import CheckpointError, did_you_mean
from sparsekit.files import seal, write_json
from sparsekit.interop.config import Config, as_config, quiet, read_raw, resolved, transformers
from sparsekit.interop.families import FAMILIES, Family, Spec, refused
from sparsekit.interop.folders import BESIDE, Tensors, locate, save_sharded, tokenizer_state
from sparsekit.interop.olmo import FAMILY as OLMO
from sparsekit.interop.olmo import MODEL_TYPE, is_training, read_config
from sparsekit.interop.parity import Difference, compared, logits_of, some_ids
from sparsekit.interop.tables import Shape, plan, to_ours
from sparsekit.model.build import build_model
from sparsekit.model.targets import SPEC, TOKENIZER, resolve
from sparsekit.model.weights import MODEL_PREFIX, WEIGHTS, load_weights
from sparsekit.spec.load import HUGGING_FACE, dump, load_spec
from sparsekit.spec.model import ModelSpec
from sparsekit.spec.run import RunSpec

ORIGIN = "import.json"
TRAINED = 1024  # tokens a sequence, unless the spec of a run says otherwise


@dataclass(frozen=True)
class Imported:
    """What came in.

    Attributes:
        parameters: how many, by dtype.
        difference: of logits, where it was looked at.
        remarks: what was left out.
    """

    out: Path
    family: str
    parameters: dict[str, int]
    difference: Difference | None
    remarks: list[str] = field(default_factory=list)


def import_folder(name: str, out: str | Path, *, check: bool = True) -> Imported:
    """Turns a Hugging Face folder into a checkpoint folder, which every command takes.

    The weights keep their dtype, bit for bit. Logits are compared with the original's in float32, on token ids of a
    novel; to compare, both models are loaded, one after the other.

    Args:
        name: ``hf:FOLDER_OR_NAME``; the prefix may be left out.
        out: a folder that does not exist yet.

    Raises:
        CheckpointError: it is no such folder, it holds what sparsekit cannot express, or the logits differ.
    """
    out = Path(out)
    demand_free(out)
    folder = locate(name)
    try:
        return _imported(folder, f"{HUGGING_FACE}{name.removeprefix(HUGGING_FACE)}", out, check)
    except CheckpointError as error:
        raise CheckpointError(
            f"{HUGGING_FACE}{name.removeprefix(HUGGING_FACE)}: {_without(str(error), folder)}"
        ) from None


def read_spec(name: str) -> RunSpec:
    """The spec that a folder's config describes; its weights are not looked at.

    Raises:
        CheckpointError: it is no such folder, or it holds what sparsekit cannot express.
    """
    folder = locate(name)
    raw = read_config(folder) if is_training(folder) else read_raw(folder)
    try:
        family = family_of(raw)
        model, _ = spec_of(config_of(raw, family), family, strict=_is_strict(family))
    except CheckpointError as error:
        raise CheckpointError(
            f"{HUGGING_FACE}{name.removeprefix(HUGGING_FACE)}: {_without(str(error), folder)}"
        ) from None
    tokenizer = {"type": "bpe", "path": f"{HUGGING_FACE}{folder / TOKENIZER}"}  # read when it is imported
    return load_spec({"name": folder.name, "model": model, "data": {"tokenizer": tokenizer}})


def _is_strict(family: Family) -> bool:
    """Whether a key that is not understood may still change the function."""
    return family.stands_in is not None or family.defaults is not None


def _without(told: str, folder: Path) -> str:
    return told.removeprefix(f"{folder}: ").removeprefix(f"{folder}/")


def demand_free(out: Path) -> None:
    """Refuses a folder in which something lies already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; give another folder, or remove it")


def _imported(folder: Path, name: str, out: Path, check: bool) -> Imported:
    raw = read_config(folder) if is_training(folder) else read_raw(folder)
    family = family_of(raw)
    config = config_of(raw, family)
    model_spec, remarks = spec_of(config, family, strict=_is_strict(family))
    spec, state, more = _run_spec(model_spec, folder, raw, out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        counts = _write_weights(folder, load_spec(spec).model, family, temporary / WEIGHTS)
        write_json(temporary / SPEC, dump(load_spec(spec)))
        if state is not None:
            write_json(temporary / TOKENIZER, state)
        for file in BESIDE:
            if (folder / file).exists():
                shutil.copyfile(folder / file, temporary / file)
        if check and family.defaults is not None:
            remarks.append("logits not compared: transformers has no such model")
            check = False
        difference = _check(folder, config, temporary) if check else None
        if difference is not None:
            difference.demand(name)
        found = Imported(out, raw["model_type"], counts, difference, remarks + more)
        write_json(temporary / ORIGIN, {"source": name, **{k: v for k, v in asdict(found).items() if k != "out"}})
        if out.exists():
            out.rmdir()  # empty, as was seen
        seal(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def family_of(raw: Mapping[str, Any]) -> Family:
    """By ``model_type``.

    Raises:
        CheckpointError: it is none of those known, or its weights are quantised.
    """
    kind = raw["model_type"]
    if kind == MODEL_TYPE:
        return OLMO
    if kind not in FAMILIES:
        near = did_you_mean(kind, FAMILIES)
        known = f"model type {kind!r} is not known{near}; known: {', '.join(FAMILIES)}"
        raise CheckpointError(f"{known}; sparsekit probe and eval take the folder as it is")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "some method")
        raise CheckpointError(f"weights quantised by {method!r} are not read; give the model before that")
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    told = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if told not in ("default", "linear", "llama3", "yarn", None):
        raise refused(f"rope scaling {told!r}", ("linear", "llama3", "yarn"))
    return FAMILIES[kind]


def config_of(raw: Mapping[str, Any], family: Family) -> Any:
    """The config of transformers by which it runs the model itself; or as it is, where it does not."""
    if family.defaults is not None:
        return Config(raw, family.defaults)
    if family.stands_in is None:
        return resolved(raw, raw["model_type"])
    kind, translate = family.stands_in
    return resolved(translate(raw), kind)


def spec_of(config: Any, family: Family, strict: bool = False) -> tuple[Spec, list[str]]:
    """The model spec of a config, and remarks.

    Args:
        strict: keys that transformers does not know either are refused, since other code may read them.

    Raises:
        CheckpointError: it says what sparsekit cannot express.
    """
    values = config if isinstance(config, Config) else as_config(config)
    spec = family.spec(values)
    values.demand_understood()
    unknown = values.unknown()
    if unknown and strict:
        raise CheckpointError(
            f"config key {unknown[0]!r} is not understood; remove it if it does not change the function"
        )
    kind = type(config).__name__
    remarks = [f"config key {key!r} left out: the {kind} of transformers does not read it either" for key in unknown]
    return spec, remarks


def _run_spec(
    model: Spec, folder: Path, raw: Mapping[str, Any], out: Path
) -> tuple[Spec, dict[str, Any] | None, list[str]]:
    """A run spec with the folder's tokenizer, what that says, and remarks."""
    path = str(out / TOKENIZER)
    try:
        state, eos, remarks = tokenizer_state(folder, model["vocab_size"], raw)
        tokenizer = {"type": "bpe", "path": path, "eos_token": eos}
    except CheckpointError as error:
        state, remarks = None, [f"without a tokenizer: {_without(str(error), folder)}"]
        tokenizer = {"type": "bpe", "path": path}
    # a batch of the longest sequences that a model takes may be far more than anybody wants to train on
    length = {"seq_len": TRAINED} if model["max_seq_len"] > TRAINED else {}
    return {"name": out.name, "model": model, "data": {"tokenizer": tokenizer, **length}}, state, remarks


def _write_weights(folder: Path, spec: ModelSpec, family: Family, weights: Path) -> dict[str, int]:
    shapes: dict[str, Shape] = {
        name: list(t.shape) for name, t in build_model(spec, device="meta").state_dict().items()
    }
    tensors = Tensors(folder, family.table.prefix)
    try:
        head = next((rule.theirs for rule in family.table.top if rule.ours == ("head",)), "")
        names = [n for n in tensors.names if not (spec.tie_embeddings and n.startswith(f"{head}."))]
        steps = plan(family.table, spec, shapes, names)
        found = to_ours(steps, tensors, shapes, spec)
        return save_sharded(((MODEL_PREFIX + name, tensor) for name, tensor in found), weights)
    finally:
        tensors.close()


def load_original(folder: Path, config: Any) -> Any:
    """The model as transformers runs it, in float32."""
    try:
        with quiet():
            model = transformers().AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    except Exception as error:
        raise CheckpointError(f"transformers cannot load it ({' '.join(str(error).split())[:200]})") from None
    return model.eval()


def _check(folder: Path, config: Any, ours: Path) -> Difference:
    target = resolve(ours)
    spec = target.spec.model
    tokenizer = None if target.tokenizer_file is None else target.tokenizer()
    ids, kind = some_ids(tokenizer, spec.vocab_size, spec.max_seq_len)
    original = logits_of(load_original(folder, config), ids)
    return compared(original, logits_of(_loaded(ours), ids), kind)


def _loaded(folder: Path) -> Any:
    """A model from a folder that has no manifest yet."""
    target = resolve(folder)
    model = build_model(target.spec)
    load_weights(model, folder / WEIGHTS)
    return model.eval()
