"""What training minimises.

Shapes: N tokens of a batch, C of a chunk of it, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsekit import spec
from sparsekit.components.contracts import ForwardContext, compute_dtype, wide
from sparsekit.data.packing import IGNORE, Batch
from sparsekit.model.decoder import Decoder, Unembedding


class Loss(NamedTuple):
    """What an objective makes of a batch, every number summed over the batch's targets.

    Attributes:
        total: what is minimised.
        reported: what is logged as the loss and compared in evaluation; cross-entropy in nats.
        further: other parts of the total, without their coefficients, logged under their names.
    """

    total: Tensor
    reported: Tensor
    further: Mapping[str, Tensor] = MappingProxyType({})


class Objective:
    """A loss over a model and a batch, summed over the batch's targets (the trainer divides by their number)."""

    class Params(spec.Params):
        pass

    def __init__(self, params: Any):
        self.params = params

    def __call__(self, model: Decoder, batch: Batch, context: ForwardContext) -> Loss:
        raise NotImplementedError

    def compile(self) -> None:
        """Compiles what stands outside of the model, where the run compiles its layers too."""

    def of_ids(self, model: Decoder, ids_BT: Tensor) -> Tensor:
        """The total where each token is its own target, for who wants to know what a batch costs."""
        return self(model, Batch(ids_BT, ids_BT, None, ids_BT.numel()), ForwardContext()).total


class NextToken(Objective):
    """Cross-entropy of the next token, -sum log p(target), in nats.

    To it ``z_loss`` times logsumexp(logits)^2 is added, which keeps logits from drifting; the loss that is logged
    stays the cross-entropy alone, and the other is logged as ``z_loss_logits``. With ``chunk_tokens`` head and loss
    are worked out over so many tokens at a time, so that the logits of a batch never exist whole: the same numbers in
    less memory.

    Source: Bengio et al. 2003, JMLR 3; z-loss: Chowdhery et al. 2022, arXiv 2204.02311, sec. 5
    """

    class Params(Objective.Params):
        z_loss: NonNegativeFloat = 0.0
        chunk_tokens: PositiveInt | None = None

    def __init__(self, params: Any):
        super().__init__(params)
        self.terms = terms

    def compile(self) -> None:
        # a pass over the logits forward and one backward, in place of a dozen over their widened copies
        self.terms = torch.compile(terms, dynamic=False)

    def __call__(self, model: Decoder, batch: Batch, context: ForwardContext) -> Loss:
        targets_N, z_loss, chunk_tokens = batch.targets_BT.flatten(), self.params.z_loss, self.params.chunk_tokens
        if chunk_tokens is None:
            total, cross_entropy, z = self.terms(model(batch.ids_BT, context).flatten(0, 1), targets_N, z_loss)
        else:

            def head(x_BTD: Tensor, unembedding: Unembedding) -> tuple[Tensor, Tensor, Tensor]:
                return chunked_terms(x_BTD.flatten(0, 1), unembedding, targets_N, z_loss, chunk_tokens)

            total, cross_entropy, z = model(batch.ids_BT, context, head)
        return Loss(total, cross_entropy.detach(), {"z_loss_logits": z.detach()} if z_loss else {})


def terms(logits_NV: Tensor, targets_N: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """(cross-entropy + z_loss z, cross-entropy, z = logsumexp^2), sums over targets, in float32 or wider."""
    wide_NV = logits_NV.to(wide(logits_NV.dtype))
    if not z_loss:
        cross_entropy = F.cross_entropy(wide_NV, targets_N, ignore_index=IGNORE, reduction="sum")
        return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy)
    counts_N1 = (targets_N != IGNORE)[:, None]
    target_N1 = torch.where(counts_N1, targets_N[:, None], 0)
    log_p_N1 = wide_NV.log_softmax(-1).gather(1, target_N1)
    s_N1 = logits_NV.gather(1, target_N1) - log_p_N1  # logsumexp; of a gather its input is kept, the narrow one here
    cross_entropy = -torch.where(counts_N1, log_p_N1, 0).sum()
    z = torch.where(counts_N1, s_N1.square(), 0).sum()
    return cross_entropy + z_loss * z, cross_entropy, z


def chunked_terms(
    x_ND: Tensor, unembedding: Unembedding, targets_N: Tensor, z_loss: float, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`terms` of the head's logits, of which no more than ``chunk_tokens`` rows exist at a time.

    Where the head is a matrix product its gradients are worked out in the forward; any other head is run once more in
    the backward.
    """
    # torch's own linear_cross_entropy (2.13) has neither a z-loss nor a graph for torch.compile; see benchmarks
    if unembedding.weight is not None and torch.is_grad_enabled():
        fused: tuple[Tensor, Tensor, Tensor] = _FusedTerms.apply(  # type: ignore[no-untyped-call]
            x_ND, unembedding.weight, unembedding.bias, targets_N, unembedding.scale, z_loss, chunk_tokens
        )
        return fused

    def piece(x_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return terms(unembedding.logits(x_CD), targets_C, z_loss)

    chunks = zip(x_ND.split(chunk_tokens), targets_N.split(chunk_tokens), strict=True)
    pieces = [checkpoint(piece, *chunk, use_reentrant=False) for chunk in chunks]
    total, cross_entropy, z = (torch.stack(parts).sum() for parts in zip(*pieces, strict=True))
    return total, cross_entropy, z


class _FusedTerms(torch.autograd.Function):
    """:func:`terms` of scale (x W^T + b), whose gradients are worked out in the forward, chunk by chunk.

    With p = softmax(logits) and s = logsumexp(logits) of a row, its gradient is p (1 + 2 z_loss s) - onehot(target).
    What stays until the backward is the gradient of each input, there only to be multiplied by that of the total. So
    the head's product is taken once forward and twice backward, as without chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor,
        scale: float, z_loss: float, chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dtype = compute_dtype(x_ND.device, x_ND.dtype)
        full = wide(dtype)
        parameter = wide(weight_VD.dtype)  # in which chunks are summed up
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx_ND = torch.empty_like(x_ND, dtype=dtype) if needs_x else None
        dw_VD = torch.zeros_like(weight_VD, dtype=parameter) if needs_weight else None
        db_V = torch.zeros_like(bias_V, dtype=parameter) if bias_V is not None and needs_bias else None
        cross_entropy, z = (torch.zeros((), dtype=full, device=x_ND.device) for _ in range(2))
        with _without_autocast(x_ND.device):
            w_VD, b_V = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for start in range(0, x_ND.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                x_CD = x_ND[rows].to(dtype)
                dlogits_CV, cross_entropy_1, z_1 = _backward_of_terms(
                    F.linear(x_CD, w_VD, b_V), targets_N[rows, None], scale, z_loss
                )
                cross_entropy, z = cross_entropy + cross_entropy_1, z + z_1
                if dx_ND is not None:
                    torch.mm(dlogits_CV, w_VD, out=dx_ND[rows])
                if dw_VD is not None:
                    _add_product(dw_VD, dlogits_CV.T, x_CD)
                if db_V is not None:
                    db_V += dlogits_CV.sum(0, dtype=parameter)
                del dlogits_CV  # before there is the next one
        ctx.save_for_backward(dx_ND, dw_VD, db_V)
        ctx.dtypes = x_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + z_loss * z, cross_entropy, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = [None if kept is None else (kept * dtotal).to(dtype) for kept, dtype in saved]
        return *gradients, None, None, None, None


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    # the meta device has none; not is_autocast_available, in which torch 2.11's compiler breaks a graph
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _backward_of_terms(
    logits_CV: Tensor, targets_C1: Tensor, scale: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of the unscaled logits, written over them; cross-entropy; z)."""
    counts_C1 = targets_C1 != IGNORE
    target_C1 = torch.where(counts_C1, targets_C1, 0)
    wide_CV = logits_CV.to(wide(logits_CV.dtype))
    if scale != 1.0:
        wide_CV = wide_CV * scale
    log_p_CV = wide_CV.log_softmax(-1)
    log_p_C1 = log_p_CV.gather(1, target_C1)
    s_C1 = wide_CV.gather(1, target_C1) - log_p_C1
    factor_C1 = torch.where(counts_C1, scale * (1 + 2 * z_loss * s_C1), 0)
    at_target_C1 = torch.where(counts_C1, log_p_C1.exp() * factor_C1 - scale, 0)  # before anything is rounded
    dlogits_CV = torch.mul(log_p_CV.exp_(), factor_C1, out=logits_CV)
    dlogits_CV.scatter_(1, target_C1, at_target_C1.to(dlogits_CV.dtype))
    cross_entropy = -torch.where(counts_C1, log_p_C1, 0).sum()
    return dlogits_CV, cross_entropy, torch.where(counts_C1, s_C1.square(), 0).sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, total perhaps wider than the product."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right
