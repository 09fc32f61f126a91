# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
"""Products of gated experts with their gathers and elementwise parts inside, in Triton; see `fused_experts`.

Rows are assignments in the order of their experts, M of them, of which ``offsets_E`` tells each expert's end. A program
takes a tile of one expert's rows; which one, it finds out from the offsets, so that nothing waits for the host: grids
are as large as any offsets may need, and programs past the last tile end at once. Sums are taken in one order, in
float32, so that a result is the same every time.

E: experts, M: rows, N: tokens, D: d_model, F: d_ff, W: tiles across F.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton


class Plan(NamedTuple):
    """How a product is cut up.

    Attributes:
        rows, width: of a program's tile of the result.
        depth: how much of the sum it takes at a time.
        warps: of 32 threads, in a program.
        stages: how many steps' reads are under way at a time.
    """

    rows: int
    width: int
    depth: int = 64
    warps: int = 8
    stages: int = 3


UP = Plan(128, 64, 64, 4, 3)
DOWN = Plan(128, 128, 64, 4, 3)
DOWN_BACK = Plan(128, 128, 64, 4, 3)
UP_BACK = Plan(128, 128, 64, 4, 3)
OUTER = Plan(128, 128, 64, 4, 3)


def up(
    x_ND: Tensor, token_M: Tensor, weight_M: Tensor, offsets_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
    plan: Plan = UP,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(g, u, w silu(g) u), each [M, F], where g = W_gate x and u = W_up x of each row's token."""
    n_experts, d_ff, d_model = gate_EFD.shape
    found = tuple(x_ND.new_empty(token_M.shape[0], d_ff) for _ in range(3))
    _traced(_up)[_grid(token_M, n_experts, d_ff, plan)](
        x_ND, token_M, weight_M, offsets_E, gate_EFD, up_EFD, *found, n_experts, d_model, d_ff,
        **_shape(n_experts, plan),
    )  # fmt: skip
    return found[0], found[1], found[2]


def down(h_MF: Tensor, offsets_E: Tensor, down_EDF: Tensor, plan: Plan = DOWN) -> Tensor:
    """W_down h of each row, [M, D]."""
    n_experts, d_model, d_ff = down_EDF.shape
    y_MD = h_MF.new_empty(h_MF.shape[0], d_model)
    _traced(_rows)[_grid(h_MF, n_experts, d_model, plan)](
        h_MF, down_EDF, h_MF, down_EDF, offsets_E, y_MD, n_experts, d_ff, d_model, TWO=False, BY_COLUMN=True,
        **_shape(n_experts, plan),
    )  # fmt: skip
    return y_MD


def down_back(
    dy_ND: Tensor, token_M: Tensor, weight_M: Tensor, offsets_E: Tensor, down_EDF: Tensor, g_MF: Tensor, u_MF: Tensor,
    plan: Plan = DOWN_BACK,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of g and u, [M, F], and of the rows' weights in summands, [W, M], float32."""
    n_experts, d_model, d_ff = down_EDF.shape
    dg_MF, du_MF = torch.empty_like(g_MF), torch.empty_like(u_MF)
    dweight_WM = weight_M.new_empty(triton.cdiv(d_ff, plan.width), token_M.shape[0], dtype=torch.float32)
    _traced(_down_back)[_grid(token_M, n_experts, d_ff, plan)](
        dy_ND, token_M, weight_M, offsets_E, down_EDF, g_MF, u_MF, dg_MF, du_MF, dweight_WM, token_M.shape[0],
        n_experts, d_model, d_ff, **_shape(n_experts, plan),
    )  # fmt: skip
    return dg_MF, du_MF, dweight_WM


def up_back(
    dg_MF: Tensor, du_MF: Tensor, offsets_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor, plan: Plan = UP_BACK
) -> Tensor:
    """W_gate^T dg + W_up^T du of each row, [M, D]."""
    n_experts, d_ff, d_model = gate_EFD.shape
    dx_MD = dg_MF.new_empty(dg_MF.shape[0], d_model)
    _traced(_rows)[_grid(dg_MF, n_experts, d_model, plan)](
        dg_MF, gate_EFD, du_MF, up_EFD, offsets_E, dx_MD, n_experts, d_ff, d_model, TWO=True, BY_COLUMN=False,
        **_shape(n_experts, plan),
    )  # fmt: skip
    return dx_MD


def outer(
    a: Tensor, b: Tensor, offsets_E: Tensor, token_M: Tensor, gather_a: bool, gather_b: bool, plan: Plan = OUTER
) -> Tensor:
    """sum over the rows m of each expert of a[m] b[m]^T, [E, A, B]; those of what is gathered are a[token[m]]."""
    n_experts, (d_a, d_b) = offsets_E.shape[0], (a.shape[1], b.shape[1])
    found = a.new_empty(n_experts, d_a, d_b)
    grid = (n_experts * triton.cdiv(d_a, plan.rows) * triton.cdiv(d_b, plan.width),)
    _traced(_outer)[grid](
        a, b, token_M, offsets_E, found, d_a, d_b, GATHER_A=gather_a, GATHER_B=gather_b, ROWS=plan.rows,
        WIDTH=plan.width, DEPTH=plan.depth, num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return found


def _traced(kernel):
    """Where operators made of kernels are traced, a compiler sees the launch."""
    return wrap_triton(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel  # else interpreted


def _grid(rows_M: Tensor, n_experts: int, width: int, plan: Plan) -> tuple[int]:
    """As many tiles as there can be: each expert's last need not be full."""
    return ((triton.cdiv(rows_M.shape[0], plan.rows) + n_experts) * triton.cdiv(width, plan.width),)


def _shape(n_experts: int, plan: Plan) -> dict[str, int]:
    sizes = {"ROWS": plan.rows, "WIDTH": plan.width, "DEPTH": plan.depth}
    return {"EXPERTS": triton.next_power_of_2(n_experts), **sizes, "num_warps": plan.warps, "num_stages": plan.stages}


# ---- as operators, in which a compiler sees the launches ----


@torch.library.triton_op("sparsekit::experts_up", mutates_args=())
def experts_up(
    x_ND: Tensor, token_M: Tensor, weight_M: Tensor, offsets_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """g = W_gate x, u = W_up x and h = w silu(g) u of each row, [M, F]."""
    return up(x_ND, token_M, weight_M, offsets_E, gate_EFD, up_EFD)


@torch.library.triton_op("sparsekit::experts_down", mutates_args=())
def experts_down(h_MF: Tensor, offsets_E: Tensor, down_EDF: Tensor) -> Tensor:
    """W_down h of each row, [M, D]."""
    return down(h_MF, offsets_E, down_EDF)


@torch.library.triton_op("sparsekit::experts_down_back", mutates_args=())
def experts_down_back(
    dy_ND: Tensor, token_M: Tensor, weight_M: Tensor, offsets_E: Tensor, down_EDF: Tensor, g_MF: Tensor, u_MF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of g and u, [M, F], and of the rows' weights, [W, M], to be summed."""
    return down_back(dy_ND, token_M, weight_M, offsets_E, down_EDF, g_MF, u_MF)


@torch.library.triton_op("sparsekit::experts_up_back", mutates_args=())
def experts_up_back(dg_MF: Tensor, du_MF: Tensor, offsets_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor) -> Tensor:
    """W_gate^T dg + W_up^T du of each row, [M, D]."""
    return up_back(dg_MF, du_MF, offsets_E, gate_EFD, up_EFD)


@torch.library.triton_op("sparsekit::experts_outer", mutates_args=())
def experts_outer(a: Tensor, b: Tensor, offsets_E: Tensor, token_M: Tensor, gather_a: bool, gather_b: bool) -> Tensor:
    """sum over each expert's rows of a b^T, [E, A, B]; what is gathered has a row a token."""
    return outer(a, b, offsets_E, token_M, gather_a, gather_b)


# ---- the kernels ----


@triton.jit
def _tile(index, offsets_ptr, n_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, its first row in this tile, the end of its rows); past the last tile an expert that is none."""
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + experts, mask=experts < n_experts, other=0)
    starts = tl.load(offsets_ptr + experts - 1, mask=(experts > 0) & (experts < n_experts), other=0)
    tiles = (ends - starts + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= index).to(tl.int32), 0)
    own = experts == expert
    begin = tl.sum(tl.where(own, starts + (index - upto + tiles) * ROWS, 0), 0)
    return expert, begin, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def _up(
    x_ptr, token_ptr, weight_ptr, offsets_ptr, gate_ptr, up_ptr, g_ptr, u_ptr, h_ptr, n_experts,
    D: tl.constexpr, F: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    widths: tl.constexpr = (F + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    expert, begin, end = _tile(program // widths, offsets_ptr, n_experts, EXPERTS, ROWS)
    if expert < n_experts:
        rows = begin + tl.arange(0, ROWS)
        token = tl.load(token_ptr + rows, mask=rows < end, other=0).to(tl.int64)
        columns = program % widths * WIDTH + tl.arange(0, WIDTH)
        depth = tl.arange(0, DEPTH)
        x_at = x_ptr + token[:, None] * D + depth[None, :]
        weight_at = expert.to(tl.int64) * F * D + tl.where(columns < F, columns, 0)[None, :] * D + depth[:, None]
        gate_at, up_at = gate_ptr + weight_at, up_ptr + weight_at
        g = tl.zeros((ROWS, WIDTH), tl.float32)
        u = tl.zeros((ROWS, WIDTH), tl.float32)
        for _ in range(D // DEPTH):
            x = tl.load(x_at)
            g = tl.dot(x, tl.load(gate_at), g)
            u = tl.dot(x, tl.load(up_at), u)
            x_at += DEPTH
            gate_at += DEPTH
            up_at += DEPTH
        first = begin.to(tl.int64) * F  # a scalar: 64-bit places of every entry would fill the registers
        at = tl.arange(0, ROWS)[:, None] * F + columns[None, :]
        g_ptr, u_ptr, h_ptr = g_ptr + first, u_ptr + first, h_ptr + first
        live = (rows < end)[:, None] & (columns < F)[None, :]
        tl.store(g_ptr + at, g.to(g_ptr.dtype.element_ty), live)
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), live)
        weight = tl.load(weight_ptr + rows, mask=rows < end, other=0).to(tl.float32)
        # of what backward sees, so that both agree
        g, u = g.to(g_ptr.dtype.element_ty).to(tl.float32), u.to(u_ptr.dtype.element_ty).to(tl.float32)
        h = g * tl.sigmoid(g) * u * weight[:, None]
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), live)


@triton.jit
def _down_back(
    dy_ptr, token_ptr, weight_ptr, offsets_ptr, down_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, dweight_ptr, n_rows, n_experts,
    D: tl.constexpr, F: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    widths: tl.constexpr = (F + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    expert, begin, end = _tile(program // widths, offsets_ptr, n_experts, EXPERTS, ROWS)
    if expert < n_experts:
        rows = begin + tl.arange(0, ROWS)
        token = tl.load(token_ptr + rows, mask=rows < end, other=0).to(tl.int64)
        columns = program % widths * WIDTH + tl.arange(0, WIDTH)
        depth = tl.arange(0, DEPTH)
        dy_at = dy_ptr + token[:, None] * D + depth[None, :]
        down_at = down_ptr + expert.to(tl.int64) * D * F + depth[:, None] * F + columns[None, :]
        dh = tl.zeros((ROWS, WIDTH), tl.float32)
        for _ in range(D // DEPTH):
            down = tl.load(down_at) if F % WIDTH == 0 else tl.load(down_at, mask=(columns < F)[None, :], other=0)
            dh = tl.dot(tl.load(dy_at), down, dh)
            dy_at += DEPTH
            down_at += DEPTH * F
        first = begin.to(tl.int64) * F
        at = tl.arange(0, ROWS)[:, None] * F + columns[None, :]
        live = (rows < end)[:, None] & (columns < F)[None, :]
        weight = tl.load(weight_ptr + rows, mask=rows < end, other=0).to(tl.float32)[:, None]
        # rounded, as between two separate products: what is held in float32 until the end would not fit in registers
        dh = dh.to(dg_ptr.dtype.element_ty)
        g = tl.load(g_ptr + first + at, live, other=0).to(tl.float32)
        u = tl.load(u_ptr + first + at, live, other=0)
        share = tl.sigmoid(g)
        silu = g * share
        du = dh.to(tl.float32) * silu
        dweight = tl.sum(du * u.to(tl.float32), 1)
        tl.store(dweight_ptr + (program % widths).to(tl.int64) * n_rows + rows, dweight, rows < end)
        tl.store(du_ptr + first + at, (du * weight).to(du_ptr.dtype.element_ty), live)
        dg = dh.to(tl.float32) * weight * u.to(tl.float32) * share * (1 + g - silu)
        tl.store(dg_ptr + first + at, dg.to(dg_ptr.dtype.element_ty), live)


@triton.jit
def _rows(
    a_ptr, b_ptr, other_a_ptr, other_b_ptr, offsets_ptr, y_ptr, n_experts,
    K: tl.constexpr, N: tl.constexpr, TWO: tl.constexpr, BY_COLUMN: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y[m] = a[m] B[e], B [K, N] or by column [N, K]; of two pairs the sum."""
    widths: tl.constexpr = (N + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    expert, begin, end = _tile(program // widths, offsets_ptr, n_experts, EXPERTS, ROWS)
    if expert < n_experts:
        rows = begin + tl.arange(0, ROWS)
        columns = program % widths * WIDTH + tl.arange(0, WIDTH)
        y = tl.zeros((ROWS, WIDTH), tl.float32)
        y = _add_rows(y, a_ptr, b_ptr, expert, rows, end, columns, K, N, BY_COLUMN, WIDTH, DEPTH)
        if TWO:
            y = _add_rows(y, other_a_ptr, other_b_ptr, expert, rows, end, columns, K, N, BY_COLUMN, WIDTH, DEPTH)
        live = (rows < end)[:, None] & (columns < N)[None, :]
        at = tl.arange(0, ROWS)[:, None] * N + columns[None, :]
        tl.store(y_ptr + begin.to(tl.int64) * N + at, y.to(y_ptr.dtype.element_ty), live)


@triton.jit
def _add_rows(
    y, a_ptr, b_ptr, expert, rows, end, columns,
    K: tl.constexpr, N: tl.constexpr, BY_COLUMN: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    depth = tl.arange(0, DEPTH)
    a_at = a_ptr + tl.where(rows < end, rows, 0).to(tl.int64)[:, None] * K + depth[None, :]
    b_ptr += expert.to(tl.int64) * N * K
    if BY_COLUMN:
        b_at = b_ptr + tl.where(columns < N, columns, 0)[None, :] * K + depth[:, None]
    else:
        b_at = b_ptr + depth[:, None] * N + columns[None, :]
    for _ in range(K // DEPTH):
        b = tl.load(b_at) if BY_COLUMN or N % WIDTH == 0 else tl.load(b_at, mask=(columns < N)[None, :], other=0)
        y = tl.dot(tl.load(a_at), b, y)
        a_at += DEPTH
        b_at += DEPTH if BY_COLUMN else DEPTH * N
    return y


@triton.jit
def _outer(
    a_ptr, b_ptr, token_ptr, offsets_ptr, y_ptr,
    A: tl.constexpr, B: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    heights: tl.constexpr = (A + ROWS - 1) // ROWS
    widths: tl.constexpr = (B + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    expert = program // (heights * widths)
    i = program // widths % heights * ROWS + tl.arange(0, ROWS)
    j = program % widths * WIDTH + tl.arange(0, WIDTH)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    y = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(begin, end, DEPTH):
        rows = first + tl.arange(0, DEPTH)
        live = rows < end
        if GATHER_A or GATHER_B:
            token = tl.load(token_ptr + rows, mask=live, other=0).to(tl.int64)
        row_a = token if GATHER_A else rows.to(tl.int64)
        row_b = token if GATHER_B else rows.to(tl.int64)
        in_a = live[:, None] if A % ROWS == 0 else live[:, None] & (i < A)[None, :]
        in_b = live[:, None] if B % WIDTH == 0 else live[:, None] & (j < B)[None, :]
        a = tl.load(a_ptr + row_a[:, None] * A + i[None, :], mask=in_a, other=0)
        b = tl.load(b_ptr + row_b[:, None] * B + j[None, :], mask=in_b, other=0)
        y = tl.dot(tl.trans(a), b, y)
    at = y_ptr + expert.to(tl.int64) * A * B + (i[:, None] * B + j[None, :])
    tl.store(at, y.to(y_ptr.dtype.element_ty), (i < A)[:, None] & (j < B)[None, :])
