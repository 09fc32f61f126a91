"""An example of every entry: parameters that it takes, and where in a spec it stands.

What ``sparsekit show`` prints and what the contract kit tries a component with. A component says what stands for a
parameter by ``Field(examples=[...])``; usual names work unaided.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from sparsekit.registry import registry

# What fills the required parameters of a component, by field name.
EXAMPLES: dict[str, Any] = {
    "d_ff": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "kv_rank": 16,
    "k": 2,
    "p": 0.5,
    "window": 4,
    "n_experts": 4,
    "expert": {"type": "swiglu", "d_ff": 24},
    "shared_expert": {"type": "swiglu", "d_ff": 24},
    "router": {"type": "top_k", "k": 2},
    "lr": 1e-3,
    "warmup_steps": 10,
    "path": "texts/a.txt",
    "paths": ["texts/a.txt"],
    "validation_path": "texts/b.txt",
    "sources": ["embedded"],
    "eos_id": 0,
}
PATHS = ("path", "paths", "validation_path")  # of which nothing is there

# Where no parameter alone is required, but one of several.
_ONE_OF: dict[tuple[str, str], dict[str, Any]] = {("tokenizer", "bpe"): {"vocab_size": 300}}

# Where in a run's spec a kind stands: the keys to it, and beside which other values of the object that holds it.
_PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("model.block.attention", {}),
    "kernel": ("model.block.attention.kernel", {"type": "mha", "n_heads": 4}),
    "normalizer": ("model.block.attention.normalizer", {"type": "mha", "n_heads": 4, "kernel": "eager"}),
    "position": ("model.block.attention.position", {"type": "mha", "n_heads": 4}),
    "rope_scaling": ("model.block.attention.position.scaling", {"type": "rope"}),
    "ffn": ("model.block.ffn", {}),
    "activation": ("model.block.ffn.activation", {"type": "gated", "d_ff": 48}),
    "router": ("model.block.ffn.router", {"type": "moe", "n_experts": 4, "expert": EXAMPLES["expert"]}),
    "norm": ("model.block.norm", {}),
    "residual": ("model.block.residual", {}),
    "linear": ("model.linear", {}),
    "embedding": ("model.embedding", {}),
    "init": ("model.init", {}),
    "objective": ("train.objective", {}),
    "optimizer": ("train.optimizer", {}),
    "schedule": ("train.schedule", {}),
    "callback": ("train.callbacks", {}),
    "source": ("data.source", {}),
    "tokenizer": ("data.tokenizer", {}),
    "probe": ("probes", {}),
}
_LISTS = ("callback", "probe")


def example_slot(kind: str, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``{"type": name, ...}`` with what is given and a value for each parameter that is required or has an example.

    Raises:
        UnknownNameError, PluginError: there is no such entry, or it cannot be imported.
        ValueError: a required parameter has no example.
    """
    slot = {"type": name, **_ONE_OF.get((kind, name), {}), **(given or {})}
    for field_name, field in registry(kind).get(name).Params.model_fields.items():
        if field_name in slot:
            continue
        if field.examples:
            slot[field_name] = field.examples[0]
        elif field.is_required():
            if field_name not in EXAMPLES:
                mend = f"give params={{{field_name!r}: ...}}, or declare it with Field(examples=[...])"
                raise ValueError(f"parameter {field_name!r} is required: {mend}")
            slot[field_name] = EXAMPLES[field_name]
    return copy.deepcopy(slot)


def fragment(kind: str, slot: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of a run's spec that says it, ``{"model": {"block": {"ffn": slot}}}``; None where no spec does."""
    if kind not in _PLACES:
        return None
    path, beside = _PLACES[kind]
    *outer, last = path.split(".")
    value: dict[str, Any] = copy.deepcopy({**beside, last: [dict(slot)] if kind in _LISTS else dict(slot)})
    if kind == "rope_scaling":  # two slots deep
        outer, value = outer[:-1], {"type": "mha", "n_heads": 4, "position": value}
    for key in reversed(outer):
        value = {key: value}
    return value


def inline(slot: Mapping[str, Any]) -> str:
    """``name:key=value,key=value``, as a command takes it."""
    from json import dumps

    pairs = (f"{key}={value if isinstance(value, str) else dumps(value)}" for key, value in slot.items())
    return ":".join(filter(None, (str(slot["type"]), ",".join(pair for pair in pairs if not pair.startswith("type=")))))
