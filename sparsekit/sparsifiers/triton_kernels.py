# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
"""The GPU's side of :mod:`sparsekit.sparsifiers.kernels`, in Triton.

How many rows are active stays on the device: grids follow from the matrix's shape, so that nothing waits for the host
and a CUDA graph can hold it. Both kernels give each program a fixed stretch of x or of keep, from which it lists what
is active by a prefix sum; it then reads those rows and no others, and one with an empty list is done at once.

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
        stretch: inputs (of keep: outputs) from which one program lists what is active.
        rows: rows of the weight read at a time.
        width: of each row, how much a program reads at a time.
        warps: of 32 threads, in a program.
        stages: how many reads are under way at a time; 1 leaves it to the programs beside it.
    """

    stretch: int
    rows: int
    width: int
    warps: int = 4
    stages: int = 1


def rows_plan(d_in: int, d_out: int, n_batch: int) -> Plan:
    """At most 32 stretches, which the second pass reads at once, and several programs for each of some 130 cores."""
    stretch = max(128, triton.next_power_of_2(triton.cdiv(d_in, 32)))
    for width in (256, 128, 64):
        if triton.cdiv(d_in, stretch) * triton.cdiv(d_out, width) >= 6 * 132:
            break
    return Plan(stretch, 16, width)


def columns_plan(d_in: int, d_out: int, n_batch: int) -> Plan:
    stretch = 16 if n_batch > 1 or d_out >= 8192 else 8
    if n_batch > 1:
        return Plan(stretch, 16, 128)
    return Plan(stretch, 4, min(1024, triton.next_power_of_2(d_in)))


# --- input-sparse


def rows_matvec(x_BI: Tensor, weight_IO: Tensor, plan: Plan | None = None) -> Tensor:
    """See :func:`sparsekit.sparsifiers.kernels.rows_matvec`."""
    n_batch, d_in = x_BI.shape
    d_out = weight_IO.shape[1]
    x_BI, plan = x_BI.contiguous(), plan or rows_plan(d_in, d_out, n_batch)
    grid = (triton.cdiv(d_out, plan.width), triton.cdiv(d_in, plan.stretch))
    lists = torch.empty(grid[0] * grid[1] * plan.stretch, dtype=torch.int32, device=x_BI.device)
    parts_SBO = torch.empty(grid[1], n_batch, d_out, dtype=torch.float32, device=x_BI.device)
    y_BO = x_BI.new_empty(n_batch, d_out)
    with torch.cuda.device_of(x_BI):
        _rows[grid](
            x_BI, weight_IO, lists, parts_SBO, d_in, d_out,
            BATCH=n_batch, TILE=triton.next_power_of_2(n_batch), STRETCH=plan.stretch, ROWS=plan.rows,
            WIDTH=plan.width, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
        _sum[(triton.cdiv(n_batch * d_out, 128),)](
            parts_SBO, y_BO, grid[1], n_batch * d_out, PARTS=triton.next_power_of_2(grid[1]), WIDTH=128
        )
    return y_BO


@triton.jit
def _rows(
    x_ptr, weight_ptr, lists_ptr, parts_ptr, d_in, d_out, BATCH: tl.constexpr,
    TILE: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, stretch = tl.program_id(0), tl.program_id(1)
    i = stretch * STRETCH + tl.arange(0, STRETCH)
    b = tl.arange(0, TILE)[:, None]
    x = tl.load(x_ptr + b * d_in + i[None, :], mask=(b < BATCH) & (i < d_in)[None, :], other=0.0)
    list_ptr = lists_ptr + (stretch * tl.num_programs(0) + block) * STRETCH
    n = _listed(tl.max((x != 0).to(tl.int32), 0), i, list_ptr)

    o = block * WIDTH + tl.arange(0, WIDTH)
    if BATCH == 1:
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for start in tl.range(0, n, ROWS, num_stages=STAGES):
            k = start + tl.arange(0, ROWS)
            row = tl.load(list_ptr + k, mask=k < n, other=0)
            xs = tl.load(x_ptr + row, mask=k < n, other=0.0).to(tl.float32)
            at = row.to(tl.int64)[:, None] * d_out + o[None, :]
            w = tl.load(weight_ptr + at, mask=(k < n)[:, None] & (o < d_out)[None, :], other=0.0)
            acc += xs[:, None] * w.to(tl.float32)
        tl.store(parts_ptr + stretch * d_out + o, tl.sum(acc, 0), mask=o < d_out)
    else:
        c = tl.arange(0, 16)[:, None]
        acc = tl.zeros((16, WIDTH), tl.float32)
        for start in tl.range(0, n, ROWS, num_stages=STAGES):
            k = start + tl.arange(0, ROWS)
            row = tl.load(list_ptr + k, mask=k < n, other=0)
            xs = tl.load(x_ptr + c * d_in + row[None, :], mask=(c < BATCH) & (k < n)[None, :], other=0.0)
            at = row.to(tl.int64)[:, None] * d_out + o[None, :]
            w = tl.load(weight_ptr + at, mask=(k < n)[:, None] & (o < d_out)[None, :], other=0.0)
            acc = tl.dot(xs, w, acc, input_precision="ieee")
        at = (stretch * BATCH + c) * d_out + o[None, :]
        tl.store(parts_ptr + at, acc, mask=(c < BATCH) & (o < d_out)[None, :])


@triton.jit
def _sum(parts_ptr, y_ptr, n, size, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    s = tl.arange(0, PARTS)[:, None]
    parts = tl.load(parts_ptr + s * size + at[None, :], mask=(s < n) & (at < size)[None, :], other=0.0)
    tl.store(y_ptr + at, tl.sum(parts, 0), mask=at < size)


@triton.jit
def _listed(active, number, list_ptr):
    """Writes the numbers that are active, in order; their count."""
    tl.store(list_ptr + tl.cumsum(active, 0) - 1, number, mask=active != 0)
    tl.debug_barrier()  # other threads of this program read the list
    return tl.sum(active, 0)


# --- output-sparse


def columns_matvec(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, plan: Plan | None = None) -> Tensor:
    """See :func:`sparsekit.sparsifiers.kernels.columns_matvec`."""
    n_batch, d_in = x_BI.shape
    d_out = weight_OI.shape[0]
    x_BI, plan = x_BI.contiguous(), plan or columns_plan(d_in, d_out, n_batch)
    grid = (triton.cdiv(d_out, plan.stretch),)
    # 32 numbers are a line of the cache, which programs should not share
    line = max(plan.stretch, 32)
    lists = torch.empty(grid[0] * line, dtype=torch.int32, device=x_BI.device)
    y_BO = x_BI.new_empty(n_batch, d_out)
    with torch.cuda.device_of(x_BI):
        _columns[grid](
            x_BI, weight_OI, keep_BO.contiguous().view(torch.uint8), lists, y_BO, d_in, d_out,
            BATCH=n_batch, TILE=triton.next_power_of_2(n_batch), STRETCH=plan.stretch, LINE=line, ROWS=plan.rows,
            WIDTH=plan.width, STAGES=plan.stages, num_warps=plan.warps,
        )  # fmt: skip
    return y_BO


@triton.jit
def _columns(
    x_ptr, weight_ptr, keep_ptr, lists_ptr, y_ptr, d_in, d_out,
    BATCH: tl.constexpr, TILE: tl.constexpr, STRETCH: tl.constexpr, LINE: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    stretch = tl.program_id(0)
    o = stretch * STRETCH + tl.arange(0, STRETCH)
    b = tl.arange(0, TILE)[:, None]
    there = (b < BATCH) & (o < d_out)[None, :]
    keep = tl.load(keep_ptr + b * d_out + o[None, :], mask=there, other=0)
    wanted = tl.max((keep != 0).to(tl.int32), 0)
    tl.store(y_ptr + b * d_out + o[None, :], tl.zeros((TILE, STRETCH), tl.float32), mask=there & (wanted == 0)[None, :])
    list_ptr = lists_ptr + stretch * LINE
    n = _listed(wanted, o, list_ptr)

    for start in range(0, n, ROWS):
        k = start + tl.arange(0, ROWS)
        row = tl.load(list_ptr + k, mask=k < n, other=0)
        if BATCH == 1:
            sums = tl.zeros((ROWS, WIDTH), tl.float32)
            for first in tl.range(0, d_in, WIDTH, num_stages=STAGES):
                i = first + tl.arange(0, WIDTH)
                xs = tl.load(x_ptr + i, mask=i < d_in, other=0.0).to(tl.float32)
                at = row.to(tl.int64)[:, None] * d_in + i[None, :]
                w = tl.load(weight_ptr + at, mask=(k < n)[:, None] & (i < d_in)[None, :], other=0.0)
                sums += w.to(tl.float32) * xs[None, :]
            tl.store(y_ptr + row, tl.sum(sums, 1), mask=k < n)
        else:
            c = tl.arange(0, 16)[None, :]
            acc = tl.zeros((ROWS, 16), tl.float32)
            for first in tl.range(0, d_in, WIDTH, num_stages=STAGES):
                i = first + tl.arange(0, WIDTH)
                xs = tl.load(x_ptr + c * d_in + i[:, None], mask=(c < BATCH) & (i < d_in)[:, None], other=0.0)
                at = row.to(tl.int64)[:, None] * d_in + i[None, :]
                w = tl.load(weight_ptr + at, mask=(k < n)[:, None] & (i < d_in)[None, :], other=0.0)
                acc = tl.dot(w, xs, acc, input_precision="ieee")
            at = c * d_out + row[:, None]
            own = (c < BATCH) & (k < n)[:, None]
            kept = tl.load(keep_ptr + at, mask=own, other=0)
            tl.store(y_ptr + at, tl.where(kept != 0, acc, 0.0), mask=own)
