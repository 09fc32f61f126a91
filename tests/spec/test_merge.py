"""Laying one piece of JSON over another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.spec.merge import differences, merge

CASES = {
    "keys": ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
    "deep": ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 3}}}, {"a": {"b": {"c": 3, "d": 2}}}),
    "lists are replaced": ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
    "null is a value": ({"a": {"b": 1}}, {"a": None}, {"a": None}),
    "over null": ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    "same type": ({"type": "x", "p": 1}, {"type": "x", "q": 2}, {"type": "x", "p": 1, "q": 2}),
    "another type": ({"type": "x", "p": 1}, {"type": "y", "q": 2}, {"type": "y", "q": 2}),
    "no type": ({"type": "x", "p": 1}, {"q": 2}, {"type": "x", "p": 1, "q": 2}),
    "object over a name": ("x", {"q": 2}, {"type": "x", "q": 2}),
    "object of another type over a name": ("x", {"type": "y", "q": 2}, {"type": "y", "q": 2}),
    "name over an object": ({"type": "x", "p": 1}, "x", {"type": "x", "p": 1}),
    "another name over an object": ({"type": "x", "p": 1}, "y", {"type": "y"}),
    "name over name": ("x", "y", "y"),
    "nested slots": (
        {"type": "moe", "router": {"type": "top_k", "k": 2}, "expert": {"type": "mlp", "d_ff": 3}},
        {"router": {"k": 4}, "expert": {"type": "swiglu", "d_ff": 5}},
        {"type": "moe", "router": {"type": "top_k", "k": 4}, "expert": {"type": "swiglu", "d_ff": 5}},
    ),
}


@pytest.mark.parametrize(("base", "over", "wanted"), CASES.values(), ids=CASES)
def test_cases(base, over, wanted):
    assert merge(base, over) == wanted


# JSON as specs hold it: "type" names an entry and stands in every object of a slot or in none
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.lists(st.integers(0, 2), max_size=2))
KEYS = st.sampled_from(["a", "b", "c", "d"])
PLAIN = st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
OBJECTS = st.dictionaries(KEYS, PLAIN, max_size=4)
TYPES = st.sampled_from(["x", "y"])
SLOTTED = st.recursive(
    LEAVES,
    lambda inner: st.builds(lambda name, rest: {"type": name, **rest}, TYPES, st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=10,
)


@given(PLAIN, PLAIN, PLAIN)
def test_plain_objects_merge_associatively(a: Any, b: Any, c: Any):
    if _no_cut(a, b, c):
        assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(OBJECTS, OBJECTS)
def test_the_keys_of_both(a: dict[str, Any], b: dict[str, Any]):
    merged = merge(a, b)
    assert list(merged) == [*a, *(key for key in b if key not in a)], "in the order of the one below"
    for key in merged:
        assert merged[key] == (merge(a[key], b[key]) if key in a and key in b else {**a, **b}[key])


def _no_cut(a: Any, b: Any, c: Any) -> bool:
    """No leaf of b lies between an object of a and one of c: there merging is not associative, and should not be."""
    if isinstance(a, dict) and isinstance(c, dict) and not isinstance(b, dict):
        return False
    if not (isinstance(a, dict) and isinstance(b, dict) and isinstance(c, dict)):
        return True
    return all(_no_cut(a[key], b[key], c[key]) for key in {*a} & {*b} & {*c})


@given(SLOTTED)
def test_nothing_over_something(a: Any):
    assert merge(a, copy.deepcopy(a)) == a
    if isinstance(a, dict):
        assert merge(a, {}) == a
        assert merge({}, a) == a


@given(SLOTTED, SLOTTED)
def test_what_lies_on_top_wins_and_nothing_is_changed_or_shared(a: Any, b: Any):
    before = copy.deepcopy((a, b))
    merged = merge(a, b)
    assert merge(merged, b) == merged, "laying it on twice changes nothing"
    if isinstance(merged, dict):
        for key in merged:
            merged[key] = "spoiled"
    assert (a, b) == before


@given(SLOTTED, SLOTTED)
def test_another_type_leaves_nothing_of_the_one_below(a: Any, b: Any):
    if isinstance(a, dict) and isinstance(b, dict) and a["type"] != b["type"]:
        assert merge(a, b) == b


@given(OBJECTS, OBJECTS)
def test_differences_are_where_two_differ(a: dict[str, Any], b: dict[str, Any]):
    assert differences(a, copy.deepcopy(a)) == {}
    found = differences(a, b)
    for path, (left, right) in found.items():
        assert left != right
        assert (_at(a, path), _at(b, path)) == (left, right)
    told = {path.split(".")[0] for path in found}
    assert told == {key for key in {*a, *b} if _full(a.get(key)) != _full(b.get(key))}


def _full(value: Any) -> Any:
    """Without what is null or empty, which stands for an absent key."""
    if not isinstance(value, dict):
        return value
    kept = {key: _full(item) for key, item in value.items()}
    return {key: item for key, item in kept.items() if item is not None} or {}


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def test_differences_name_paths():
    left, right = {"m": {"d": 1, "x": [1]}, "n": 2}, {"m": {"d": 3, "x": [1]}, "k": 4}
    assert differences(left, right) == {"m.d": (1, 3), "n": (2, None), "k": (None, 4)}
