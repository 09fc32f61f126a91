# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
"""The GPU's side of :mod:`sparsekit.sparsifiers.kernels`, in Triton.

How many rows are active stays on the device: grids follow from the matrix's shape, so that nothing waits for the host
and a CUDA graph can hold it. Nothing is listed or numbered either: a program passes over every row of its tile, and
where a row is inactive its threads' loads are switched off, which costs the instruction and reads nothing.

input-sparse: a program takes a stretch of inputs and a block of outputs. What the stretches add up to (split-K) is
    written in float32 and summed by a second kernel: in one fixed order, so that a result is the same every time, and
    without zeroing a buffer first, which atomic additions would need on top of a pass that rounds.
output-sparse: a program takes a few outputs and all inputs; there is nothing to add up. One of whose outputs none is
    wanted is done at once.

Products go through the tensor cores, whose tiles are 16 high, even for one token: multiplying what masked loads left
out costs nothing there, and operands are copied past the registers, several steps ahead. Only one token's dot products
with whole rows are done in registers, as each row is read by few threads and used once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Plan(NamedTuple):
    """How a product is cut up.

    Attributes:
        stretch: inputs that one program adds up (all of them where what is sparse are outputs).
        rows: rows of the weight read at a time.
        width: of each row, how much a program reads at a time.
        warps: of 32 threads, in a program.
        stages: how many steps' reads are under way at a time.
    """

    stretch: int
    rows: int
    width: int
    warps: int = 4
    stages: int = 3


# Of one token, and of several; measured at 14336 x 4096 and 4096 x 14336: benchmarks/sparse_decode.py --tune.
ROWS_PLANS = Plan(256, 16, 256, 1, 5), Plan(512, 32, 128, 1, 4)
SHORT_COLUMNS_PLANS = Plan(0, 2, 1024, 2), Plan(0, 16, 128, 1)
LONG_COLUMNS_PLANS = Plan(0, 1, 2048, 4), Plan(0, 16, 128, 2, 5)
LONG = 8192  # inputs to an output
PROGRAMS = 512  # that a small matrix is cut into at least, as else most of the device would have nothing to do


def rows_plan(d_in: int, d_out: int, n_batch: int) -> Plan:
    plan = ROWS_PLANS[n_batch > 1]
    most = d_in * triton.cdiv(d_out, plan.width) // PROGRAMS
    return plan._replace(stretch=min(plan.stretch, max(2 * plan.rows, triton.next_power_of_2(most // 2 + 1))))


def columns_plan(d_in: int, d_out: int, n_batch: int) -> Plan:
    plan = (LONG_COLUMNS_PLANS if d_in > LONG else SHORT_COLUMNS_PLANS)[n_batch > 1]
    return plan._replace(width=max(16, min(plan.width, triton.next_power_of_2(d_in))))


# --- input-sparse


def rows_matvec(x_BI: Tensor, weight_IO: Tensor, plan: Plan | None = None) -> Tensor:
    """See :func:`sparsekit.sparsifiers.kernels.rows_matvec`."""
    n_batch, d_in = x_BI.shape
    d_out = weight_IO.shape[1]
    x_BI, plan = x_BI.contiguous(), plan or rows_plan(d_in, d_out, n_batch)
    grid = (triton.cdiv(d_out, plan.width), triton.cdiv(d_in, plan.stretch))
    parts_SBO = torch.empty(grid[1], n_batch, d_out, dtype=torch.float32, device=x_BI.device)
    y_BO = x_BI.new_empty(n_batch, d_out)
    with torch.cuda.device_of(x_BI):
        _rows[grid](
            x_BI, weight_IO, parts_SBO, d_in, d_out,
            BATCH=n_batch, STRETCH=plan.stretch, ROWS=plan.rows, WIDTH=plan.width, STAGES=plan.stages,
            num_warps=plan.warps,
        )  # fmt: skip
        _sum[(triton.cdiv(n_batch * d_out, 32),)](
            parts_SBO, y_BO, grid[1], n_batch * d_out, PARTS=min(triton.next_power_of_2(grid[1]), 128), WIDTH=32
        )
    return y_BO


@triton.jit
def _rows(
    x_ptr, weight_ptr, parts_ptr, d_in, d_out, BATCH: tl.constexpr,
    STRETCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, stretch = tl.program_id(0), tl.program_id(1)
    o = block * WIDTH + tl.arange(0, WIDTH)
    b = tl.arange(0, 16)[:, None]
    acc = tl.zeros((16, WIDTH), tl.float32)
    for step in tl.range(STRETCH // ROWS, num_stages=STAGES):
        i = stretch * STRETCH + step * ROWS + tl.arange(0, ROWS)
        xs = tl.load(x_ptr + b * d_in + i[None, :], mask=(b < BATCH) & (i < d_in)[None, :], other=0.0)
        if BATCH == 1:  # a second read is quicker than bringing the first where it is needed
            active = tl.load(x_ptr + i, mask=i < d_in, other=0.0) != 0
        else:
            active = tl.max((xs != 0).to(tl.int32), 0) != 0
        at = i.to(tl.int64)[:, None] * d_out + o[None, :]
        w = tl.load(weight_ptr + at, mask=active[:, None] & (o < d_out)[None, :], other=0.0)
        acc = tl.dot(xs, w, acc, input_precision="ieee")
    at = (stretch * BATCH + b) * d_out + o[None, :]
    tl.store(parts_ptr + at, acc, mask=(b < BATCH) & (o < d_out)[None, :])


@triton.jit
def _sum(parts_ptr, y_ptr, n, size, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, n, PARTS):
        s = first + tl.arange(0, PARTS)[:, None]
        parts = tl.load(parts_ptr + s * size + at[None, :], mask=(s < n) & (at < size)[None, :], other=0.0)
        total += tl.sum(parts, 0)
    tl.store(y_ptr + at, total, mask=at < size)


# --- output-sparse


def columns_matvec(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, plan: Plan | None = None) -> Tensor:
    """See :func:`sparsekit.sparsifiers.kernels.columns_matvec`."""
    n_batch, d_in = x_BI.shape
    d_out = weight_OI.shape[0]
    x_BI, plan = x_BI.contiguous(), plan or columns_plan(d_in, d_out, n_batch)
    y_BO = x_BI.new_empty(n_batch, d_out)
    with torch.cuda.device_of(x_BI):
        _columns[(triton.cdiv(d_out, plan.rows),)](
            x_BI, weight_OI, keep_BO.contiguous().view(torch.uint8), y_BO, d_in, d_out,
            BATCH=n_batch, ROWS=plan.rows, WIDTH=plan.width, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
    return y_BO


@triton.jit
def _columns(
    x_ptr, weight_ptr, keep_ptr, y_ptr, d_in, d_out, BATCH: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, 1 if BATCH == 1 else 16)[None, :]
    there = (b < BATCH) & (o < d_out)[:, None]
    kept = tl.load(keep_ptr + b * d_out + o[:, None], mask=there, other=0) != 0
    wanted = tl.max(kept.to(tl.int32), 1) != 0
    y = tl.zeros((ROWS, 1 if BATCH == 1 else 16), tl.float32)
    if tl.max(wanted.to(tl.int32), 0) != 0:
        sums = tl.zeros((ROWS, WIDTH if BATCH == 1 else 16), tl.float32)
        for first in tl.range(0, d_in, WIDTH, num_stages=STAGES):
            i = first + tl.arange(0, WIDTH)
            at = o.to(tl.int64)[:, None] * d_in + i[None, :]
            w = tl.load(weight_ptr + at, mask=wanted[:, None] & (i < d_in)[None, :], other=0.0)
            if BATCH == 1:
                x = tl.load(x_ptr + i, mask=i < d_in, other=0.0)
                sums += w.to(tl.float32) * x.to(tl.float32)[None, :]
            else:
                xs = tl.load(x_ptr + b * d_in + i[:, None], mask=(b < BATCH) & (i < d_in)[:, None], other=0.0)
                sums = tl.dot(w, xs, sums, input_precision="ieee")
        y = tl.sum(sums, 1)[:, None] if BATCH == 1 else sums
    tl.store(y_ptr + b * d_out + o[:, None], tl.where(kept, y, 0.0), mask=there)
