"""``list`` and ``show``: every entry tells what it takes, where it comes from, and an example that validates."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from pydantic import PositiveInt

from sparsekit.components.feedforward import MLP
from sparsekit.components.kernels import able_to
from sparsekit.examples import example_slot, fragment, inline
from sparsekit.registry import KINDS, register, registry
from sparsekit.sparsifiers.choose import make
from sparsekit.spec.facts import walk
from sparsekit.spec.load import load_spec
from sparsekit.spec.slot import Slot

from .test_cli import refused, tell

ENTRIES = [(kind, name) for kind in KINDS for name in registry(kind).names()]
IDS = [f"{kind}-{name}" for kind, name in ENTRIES]
BASE: dict[str, Any] = {
    "model": {
        "d_model": 32, "n_layers": 2, "vocab_size": 512, "max_seq_len": 32,
        "block": {"attention": {"type": "mha", "n_heads": 4}, "ffn": {"type": "swiglu", "d_ff": 48}},
    }
}  # fmt: skip


def laid(base: Any, part: Any) -> Any:
    """A part laid over a spec: a whole slot stands in another's place."""
    if not isinstance(part, dict) or not isinstance(base, dict) or "type" in part:
        return copy.deepcopy(part)
    return {**base, **{key: laid(base.get(key), value) for key, value in part.items()}}


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=IDS)
def test_show_gives_an_example_that_validates(kind: str, name: str) -> None:
    lines = tell("show", kind, name).splitlines()
    assert lines[0].startswith(f"{kind} {name}, of sparsekit ")
    use = lines[lines.index("example") + 1].strip()
    if kind == "sparsifier":
        start = "sparsekit sparsify RUN --sparsifier "
        assert use.startswith(start)
        assert make(use.removeprefix(start)).params == Slot(kind).validate(example_slot(kind, name)).params
        return
    part = json.loads(use)
    assert part == fragment(kind, example_slot(kind, name))
    spec = load_spec(laid(BASE, part))
    sections = (spec.model, spec.data, spec.train, *spec.probes, *spec.model.per_layer)
    assert (kind, name) in {(choice.kind, choice.type) for section in sections for _, choice in walk(section)}


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=IDS)
def test_show_tells_all_there_is_to_tell(kind: str, name: str) -> None:
    told, cls = json.loads(tell("show", kind, name, "--json")), registry(kind).get(name)
    entry = registry(kind).entry(name)
    assert [told[key] for key in ("owner", "version", "source")] == [entry.owner, entry.version, entry.source]
    assert told["doc"].startswith(entry.summary[:20])
    parameters = {each["name"]: each for each in told["parameters"]}
    assert list(parameters) == list(cls.Params.model_fields)
    for each in parameters.values():
        assert each["type"], each
        assert "Annotated" not in each["type"] and "typing" not in each["type"], each
        assert each["required"] == cls.Params.model_fields[each["name"]].is_required()
    assert told.get("causal") == getattr(cls, "causal", None)
    Slot(kind).validate(told["example"])
    if kind == "kernel":
        assert (told["devices"], told["gradients"]) == (list(cls.devices), list(cls.gradients))
        assert set(told["features"]) == cls.features


def test_what_is_causal_and_which_kernels_do() -> None:
    assert "causal: no  batch_coupled: yes" in tell("show", "router", "expert_choice")
    assert "causal: yes  batch_coupled: no" in tell("show", "router", "top_k")
    text = tell("show", "kernel", "flash")
    assert "\ndevices: cuda\n" in text and "\ndtypes: bfloat16, float16\n" in text
    assert "\nneeds: flash_attn (pip install 'sparsekit[flash]')\n" in text
    assert json.loads(tell("show", "attention", "mha", "--json"))["kernels"] == able_to(frozenset())
    assert json.loads(tell("show", "attention", "mla", "--json"))["kernels"] == able_to(frozenset({"value_dim"}))
    assert "flash" not in able_to(frozenset({"value_dim"})), "else this would say nothing"


def test_an_entry_of_this_process_is_shown_too() -> None:
    @register("ffn", "noted")
    class Noted(MLP):
        """A cell of a notebook.

        Source: Somebody 2026,
        sec. 1
        """

        class Params(MLP.Params):
            flux: PositiveInt

    @register("ffn", "odd")
    class Odd:
        """Not of ours at all."""

    try:
        told = json.loads(tell("show", "ffn", "noted", "--json"))
        assert (told["source"], told["example"]) == ("Somebody 2026, sec. 1", None)
        assert "\nexample\n  none: parameter 'flux' is required: give params=" in tell("show", "ffn", "noted")
        refused("show", "ffn", "odd", says="ffn 'odd' of package tests.cli.test_catalogue")
    finally:
        for name in ("noted", "odd"):
            registry("ffn").unregister(name)


def test_inline() -> None:
    assert inline({"type": "cats"}) == "cats"
    assert inline({"type": "teal", "sparsity": 0.5, "allocation": "greedy"}) == "teal:sparsity=0.5,allocation=greedy"
    assert make(inline({"type": "teal", "sparsity": 0.25, "allocation": "greedy"})).params.sparsity == 0.25
    assert make(inline({"type": "cett", "thresholds": [0.1, 0.2]})).params.thresholds == [0.1, 0.2]
