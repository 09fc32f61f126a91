"""The fits of Sparsing Law's curves: planted coefficients, the least sum of squares, and what intervals cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import differential_evolution

from sparsekit.errors import DataError
from sparsekit.studies.laws import PUBLISHED, RELU, SILU, fit, fit_relu, fit_silu, points_of

D_N = np.geomspace(10, 300, 24)  # billions: what the paper's fits are read at


def relu(D, a, b, c, A0):
    return np.exp(-c * D**a + b) + A0


def silu(D, a, c, A0):
    return -c / D**a + A0


CURVES = {"relu": relu, "silu": silu}
PLANTED = [(law, size) for law, sizes in PUBLISHED.items() for size in sizes]


@pytest.mark.parametrize(("law", "size"), PLANTED)
def test_published_coefficients_come_back(law, size):
    planted = PUBLISHED[law][size]
    found = fit(law, D_N, CURVES[law](D_N, *planted))
    # of the 0.1B ReLU curve (a = .1) a change of all four coefficients together hardly shows
    np.testing.assert_allclose(list(found.coefficients.values()), planted, rtol=1e-4)
    assert found.error < 1e-9
    assert found.limit == found.coefficients["A0"]
    np.testing.assert_allclose(found([[1000.0]]), CURVES[law](np.array([[1000.0]]), *planted), rtol=1e-4)


@given(a=st.floats(0.2, 2), at_end=st.floats(0.5, 8), height=st.floats(0.02, 0.6), A0=st.floats(0, 0.3))
@settings(max_examples=8, deadline=None)
def test_any_relu_curve_that_shows_itself_is_found(a, at_end, height, A0):
    D = np.geomspace(0.5, 50, 20)
    c = at_end / 50**a
    planted = (a, math.log(height), c, A0)
    A = relu(D, *planted)
    found = fit_relu(D, A)
    np.testing.assert_allclose(found(D), A, atol=1e-6)


@pytest.mark.parametrize("law", ["relu", "silu"])
def test_no_search_of_another_kind_finds_a_smaller_sum_of_squares(law):
    rng = np.random.default_rng(3)
    A = CURVES[law](D_N, *PUBLISHED[law]["0.2B"]) + rng.normal(0, 1e-3, len(D_N))
    found = fit(law, D_N, A)
    squares = ((found(D_N) - A) ** 2).sum()
    ends = {"a": (0.01, 3), "b": (-8, 4), "c": (1e-3, 4), "A0": (0, 1)}
    of = {"relu": RELU, "silu": SILU}[law].coefficients
    other = differential_evolution(
        lambda x: ((CURVES[law](D_N, *x) - A) ** 2).sum(), [ends[c] for c in of], rng=1, tol=1e-12, maxiter=400
    )
    assert squares <= other.fun * (1 + 1e-6)
    assert found.error == pytest.approx(math.sqrt(squares / (len(D_N) - len(of))))


def test_the_slopes_are_those_of_the_curves():
    for law, size in PLANTED:
        form = {"relu": RELU, "silu": SILU}[law]
        x = form.inside(dict(zip(form.coefficients, PUBLISHED[law][size], strict=True)))
        for i in range(len(x)):
            step = np.zeros_like(x)
            step[i] = 1e-6
            by_differences = (form.value(x + step, D_N) - form.value(x - step, D_N)) / 2e-6
            np.testing.assert_allclose(form.slope(x, D_N)[:, i], by_differences, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("law", ["relu", "silu"])
def test_an_intervals_ends_are_where_the_profile_says(law):
    """Held at an end, the rest fitted anew by another method, the sum of squares is the bearable one."""
    from scipy.optimize import minimize
    from scipy.stats import f

    rng = np.random.default_rng(4)
    A = CURVES[law](D_N, *PUBLISHED[law]["0.2B"]) + rng.normal(0, 3e-4, len(D_N))
    found = fit(law, D_N, A)
    names = list(found.coefficients)
    freedom = len(D_N) - len(names)
    bearable = freedom * found.error**2 * (1 + f.ppf(0.95, 1, freedom) / freedom)
    for end in found.intervals["a"]:

        def squares(rest, end=end):
            x = np.array(list(rest))
            return ((CURVES[law](D_N, end, *x) - A) ** 2).sum() * 1e6

        start = [found.coefficients[name] for name in names[1:]]
        options = {"xatol": 1e-12, "fatol": 1e-12, "maxiter": 20_000, "maxfev": 20_000}
        held = minimize(squares, start, method="Nelder-Mead", options=options)
        assert held.fun / 1e6 == pytest.approx(bearable, rel=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_interval_holds_what_another_minimum_bears(seed):
    """Of a fall that is over with the second point every steepness is as good, each in a minimum of its own."""
    from scipy.stats import f

    D = np.linspace(4e-4, 8e-3, 18)  # billions, a small run's
    A = 0.02 + np.where(np.arange(18) == 0, 0.03, 0.0) + np.random.default_rng(seed).normal(0, 5e-3, 18)
    found = fit_relu(D, A)
    bearable = 14 * found.error**2 * (1 + f.ppf(0.95, 1, 14) / 14)
    for a in (1.0, 2.0, 4.0, 6.0, 8.0, 9.9):
        least = math.inf
        for at_start in np.geomspace(1e-2, 30, 400):  # c D^a at the first point, b at most 40; A0 is linear
            falling = np.exp(-at_start * ((D / D[0]) ** a - 1))
            (amplitude, limit), *_ = np.linalg.lstsq(np.stack((falling, np.ones(18)), axis=1), A, rcond=None)
            if amplitude > 0 and 0 <= limit <= 1:
                least = min(least, float(((amplitude * falling + limit - A) ** 2).sum()))
        if least <= bearable * 0.99:
            low, high = found.intervals["a"]
            assert low <= a <= high, (a, found.intervals)
        assert least >= 14 * found.error**2 * (1 - 1e-6)  # no place of the grid is below the minimum


@pytest.mark.parametrize(
    ("law", "size", "runs"), [("silu", "0.1B", 40), pytest.param("relu", "0.4B", 80, marks=pytest.mark.slow)]
)
def test_intervals_hold_what_was_planted_as_often_as_they_say(law, size, runs):
    rng = np.random.default_rng(5)
    planted = PUBLISHED[law][size]
    curve = CURVES[law](D_N, *planted)
    held = np.zeros(len(planted))
    for _ in range(runs):
        found = fit(law, D_N, curve + rng.normal(0, 1e-3, len(D_N)), level=0.9)
        pairs = zip(found.intervals.values(), planted, strict=True)
        held += [low <= value <= high for (low, high), value in pairs]
    # 3.5 standard deviations of a binomial about .9
    room = 3.5 * math.sqrt(0.9 * 0.1 / runs)
    assert (np.abs(held / runs - 0.9) <= room).all(), held / runs


def test_what_the_points_do_not_bound_is_said_to_be_unbounded():
    """Of a flat cloud no exponent can be told."""
    rng = np.random.default_rng(6)
    found = fit_silu(D_N, 0.4 + rng.normal(0, 1e-3, len(D_N)))
    low, high = found.intervals["a"]
    assert (low, high) == (0.0, 10.0)
    assert found.intervals["c"][0] == 0.0


def test_the_unit_of_tokens_changes_c_alone():
    rng = np.random.default_rng(7)
    A = silu(D_N, *PUBLISHED["silu"]["0.1B"]) + rng.normal(0, 1e-3, len(D_N))
    ours, millions = fit_silu(D_N, A), fit_silu(D_N * 1e3, A)
    assert millions.coefficients["a"] == pytest.approx(ours.coefficients["a"], rel=1e-5)
    assert millions.limit == pytest.approx(ours.limit, rel=1e-6)
    scale = 1e3 ** ours.coefficients["a"]
    assert millions.coefficients["c"] == pytest.approx(ours.coefficients["c"] * scale, rel=1e-4)


def test_it_prints_a_line_for_each_coefficient():
    text = str(fit_silu(D_N, silu(D_N, 0.5, 0.1, 0.4)))
    assert text.splitlines()[0].startswith("A(D) = -c / D^a + A0, 24 points, error ")
    assert [line.split()[:2] for line in text.splitlines()[1:]] == [["a", "0.5"], ["c", "0.1"], ["A0", "0.4"]]


def test_the_points_of_a_run_are_what_it_measured_while_it_trained(tmp_path):
    spec = {
        "model": {
            "d_model": 16, "n_layers": 2, "vocab_size": 257, "max_seq_len": 32,
            "block": {
                "attention": {"type": "mha", "n_heads": 2}, "ffn": {"type": "gated", "d_ff": 32, "activation": "relu"},
            },
        },
        "data": {"source": {"type": "embedded", "novels": ["emma"]}, "tokenizer": "byte"},
        "train": {
            "max_steps": 6, "global_batch_tokens": 128, "micro_batch_size": 4, "log_every": 4, "eval_tokens": 128,
            "callbacks": [],
        },
        "probes": [{"type": "activation_sparsity", "metric": "nonzero", "every": 2, "sequences": 4}],
    }  # fmt: skip
    from sparsekit import load_spec, train

    run = train(load_spec(spec), out=tmp_path / "run")
    D, A = points_of(run.folder)
    np.testing.assert_allclose(D * 1e9, [256, 512, 768])
    assert ((A > 0.2) & (A < 0.8)).all()  # a ReLU, barely trained
    with pytest.raises(DataError) as caught:
        points_of(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds no activation ratios of activation_sparsity along training; "
        'train it with "probes": [{"type": "activation_sparsity", "every": 100}] in its spec'
    )


@pytest.mark.parametrize(
    ("D", "A", "told"),
    [
        (
            [1, 2, 3, 3],
            [0.1] * 4,
            "silu law: 3 coefficients take points at 4 different D or more, and there are 3; measure more checkpoints",
        ),
        ([1, 2], [0.1], "silu law: D and A have shapes (2,) and (1,); give one A for each D"),
        ([0, 1, 2, 3], [0.1] * 4, "silu law: D are tokens trained on, above 0; leave out what is not"),
        ([1, 2, 3, 4], [0.1, 0.2, 40, 0.1], "silu law: A are activation ratios, from 0 to 1; leave out what is not"),
        ([1, 2, 3, 4], [math.nan] * 4, "silu law: A are activation ratios, from 0 to 1; leave out what is not"),
    ],
)  # fmt: skip
def test_mistakes_are_a_line_each(D, A, told):
    with pytest.raises(DataError) as caught:
        fit_silu(D, A)
    assert str(caught.value) == told


def test_without_scipy_a_line_says_what_installs_it(monkeypatch):
    import sys

    from sparsekit.errors import SparsekitError

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(SparsekitError, match=r"^fitting a law needs scipy: pip install 'sparsekit\[studies\]'$"):
        fit_relu(D_N, relu(D_N, *PUBLISHED["relu"]["0.2B"]))
