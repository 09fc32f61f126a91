# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
"""The GPU's side of :mod:`sparsekit.sparsifiers.kernels`, in Triton.

How many rows are active stays on the device: grids follow from the matrix's shape, so that nothing waits for the host
and a CUDA graph can hold it. Both kernels give each program a fixed stretch of x or of keep; it numbers what is active
there by a prefix sum, reads those rows and no others, and one that finds nothing is done at once. Which row is number k
is worked out in registers, by comparing every number with k: a list in memory would cost three waits for it.

input-sparse: a program takes a stretch of inputs and a block of outputs. What the stretches add up to (split-K) is
    written in float32 and summed by a second kernel: in one fixed order, so that a result is the same every time, and
    without zeroing a buffer first, which atomic additions would need on top of a pass that rounds.
output-sparse: a program takes a stretch of outputs and all inputs; there is nothing to add up.

One token is multiplied in registers; 2 to 8 go through the tensor cores, whose tiles are 16 high.
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
        stretch: inputs (of keep: outputs) among which one program looks for what is active.
        rows: rows of the weight read at a time.
        width: of each row, how much a program reads at a time.
        warps: of 32 threads, in a program.
    """

    stretch: int
    rows: int
    width: int
    warps: int = 4


# of one token, and of several, whose tiles go through the tensor cores
ROWS_PLANS = Plan(128, 32, 128), Plan(128, 16, 128)
COLUMNS_PLANS = Plan(8, 4, 2048), Plan(16, 16, 128)


def rows_plan(d_in: int, d_out: int, n_batch: int) -> Plan:
    return ROWS_PLANS[n_batch > 1]


def columns_plan(d_in: int, d_out: int, n_batch: int) -> Plan:
    plan = COLUMNS_PLANS[n_batch > 1]
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
            BATCH=n_batch, TILE=triton.next_power_of_2(n_batch), STRETCH=plan.stretch, ROWS=plan.rows,
            WIDTH=plan.width, num_warps=plan.warps,
        )  # fmt: skip
        _sum[(triton.cdiv(n_batch * d_out, 32),)](
            parts_SBO, y_BO, grid[1], n_batch * d_out, PARTS=min(triton.next_power_of_2(grid[1]), 128), WIDTH=32
        )
    return y_BO


@triton.jit
def _rows(
    x_ptr, weight_ptr, parts_ptr, d_in, d_out, BATCH: tl.constexpr,
    TILE: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, stretch = tl.program_id(0), tl.program_id(1)
    i = stretch * STRETCH + tl.arange(0, STRETCH)
    o = block * WIDTH + tl.arange(0, WIDTH)
    if BATCH == 1:
        x = tl.load(x_ptr + i, mask=i < d_in, other=0.0)
        number = _numbered(x != 0)
        n = tl.max(number, 0)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in range(0, n, ROWS):
            k = start + 1 + tl.arange(0, ROWS)
            own = number[None, :] == k[:, None]
            row = tl.sum(tl.where(own, i[None, :], 0), 1)
            xs = tl.sum(tl.where(own, x.to(tl.float32)[None, :], 0.0), 1)
            at = row.to(tl.int64)[:, None] * d_out + o[None, :]
            w = tl.load(weight_ptr + at, mask=(k <= n)[:, None] & (o < d_out)[None, :], other=0.0)
            acc += xs[:, None] * w.to(tl.float32)
        tl.store(parts_ptr + stretch * d_out + o, tl.sum(acc, 0), mask=o < d_out)
    else:
        b = tl.arange(0, TILE)[:, None]
        x = tl.load(x_ptr + b * d_in + i[None, :], mask=(b < BATCH) & (i < d_in)[None, :], other=0.0)
        number = _numbered(tl.max((x != 0).to(tl.int32), 0) != 0)
        n = tl.max(number, 0)
        c = tl.arange(0, 16)[:, None]
        acc = tl.zeros((16, WIDTH), tl.float32)
        for start in range(0, n, ROWS):
            k = start + 1 + tl.arange(0, ROWS)
            row = tl.sum(tl.where(number[None, :] == k[:, None], i[None, :], 0), 1)
            xs = tl.load(x_ptr + c * d_in + row[None, :], mask=(c < BATCH) & (k <= n)[None, :], other=0.0)
            at = row.to(tl.int64)[:, None] * d_out + o[None, :]
            w = tl.load(weight_ptr + at, mask=(k <= n)[:, None] & (o < d_out)[None, :], other=0.0)
            acc = tl.dot(xs, w, acc, input_precision="ieee")
        at = (stretch * BATCH + c) * d_out + o[None, :]
        tl.store(parts_ptr + at, acc, mask=(c < BATCH) & (o < d_out)[None, :])


@triton.jit
def _sum(parts_ptr, y_ptr, n, size, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, n, PARTS):
        s = first + tl.arange(0, PARTS)[:, None]
        parts = tl.load(parts_ptr + s * size + at[None, :], mask=(s < n) & (at < size)[None, :], other=0.0)
        total += tl.sum(parts, 0)
    tl.store(y_ptr + at, total, mask=at < size)


@triton.jit
def _numbered(active):
    """1, 2, 3 … at what is active, in order, and 0 elsewhere."""
    one = active.to(tl.int32)
    return tl.cumsum(one, 0) * one


# --- output-sparse


def columns_matvec(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, plan: Plan | None = None) -> Tensor:
    """See :func:`sparsekit.sparsifiers.kernels.columns_matvec`."""
    n_batch, d_in = x_BI.shape
    d_out = weight_OI.shape[0]
    x_BI, plan = x_BI.contiguous(), plan or columns_plan(d_in, d_out, n_batch)
    y_BO = x_BI.new_empty(n_batch, d_out)
    with torch.cuda.device_of(x_BI):
        _columns[(triton.cdiv(d_out, plan.stretch),)](
            x_BI, weight_OI, keep_BO.contiguous().view(torch.uint8), y_BO, d_in, d_out,
            BATCH=n_batch, TILE=triton.next_power_of_2(n_batch), STRETCH=plan.stretch, ROWS=plan.rows,
            WIDTH=plan.width, num_warps=plan.warps,
        )  # fmt: skip
    return y_BO


@triton.jit
def _columns(
    x_ptr, weight_ptr, keep_ptr, y_ptr, d_in, d_out, BATCH: tl.constexpr,
    TILE: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * STRETCH + tl.arange(0, STRETCH)
    b = tl.arange(0, TILE)[:, None]
    there = (b < BATCH) & (o < d_out)[None, :]
    keep = tl.load(keep_ptr + b * d_out + o[None, :], mask=there, other=0)
    wanted = tl.max((keep != 0).to(tl.int32), 0) != 0
    number = _numbered(wanted)
    n = tl.max(number, 0)
    tl.store(y_ptr + b * d_out + o[None, :], tl.zeros((TILE, STRETCH), tl.float32), mask=there & ~wanted[None, :])

    for start in range(0, n, ROWS):
        k = start + 1 + tl.arange(0, ROWS)
        row = tl.sum(tl.where(number[None, :] == k[:, None], o[None, :], 0), 1)
        if BATCH == 1:
            sums = tl.zeros((ROWS, WIDTH), tl.float32)
            for first in range(0, d_in, WIDTH):
                i = first + tl.arange(0, WIDTH)
                xs = tl.load(x_ptr + i, mask=i < d_in, other=0.0).to(tl.float32)
                at = row.to(tl.int64)[:, None] * d_in + i[None, :]
                w = tl.load(weight_ptr + at, mask=(k <= n)[:, None] & (i < d_in)[None, :], other=0.0)
                sums += w.to(tl.float32) * xs[None, :]
            tl.store(y_ptr + row, tl.sum(sums, 1), mask=k <= n)
        else:
            c = tl.arange(0, 16)[None, :]
            acc = tl.zeros((ROWS, 16), tl.float32)
            for first in range(0, d_in, WIDTH):
                i = first + tl.arange(0, WIDTH)
                xs = tl.load(x_ptr + c * d_in + i[:, None], mask=(c < BATCH) & (i < d_in)[:, None], other=0.0)
                at = row.to(tl.int64)[:, None] * d_in + i[None, :]
                w = tl.load(weight_ptr + at, mask=(k <= n)[:, None] & (i < d_in)[None, :], other=0.0)
                acc = tl.dot(w, xs, acc, input_precision="ieee")
            at = c * d_out + row[:, None]
            own = (c < BATCH) & (k <= n)[:, None]
            kept = tl.load(keep_ptr + at, mask=own, other=0)
            tl.store(y_ptr + at, tl.where(kept != 0, acc, 0.0), mask=own)
