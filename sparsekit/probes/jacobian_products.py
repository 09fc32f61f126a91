"""Products with a layer's Jacobian: many cotangents at a time, through copies of the batch side by side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsekit.components.contracts import wide
from sparsekit.probes.layered import Pass

TOKENS = {"cuda": 32768}  # of all copies together: enough to fill the device; a CPU gains nothing by more
TOKENS_ELSEWHERE = 512


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, so that what only they need is not kept."""
    wanting = [p for p in module.parameters() if p.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


class Copies:
    """A layer's graph on ``copies`` of a batch, one behind the other; each copy takes a cotangent of its own.

    Fused attention has no rule for a batch of cotangents, so the batch itself is repeated. The graph is made once and
    cotangents are drawn through it again and again.
    """

    def __init__(self, batch: Pass, layer: int, h_BTD: Tensor, copies: int):
        self.copies, self.shape = copies, h_BTD.shape
        self.input = h_BTD.detach().to(batch.view.dtype).repeat(copies, 1, 1).requires_grad_()
        with torch.enable_grad(), frozen(batch.view.model):
            self.output = batch.layer(layer, self.input)

    @classmethod
    def within(cls, batch: Pass, layer: int, h_BTD: Tensor, room: int, most: int) -> Copies:
        """As many copies as fill the device, fit into ``room`` bytes and are of use; at least one."""
        tokens = TOKENS.get(h_BTD.device.type, TOKENS_ELSEWHERE)
        copies = min(most, tokens // (h_BTD.shape[0] * h_BTD.shape[1]))
        if copies > 1:
            # beside what is kept for the backward pass stand gradients, at the most about as much again
            copies = min(copies, room // (2 * graph_bytes(batch, layer, h_BTD)))
        return cls(batch, layer, h_BTD, max(1, copies))

    def pull(self, cotangents_CBTD: Tensor) -> Tensor:
        """[c, B, T, D] cotangents of the outputs, c <= copies -> the gradients of the inputs, likewise."""
        wanted = len(cotangents_CBTD)
        cotangents = cotangents_CBTD.to(self.output.dtype)
        if wanted < self.copies:
            empty = cotangents.new_zeros(self.copies - wanted, *cotangents.shape[1:])
            cotangents = torch.cat((cotangents, empty))
        cotangents = cotangents.reshape(self.output.shape).contiguous()
        (gradient,) = torch.autograd.grad(self.output, self.input, cotangents, retain_graph=True)
        return gradient.view(self.copies, *self.shape)[:wanted]

    def pull_sums(self, cotangents_CD: Tensor) -> Tensor:
        """v -> sum_b sum_t' v . d(sum_t h'_t) / dh_t' for any number of v, [C, D] -> [C, D] in float32 or wider."""
        found = []
        for v_CD in cotangents_CD.split(self.copies):
            gradient = self.pull(v_CD[:, None, None].expand(-1, *self.shape[:2], -1))
            found.append(gradient.sum((1, 2), dtype=wide(gradient.dtype)))
        return torch.cat(found)

    def pull_own(self, position_B: Tensor, cotangents_CBD: Tensor) -> Tensor:
        """v -> v . dh'_t / dh_t at one position t of each sequence: [C, B, D] -> [C, B, D]."""
        found = []
        sequence_B = torch.arange(self.shape[0], device=position_B.device)
        for v_CBD in cotangents_CBD.split(self.copies):
            cotangents = v_CBD.new_zeros(len(v_CBD), *self.shape)
            cotangents[:, sequence_B, position_B] = v_CBD
            found.append(self.pull(cotangents)[:, sequence_B, position_B])
        return torch.cat(found)


def graph_bytes(batch: Pass, layer: int, h_BTD: Tensor) -> int:
    """What a layer keeps of one batch for the backward pass, its parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in batch.view.model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        Copies(batch, layer, h_BTD, 1)
    return max(1, sum(kept.values()))


def exact_sum(batch: Pass, layer: int, h_BTD: Tensor, room: int) -> Tensor:
    """sum_b sum_t' sum_{t >= t'} dh'_t / dh_t', [D, D], a vector-Jacobian product a row."""
    d_model = h_BTD.shape[-1]
    graph = Copies.within(batch, layer, h_BTD, room, d_model)
    return graph.pull_sums(torch.eye(d_model, dtype=batch.view.dtype, device=h_BTD.device))


def push_sums(batch: Pass, layer: int, h_BTD: Tensor, directions_CD: Tensor) -> Tensor:
    """d -> sum_b sum_t dh'_t where every token of the input moves by d: [C, D] -> [C, D] in float32 or wider.

    By forward differentiation, or, where an operator has no rule for it, by differentiating backward twice. One copy
    at a time, as the attention that can be differentiated so holds T x T scores.

    Raises:
        RuntimeError: an operator can be differentiated neither way.
    """
    h_BTD = h_BTD.detach().to(batch.view.dtype)
    found = []
    push = _push_forward
    with sdpa_kernel(SDPBackend.MATH):
        for d_D in directions_CD.to(h_BTD.dtype):
            direction = d_D.expand_as(h_BTD).contiguous()
            try:
                tangent = push(batch, layer, h_BTD, direction)
            except (RuntimeError, NotImplementedError):
                push = _push_backward
                tangent = push(batch, layer, h_BTD, direction)
            found.append(tangent.sum((0, 1), dtype=wide(tangent.dtype)))
    return torch.stack(found)


def _push_forward(batch: Pass, layer: int, h_BTD: Tensor, direction: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = batch.layer(layer, forward_ad.make_dual(h_BTD, direction))
        tangent: Tensor | None = forward_ad.unpack_dual(out).tangent
    if tangent is None:
        raise NotImplementedError("the layer lost the tangent on its way")
    return tangent


def _push_backward(batch: Pass, layer: int, h_BTD: Tensor, direction: Tensor) -> Tensor:
    """J d as the gradient of u J d, which is linear in u."""
    read = h_BTD.clone().requires_grad_()
    with torch.enable_grad(), frozen(batch.view.model):
        out = batch.layer(layer, read)
        u = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, read, u, create_graph=True)
        (tangent,) = torch.autograd.grad((pulled * direction).sum(), u)
    return tangent
