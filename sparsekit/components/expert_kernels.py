# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
"""What experts compute beside plain grouped products, in Triton; see :mod:`sparsekit.components.fused_experts`.

Rows are assignments in the order of their experts, M of them, of which ``offsets_E`` tells each expert's end. A program
of a product takes a tile of one expert's rows; which one, it reads in a table that is made where rows are sorted, so
that nothing waits for the host: grids are as large as any routing may need, and programs past the last tile end at
once. Sums are taken in one order, in float32, so that a result is the same every time.

E: experts, M: rows, T: tiles, N: tokens, S: assignments a token, D: d_model, F: d_ff.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton
from triton.tools.tensor_descriptor import TensorDescriptor


class Plan(NamedTuple):
    """How a product is cut up, beside its rows.

    Attributes:
        width: of a program's tile of the result.
        depth: how much of the sum it takes at a time.
        warps: of 32 threads, in a program.
        stages: how many steps' reads are under way at a time.
    """

    width: int
    depth: int = 64
    warps: int = 8
    stages: int = 3


ROWS = 128  # of a tile
# The best at the shapes of benchmarks/moe.py (H200, bfloat16; benchmarks/expert_kernels.py)
UP, WIDE_UP = Plan(128, 64, 4, 3), Plan(256, 64, 8, 4)
DOWN, UP_BACK = Plan(256, 64, 8, 4), Plan(256, 64, 8, 3)
ENTRIES = 4096  # that a program of an elementwise pass takes
SHARES, CHUNK = 256, 8192  # into which assignments are cut to be counted, and how many of a table are held at a time


@torch.library.triton_op("sparsekit::experts_sort", mutates_args=())
def sort(expert_M: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assignments in the order of their experts; every one has an expert.

    By counting: no key is moved, and those of an expert stay in the order in which they came.

    Returns:
        Which assignment each row is, [M]; the row of each assignment, [M]; int32 offsets, [E]; int32 [4, T], the expert
        of each tile, its first row, the end of its expert's rows, and how many tiles there are, of T at most.
    """
    n_rows, experts = expert_M.shape[0], _padded(n_experts)
    chunk = max(CHUNK // experts, 1)
    share = triton.cdiv(triton.cdiv(n_rows, SHARES), chunk) * chunk
    n_shares, n_tiles = triton.cdiv(n_rows, share), _most_tiles(n_rows, n_experts)
    count = expert_M.new_empty(n_shares, experts, dtype=torch.int32)
    order_M, row_M = torch.empty_like(expert_M), torch.empty_like(expert_M)
    offsets_E = expert_M.new_empty(n_experts, dtype=torch.int32)
    tiles_4T = expert_M.new_empty(4, n_tiles, dtype=torch.int32)
    sizes = {"EXPERTS": experts, "CHUNK": chunk, "num_warps": 8}
    _traced(_count)[(n_shares,)](expert_M, count, n_rows, share, **sizes)
    _traced(_place)[(n_shares,)](
        expert_M, count, order_M, row_M, offsets_E, tiles_4T, n_rows, share, n_shares, n_experts, n_tiles, ROWS=ROWS,
        **sizes,
    )  # fmt: skip
    return order_M, row_M, offsets_E, tiles_4T


def up_plan(d_model: int, d_ff: int) -> Plan:
    return WIDE_UP if d_model >= 1024 and 2 * d_ff % WIDE_UP.width == 0 else UP


def up(
    x_ND: Tensor, weight_NS: Tensor, order_M: Tensor, tiles_4T: Tensor, gate_EFD: Tensor, up_EFD: Tensor,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(g, u, w silu(g) u), each [M, F], where g = W_gate x and u = W_up x of each row's token, gathered here."""
    _, d_ff, d_model = gate_EFD.shape
    plan = plan or up_plan(d_model, d_ff)
    n_tiles = tiles_4T.shape[1]
    found = tuple(x_ND.new_empty(order_M.shape[0], d_ff) for _ in range(3))
    _traced(_up)[(n_tiles * triton.cdiv(2 * d_ff, plan.width),)](
        x_ND, weight_NS, order_M, tiles_4T, gate_EFD, up_EFD, *found, n_tiles, D=d_model, F=d_ff,
        SLOTS=weight_NS.shape[1], **_shape(plan),
    )  # fmt: skip
    return found[0], found[1], found[2]


def down(h_MF: Tensor, tiles_4T: Tensor, down_EDF: Tensor, plan: Plan = DOWN) -> Tensor:
    """W_down h of each row, [M, D]; as many programs as run at a time take one tile after the other."""
    _, d_model, d_ff = down_EDF.shape
    n_tiles = tiles_4T.shape[1]
    y_MD = h_MF.new_empty(h_MF.shape[0], d_model)
    programs = min(_processors(h_MF.device), n_tiles * triton.cdiv(d_model, plan.width))
    _down[(programs,)](
        _blocks(h_MF, ROWS, plan.depth), _blocks(down_EDF, plan.width, plan.depth), tiles_4T, y_MD, n_tiles, programs,
        F=d_ff, D=d_model, **_shape(plan),
    )  # fmt: skip
    return y_MD


def up_back(
    dg_MF: Tensor, du_MF: Tensor, tiles_4T: Tensor, gate_EFD: Tensor, up_EFD: Tensor, plan: Plan = UP_BACK
) -> Tensor:
    """W_gate^T dg + W_up^T du of each row, [M, D], as one sum."""
    _, d_ff, d_model = gate_EFD.shape
    n_tiles = tiles_4T.shape[1]
    dx_MD = dg_MF.new_empty(dg_MF.shape[0], d_model)
    rows = (_blocks(rows_MF, ROWS, plan.depth) for rows_MF in (dg_MF, du_MF))
    weights = (_blocks(weight_EFD, plan.depth, plan.width) for weight_EFD in (gate_EFD, up_EFD))
    _up_back[(n_tiles * triton.cdiv(d_model, plan.width),)](
        *rows, *weights, tiles_4T, dx_MD, n_tiles, F=d_ff, D=d_model, **_shape(plan)
    )
    return dx_MD


def _blocks(stack: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix, or a stack of them as one below the other, for a GPU's engine that copies blocks of it."""
    return TensorDescriptor.from_tensor(stack.view(-1, stack.shape[-1]), [rows, columns])


@torch.library.triton_op("sparsekit::experts_act_back", mutates_args=())
def act_back(
    dh_MF: Tensor, weight_NS: Tensor, order_M: Tensor, g_MF: Tensor, u_MF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of g and u, [M, F], and of the weights, [N, S] in float32, from that of h = w silu(g) u."""
    dg_MF, du_MF = torch.empty_like(g_MF), torch.empty_like(u_MF)
    n_rows, d_ff = g_MF.shape
    dweight_NS = torch.empty_like(weight_NS, dtype=torch.float32)
    width = _width(d_ff)
    rows = ENTRIES // width
    _traced(_act_back)[(triton.cdiv(n_rows, rows),)](
        dh_MF, weight_NS, order_M, g_MF, u_MF, dg_MF, du_MF, dweight_NS, n_rows, d_ff, ROWS=rows, WIDTH=width,
        num_warps=8,
    )  # fmt: skip
    return dg_MF, du_MF, dweight_NS


@torch.library.triton_op("sparsekit::experts_spread", mutates_args=())
def spread(x_ND: Tensor, row_NS: Tensor) -> Tensor:
    """y[row[n, s]] = x[n], the tokens as rows, [M, D].

    In the order of tokens, which reads each once; in the order of experts each would be fetched from memory S times.
    """
    n_tokens, slots = row_NS.shape
    d_model = x_ND.shape[1]
    y_MD = x_ND.new_empty(n_tokens * slots, d_model)
    width = _width(d_model)
    rows = ENTRIES // width
    _traced(_spread)[(triton.cdiv(n_tokens, rows) * (d_model // width),)](
        x_ND, row_NS, y_MD, n_tokens, d_model, SLOTS=slots, ROWS=rows, WIDTH=width, num_warps=4
    )
    return y_MD


def _width(d: int) -> int:
    """The largest power of two that divides a row, up to a part of a program's share: no thread is idle then."""
    return min(d & -d, ENTRIES // 4)


def _traced(kernel):
    """Where operators made of kernels are traced, a compiler sees the launch."""
    return wrap_triton(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel  # else interpreted


def _most_tiles(n_rows: int, n_experts: int) -> int:
    """As many as there can be: each expert's last need not be full."""
    return triton.cdiv(n_rows, ROWS) + n_experts


def _shape(plan: Plan) -> dict[str, int]:
    sizes = {"ROWS": ROWS, "WIDTH": plan.width, "DEPTH": plan.depth}
    return {**sizes, "num_warps": plan.warps, "num_stages": plan.stages}


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _padded(n_experts: int) -> int:
    """A table of experts is as long as a power of two."""
    return max(2, triton.next_power_of_2(n_experts))


# ---- those that are cut up by a plan, as operators; whoever traces them cannot look into those that copy blocks ----


@torch.library.triton_op("sparsekit::experts_up", mutates_args=())
def experts_up(
    x_ND: Tensor, weight_NS: Tensor, order_M: Tensor, tiles_4T: Tensor, gate_EFD: Tensor, up_EFD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """g = W_gate x, u = W_up x and h = w silu(g) u of each row, [M, F]."""
    return up(x_ND, weight_NS, order_M, tiles_4T, gate_EFD, up_EFD)


@torch.library.custom_op("sparsekit::experts_down", mutates_args=())
def experts_down(h_MF: Tensor, tiles_4T: Tensor, down_EDF: Tensor) -> Tensor:
    """W_down h of each row, [M, D]."""
    return down(h_MF, tiles_4T, down_EDF)


@experts_down.register_fake
def _(h_MF: Tensor, tiles_4T: Tensor, down_EDF: Tensor) -> Tensor:
    return h_MF.new_empty(h_MF.shape[0], down_EDF.shape[1])


@torch.library.custom_op("sparsekit::experts_up_back", mutates_args=())
def experts_up_back(dg_MF: Tensor, du_MF: Tensor, tiles_4T: Tensor, gate_EFD: Tensor, up_EFD: Tensor) -> Tensor:
    """W_gate^T dg + W_up^T du of each row, [M, D]."""
    return up_back(dg_MF, du_MF, tiles_4T, gate_EFD, up_EFD)


@experts_up_back.register_fake
def _(dg_MF: Tensor, du_MF: Tensor, tiles_4T: Tensor, gate_EFD: Tensor, up_EFD: Tensor) -> Tensor:
    return dg_MF.new_empty(dg_MF.shape[0], gate_EFD.shape[2])


# ---- the kernels ----


@triton.jit
def _count(expert_ptr, count_ptr, n_rows, share, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """How many of a share's assignments each expert has."""
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), tl.int32)
    for first in range(program * share, program * share + share, CHUNK):
        place = first + tl.arange(0, CHUNK)
        expert = tl.load(expert_ptr + place, mask=place < n_rows, other=EXPERTS)
        count += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + program * EXPERTS + experts, count)


@triton.jit
def _place(
    expert_ptr, count_ptr, order_ptr, row_ptr, offsets_ptr, tiles_ptr, n_rows, share, n_shares, n_experts, n_tiles,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """An assignment's row: where its expert's begin, and how many of that expert come before it. And a share of the
    table of tiles."""
    program = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, n_shares, CHUNK):
        other = first + tl.arange(0, CHUNK)
        at = count_ptr + other[:, None] * EXPERTS + experts[None, :]
        count = tl.load(at, mask=(other < n_shares)[:, None], other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((other < program)[:, None], count, 0), 0)
    ends = tl.cumsum(total, 0)
    if program == 0:
        tl.store(offsets_ptr + experts, ends, experts < n_experts)
    free = ends - total + before
    for first in range(program * share, program * share + share, CHUNK):
        place = first + tl.arange(0, CHUNK)
        expert = tl.load(expert_ptr + place, mask=place < n_rows, other=EXPERTS)
        own = (expert[:, None] == experts[None, :]).to(tl.int32)
        row = tl.sum(own * (tl.cumsum(own, 0) - 1 + free[None, :]), 1)
        tl.store(row_ptr + place, row.to(tl.int64), place < n_rows)
        tl.store(order_ptr + row, place.to(tl.int64), place < n_rows)
        free += tl.sum(own, 0)
    tiles = (total + ROWS - 1) // ROWS
    upto = tl.cumsum(tiles, 0)
    first_row = ends - total - (upto - tiles) * ROWS  # of an expert's tile, less its place among all tiles' rows
    own_tiles = (n_tiles + n_shares - 1) // n_shares
    for first in range(program * own_tiles, program * own_tiles + own_tiles, CHUNK):
        place = first + tl.arange(0, CHUNK)
        expert = tl.sum((upto[None, :] <= place[:, None]).to(tl.int32), 1)
        own = (expert[:, None] == experts[None, :]).to(tl.int32)
        tl.store(tiles_ptr + place, expert, place < n_tiles)
        tl.store(tiles_ptr + n_tiles + place, place * ROWS + tl.sum(own * first_row[None, :], 1), place < n_tiles)
        tl.store(tiles_ptr + 2 * n_tiles + place, tl.sum(own * ends[None, :], 1), place < n_tiles)
        tl.store(tiles_ptr + 3 * n_tiles + place, place * 0 + tl.sum(tiles, 0), place < n_tiles)


@triton.jit
def _tile(index, tiles_ptr, n_tiles):
    """(expert, first row of the tile, end of the expert's rows)."""
    at = tiles_ptr + index
    return tl.load(at), tl.load(at + n_tiles), tl.load(at + 2 * n_tiles)


@triton.jit
def _up(
    x_ptr, weight_ptr, order_ptr, tiles_ptr, gate_ptr, up_ptr, g_ptr, u_ptr, h_ptr, n_tiles,
    D: tl.constexpr, F: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Columns of W_gate and W_up take turns in one product, twice as wide as either: g and u of a neuron lie side by
    side in a thread's registers then."""
    half: tl.constexpr = WIDTH // 2
    widths: tl.constexpr = (F + half - 1) // half
    program = tl.program_id(0)
    if program // widths < tl.load(tiles_ptr + 3 * n_tiles):
        expert, begin, end = _tile(program // widths, tiles_ptr, n_tiles)
        rows = begin + tl.arange(0, ROWS)
        order = tl.load(order_ptr + rows, mask=rows < end, other=0)
        token = order // SLOTS
        depth = tl.arange(0, DEPTH)
        x_at = x_ptr + token[:, None] * D + depth[None, :]
        turn = tl.arange(0, WIDTH)
        neuron = program % widths * half + turn // 2
        neuron_at = expert.to(tl.int64) * F * D + tl.where(neuron < F, neuron, 0) * D
        both_at = tl.where(turn % 2 == 0, gate_ptr + neuron_at, up_ptr + neuron_at)[None, :] + depth[:, None]
        both = tl.zeros((ROWS, WIDTH), tl.float32)
        for _ in range(D // DEPTH):
            both = tl.dot(tl.load(x_at), tl.load(both_at), both)
            x_at += DEPTH
            both_at += DEPTH
        # rounded as it is kept for backward, so that both agree
        g, u = tl.split(tl.reshape(both.to(g_ptr.dtype.element_ty), (ROWS, half, 2)))
        columns = program % widths * half + tl.arange(0, half)
        first = begin.to(tl.int64) * F  # a scalar: 64-bit places of every entry would fill the registers
        at = tl.arange(0, ROWS)[:, None] * F + columns[None, :]
        live = (rows < end)[:, None] & (columns < F)[None, :]
        tl.store(g_ptr + first + at, g, live)
        tl.store(u_ptr + first + at, u, live)
        weight = tl.load(weight_ptr + order, mask=rows < end, other=0).to(tl.float32)
        g = g.to(tl.float32)
        h = g * tl.sigmoid(g) * u.to(tl.float32) * weight[:, None]
        tl.store(h_ptr + first + at, h.to(h_ptr.dtype.element_ty), live)


@triton.jit
def _down(
    h, down, tiles_ptr, y_ptr, n_tiles, programs,
    F: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One loop over tiles and their sums: the next tile's reads are under way while one is written."""
    widths: tl.constexpr = (D + WIDTH - 1) // WIDTH
    for tile in tl.range(tl.program_id(0), tl.load(tiles_ptr + 3 * n_tiles) * widths, programs, flatten=True):
        expert, begin, end = _tile(tile // widths, tiles_ptr, n_tiles)
        column = tile % widths * WIDTH
        y = tl.zeros((ROWS, WIDTH), tl.float32)
        for k in range(0, F, DEPTH):
            y = tl.dot(h.load([begin, k]), down.load([expert * D + column, k]).T, y)
        _write(y_ptr, y, begin, end, column, D, ROWS, WIDTH)


@triton.jit
def _up_back(
    dg, du, gate, up, tiles_ptr, dx_ptr, n_tiles,
    F: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    widths: tl.constexpr = (D + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    if program // widths < tl.load(tiles_ptr + 3 * n_tiles):
        expert, begin, end = _tile(program // widths, tiles_ptr, n_tiles)
        column = program % widths * WIDTH
        dx = tl.zeros((ROWS, WIDTH), tl.float32)
        for k in range(0, F, DEPTH):
            dx = tl.dot(dg.load([begin, k]), gate.load([expert * F + k, column]), dx)
        for k in range(0, F, DEPTH):
            dx = tl.dot(du.load([begin, k]), up.load([expert * F + k, column]), dx)
        _write(dx_ptr, dx, begin, end, column, D, ROWS, WIDTH)


@triton.jit
def _write(y_ptr, y, begin, end, column, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile, but for rows of the next expert and columns that there are not."""
    rows, columns = begin + tl.arange(0, ROWS), column + tl.arange(0, WIDTH)
    at = tl.arange(0, ROWS)[:, None] * D + columns[None, :]
    live = (rows < end)[:, None] & (columns < D)[None, :]
    tl.store(y_ptr + begin.to(tl.int64) * D + at, y.to(y_ptr.dtype.element_ty), live)


@triton.jit
def _act_back(
    dh_ptr, weight_ptr, order_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, dweight_ptr, n_rows,
    F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    order = tl.load(order_ptr + rows, mask=rows < n_rows, other=0)
    weight = tl.load(weight_ptr + order, mask=rows < n_rows, other=0).to(tl.float32)[:, None]
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
    tl.store(dweight_ptr + order, dweight, rows < n_rows)


@triton.jit
def _spread(
    x_ptr, row_ptr, y_ptr, n_tokens,
    D: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tokens = program // (D // WIDTH) * ROWS + tl.arange(0, ROWS)
    columns = program % (D // WIDTH) * WIDTH + tl.arange(0, WIDTH)
    live = tokens < n_tokens
    x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :], live[:, None])
    for slot in tl.static_range(SLOTS):
        row = tl.load(row_ptr + tokens.to(tl.int64) * SLOTS + slot, live, other=0).to(tl.int64)
        tl.store(y_ptr + row[:, None] * D + columns[None, :], x, live[:, None])
