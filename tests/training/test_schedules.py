"""Schedules against their formulas, warm-ups in three units, and batches that grow."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.errors import SpecError
from sparsekit.registry import registry
from sparsekit.spec.load import validate
from sparsekit.training.schedules import BatchRamp, BatchRampSpec, Place, Schedule

NAMES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def make(name: str, **params: Any) -> Schedule:
    cls = registry("schedule").get(name)
    made: Schedule = cls(cls.Params(**params))
    return made


def places(total: int, step_tokens: int) -> list[Place]:
    """The steps of a run of equal batches."""
    return [Place(step, total, step * step_tokens, step_tokens, total * step_tokens) for step in range(total)]


# ---- schedules ----


def test_all_of_them_are_tested() -> None:
    assert set(NAMES) == {entry.name for entry in registry("schedule").entries() if entry.built_in}


def final_of(name: str) -> dict[str, Any]:
    return {"final": 0.2} if name in ("linear", "cosine", "wsd") else {}


@given(st.sampled_from(NAMES), st.integers(0, 20), st.integers(1, 200))
def test_up_to_the_peak_and_never_up_again(name: str, warmup: int, total: int) -> None:
    schedule = make(name, warmup_steps=warmup)
    factors = [schedule.factor(place) for place in places(total, 7)]
    assert factors == [schedule.factor(step, total) for step in range(total)]  # where nothing counts tokens
    assert all(0 < factor <= 1 for factor in factors)
    for step in range(min(warmup, total)):
        assert factors[step] == pytest.approx((step + 1) / warmup)
    after = factors[warmup:]
    assert after[:1] in ([], [1.0]) or name == "wsd"
    assert after == sorted(after, reverse=True)


@given(st.sampled_from(NAMES), st.integers(0, 20), st.integers(1, 200), st.integers(1, 10**6))
def test_a_warmup_is_the_same_in_any_unit(name: str, warmup: int, total: int, step_tokens: int) -> None:
    by_step = make(name, warmup_steps=warmup, **final_of(name))
    by_token = make(name, warmup_tokens=warmup * step_tokens, **final_of(name))
    for place in places(total, step_tokens):
        expected = by_step.factor(place)
        if name != "inverse_sqrt" or warmup:  # without a warm-up its time is counted in its own unit
            assert by_token.factor(place) == pytest.approx(expected, rel=1e-12)
    if warmup <= total:
        by_share = make(name, warmup_share=warmup / total, **final_of(name))
        for place in places(total, step_tokens):
            assert by_share.factor(place) == pytest.approx(by_step.factor(place), rel=1e-12)


def test_tokens_count_where_batches_grow() -> None:
    """Batches of 10, 20, 30, … tokens: warmed up over 65 of 360, then linearly down over the other 295."""
    schedule = make("linear", warmup_tokens=65)
    factors, seen = [], 0
    for step in range(8):
        batch = 10 * (step + 1)
        factors.append(schedule.factor(Place(step, 8, seen, batch, 360)))
        seen += batch
    down = [1 - (tokens - 65) / 295 for tokens in (100, 150, 210, 280)]
    assert factors == pytest.approx([10 / 65, 30 / 65, 60 / 65, 1.0, *down], rel=1e-12)


def test_formulas() -> None:
    """Ten steps of warm-up, then a hundred."""
    t = [step / 100 for step in range(100)]
    expected = {
        "constant": [1.0 for _ in t],
        "linear": [0.2 + 0.8 * (1 - x) for x in t],
        "cosine": [0.2 + 0.8 * (1 + math.cos(math.pi * x)) / 2 for x in t],
        "inverse_sqrt": [math.sqrt(10 / (10 + 100 * x)) for x in t],
    }
    for name, factors in expected.items():
        schedule = make(name, warmup_steps=10, **final_of(name))
        assert [schedule.factor(step, 110) for step in range(10, 110)] == pytest.approx(factors, rel=1e-12)


@pytest.mark.parametrize(
    ("decay", "shape"),
    [
        ("linear", lambda t: 1 - t),
        ("1-sqrt", lambda t: 1 - math.sqrt(t)),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
    ],
)
def test_wsd_decays_over_its_last_share_only(decay: str, shape: Any) -> None:
    schedule = make("wsd", warmup_steps=10, decay_share=0.25, final=0.1, decay=decay)
    factors = [schedule.factor(step, 110) for step in range(110)]
    assert factors[10:86] == [1.0] * 76
    expected = [0.1 + 0.9 * shape((step - 85) / 25) for step in range(85, 110)]
    assert factors[85:] == pytest.approx(expected, rel=1e-9)
    assert make("wsd", decay_share=0.0).factor(109, 110) == 1.0
    assert make("wsd", final=0.1, decay=decay).factor(110, 110) == pytest.approx(0.1)  # past its end


def test_inverse_sqrt_by_its_own_time() -> None:
    schedule = make("inverse_sqrt", warmup_steps=10, timescale=400)
    assert [schedule.factor(step, 5000) for step in (9, 10, 1210)] == pytest.approx([1.0, 1.0, 0.5])
    assert make("inverse_sqrt").factor(99, 5000) == pytest.approx(0.1)
    assert schedule.factor(1210, 2000) == schedule.factor(1210, 9000)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"warmup_steps": 5, "warmup_tokens": 100},
            "train.schedule.warmup_tokens: a run warms up once, and warmup_steps is given too; set warmup_steps to 0",
        ),
        (
            {"warmup_tokens": 0, "warmup_share": 0.1},
            "train.schedule.warmup_share: a run warms up once, and warmup_tokens is given too; "
            "set warmup_tokens to null",
        ),
    ],
)
def test_one_warmup_at_most(raw: dict[str, Any], params: dict[str, Any], message: str) -> None:
    raw["train"]["schedule"] = {"type": "cosine", **params}
    with pytest.raises(SpecError) as error:
        validate(raw)
    assert str(error.value) == message


def test_specs_survive_their_dump() -> None:
    for params in ({"warmup_steps": 3}, {"warmup_tokens": 0}, {"warmup_share": 0.5}, {}):
        first = make("cosine", **params).params
        assert type(first).model_validate(first.model_dump(mode="json")) == first


def test_tokens_must_be_told() -> None:
    with pytest.raises(TypeError, match="wants a Place"):
        make("cosine", warmup_tokens=10).factor(0, 10)


# ---- batches that grow ----

SIZES = st.tuples(
    st.integers(1, 8), st.integers(1, 12), st.integers(0, 20)
)  # the unit, how many at first, how many more


def ramp_of(sizes: tuple[int, int, int], ramp_tokens: int, increments: int, offset: int) -> BatchRamp:
    unit, first, more = sizes
    start = min(unit * first + offset % unit, unit * (first + more))
    return BatchRamp(
        BatchRampSpec(start_tokens=start, ramp_tokens=ramp_tokens, increments=increments), unit * (first + more), unit
    )


@given(SIZES, st.integers(1, 3000), st.integers(1, 12), st.integers(0, 7), st.integers(1, 6000), st.integers(0, 400))
def test_steps_and_tokens_of_a_ramp(
    sizes: tuple[int, int, int], ramp_tokens: int, increments: int, offset: int, tokens: int, steps: int
) -> None:
    """Against a run that is walked through step by step."""
    ramp = ramp_of(sizes, ramp_tokens, increments, offset)
    seen, count, walked, at_tokens = 0, 0, 0, None
    batches = []
    while at_tokens is None or count < steps:
        if at_tokens is None and seen >= tokens:
            at_tokens = count
        batch = ramp.batch_tokens(seen)
        assert batch % ramp.unit == 0 and batch >= ramp.unit
        batches.append(batch)
        seen, count = seen + batch, count + 1
        walked = seen if count <= steps else walked
    assert ramp.steps(tokens) == at_tokens
    assert ramp.tokens(steps) == walked
    assert batches == sorted(batches)
    assert ramp.batch_tokens(ramp_tokens) == ramp.full


def test_a_ramp_by_hand() -> None:
    ramp = BatchRamp(BatchRampSpec(start_tokens=32, ramp_tokens=400, increments=4), full=128, unit=16)
    assert [ramp.batch_tokens(seen) for seen in (0, 99, 100, 199, 200, 300, 399, 400, 9999)] == [
        32, 32, 48, 48, 80, 96, 96, 128, 128,
    ]  # fmt: skip
    rounded = BatchRamp(BatchRampSpec(start_tokens=40, ramp_tokens=400, increments=4), full=128, unit=32)
    assert [rounded.batch_tokens(seen) for seen in (0, 100, 200, 300, 400)] == [32, 32, 64, 96, 128]
    assert ramp.tokens(3) == 96
    assert ramp.tokens(5) == 4 * 32 + 48
    assert ramp.steps(97) == 4


def test_no_ramp() -> None:
    ramp = BatchRamp(None, full=128, unit=16)
    assert (ramp.batch_tokens(0), ramp.steps(1000), ramp.steps(1024), ramp.tokens(8)) == (128, 8, 8, 1024)


@pytest.mark.parametrize(
    ("start", "full", "message"),
    [
        (8, 128, "train.batch_ramp.start_tokens: 8 is not between 16 (a micro-batch on each process) and 128"),
        (256, 128, "train.batch_ramp.start_tokens: 256 is not between 16 (a micro-batch on each process) and 128"),
        (16, 120, "train.global_batch_tokens: 120 is not a multiple of 16, a micro-batch on each process"),
    ],
)
def test_a_ramp_that_does_not_fit(start: int, full: int, message: str) -> None:
    with pytest.raises(SpecError) as error:
        BatchRamp(BatchRampSpec(start_tokens=start, ramp_tokens=100), full, 16)
    assert str(error.value) == message
