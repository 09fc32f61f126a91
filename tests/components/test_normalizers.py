"""Sparsemax and entmax against the library, against other algorithms for the same, and against their Jacobians."""

from __future__ import annotations

import math

import entmax
import pytest
import torch

LIBRARY = {"sparsemax": entmax.sparsemax, "entmax15": entmax.entmax15}
SPARSE = list(LIBRARY)
INF = float("inf")


def sparsemax_by_sorting(row):
    """Martins & Astudillo 2016, algorithm 1."""
    z = sorted(row, reverse=True)
    k = max(k for k in range(1, len(z) + 1) if 1 + k * z[k - 1] > sum(z[:k]))
    tau = (sum(z[:k]) - 1) / k
    return [max(0.0, v - tau) for v in row]


def by_bisection(row, power, slope):
    """max(0, slope z - tau)^power, tau such that the sum is 1: halved until it can be no finer."""
    z = [slope * v for v in row]
    low, high = max(z) - 1, max(z)  # at low the largest alone gives 1, at high the sum is 0
    for _ in range(200):
        tau = (low + high) / 2
        if sum(max(0.0, v - tau) ** power for v in z) >= 1:
            low = tau
        else:
            high = tau
    return [max(0.0, v - low) ** power for v in z]


REFERENCES = {
    "softmax": [lambda row: [math.exp(v) / sum(math.exp(w) for w in row) for v in row]],
    "sparsemax": [sparsemax_by_sorting, lambda row: by_bisection(row, 1, 1.0)],
    "entmax15": [lambda row: by_bisection(row, 2, 0.5)],
}


def scores(randn):
    """Rows of all kinds: near, far apart, equal, one alone ahead."""
    rows = torch.cat([s * randn(10, 9) for s in (0.1, 1.0, 4.0, 30.0)])
    rows[0] = 0.0
    rows[1] = torch.tensor([5.0, *[0.0] * 8])
    rows[2] = torch.tensor([1.0, 1.0, *[-3.0] * 7])
    return rows


@pytest.mark.parametrize("name", REFERENCES)
def test_values(component, randn, name):
    z, made = scores(randn), component("normalizer", name)
    for reference in REFERENCES[name]:
        wanted = torch.tensor([reference(row) for row in z.tolist()], dtype=torch.float64)
        torch.testing.assert_close(made(z), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_library(component, randn, name, dtype):
    z, direction = scores(randn).to(dtype).requires_grad_(), randn(40, 9).to(dtype)
    outcomes = []
    for normalise in (component("normalizer", name), lambda x: LIBRARY[name](x, dim=-1)):
        p = normalise(z)
        outcomes.append((p, *torch.autograd.grad((p * direction).sum(), z)))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1], rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("name", SPARSE)
def test_rows_are_distributions_with_exact_zeros(component, randn, name):
    p = component("normalizer", name)(scores(randn))
    torch.testing.assert_close(p.sum(-1), torch.ones(40, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (p >= 0).all()
    assert (p[0] == p[0, 0]).all(), "equal scores share alike"
    assert p[1].tolist() == [1.0, *[0.0] * 8], "one far ahead takes all"
    assert p[2].tolist() == pytest.approx([0.5, 0.5, *[0.0] * 7], abs=1e-15)
    assert (p[20:] == 0).double().mean() > 0.4


def test_they_lie_in_order_between_softmax_and_argmax(component, randn):
    z = scores(randn)
    support = [(component("normalizer", n)(z) > 0).sum(-1) for n in ("softmax", "entmax15", "sparsemax")]
    assert (support[0] >= support[1]).all()
    assert (support[1] >= support[2]).all()
    assert (support[1] > support[2]).any()


@pytest.mark.parametrize("name", ["softmax", *SPARSE])
def test_a_constant_added_to_all_scores_changes_nothing(component, randn, name):
    z, made = scores(randn)[3:20], component("normalizer", name)
    torch.testing.assert_close(made(z + 7.5), made(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SPARSE)
def test_the_jacobian(component, randn, name):
    """diag(s) - s s^T / sum(s), s the support's indicator or the roots of the probabilities."""
    made = component("normalizer", name)
    for row in scores(randn)[3:]:
        p = made(row)
        s = (p > 0).double() if name == "sparsemax" else p.sqrt()
        wanted = torch.diag(s) - torch.outer(s, s) / s.sum()
        got = torch.autograd.functional.jacobian(made, row)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            got @ torch.ones(9, dtype=torch.float64), torch.zeros(9).double(), atol=1e-12, rtol=0
        )
        torch.testing.assert_close(got, got.T, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", SPARSE)
def test_gradcheck(component, randn, name):
    # between the kinks: no score is within the step of a threshold
    z = (0.7 * randn(4, 6)).requires_grad_()
    assert torch.autograd.gradcheck(component("normalizer", name), (z,))


@pytest.mark.parametrize("name", ["softmax", *SPARSE])
def test_hidden_keys(component, randn, name):
    """-inf gets exactly 0 and no gradient, and the rest is as if it were not there."""
    made, z = component("normalizer", name), randn(6, 9)
    hidden = torch.zeros(6, 9, dtype=torch.bool)
    for n in range(6):
        hidden[n, [2, 5, 6, 8, 0, 1, 3, 7][: n + 3]] = True  # the last row sees one key
    leaf = z.masked_fill(hidden, -INF).requires_grad_()
    p = made(leaf)
    assert not p[hidden].any()
    (gradient,) = torch.autograd.grad((p * randn(6, 9)).sum(), leaf)
    assert gradient.isfinite().all()
    assert not gradient[hidden].any()
    for n in range(6):
        torch.testing.assert_close(p[n, ~hidden[n]], made(z[n, ~hidden[n]]), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SPARSE)
def test_they_compile_whole(component, randn, name):
    made, z = component("normalizer", name), scores(randn).requires_grad_()
    direction = randn(40, 9)
    compiled = torch.compile(lambda x: made(2 * x) * direction, backend="aot_eager", fullgraph=True)
    (wanted,) = torch.autograd.grad((made(2 * z) * direction).sum(), z)
    y = compiled(z)
    torch.testing.assert_close(y, made(2 * z) * direction, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), z)[0], wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", SPARSE)
def test_what_the_compiler_is_told_is_true(randn, name):
    torch.library.opcheck(getattr(torch.ops.sparsekit, name), (randn(3, 5).requires_grad_(),))
