"""The Triton kernels: in Triton's interpreter, as machine code for an H100 (both without a GPU), and on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsekit.sparsifiers.kernels import columns_matvec, rows_matvec
from tests.triton_tools import code_for_an_h100, demand_gpu, interpreted, resources

from .test_kernels import close, columns_case, rows_case

DTYPES = [torch.bfloat16, torch.float16]

# Weights that must not be read are nan.
INTERPRETED = """
import torch
from sparsekit.sparsifiers import triton_kernels
from sparsekit.sparsifiers.triton_kernels import Plan
from tests.sparsifiers.test_kernels import close, columns_case, rows_case

def check(n_batch, d_in, d_out, sparsity, dtype, by_rows=None, by_columns=None):
    drawn = rows_case(n_batch, d_in, d_out, sparsity, dtype)
    drawn[1][(drawn[0] == 0).all(0)] = torch.nan
    y = triton_kernels.rows_matvec(*drawn, by_rows)
    close(y, [drawn[0], drawn[1].nan_to_num()])
    drawn = columns_case(n_batch, d_in, d_out, sparsity, dtype)
    drawn[1][~drawn[2].any(0)] = torch.nan
    y = triton_kernels.columns_matvec(*drawn, by_columns)
    close(y, [drawn[0], drawn[1].nan_to_num(), drawn[2]])

for n_batch in range(1, 9):
    for d_in, d_out in ((1, 1), (37, 53), (300, 130)):
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            check(n_batch, d_in, d_out, sparsity, torch.float16)
for plan in (Plan(16, 16, 32), Plan(64, 16, 64)):  # many stretches, sizes that no tile divides
    for n_batch in (1, 3):
        check(n_batch, 45, 77, 0.5, torch.float16, plan, plan)
print("all agree")
"""


@pytest.mark.slow
def test_kernels_agree_in_the_interpreter():
    interpreted(INTERPRETED)


# --- machine code

SHAPES = [(4096, 14336), (14336, 4096), (1031, 515), (1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("n_batch", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compile_for_an_h100(dtype: torch.dtype, n_batch: int, tmp_path: Path) -> None:
    """Little shared memory; where sizes allow, weights are read 16 bytes a thread at a time and nothing spills."""
    pytest.importorskip("triton", reason="triton is not installed")
    from sparsekit.sparsifiers import triton_kernels as kernels

    pointer = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    for d_in, d_out in SHAPES:
        sizes = {"d_in": d_in, "d_out": d_out}
        for name, plan in [("rows", kernels.rows_plan(d_in, d_out, n_batch)),
                           ("columns", kernels.columns_plan(d_in, d_out, n_batch))]:  # fmt: skip
            shape = {"ROWS": plan.rows, "WIDTH": plan.width, "STAGES": plan.stages, "BATCH": n_batch}
            tensors = {"x_ptr": pointer, "weight_ptr": pointer}
            if name == "rows":
                kernel, tensors = kernels._rows, {**tensors, "parts_ptr": "*fp32"}
                shape["STRETCH"] = plan.stretch
            else:
                kernel, tensors = kernels._columns, {**tensors, "keep_ptr": "*u8", "y_ptr": pointer}
            code = code_for_an_h100(kernel, tensors, sizes, plan, **shape)
            used = resources(code, tmp_path)
            assert code.metadata.shared <= 48 * 1024
            assert not re.search(r"\batom\.|\bred\.", code.asm["ptx"]), "added up in one order"
            if d_in % 16 == d_out % 16 == 0:
                assert used["STACK"] == used["LOCAL"] == 0, (name, d_in, d_out, used)
                assert re.search(r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global", code.asm["ptx"])
    parts = 28
    sizes = {"n": parts, "size": n_batch * 4096}
    tensors = {"parts_ptr": "*fp32", "y_ptr": pointer}
    code = code_for_an_h100(kernels._sum, tensors, sizes, plan, PARTS=32, WIDTH=128)
    assert resources(code, tmp_path)["STACK"] == 0


# --- on a GPU


def on_gpu(case: list[Tensor]) -> list[Tensor]:
    return [x.cuda() for x in case]


@pytest.fixture
def triton_kernels():
    demand_gpu()
    from sparsekit.sparsifiers import triton_kernels

    return triton_kernels


@pytest.mark.gpu
@pytest.mark.parametrize("n_batch", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_agree_on_a_gpu(triton_kernels, dtype, n_batch):
    for d_in, d_out in ((4096, 1024), (1031, 4099), (7, 5)):
        for sparsity in (0.0, 0.5, 0.9, 1.0):
            drawn = on_gpu(rows_case(n_batch, d_in, d_out, sparsity, dtype))
            drawn[1][(drawn[0] == 0).all(0)] = torch.nan
            y = rows_matvec(*drawn)
            close(y, [drawn[0], drawn[1].nan_to_num()])
            assert y.equal(rows_matvec(*drawn))  # added up in one order
            drawn = on_gpu(columns_case(n_batch, d_in, d_out, sparsity, dtype))
            drawn[1][~drawn[2].any(0)] = torch.nan
            close(columns_matvec(*drawn), [drawn[0], drawn[1].nan_to_num(), drawn[2]])


@pytest.mark.gpu
@pytest.mark.parametrize("n_batch", [1, 4])
def test_a_cuda_graph_takes_other_masks(triton_kernels, n_batch):
    x, weight = on_gpu(rows_case(n_batch, 1031, 515, 0.9, torch.bfloat16))
    z, other, keep = on_gpu(columns_case(n_batch, 515, 1031, 0.9, torch.bfloat16))

    def run() -> tuple[Tensor, Tensor]:
        return rows_matvec(x, weight, 0.9), columns_matvec(z, other, keep, 0.9)

    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, columns = run()
    for sparsity in (0.9, 0.0, 1.0, 0.5):
        x.copy_(rows_case(n_batch, 1031, 515, sparsity, torch.bfloat16, seed=1)[0])
        keep.copy_(columns_case(n_batch, 515, 1031, sparsity, torch.bfloat16, seed=1)[2])
        graph.replay()
        close(rows, [x, weight])
        close(columns, [z, other, keep])
