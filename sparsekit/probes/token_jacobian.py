"""How a token's output moves with its own input: dh'_t / dh_t - I, without what other tokens see of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.jacobian_products import Copies
from sparsekit.probes.structured_layer import Heads, Projection, StructuredLayer, turn, unit


class TokenSample:
    """At which positions to look, and along which directions; of each sequence its own, whatever the batches.

    Attributes:
        position_SP: [S, P], drawn without replacement; all positions where ``positions`` is None.
        directions: Rademacher directions for each sequence and position, or None for all D axes.
    """

    def __init__(self, sequences: int, length: int, positions: int | None, directions: int | None, seed: int):
        self.directions = directions
        self.generator = torch.Generator().manual_seed(seed)
        n = length if positions is None else min(positions, length)
        drawn = [torch.randperm(length, generator=self.generator)[:n].sort().values for _ in range(sequences)]
        self.position_SP = torch.stack(drawn)
        self.seed = int(torch.randint(2**62, (), generator=self.generator))

    def draw(self, sequences: range, place: int, d_model: int, like: Tensor) -> Tensor:
        """Directions of some sequences at their place-th position, [C, B, D]."""
        if self.directions is None:
            axes = torch.eye(d_model, dtype=like.dtype, device=like.device)
            return axes[:, None].expand(-1, len(sequences), -1)
        signs = []
        for sequence in sequences:
            generator = torch.Generator().manual_seed(self.seed ^ (sequence * self.position_SP.shape[1] + place))
            signs.append(torch.randint(2, (self.directions, d_model), generator=generator, dtype=torch.int8))
        return (torch.stack(signs, 1).to(like.device).to(like.dtype) * 2 - 1).contiguous()

    def deviation(self, changes_CBD: Tensor) -> Tensor:
        """||A||_F / D a sequence, [B], from A v (or v A) along the directions v.

        sqrt(mean ||A v||^2 over Rademacher v), whose bias of - var(mean) / (8 mean^2) is mended.
        """
        squares_CB = changes_CBD.double().square().sum(-1)
        n, d_model = changes_CBD.shape[0], changes_CBD.shape[-1]
        if self.directions is None:
            return squares_CB.sum(0).sqrt() / d_model
        mean_B = squares_CB.mean(0)
        spread_B = squares_CB.var(0) / n if n > 1 else torch.zeros_like(mean_B)
        relative = torch.where(mean_B > 0, spread_B / mean_B.square(), 0)
        return mean_B.sqrt() * (1 + relative / 8) / d_model


def change_by_products(graph: Copies, position_B: Tensor, v_CBD: Tensor) -> Tensor:
    """v (dh'_t / dh_t - I), [C, B, D], by vector-Jacobian products."""
    gradient = graph.pull_own(position_B, v_CBD)
    return gradient.to(wide(gradient.dtype)) - v_CBD


def change_structured(layer: StructuredLayer, x_BTD: Tensor, position_B: Tensor, v_CBD: Tensor) -> Tensor:
    """(dh'_t / dh_t - I) v, [C, B, D], in closed form: one query, and one key among those that it sees."""
    n, length, d_model = x_BTD.shape
    sequence_B = torch.arange(n, device=x_BTD.device)
    cos_TZ, sin_TZ = layer.turning(length, x_BTD)
    cos, sin = (table[position_B, None] for table in (cos_TZ, sin_TZ))  # [B, 1, Z]
    x_hat, r = unit(x_BTD, layer.norm_1)
    heads = Heads.of(layer, x_hat, cos_TZ, sin_TZ)
    x_hat, r = x_hat[sequence_B, position_B], r[sequence_B, position_B]
    moved = (v_CBD - x_hat * (x_hat * v_CBD).sum(-1, keepdim=True) / d_model) / r

    def project(projection: Projection, n_heads: int) -> Tensor:
        return (moved @ projection.weight.T).unflatten(-1, (n_heads, -1))

    def shared(x: Tensor, dim: int) -> Tensor:
        return x.repeat_interleave(layer.group, dim)

    dq, dk = project(layer.q, layer.heads), project(layer.k, layer.kv_heads)  # [C, B, H or G, K]
    if heads.q_norm is not None:
        dq = heads.q_norm.at(sequence_B, slice(None), position_B).moved(dq)
    if heads.k_norm is not None:
        dk = heads.k_norm.at(sequence_B, slice(None), position_B).moved(dk)
    dq, dk = turn(dq, cos, sin), shared(turn(dk, cos, sin), 2)
    dv = shared(project(layer.v, layer.kv_heads), 2)
    q = heads.q_BHTK[sequence_B, :, position_B]
    k, v = shared(heads.k_BGTK, 1), shared(heads.v_BGTV, 1)
    hidden = torch.arange(length, device=x_BTD.device) > position_B[:, None]
    score = (k @ q[..., None])[..., 0] * layer.scale
    p = score.masked_fill(hidden[:, None], -torch.inf).softmax(-1)  # [B, H, T]
    own = p[sequence_B, :, position_B][..., None]  # [B, H, 1]
    o = (p[:, :, None] @ v)[:, :, 0]
    change = torch.einsum("cbhk,bhsk->cbhs", dq, k) * layer.scale
    itself = (q * dk).sum(-1, keepdim=True) * layer.scale  # the query's own key moves, too
    weighted = p * change
    v_own = v[sequence_B, :, position_B]
    mean = weighted.sum(-1, keepdim=True) + own * itself
    do = torch.einsum("cbhs,bhsv->cbhv", weighted, v) + own * itself * v_own - mean * o + own * dv
    attended = do.flatten(2) @ layer.o.T
    y, dy = x_BTD[sequence_B, position_B], v_CBD
    if not layer.parallel:
        context = o if layer.v.bias is None else o + shared(layer.v.bias.view(layer.kv_heads, -1), 0)
        y, dy = y + F.linear(context.flatten(1), layer.o, layer.o_bias), dy + attended
    y_hat, rho = unit(y, layer.norm_2)
    dy_hat = (dy - y_hat * (y_hat * dy).sum(-1, keepdim=True) / d_model) / rho
    slope, _ = layer.slopes(y_hat)
    hidden_change = (slope * (dy_hat @ layer.ffn.weight.T)).unflatten(-1, (-1, layer.d_ff)).sum(-2)
    return attended + hidden_change @ layer.down.T
