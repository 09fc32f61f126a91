"""Which block a layer has: patterns, exceptions, and the identity of equal layers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.spec.load import dump, validate_model

ATTENTION = {"type": "mha", "n_heads": 4}
DENSE = {"attention": ATTENTION, "ffn": {"type": "swiglu", "d_ff": 48}}
SPARSE = {"attention": ATTENTION, "ffn": {"type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 24}}}


def model(n_layers=6, **changes):
    spec = {"d_model": 32, "n_layers": n_layers, "vocab_size": 64, "max_seq_len": 32, **changes}
    return validate_model(spec if "blocks" in spec else {"block": DENSE, **spec})


def ffns(spec):
    return [block.ffn.type for block in spec.per_layer]


def norms(**layers):
    """The norm of each of six layers, with ``layers`` as {selector: norm}."""
    return [b.norm.type for b in model(layers={name: {"norm": norm} for name, norm in layers.items()}).per_layer]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        (["dense", "moe"], ["swiglu", "moe"] * 3),
        (["dense", "dense", "moe", "moe"], ["swiglu", "swiglu", "moe", "moe", "swiglu", "swiglu"]),
        (["moe"], ["moe"] * 6),
        (["dense"] * 6 + ["moe"], ["swiglu"] * 6),
    ],
)
def test_patterns_repeat_over_the_depth(pattern, wanted):
    blocks = {name: {"dense": DENSE, "moe": SPARSE}[name] for name in pattern}
    assert ffns(model(blocks=blocks, pattern=pattern)) == wanted


def test_null_takes_a_block_back():
    assert ffns(model(blocks={"dense": DENSE, "moe": None}, pattern=["dense"])) == ["swiglu"] * 6


def test_one_named_block_needs_no_pattern():
    assert ffns(model(blocks={"only": SPARSE})) == ["moe"] * 6


@given(st.integers(1, 9), st.data())
def test_selectors_are_pythons(n_layers, data):
    """Any index or slice picks what Python picks from a list."""
    number = st.integers(-12, 12)
    part = st.one_of(st.just(""), number.map(str))
    step = st.one_of(st.just(""), number.filter(bool).map(str))
    selector = data.draw(
        st.one_of(
            st.integers(-n_layers, n_layers - 1).map(str),
            st.tuples(part, part).map(":".join),
            st.tuples(part, part, step).map(":".join),
        )
    )
    layers = list(range(n_layers))
    if ":" in selector:
        wanted = layers[slice(*(int(p) if p else None for p in selector.split(":")))]
    else:
        wanted = [layers[int(selector)]]
    spec = model(n_layers, layers={selector: {"norm": "none"}})
    assert [i for i, block in enumerate(spec.per_layer) if block.norm.type == "none"] == sorted(wanted)


def test_the_last_match_wins():
    r, n, ln = "rmsnorm", "none", "layernorm"
    assert norms(**{"0": n, "-1": ln}) == [n, r, r, r, r, ln]
    assert norms(**{"1:4": n, "2": ln}) == [r, n, ln, n, r, r]
    assert norms(**{"2": ln, "1:4": n}) == [r, n, n, n, r, r]
    assert norms(**{"::2": n, "::3": ln}) == [ln, r, n, ln, n, r]


def test_exceptions_merge_over_each_other():
    layers = {"0:3": {"norm": {"eps": 0.5}}, "1": {"attention": {"window": 4}}, "2": {"norm": {"type": "layernorm"}}}
    blocks = model(layers=layers).per_layer
    assert [b.norm.params.eps for b in blocks] == [0.5, 0.5, 1e-5, 1e-6, 1e-6, 1e-6]
    assert [b.attention.params.window for b in blocks] == [None, 4, None, None, None, None]
    assert blocks[1].attention.params.n_heads == 4


def test_exceptions_lie_over_the_layers_own_block():
    spec = model(blocks={"dense": DENSE, "moe": SPARSE}, pattern=["dense", "moe"], layers={"1:3": {"norm": "none"}})
    assert ffns(spec) == ["swiglu", "moe"] * 3
    assert [b.norm.type for b in spec.per_layer][:4] == ["rmsnorm", "none", "none", "rmsnorm"]


def test_another_type_replaces_the_slot_whole():
    spec = model(layers={"-1": {"ffn": {"type": "mlp", "d_ff": 7}}})
    assert (
        spec.per_layer[-1].ffn.dump().items()
        >= {"type": "mlp", "d_ff": 7, "bias": False, "activation": {"type": "gelu"}}.items()
    )


def test_equal_layers_are_one_object():
    spec = model(layers={"0": {"norm": "none"}, "3:": {"norm": "none"}})
    assert len({id(block) for block in spec.per_layer}) == 3, "the block, and each exception once"
    assert spec.per_layer[1] is spec.per_layer[2] is spec.block
    assert spec.per_layer[3] is spec.per_layer[5]
    assert len({id(b) for b in model(n_layers=200).per_layer}) == 1
    blocks = {"a": DENSE, "b": SPARSE}
    assert len({id(b) for b in model(n_layers=9, blocks=blocks, pattern=["a", "b", "b"]).per_layer}) == 2


def test_the_last_norm():
    assert model().last_norm.type == "rmsnorm"
    assert model(layers={"-1": {"norm": "layernorm"}}).last_norm.type == "layernorm"
    assert model(layers={"-1": {"norm": "layernorm"}}, final_norm="none").last_norm.type == "none"


def test_per_layer_survives_the_round_trip():
    spec = model(blocks={"a": DENSE, "b": SPARSE}, pattern=["a", "b"], layers={"::3": {"norm": {"eps": 0.1}}})
    again = validate_model(dump(spec))
    assert again.per_layer == spec.per_layer
    assert again == spec
