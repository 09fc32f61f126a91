"""Sparse matrix times vector against masked dense in float64, on the CPU; on a GPU: test_triton_kernels.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.sparsifiers import kernels
from sparsekit.sparsifiers.kernels import columns_matvec, gather_columns, gather_rows, pays, rows_matvec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def draw(n_batch: int, n: int, sparsity: float, seed: int) -> tuple[Tensor, torch.Generator]:
    """A mask with a share of about ``sparsity`` False."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_batch, n, generator=generator) >= sparsity, generator


def rows_case(n_batch: int, d_in: int, d_out: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    keep, generator = draw(n_batch, d_in, sparsity, seed)
    x = torch.randn(n_batch, d_in, generator=generator) * keep
    return [x.to(dtype), torch.randn(d_in, d_out, generator=generator).to(dtype)]


def columns_case(
    n_batch: int, d_in: int, d_out: int, sparsity: float, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    keep, generator = draw(n_batch, d_out, sparsity, seed)
    x, weight = (torch.randn(n, d_in, generator=generator).to(dtype) for n in (n_batch, d_out))
    return [x, weight, keep]


def dense(x: Tensor, weight: Tensor, keep: Tensor | None = None) -> Tensor:
    if keep is None:
        return x.double() @ weight.double()
    return (x.double() @ weight.double().T) * keep


def close(y: Tensor, case: list[Tensor]) -> None:
    """Off by the rounding of the result, and by what float32 sums lose of their terms; over many outputs, by 2e-3.

    Rounding n times while float32 terms are added up drifts like a random walk: off by sqrt(n) roundings.
    """
    x, weight, *keep = case
    exact = dense(*case)
    terms = dense(x.abs(), weight.abs(), *keep)
    slack = 1e-15 if x.dtype == torch.float64 else 1e-6
    smallest = torch.finfo(x.dtype).tiny
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert ((y.double() - exact).abs() <= ROUNDING[x.dtype] * exact.abs() + slack * terms + smallest).all()
    if y.numel() >= 512:
        bound = torch.finfo(x.dtype).eps * x.shape[1] ** 0.5 if x.dtype == torch.float32 else 2e-3
        assert (y.double() - exact).norm() <= bound * exact.norm()


sizes = st.integers(1, 70)
cases = st.tuples(
    st.integers(1, 8), sizes, sizes, st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.sampled_from([*DTYPES, torch.float64]),
    st.integers(0, 2**32),
)  # fmt: skip


@given(cases, st.sampled_from([1, 2, 3, 8]))
@settings(deadline=None, max_examples=120)
def test_rows_are_summed_as_masked_dense_does(case, threads):
    drawn = rows_case(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(kernels, "SMALL", 0)
        close(gather_rows(*drawn), drawn)
        close(rows_matvec(*drawn), drawn)


@given(cases)
@settings(deadline=None, max_examples=120)
def test_columns_are_multiplied_as_masked_dense_does(case):
    drawn = columns_case(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SMALL", 0)
        close(gather_columns(*drawn), drawn)
        close(columns_matvec(*drawn), drawn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_long_sums_keep_their_digits(dtype, sparsity):
    drawn = rows_case(2, 5000, 600, sparsity, dtype)
    close(gather_rows(*drawn), drawn)
    drawn = columns_case(2, 5000, 2000, sparsity, dtype)
    close(gather_columns(*drawn), drawn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_rows_are_not_read(dtype):
    x, weight = rows_case(3, 64, 48, 0.7, dtype)
    weight[(x == 0).all(0)] = torch.nan
    assert gather_rows(x, weight).isfinite().all()
    x, weight, keep = columns_case(3, 48, 64, 0.7, dtype)
    weight[~keep.any(0)] = torch.nan
    assert gather_columns(x, weight, keep).isfinite().all()


def test_a_nan_in_x_is_active():
    x, weight = rows_case(1, 64, 48, 0.9, torch.float32)
    x[0, 5] = torch.nan
    assert gather_rows(x, weight).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_batch", [1, 8])
def test_nothing_active_is_exactly_zero(monkeypatch, n_batch, dtype):
    monkeypatch.setattr(kernels, "SMALL", 0)
    x, weight = torch.zeros(n_batch, 40, dtype=dtype), torch.randn(40, 24).to(dtype)
    assert rows_matvec(x, weight).equal(torch.zeros(n_batch, 24, dtype=dtype))
    assert rows_matvec(-x, weight).equal(torch.zeros(n_batch, 24, dtype=dtype))
    nobody = torch.zeros(n_batch, 24, dtype=torch.bool)
    x, weight = torch.randn(n_batch, 40).to(dtype), torch.randn(24, 40).to(dtype)
    assert columns_matvec(x, weight, nobody).equal(torch.zeros(n_batch, 24, dtype=dtype))


def test_a_token_of_zeros_beside_another():
    x, weight = rows_case(3, 64, 48, 0.5, torch.float32)
    x[1] = 0
    close(gather_rows(x, weight), [x, weight])
    assert not gather_rows(x, weight)[1].any()


@pytest.mark.parametrize(
    ("n_batch", "sparsity", "dtype", "rows", "columns"),
    [
        (1, 0.0, torch.float32, True, False),
        (1, 0.6, torch.float32, True, True),
        (1, 0.0, torch.bfloat16, True, False),
        (1, 0.9, torch.bfloat16, True, True),
        (4, 0.0, torch.float32, False, False),
        (4, 0.4, torch.float32, False, True),
        (4, 0.9, torch.float32, True, True),
        (8, 0.0, torch.float16, True, False),
    ],
)
def test_what_is_gathered_and_what_multiplied_densely(monkeypatch, n_batch, sparsity, dtype, rows, columns):
    called = []
    monkeypatch.setattr(kernels, "SMALL", 400 * 16)
    for name in ("gather_rows", "gather_columns"):
        true = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, name=name, true=true: called.append(name) or true(*given))
    drawn = rows_case(n_batch, 400, 16, sparsity, dtype)
    close(rows_matvec(*drawn), drawn)
    drawn = columns_case(n_batch, 16, 400, sparsity, dtype)
    close(columns_matvec(*drawn), drawn)
    assert called == ["gather_rows"] * rows + ["gather_columns"] * columns
    monkeypatch.setattr(kernels, "SMALL", 400 * 16 + 1)
    columns_matvec(*drawn)
    assert len(called) == rows + columns


def test_a_gpu_goes_by_what_it_is_told():
    assert pays(None, 8) and pays(0.9, 1) and pays(0.5, 1) and pays(0.9, 8)
    assert not pays(0.0, 1) and not pays(0.05, 1) and not pays(0.5, 4)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_operators_stand_in_a_graph(sparsity):
    x, weight = rows_case(2, 40, 24, sparsity, torch.float32)
    _, other, keep = columns_case(2, 24, 32, sparsity, torch.float32)

    def forward(x, weight, other, keep):
        return columns_matvec(rows_matvec(x * 2, weight, 0.9).relu(), other, keep)

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, other, keep), forward(x, weight, other, keep))
    torch.library.opcheck(torch.ops.sparsekit.rows_matvec, (x, weight, None))
    torch.library.opcheck(torch.ops.sparsekit.columns_matvec, (x @ weight, other, keep, 0.5))


def test_mistakes_are_told_in_one_line():
    x, weight = torch.zeros(2, 6), torch.zeros(6, 4)
    told = [
        (lambda: rows_matvec(x, weight.T.contiguous()),
         "rows_matvec: x [2, 6] and weight [4, 6] do not go together; "
         "give x [1 to 8, d_in] and a matrix with that d_in"),
        (lambda: rows_matvec(torch.zeros(9, 6), weight),
         "rows_matvec: x [9, 6] and weight [6, 4] do not go together; "
         "give x [1 to 8, d_in] and a matrix with that d_in"),
        (lambda: rows_matvec(x.half(), weight),
         "rows_matvec: x is torch.float16 on cpu and weight torch.float32 on cpu; "
         "give both in one floating type on one device"),
        (lambda: rows_matvec(x, torch.zeros(4, 6).T),
         "rows_matvec: weight has strides (1, 6); give it contiguous, or rows are no rows"),
        (lambda: columns_matvec(x, torch.zeros(4, 6), torch.zeros(2, 4)),
         "columns_matvec: keep is torch.float32 [2, 4] on cpu; give torch.bool [2, 4] on cpu"),
    ]  # fmt: skip
    for call, line in told:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == line
