"""In what specs differ."""

from __future__ import annotations

import copy

from hypothesis import given
from hypothesis import strategies as st

from sparsekit.reports.differences import differences, words

leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
trees = st.recursive(leaves, lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3), max_leaves=8)
specs = st.dictionaries(st.sampled_from("abcd"), trees, min_size=1, max_size=4)


def leaf_paths(value, path=()):
    if isinstance(value, dict) and value:
        return [found for key, item in value.items() for found in leaf_paths(item, (*path, key))]
    return [path]


@given(specs, st.integers(1, 4))
def test_equal_specs_do_not_differ(spec, n):
    assert differences([copy.deepcopy(spec) for _ in range(n)]) == {}


@given(specs, st.data())
def test_one_changed_value_is_the_one_difference(spec, data):
    path = data.draw(st.sampled_from(leaf_paths(spec)))
    changed = copy.deepcopy(spec)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    before, parent[path[-1]] = parent[path[-1]], "another value"
    assert differences([spec, changed]) == {".".join(path): [words(before), "another value"]}


def test_slots_of_other_types_are_told_whole_and_seeds_are_apart():
    dense = {"name": "a", "train": {"seed": 1, "lr": 0.1}, "ffn": {"type": "swiglu", "d_ff": 8, "bias": None}}
    moe = {"name": "b", "train": {"seed": 2, "lr": 0.2},
           "ffn": {"type": "moe", "n_experts": 4, "router": {"type": "top_k", "k": 2}}}  # fmt: skip
    assert differences([dense, moe]) == {
        "train.lr": ["0.1", "0.2"],
        "ffn": ["swiglu (d_ff 8)", "moe (n_experts 4, router top_k (k 2))"],
    }
    wider = {**dense, "ffn": {"type": "swiglu", "d_ff": 16, "bias": None}}
    assert differences([dense, wider, dense]) == {"ffn.d_ff": ["8", "16", "8"]}


def test_what_a_spec_lacks_is_none():
    assert differences([{"layers": {}}, {"layers": {"0": {"d_ff": 3}}}]) == {"layers.0": [None, "(d_ff 3)"]}
    assert differences([]) == {}


def test_values_in_words():
    assert [words(v) for v in ({}, [], None, True, 1e-4, "x")] == ["{}", "[]", "null", "true", "0.0001", "x"]
    assert words([{"type": "variance", "every": 5}, {"type": "causal"}]) == "variance (every 5), causal"
