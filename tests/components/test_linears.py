"""The grouped matrix multiply behind experts, against a loop over rows."""

from __future__ import annotations

import pytest
import torch

from sparsekit.components.contracts import ExpertGroups, ForwardContext
from sparsekit.components.linears import grouped_mm, grouped_outer, project

# (rows, d_in, d_out, ends of the experts' rows): aligned and not, experts without rows, rows without an expert
CASES = [
    (12, 16, 8, [3, 3, 9, 12]),
    (12, 16, 8, [0, 0, 0, 12]),
    (11, 5, 7, [2, 6, 6, 11]),
    (13, 8, 16, [4, 4, 7, 10]),
    (13, 3, 8, [0, 0, 1, 1]),
    (6, 8, 8, [0, 0, 0, 0]),
    (0, 8, 8, [0, 0, 0, 0]),
    (0, 3, 5, [0, 0, 0, 0]),
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.15}


def owner(row, ends):
    """The expert of a row, or None past the last."""
    return next((expert for expert, end in enumerate(ends) if row < end), None)


def by_row(x, weight, ends):
    rows = [
        weight[owner(m, ends)] @ x[m] if owner(m, ends) is not None else 0 * (weight[0] @ x[m]) for m in range(len(x))
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])


def inputs(randn, case, dtype):
    n_rows, d_in, d_out, ends = case
    x, weight, dy = randn(n_rows, d_in), randn(4, d_out, d_in), randn(n_rows, d_out)
    return x.to(dtype), weight.to(dtype), dy.to(dtype), torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(randn, case, dtype):
    x, weight, dy, offsets = inputs(randn, case, dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    got = grouped_mm(x, weight, offsets)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = by_row(*wide, case[3])
    close = {"rtol": 0, "atol": TOLERANCE[dtype], "check_dtype": False}
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted, **close)
    if len(x):
        gradients = torch.autograd.grad(wanted, wide, dy.double())
        for one, other in zip(torch.autograd.grad(got, (x, weight), dy), gradients, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_gradients_that_are_not_contiguous(randn, case, dtype):
    x, weight, _, offsets = inputs(randn, case, dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    ones = torch.ones(case[0], case[2], dtype=dtype)
    wanted = torch.autograd.grad(grouped_mm(x, weight, offsets), (x, weight), ones)
    expanded = torch.autograd.grad(grouped_mm(x, weight, offsets).sum(), (x, weight))
    transposed = torch.autograd.grad(grouped_mm(x, weight, offsets), (x, weight), ones.T.contiguous().T)
    for gradients in (expanded, transposed):
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype])


def test_inputs_that_are_not_contiguous(randn):
    x, weight, _, offsets = inputs(randn, CASES[0], torch.float32)
    wanted = grouped_mm(x, weight, offsets)
    torch.testing.assert_close(grouped_mm(x.T.contiguous().T, weight, offsets), wanted)
    torch.testing.assert_close(grouped_mm(x, weight.mT.contiguous().mT, offsets), wanted)


@pytest.mark.parametrize("case", [(5, 3, 2, [2, 2, 4, 5]), (5, 2, 3, [1, 1, 1, 3])], ids=str)
def test_first_and_second_derivatives(randn, case):
    x, weight, dy, offsets = inputs(randn, case, torch.float64)
    x, weight, dy = x.requires_grad_(), weight.requires_grad_(), dy.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: grouped_mm(a, b, offsets), (x, weight))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_mm(a, b, offsets), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: grouped_outer(a, b, offsets), (dy, x))
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_outer(a, b, offsets), (dy, x))


@pytest.mark.parametrize("operator", [grouped_mm, grouped_outer])
def test_what_the_compiler_is_told_is_true(randn, operator):
    x, weight, dy, offsets = inputs(randn, CASES[0], torch.float32)
    arguments = (x, weight, offsets) if operator is grouped_mm else (dy, x, offsets)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_or_a_group_of_them(component, randn, bias):
    x, weight, offsets = randn(7, 5), randn(3, 4, 5), torch.tensor([2, 2, 6], dtype=torch.int32)
    shift = randn(3, 4) if bias else None
    grouped = project(x, weight, shift, ForwardContext(groups=ExpertGroups(offsets)))
    for m in range(6):
        e = owner(m, [2, 2, 6])
        wanted = weight[e] @ x[m] + (shift[e] if bias else 0)
        torch.testing.assert_close(grouped[m], wanted, rtol=0, atol=1e-13)
        alone = project(x[m : m + 1], weight, shift, ForwardContext(groups=ExpertGroups(expert=e)))[0]
        torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-13)


def test_without_its_context_an_expert_cannot_project(randn):
    with pytest.raises(TypeError, match=r"call linear\(x, context\)"):
        project(randn(2, 5), randn(3, 4, 5), None, None)
    with pytest.raises(TypeError, match="grouped = False"):
        project(randn(2, 5), randn(3, 4, 5), None, ForwardContext())


def test_autocast_reaches_grouped_products(randn):
    x, weight, _, offsets = inputs(randn, CASES[0], torch.float32)
    context = ForwardContext(groups=ExpertGroups(offsets))
    with torch.autocast("cpu", torch.bfloat16):
        y = project(x.requires_grad_(), weight.requires_grad_(), None, context)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), project(x, weight, None, context), rtol=0, atol=0.15)
