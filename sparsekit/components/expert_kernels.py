# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
"""What experts compute beside plain grouped products, in Triton; see :mod:`sparsekit.components.fused_experts`.

Rows are assignments in the order of their experts, M of them, of which ``offsets_E`` tells each expert's end. A program
of a product takes a tile of one expert's rows; which one, it finds out from the offsets, so that nothing waits for the
host: grids are as large as any offsets may need, and programs past the last tile end at once. Sums are taken in one
order, in float32, so that a result is the same every time.

E: experts, M: rows, N: tokens, D: d_model, F: d_ff.
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


# Measured at the shapes of benchmarks/moe.py (H200, bfloat16): benchmarks/expert_kernels.py.
WIDE_UP, UP = Plan(128, 128, 64, 8, 4), Plan(128, 64, 64, 4, 3)
UP_BACK = Plan(128, 256, 64, 8, 4)
ENTRIES = 4096  # that a program of an elementwise pass takes


def up_plan(d_ff: int) -> Plan:
    return UP if d_ff % WIDE_UP.width else WIDE_UP


def up(
    x_ND: Tensor, token_M: Tensor, weight_M: Tensor, offsets_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(g, u, w silu(g) u), each [M, F], where g = W_gate x and u = W_up x of each row's token, gathered here."""
    n_experts, d_ff, d_model = gate_EFD.shape
    plan = plan or up_plan(d_ff)
    found = tuple(x_ND.new_empty(token_M.shape[0], d_ff) for _ in range(3))
    _traced(_up)[_grid(token_M, n_experts, d_ff, plan)](
        x_ND, token_M, weight_M, offsets_E, gate_EFD, up_EFD, *found, n_experts, d_model, d_ff,
        **_shape(n_experts, plan),
    )  # fmt: skip
    return found[0], found[1], found[2]


def up_back(
    dg_MF: Tensor, du_MF: Tensor, offsets_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor, plan: Plan = UP_BACK
) -> Tensor:
    """W_gate^T dg + W_up^T du of each row, [M, D], as one sum."""
    n_experts, d_ff, d_model = gate_EFD.shape
    dx_MD = dg_MF.new_empty(dg_MF.shape[0], d_model)
    _traced(_up_back)[_grid(dg_MF, n_experts, d_model, plan)](
        dg_MF, du_MF, gate_EFD, up_EFD, offsets_E, dx_MD, n_experts, d_ff, d_model, **_shape(n_experts, plan)
    )
    return dx_MD


def act_back(dh_MF: Tensor, weight_M: Tensor, g_MF: Tensor, u_MF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of g and u, [M, F], and of the rows' weights, [M] in float32, from that of h = w silu(g) u."""
    dg_MF, du_MF = torch.empty_like(g_MF), torch.empty_like(u_MF)
    n_rows, d_ff = g_MF.shape
    dweight_M = weight_M.new_empty(n_rows, dtype=torch.float32)
    width = _width(d_ff)
    rows = ENTRIES // width
    _traced(_act_back)[(triton.cdiv(n_rows, rows),)](
        dh_MF, weight_M, g_MF, u_MF, dg_MF, du_MF, dweight_M, n_rows, d_ff, ROWS=rows, WIDTH=width, num_warps=8
    )
    return dg_MF, du_MF, dweight_M


def spread(x_ND: Tensor, back_NS: Tensor) -> Tensor:
    """y[back[n, s]] = x[n], the tokens as rows, [M, D].

    In the order of tokens, which reads each once; in the order of experts each would be fetched from memory S times.
    """
    n_tokens, slots = back_NS.shape
    d_model = x_ND.shape[1]
    y_MD = x_ND.new_empty(n_tokens * slots, d_model)
    width = _width(d_model)
    rows = ENTRIES // width
    _traced(_spread)[(triton.cdiv(n_tokens, rows) * (d_model // width),)](
        x_ND, back_NS, y_MD, n_tokens, d_model, SLOTS=slots, ROWS=rows, WIDTH=width, num_warps=4
    )
    return y_MD


def _width(d: int) -> int:
    """The largest power of two that divides a row, up to a part of a program's share: no thread is idle then."""
    return min(d & -d, ENTRIES // 4)


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


@torch.library.triton_op("sparsekit::experts_up_back", mutates_args=())
def experts_up_back(dg_MF: Tensor, du_MF: Tensor, offsets_E: Tensor, gate_EFD: Tensor, up_EFD: Tensor) -> Tensor:
    """W_gate^T dg + W_up^T du of each row, [M, D]."""
    return up_back(dg_MF, du_MF, offsets_E, gate_EFD, up_EFD)


@torch.library.triton_op("sparsekit::experts_act_back", mutates_args=())
def experts_act_back(dh_MF: Tensor, weight_M: Tensor, g_MF: Tensor, u_MF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of g and u, [M, F], and of the rows' weights, [M], from that of h."""
    return act_back(dh_MF, weight_M, g_MF, u_MF)


@torch.library.triton_op("sparsekit::experts_spread", mutates_args=())
def experts_spread(x_ND: Tensor, back_NS: Tensor) -> Tensor:
    """The tokens as rows, [M, D]."""
    return spread(x_ND, back_NS)


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
def _up_back(
    dg_ptr, du_ptr, gate_ptr, up_ptr, offsets_ptr, dx_ptr, n_experts,
    F: tl.constexpr, D: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    widths: tl.constexpr = (D + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    expert, begin, end = _tile(program // widths, offsets_ptr, n_experts, EXPERTS, ROWS)
    if expert < n_experts:
        rows = begin + tl.arange(0, ROWS)
        columns = program % widths * WIDTH + tl.arange(0, WIDTH)
        dx = tl.zeros((ROWS, WIDTH), tl.float32)
        dx = _add_product(dx, dg_ptr, gate_ptr, expert, rows, end, columns, F, D, WIDTH, DEPTH)
        dx = _add_product(dx, du_ptr, up_ptr, expert, rows, end, columns, F, D, WIDTH, DEPTH)
        live = (rows < end)[:, None] & (columns < D)[None, :]
        at = tl.arange(0, ROWS)[:, None] * D + columns[None, :]
        tl.store(dx_ptr + begin.to(tl.int64) * D + at, dx.to(dx_ptr.dtype.element_ty), live)


@triton.jit
def _add_product(
    y, a_ptr, b_ptr, expert, rows, end, columns,
    K: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """y + a B[e], a [M, K], B [E, K, N]."""
    depth = tl.arange(0, DEPTH)
    a_at = a_ptr + tl.where(rows < end, rows, 0).to(tl.int64)[:, None] * K + depth[None, :]
    b_at = b_ptr + expert.to(tl.int64) * N * K + depth[:, None] * N + columns[None, :]
    for _ in range(K // DEPTH):
        b = tl.load(b_at) if N % WIDTH == 0 else tl.load(b_at, mask=(columns < N)[None, :], other=0)
        y = tl.dot(tl.load(a_at), b, y)
        a_at += DEPTH
        b_at += DEPTH * N
    return y


@triton.jit
def _act_back(
    dh_ptr, weight_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, dweight_ptr, n_rows,
    F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(weight_ptr + rows, mask=rows < n_rows, other=0).to(tl.float32)[:, None]
    dweight = tl.zeros((ROWS,), tl.float32)
    for first in tl.static_range(0, F, WIDTH):
        columns = first + tl.arange(0, WIDTH)
        at = rows.to(tl.int64)[:, None] * F + columns[None, :]
        live = (rows < n_rows)[:, None]
        dh = tl.load(dh_ptr + at, live, other=0).to(tl.float32)
        g = tl.load(g_ptr + at, live, other=0).to(tl.float32)
        u = tl.load(u_ptr + at, live, other=0).to(tl.float32)
        share = tl.sigmoid(g)
        silu = g * share
        dweight += tl.sum(dh * silu * u, 1)
        dh *= weight
        tl.store(dg_ptr + at, (dh * u * share * (1 + g - silu)).to(dg_ptr.dtype.element_ty), live)
        tl.store(du_ptr + at, (dh * silu).to(du_ptr.dtype.element_ty), live)
    tl.store(dweight_ptr + rows, dweight, rows < n_rows)


@triton.jit
def _spread(
    x_ptr, back_ptr, y_ptr, n_tokens,
    D: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tokens = program // (D // WIDTH) * ROWS + tl.arange(0, ROWS)
    columns = program % (D // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    live = tokens < n_tokens
    x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :], live[:, None])
    for slot in tl.static_range(SLOTS):
        row = tl.load(back_ptr + tokens.to(tl.int64) * SLOTS + slot, live, other=0).to(tl.int64)
        tl.store(y_ptr + row[:, None] * D + columns[None, :], x, live[:, None])
