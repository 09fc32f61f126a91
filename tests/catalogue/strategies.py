"""Random specs from the whole catalogue: what an entry may be given is read from its ``Params``."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st

from sparsekit.checks import elsewhere
from sparsekit.registry import registry
from sparsekit.spec.slot import slot_of

VOCABULARY, LENGTH = 257, 8
ROLES = ["q", "k", "v", "o", "gate", "up", "down", "router", "head"]

# Sizes by field name, small, and such that most of them fit together; everything else goes by its type.
SIZES: dict[str, Any] = {
    "d_ff": [6, 8, 12],
    "n_heads": [1, 2, 4, 6],
    "n_kv_heads": [1, 2],
    "head_dim": [None, 4, 6],
    "rope_head_dim": [4, 6],
    "v_head_dim": [None, 3, 4],
    "kv_rank": [4, 7],
    "q_rank": [None, 6],
    "n_experts": [1, 2, 3, 4, 4, 4],
    "k": [1, 2],
    "n_groups": [1, 2],
    "k_groups": [1, 2],
    "max_experts": [None, 1, 2],
    "capacity_factor": [0.5, 1.0, 1.25, 2.0],
    "window": [None, 1, 3, 100],
    "sinks": [0, 1, 2],
    "original_max_seq_len": [4, 2048],
    "fraction": [1.0, 0.5, 0.75],
    "theta": [10000.0, 100.0, 2.0],
    "base_width": [16, 256],
    "std": [0.02, 0.1],
    "eps": [1e-6, 1e-5, 1e-2],
    "roles": [[], ["q", "router"], ["head"], ROLES],
    "cutoff": [0.5, 3.0],
    "seed": [0, 7],
}
FLOATS = [-0.5, 0.0, 0.05, 0.25, 0.5, 0.9, 1.0, 1.5, 2.0, 4.0]  # none that is more about float32 than about an entry
RARE = {
    "window": 0.4,
    "sinks": 0.2,
    "softcap": 0.2,
    "sink_logits": 0.2,
    "normalizer": 0.25,
    "kernel": 0.7,
    "activation": 0.9,
    "scaling": 0.7,
}


def slots(kind: str, depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """Any entry of a kind with any parameters; ``depth`` counts the mixtures around it."""
    names = registry(kind).names()
    if kind == "kernel":  # those that train here come more often
        names = [n for n in names if elsewhere(registry(kind).get(n)) is None] * 4 + ["auto"] * 12 + names
    if kind == "ffn":
        names = [n for n in names if n != "moe"] + ["mlp", "gated"] * 2 + ["moe"] * [6, 3, 0][depth]
    return st.sampled_from(names).flatmap(lambda name: params(kind, name, depth))


@st.composite
def params(draw: Any, kind: str, name: str, depth: int) -> dict[str, Any]:
    """A slot of this entry: required parameters always, others now and then."""
    slot: dict[str, Any] = {"type": name}
    for field, info in registry(kind).get(name).Params.model_fields.items():
        often = RARE.get(field, 0.5)
        if not info.is_required() and draw(st.integers(1, 20)) > 20 * often:
            continue
        if field == "kernel" and slot.keys() & {"softcap", "sink_logits", "normalizer"} and draw(st.booleans()):
            continue
        below = slot_of(info)
        inner = depth + (name == "moe")
        values = slots(below.kind, inner) if below else values_of(field, info)
        if below and type(None) in get_args(info.annotation):
            values = st.one_of(st.none(), values)
        slot[field] = draw(values)
    hard = {"softcap", "sink_logits", "normalizer", "window", "sinks"} & slot.keys()
    if "kernel" in registry(kind).get(name).Params.model_fields and hard and "kernel" not in slot:
        slot["kernel"] = draw(st.sampled_from(["auto", "eager"]))
    if slot.get("sinks") and not slot.get("window") and draw(st.integers(0, 3)):
        slot["window"] = 2
    return slot


def values_of(field: str, info: Any) -> st.SearchStrategy[Any]:
    """Values of a field by its name or else its type."""
    if field == "roles" and get_origin(info.annotation) is dict:
        return st.dictionaries(st.sampled_from(ROLES), st.sampled_from([0.0, 0.5, 2.0]), max_size=2)
    if field in SIZES:
        return st.sampled_from(SIZES[field])
    return by_type(info.annotation, info.metadata)


def by_type(annotation: Any, metadata: Any = ()) -> st.SearchStrategy[Any]:
    if hasattr(annotation, "__metadata__"):
        return by_type(get_args(annotation)[0], [*metadata, *annotation.__metadata__])
    if get_origin(annotation) in (Union, types.UnionType):
        return st.one_of(*(by_type(option, metadata) for option in get_args(annotation)))
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if annotation in (float, int):
        numbers = FLOATS if annotation is float else [*range(5)]
        return st.sampled_from([x for x in numbers if all(_fits(x, bound) for bound in metadata)])
    raise TypeError(f"no strategy for {annotation}: teach tests/catalogue/strategies.py about it")


def _fits(x: float, bound: Any) -> bool:
    match bound:
        case Ge(ge=limit):
            return bool(x >= limit)
        case Gt(gt=limit):
            return bool(x > limit)
        case Le(le=limit):
            return bool(x <= limit)
        case Lt(lt=limit):
            return bool(x < limit)
    return True


@st.composite
def blocks(draw: Any) -> dict[str, Any]:
    block = {"attention": draw(slots("attention")), "ffn": draw(slots("ffn"))}
    for kind in ("norm", "residual"):
        if draw(st.booleans()):
            block[kind] = draw(slots(kind))
    return block


@st.composite
def exceptions(draw: Any) -> dict[str, Any]:
    """A partial block for ``layers``."""
    kinds = draw(
        st.lists(st.sampled_from(["attention", "ffn", "norm", "residual"]), min_size=1, max_size=2, unique=True)
    )
    return {kind: draw(slots(kind)) for kind in kinds}


@st.composite
def models(draw: Any) -> dict[str, Any]:
    """A whole model spec."""
    n_layers = draw(st.integers(1, 3))
    spec: dict[str, Any] = {
        "d_model": draw(st.sampled_from([12, 24])),
        "n_layers": n_layers,
        "vocab_size": VOCABULARY,
        "max_seq_len": LENGTH,
    }
    if draw(st.integers(0, 2)):
        spec["block"] = draw(blocks())
    else:
        spec["blocks"] = {"a": draw(blocks()), "b": draw(blocks())}
        spec["pattern"] = draw(st.permutations("ab")) + draw(st.lists(st.sampled_from("ab"), max_size=1))
    if draw(st.integers(0, 2)) == 0:
        selectors = st.one_of(st.integers(-n_layers, n_layers - 1).map(str), st.sampled_from(["::2", "1:"]))
        spec["layers"] = draw(st.dictionaries(selectors, exceptions(), min_size=1, max_size=2))
    for kind in ("linear", "embedding", "init"):
        if draw(st.booleans()):
            spec[kind] = draw(slots(kind))
    if draw(st.integers(0, 3)) == 0:
        spec["final_norm"] = draw(slots("norm"))
    if draw(st.booleans()):
        spec["tie_embeddings"] = draw(st.booleans())
    if draw(st.integers(0, 3)) == 0:
        spec["logit_scale"] = draw(st.sampled_from([0.25, 2.0]))
    return spec
