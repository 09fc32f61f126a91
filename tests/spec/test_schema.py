"""The JSON Schema says of a spec what validation says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from sparsekit.registry import KINDS, registry
from sparsekit.spec.load import dump, load_spec
from sparsekit.spec.schema import json_schema
from sparsekit.studies.schema import study_schema
from tests.spec.test_mistakes import put

FOLDER = Path(__file__).parents[2] / "specs"
SPECS = sorted(path for path in FOLDER.glob("*/*.json") if path.parent.name != "studies")
STUDIES = sorted((FOLDER / "studies").glob("*.json"))
MOE = {"type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 8}}


def inside(**changes: Any) -> dict[str, Any]:
    """A mixture whose expert is a mixture with these changes."""
    return {**MOE, "expert": {**MOE, **changes}}


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_it_is_plain_json_without_marks_of_ours():
    text = json.dumps(json_schema())
    assert "x-slot" not in text
    assert "x-partial" not in text


def test_every_reference_leads_somewhere():
    schema = json_schema()
    found = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            found.update([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                walk(item)

    walk(schema)
    assert {ref.removeprefix("#/$defs/") for ref in found} <= schema["$defs"].keys()
    assert len(found) > len(KINDS)


def test_every_entry_of_every_kind_is_in_it():
    definitions = json_schema()["$defs"]
    for kind in KINDS:
        assert kind in definitions
        for name in registry(kind).names():
            assert f"{kind}.{name}" in definitions


ACCEPTED = {
    "shorthands": ("model.block.norm", "layernorm"),
    "default type": ("model.block.norm", {"eps": 0.1}),
    "null": ("model.block.attention.qk_norm", None),
    "optional slot": ("model.block.attention.qk_norm", "rmsnorm"),
    "nested": (
        "model.block.ffn",
        {**MOE, "expert": {**MOE, "shared_expert": {"type": "mlp", "d_ff": 3, "activation": "relu"}}},
    ),
    "callbacks": ("train.callbacks", ["progress", {"type": "sample", "top_k": 3}]),
    "int for a float": ("train.optimizer", {"lr": 1}),
    "layers": ("model.layers", {"0": {"norm": {"eps": 0.1}}, "-1": {"attention": {"window": 2}}, "1:2": {"ffn": MOE}}),
    "layers, the type said again": (
        "model.layers",
        {"0": {"attention": {"type": "gqa", "window": 2}, "ffn": "swiglu"}},
    ),
}
REJECTED = {
    "unknown name": ("model.block.ffn", "swigloo"),
    "unknown type": ("model.block.ffn", {"type": "swigloo", "d_ff": 3}),
    "unknown key": ("model.block.ffn.dff", 3),
    "key of another entry": ("model.block.norm", {"type": "rmsnorm", "bias": True}),
    "unknown key, default type": ("model.block.norm", {"epz": 1.0}),
    "wrong value, default type": ("train.optimizer", {"lr": "fast"}),
    "required missing": ("model.block.ffn", "swiglu"),
    "required missing in an object": ("model.block.attention", {"type": "gqa", "n_heads": 4}),
    "unknown name deep down": ("model.block.ffn", inside(expert={"type": "mlp", "d_ff": 3, "activation": "rleu"})),
    "unknown key deep down": ("model.block.ffn", inside(router={"type": "top_k", "k": 1, "z": 3})),
    "required missing deep down": ("model.block.ffn", inside(router={"type": "top_k"})),
    "text for a number": ("model.d_model", "32"),
    "a fraction": ("model.n_layers", 1.5),
    "zero": ("model.d_model", 0),
    "null for a slot": ("model.block.attention", None),
    "unknown key of the model": ("model.d_modle", 3),
    "unknown key of the run": ("modle", {}),
    "unknown key of a section": ("train.keep", {"lst": 1}),
    "unknown name in a list": ("train.callbacks", ["progres"]),
    "unknown choice": ("train.precision", "fp12"),
    "layers: unknown key": ("model.layers", {"0": {"nrom": "none"}}),
    "layers: unknown name": ("model.layers", {"0": {"norm": "nonne"}}),
    "layers: wrong value": ("model.layers", {"0": {"attention": {"n_heads": "4"}}}),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepts(validator, raw, path, value):
    spec = put(raw, path, value)
    load_spec(spec)
    for good in (spec, dump(load_spec(spec))):
        assert not list(validator.iter_errors(good))
    assert not list(validator.iter_errors(spec["model"])), "a bare model spec too"


@pytest.mark.parametrize(("path", "value"), REJECTED.values(), ids=REJECTED)
def test_rejects(validator, raw, problems, path, value):
    spec = put(raw, path, value)
    assert problems(spec)
    assert not validator.is_valid(spec)
    if path.startswith("model."):
        assert not validator.is_valid(spec["model"]), "a bare model spec too"


@pytest.mark.parametrize("key", ["d_model", "n_layers", "vocab_size", "max_seq_len"])
def test_required_keys(validator, raw, key):
    del raw["model"][key]
    assert not validator.is_valid(raw)
    assert not validator.is_valid(raw["model"])


EXTENDING = {
    "whole": {"extends": "a.json"},
    "run": {"extends": "a.json", "train": {"seed": 1}},
    "run with part of a model": {"extends": "a.json", "model": {"d_model": 3}},
    "part of a slot": {
        "extends": "a.json",
        "model": {"block": {"attention": {"n_heads": 3}, "ffn": {"router": {"k": 3}}}},
    },
    "a type alone": {"extends": "a.json", "model": {"block": {"ffn": {"type": "moe", "dispatch": "loop"}}}},
    "bare model": {"extends": "a.json", "block": {"ffn": {"d_ff": 3}}},
    "model": {"model": {"extends": "a.json", "block": {"ffn": {"d_ff": 3}}}},
    "slot": {"model": {"extends": "a.json", "block": {"ffn": {"extends": "b.json", "d_ff": 3}}}},
    "section": {"extends": "a.json", "train": {"extends": "t.json", "optimizer": {"lr": 1e-3}}},
}


@pytest.mark.parametrize("spec", EXTENDING.values(), ids=EXTENDING)
def test_what_extends_a_file_may_be_partial(validator, spec):
    assert not list(validator.iter_errors(spec))


@pytest.mark.parametrize("place", ["", "model.", "model.block.", "model.block.ffn."])
def test_what_extends_a_file_is_still_checked(validator, place):
    spec: Any = {"extends": "a.json", "model": {"block": {"ffn": {"d_ff": 3}}}}
    assert validator.is_valid(spec)
    assert not validator.is_valid(put(spec, f"{place}no_such_key", 3))
    assert not validator.is_valid(put(spec, "model.block.ffn.d_ff", "3"))
    assert not validator.is_valid(put(spec, "model.block.norm", "rmsnrom"))


def test_without_extends_a_part_is_not_enough(validator):
    for spec in EXTENDING.values():
        whole = copy.deepcopy(spec)
        whole.pop("extends", None)
        if "extends" not in json.dumps(whole):
            assert not validator.is_valid(whole)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_the_specs_of_this_repository(validator, path):
    assert not list(validator.iter_errors(json.loads(path.read_text())))
    assert not list(validator.iter_errors(dump(load_spec(path))))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_the_studies_of_this_repository(path):
    assert not list(Draft202012Validator(study_schema()).iter_errors(json.loads(path.read_text())))


def test_an_entry_that_cannot_be_used_costs_only_itself():
    @registry("ffn").register("foreign")
    class Foreign:
        """No Params."""

    try:
        definitions = json_schema()["$defs"]
    finally:
        registry("ffn").unregister("foreign")
    assert "ffn.foreign" not in definitions
    assert "ffn.swiglu" in definitions
