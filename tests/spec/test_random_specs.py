"""Any model that the catalogue allows validates, dumps to plain JSON, and reads back as itself."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sparsekit.model.build import build_model
from sparsekit.spec.load import dump, fingerprint, validate_model
from sparsekit.spec.schema import json_schema

VALIDATOR = Draft202012Validator(json_schema())
POSITIVE = st.floats(1e-6, 1e6)
NORMS = st.one_of(
    st.sampled_from(["rmsnorm", "layernorm", "none"]),
    st.builds(lambda eps: {"type": "rmsnorm", "eps": eps}, POSITIVE),
    st.builds(lambda bias: {"type": "layernorm", "bias": bias}, st.booleans()),
)
ACTIVATIONS = st.sampled_from(["relu", "gelu", {"type": "silu"}])
SIZES = st.integers(1, 12)


@st.composite
def attentions(draw: Any) -> dict[str, Any]:
    groups, kv = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    slot: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"type": "gqa", "n_heads": groups * kv, "n_kv_heads": kv},
                {"type": "mha", "n_heads": kv},
                {"type": "mqa", "n_heads": groups},
            ]
        )
    )
    slot = {**slot, "head_dim": draw(st.sampled_from([2, 4, 6]))}
    optional = {
        "position": st.one_of(st.sampled_from(["rope", "none"]), st.builds(lambda t: {"theta": t}, POSITIVE)),
        "kernel": st.sampled_from(["sdpa", "eager", {"type": "eager"}]),
        "qk_norm": st.one_of(st.none(), NORMS),
        "window": st.one_of(st.none(), SIZES),
        "bias": st.booleans(),
    }
    return {**slot, **{name: draw(values) for name, values in optional.items() if draw(st.booleans())}}


DENSE = st.one_of(
    st.builds(lambda name, d_ff: {"type": name, "d_ff": d_ff}, st.sampled_from(["swiglu", "geglu", "reglu"]), SIZES),
    st.builds(
        lambda a, d_ff, b: {"type": "mlp", "d_ff": d_ff, "activation": a, "bias": b}, ACTIVATIONS, SIZES, st.booleans()
    ),
    st.builds(lambda a, d_ff: {"type": "gated", "d_ff": d_ff, "activation": a}, ACTIVATIONS, SIZES),
)


@st.composite
def mixtures(draw: Any, expert: Any) -> dict[str, Any]:
    n_experts = draw(st.integers(1, 5))
    router = {
        "type": "top_k",
        "k": draw(st.integers(1, n_experts)),
        "score": draw(st.sampled_from(["softmax", "sigmoid"])),
    }
    slot = {"type": "moe", "n_experts": n_experts, "router": router, "expert": draw(expert)}
    if draw(st.booleans()):
        slot["shared_expert"] = draw(expert)
        slot["shared_combine"] = draw(st.sampled_from(["sum", "mean"]))
    return slot


FFNS = st.recursive(DENSE, mixtures, max_leaves=3)
RESIDUALS = st.one_of(
    st.sampled_from(["pre_norm", "post_norm"]), st.builds(lambda s: {"type": "pre_norm", "scale": s}, POSITIVE)
)
BLOCKS = st.fixed_dictionaries(
    {"attention": attentions(), "ffn": FFNS}, optional={"norm": NORMS, "residual": RESIDUALS}
)
PARTS = st.fixed_dictionaries({}, optional={"ffn": FFNS, "norm": NORMS, "residual": RESIDUALS})


@st.composite
def models(draw: Any) -> dict[str, Any]:
    n_layers = draw(st.integers(1, 4))
    spec: dict[str, Any] = {"d_model": draw(SIZES), "n_layers": n_layers, "vocab_size": 16, "max_seq_len": 8}
    if draw(st.booleans()):
        spec["block"] = draw(BLOCKS)
    else:
        spec["blocks"] = {"a": draw(BLOCKS), "b": draw(BLOCKS)}
        spec["pattern"] = draw(st.permutations("ab")) + draw(st.lists(st.sampled_from("ab"), max_size=1))
    selectors = st.one_of(st.integers(-n_layers, n_layers - 1).map(str), st.sampled_from(["::2", "1:", ":-1"]))
    spec["layers"] = draw(st.dictionaries(selectors, PARTS, max_size=2))
    optional = {
        "final_norm": st.one_of(st.none(), NORMS),
        "init": st.sampled_from(["normal", "depth_scaled", {"std": 0.1}]),
        "embedding": st.sampled_from(["token", {"scale": 12.0}]),
        "tie_embeddings": st.booleans(),
        "logit_scale": POSITIVE,
    }
    return {**spec, **{name: draw(values) for name, values in optional.items() if draw(st.booleans())}}


@settings(max_examples=100, deadline=None)
@given(models())
def test_validate_dump_validate(raw: dict[str, Any]):
    spec = validate_model(raw)
    dumped = json.loads(json.dumps(dump(spec)))
    again = validate_model(dumped)
    assert again == spec
    assert dump(again) == dumped
    assert again.per_layer == spec.per_layer
    assert fingerprint(again) == fingerprint(spec)
    assert len(spec.per_layer) == raw["n_layers"]
    assert not list(VALIDATOR.iter_errors(raw))
    assert not list(VALIDATOR.iter_errors(dumped))


@settings(max_examples=25, deadline=None)
@given(models())
def test_what_validates_also_builds(raw: dict[str, Any]):
    """Checks promise that building will not fail."""
    model = build_model(raw, device="meta")
    assert [type(layer.ffn).__name__ for layer in model.layers] == [b.ffn.cls.__name__ for b in model.spec.per_layer]
