"""What this package checks of itself: the contract of its kind, and what it says."""

from __future__ import annotations

from new_part_package import NewPart
from sparsekit.testing import check_component


def test_contract() -> None:
    check_component("source", "new_part")


def test_sums_are_right_and_none_is_in_both_splits() -> None:
    source = NewPart(NewPart.Params(n=20, below=30))
    seen = {split: set("".join(source.documents(split)).splitlines()) for split in ("train", "validation")}
    for line in seen["train"] | seen["validation"]:
        left, _, total = line.partition("=")
        a, b = map(int, left.split("+"))
        assert a + b == int(total)
        assert 0 <= a < 30 and 0 <= b < 30
    assert seen["train"] and seen["validation"]
    assert not seen["train"] & seen["validation"]
    other = NewPart(NewPart.Params(n=20, below=30, seed=1))
    assert list(other.documents("train")) != list(source.documents("train"))
