"""Matrix times vector where most of the vector is zero, or most of the result is not wanted: 1 to 8 tokens at a time.

A decoding step reads every weight once and does little else, so its time is that of the bytes it reads. These two
functions read what is needed and no more:

    rows_matvec      input-sparse    y = x W         rows i of W [in, out] at which any x[b, i] is not 0
    columns_matvec   output-sparse   y = keep * x Wᵀ rows o of W [out, in] which any b keeps

A row is contiguous either way, which is why the first wants its weight stored [in, out].

On a GPU with triton, in 16 bits, :mod:`sparsekit.sparsifiers.triton_kernels`; on a CPU, what torch's embedding bags do
without a copy; elsewhere masked dense. Where more is active than pays, both multiply densely. A CPU counts what is
active; a GPU would have to wait for the count, so there it goes by the ``sparsity`` that the caller expects, if told.

B: tokens, I: inputs, O: outputs, C: pieces of a row, S: runs of inputs.
"""

from __future__ import annotations

import functools
import math
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BATCH = 8
# The most that may be active for gathering to be the faster on a CPU, summed over tokens, as a share of one token's
# inputs (of outputs): of one token, and of several. What a type has no entry for always gathers. A gathered product
# costs as much again for each token, and its dot products (columns) wait for memory more than its sums of rows, which
# fetch ahead. A dense product reads its weight once, so that more tokens cost it little: hence shares above 1 where
# that is slow all the same, as in float32 with several, and in 16 bits where the weight stands [in, out], by three to
# twenty times. Measured at 14336 x 4096, on two cores of an EPYC (family 26): benchmarks/sparse_decode.py --break-even.
ROWS_PAY = {torch.float32: (1.0, 2.0), torch.bfloat16: (1.0, 3.0)}
COLUMNS_PAY = {torch.float32: (0.55, 3.0), torch.bfloat16: (0.45, 0.45), torch.float16: (0.45, 0.45)}
SMALL = 2**20  # weights below are read in less time than a list of what is active takes, some 70 microseconds
# The same on a GPU, as a share of the weight's rows, by those that any token needs: below, what is not read is worth
# more than a second pass and shorter reads cost. Measured at 1 to 8 tokens (H200, bfloat16): --break-even there.
GPU_PAYS = 0.9
RUN = 1024  # float32 products added up one after the other; beyond, rounding errors show in the sixth digit


def rows_matvec(x_BI: Tensor, weight_IO: Tensor, sparsity: float | None = None) -> Tensor:
    """y[b] = sum over i with x[b, i] != 0 of x[b, i] W[i], without reading the other rows of W.

    Products are added up in float32 (in float64 for float64). No gradient.

    Args:
        x_BI: 1 to 8 tokens, [B, I].
        weight_IO: contiguous, [I, O], of the same type.
        sparsity: the share of zeros to expect of x, by which a GPU chooses between this and a dense product; None:
            enough of them.

    Returns:
        [B, O], of x's type.

    Raises:
        ValueError: shapes, types or devices that do not go together, or more than 8 tokens.

    Source: Liu et al. 2024, arXiv 2408.14690, sec. 4.4
    """
    _check("rows_matvec", x_BI, weight_IO, weight_IO.shape[0])
    if torch.compiler.is_compiling():
        return _rows_matvec(x_BI, weight_IO, sparsity)
    with torch.no_grad():
        return _rows(x_BI, weight_IO, sparsity)


def columns_matvec(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, sparsity: float | None = None) -> Tensor:
    """y[b, o] = keep[b, o] x[b] · W[o], without reading rows of W that no token keeps.

    Products are added up in float32 (in float64 for float64). No gradient.

    Args:
        x_BI: 1 to 8 tokens, [B, I].
        weight_OI: contiguous, [O, I], of the same type.
        keep_BO: which outputs are wanted, boolean; the others are 0.
        sparsity: the share of outputs to expect that are not wanted, as in :func:`rows_matvec`, of several tokens.

    Returns:
        [B, O], of x's type.

    Raises:
        ValueError: shapes, types or devices that do not go together, or more than 8 tokens.

    Source: Lee et al. 2024, arXiv 2404.08763, sec. 4
    """
    _check("columns_matvec", x_BI, weight_OI, weight_OI.shape[1])
    wanted = (x_BI.shape[0], weight_OI.shape[0])
    if tuple(keep_BO.shape) != wanted or keep_BO.dtype != torch.bool or keep_BO.device != x_BI.device:
        raise ValueError(
            f"columns_matvec: keep is {keep_BO.dtype} {list(keep_BO.shape)} on {keep_BO.device}; "
            f"give torch.bool {list(wanted)} on {x_BI.device}"
        )
    if torch.compiler.is_compiling():
        return _columns_matvec(x_BI, weight_OI, keep_BO, sparsity)
    with torch.no_grad():
        return _columns(x_BI, weight_OI, keep_BO, sparsity)


def _check(name: str, x_BI: Tensor, weight: Tensor, d_in: int) -> None:
    if x_BI.ndim != 2 or weight.ndim != 2 or x_BI.shape[1] != d_in or not 1 <= x_BI.shape[0] <= MAX_BATCH:
        raise ValueError(
            f"{name}: x {list(x_BI.shape)} and weight {list(weight.shape)} do not go together; "
            f"give x [1 to {MAX_BATCH}, d_in] and a matrix with that d_in"
        )
    if x_BI.dtype != weight.dtype or x_BI.device != weight.device or not x_BI.is_floating_point():
        raise ValueError(
            f"{name}: x is {x_BI.dtype} on {x_BI.device} and weight {weight.dtype} on {weight.device}; "
            "give both in one floating type on one device"
        )
    if not weight.is_contiguous():
        raise ValueError(f"{name}: weight has strides {weight.stride()}; give it contiguous, or rows are no rows")


def _rows(x_BI: Tensor, weight_IO: Tensor, sparsity: float | None) -> Tensor:
    if x_BI.is_cuda and _triton(x_BI.dtype) and pays(sparsity, x_BI.shape[0]):
        from sparsekit.sparsifiers import triton_kernels

        return triton_kernels.rows_matvec(x_BI, weight_IO)
    if x_BI.device.type == "cpu" and _few(x_BI, weight_IO, ROWS_PAY):
        return gather_rows(x_BI, weight_IO)
    return x_BI @ weight_IO


def _columns(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, sparsity: float | None) -> Tensor:
    # of one token always: a kernel that is told what is wanted costs less than one that blanks out what is not
    if x_BI.is_cuda and _triton(x_BI.dtype) and (x_BI.shape[0] == 1 or pays(sparsity, x_BI.shape[0])):
        from sparsekit.sparsifiers import triton_kernels

        return triton_kernels.columns_matvec(x_BI, weight_OI, keep_BO)
    if x_BI.device.type == "cpu" and _few(keep_BO, weight_OI, COLUMNS_PAY):
        return gather_columns(x_BI, weight_OI, keep_BO)
    return F.linear(x_BI, weight_OI).masked_fill(~keep_BO, 0)


# What is active differs from token to token, which torch.compile cannot trace; as operators both stand in a graph
# whole. Called as operators otherwise, they would cost some 0.1 ms more each.
@torch.library.custom_op("sparsekit::rows_matvec", mutates_args=())
def _rows_matvec(x_BI: Tensor, weight_IO: Tensor, sparsity: float | None) -> Tensor:
    return _rows(x_BI, weight_IO, sparsity)


@_rows_matvec.register_fake
def _(x_BI: Tensor, weight_IO: Tensor, sparsity: float | None) -> Tensor:
    return x_BI.new_empty(x_BI.shape[0], weight_IO.shape[1])


@torch.library.custom_op("sparsekit::columns_matvec", mutates_args=())
def _columns_matvec(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, sparsity: float | None) -> Tensor:
    return _columns(x_BI, weight_OI, keep_BO, sparsity)


@_columns_matvec.register_fake
def _(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor, sparsity: float | None) -> Tensor:
    return x_BI.new_empty(keep_BO.shape)


def _few(active: Tensor, weight: Tensor, pay: dict[torch.dtype, tuple[float, float]]) -> bool:
    if weight.numel() < SMALL:
        return False
    share = pay[weight.dtype][len(active) > 1] if weight.dtype in pay else math.inf
    return int(active.count_nonzero()) <= share * active.shape[1]


@functools.cache
def _triton(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and find_spec("triton") is not None


def pays(sparsity: float | None, n_batch: int) -> bool:
    """Whether a GPU is told of few enough active rows: those of any token, as if tokens chose independently."""
    return sparsity is None or 1 - sparsity**n_batch <= GPU_PAYS


def gather_rows(x_BI: Tensor, weight_IO: Tensor) -> Tensor:
    """:func:`rows_matvec` as weighted sums of rows in bags, which torch reads in place."""
    n_batch, d_in = x_BI.shape
    d_out = weight_IO.shape[1]
    # Threads share bags, so a token's row is cut into pieces, [I, O] seen as [I C, O / C]: in pieces of the columns
    # no partial sum is rounded to 16 bits. Runs of inputs are for float32's own rounding.
    n_pieces = math.gcd(d_out, torch.get_num_threads())
    if n_batch == 1:
        return _gather_rows_of_one(x_BI, weight_IO, n_pieces)
    run = RUN if x_BI.dtype == torch.float32 else d_in
    token_N, input_N = x_BI.nonzero(as_tuple=True)
    before = F.pad((x_BI != 0).flatten().cumsum(0), (1, 0))  # how many are active before a place
    starts_BS = torch.arange(n_batch)[:, None] * d_in + torch.arange(0, d_in, run)
    piece_C1 = torch.arange(n_pieces)[:, None]
    y = F.embedding_bag(
        (input_N * n_pieces + piece_C1).flatten(),
        weight_IO.view(d_in * n_pieces, d_out // n_pieces),
        (before[starts_BS.flatten()] + piece_C1 * len(input_N)).flatten(),
        mode="sum",
        per_sample_weights=x_BI[token_N, input_N].repeat(n_pieces),
    )
    y_CBSO = y.view(n_pieces, n_batch, -1, d_out // n_pieces)
    return y_CBSO.sum(2).transpose(0, 1).reshape(n_batch, d_out)


def _gather_rows_of_one(x_1I: Tensor, weight_IO: Tensor, n_pieces: int) -> Tensor:
    """The same with a third of the steps, which take as long as the reads where little is active."""
    d_in, d_out = weight_IO.shape
    input_N = x_1I[0].nonzero()[:, 0]
    n = len(input_N)
    starts_S = torch.arange(0, max(n, 1), RUN if x_1I.dtype == torch.float32 else max(n, 1))
    pieces = range(n_pieces)
    y = F.embedding_bag(
        torch.cat([input_N * n_pieces + piece for piece in pieces]),
        weight_IO.view(d_in * n_pieces, d_out // n_pieces),
        torch.cat([starts_S + piece * n for piece in pieces]),
        mode="sum",
        per_sample_weights=x_1I[0].index_select(0, input_N).repeat(n_pieces),
    )
    return y.view(n_pieces, -1, d_out // n_pieces).sum(1).view(1, d_out)


def gather_columns(x_BI: Tensor, weight_OI: Tensor, keep_BO: Tensor) -> Tensor:
    """:func:`columns_matvec` as the gradient of a bag's weights, which is such dot products of rows read in place."""
    y_BO = x_BI.new_zeros(keep_BO.shape)
    if len(x_BI) == 1:
        output_N = keep_BO[0].nonzero()[:, 0]
        y_N = _dots(x_BI, weight_OI, output_N, torch.zeros_like(output_N))
        y_BO[0].index_copy_(0, output_N, y_N)
        return y_BO
    output_N, token_N = keep_BO.T.nonzero(as_tuple=True)  # by output, so that tokens find its row in the cache
    y_BO[token_N, output_N] = _dots(x_BI, weight_OI, output_N, token_N)
    return y_BO


def _dots(x_BI: Tensor, weight_OI: Tensor, output_N: Tensor, token_N: Tensor) -> Tensor:
    """x[token] · W[output]."""
    y_N: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_BI, weight_OI, output_N, token_N.new_zeros(1), token_N, 0
    )
    return y_N
