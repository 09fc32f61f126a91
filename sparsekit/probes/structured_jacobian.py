"""The mean Jacobian of a pre-norm layer in closed form, many times cheaper than one product a channel.

What is wanted is the response of the layer's outputs, summed over tokens, to one direction d added to every token's
input: J d = sum_t dh'_t. All that a token's attention tells of d comes through W_q d, W_k d and W_v d of each head, K
numbers each, and through the norm's own channel, one number a token, x^ . d. So per head and token a K x K matrix

    O_t = sum_s P_ts E_s (x) (v_s - o_t),    with E_s = k_s for W_q d, and s's turn of q_t for W_k d,

says it all, and behind the attention a feed-forward neuron f with slope a_tf multiplies it by row f of W_in W_o. Summed
over tokens that is one product (F x tokens)(tokens x K^2) a head in place of D backward passes. Whatever is rank one
(norms, the output -o_t) goes beside it in products of T x T or F x T.

Shapes beside those of probes/base.py: V head_dim of values; R rows of W_in, gate and up under each other (2F, or F
where there is no gate); Z pairs of channels that turn; X = K + 2Z (+ 1) columns of E (keys, and over the norm's r_s
cosines, sines and, where channels stand still, 1). A hat is a normalised stream, before the norm's weight, which
stands in the projections.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.probes.structured_layer import HeadNorm, Heads, StructuredLayer, unit

TOKENS = {"cuda": 4096}  # that go through the large products together
TOKENS_ELSEWHERE = 2048
COLUMNS = 16384  # of those products at most: larger ones are no faster


def turn_back(sums: Tensor, cos: Tensor, sin: Tensor, step: Tensor, q: Tensor, out: Tensor) -> None:
    """What key-weighted sums over E say of W_q d and W_k d: [..., X] -> ``out`` [..., 2K].

    The first K are R_t^T (sum of keys) times ``step`` = scale / r_t (``cos`` and ``sin`` come multiplied by it); the
    others are q_t, turned back by the keys' positions: ``q`` comes multiplied by the scale.
    """
    half, width = cos.shape[-1], q.shape[-1]
    sizes = [half, half, width - 2 * half]
    a, b, still, cosines, sines, ones = sums.split([*sizes, half, half, sums.shape[-1] - width - 2 * half], dim=-1)
    of_q, of_k = out[..., :width].split(sizes, dim=-1), out[..., width:].split(sizes, dim=-1)
    q_a, q_b, q_still = q.split(sizes, dim=-1)
    torch.mul(a, cos, out=of_q[0]).addcmul_(b, sin)
    torch.mul(b, cos, out=of_q[1]).addcmul_(a, sin, value=-1)
    torch.mul(cosines, q_a, out=of_k[0]).addcmul_(sines, q_b)
    torch.mul(cosines, q_b, out=of_k[1]).addcmul_(sines, q_a, value=-1)
    if sizes[2]:
        torch.mul(still, step, out=of_q[2])
        torch.mul(ones, q_still, out=of_k[2])


def batch_size(layer: StructuredLayer, length: int, room: int) -> int:
    """Sequences that go through the closed form together within ``room`` bytes.

    Twice as many tokens as a block of queries has: blocks see only the keys before them.
    """
    return max(1, 2 * _tokens(layer, length, room) // length)


def _tokens(layer: StructuredLayer, length: int, room: int) -> int:
    """Tokens in one block: enough for large products, few enough for half of the room."""
    rows, d_model = layer.ffn.weight.shape
    bytes_each = layer.o.element_size() * (10 * rows + 16 * d_model + 6 * length)
    return max(16, min(TOKENS.get(layer.o.device.type, TOKENS_ELSEWHERE), room // 2 // bytes_each))


def jacobian_sum(layer: StructuredLayer, x_BTD: Tensor, room: int, products: torch.dtype | None = None) -> Tensor:
    """sum_b sum_t' sum_{t >= t'} dh'_t / dh_t', [D, D], row i the gradient of output channel i.

    Args:
        x_BTD: the layer's input, in the dtype of the layer's matrices.
        room: bytes that it may take beside them and the batch.
        products: the dtype of the large products' factors (they accumulate in float32 or wider); None for x's.
    """
    sweep = Sweep(layer, x_BTD, room, products or x_BTD.dtype)
    block = max(1, _tokens(layer, x_BTD.shape[1], room) // x_BTD.shape[0])
    for first in range(0, x_BTD.shape[1], block):
        sweep.queries(first, min(first + block, x_BTD.shape[1]))
    return sweep.total()


class Sweep:
    """What queries gather, block after block: the coefficients of the projections, and what is rank one in a token.

    Attributes:
        of_q, of_k, of_v: how the sum over tokens of W_in y^, neuron by neuron, moves with W_q d, W_k d and W_v d:
            [F, H or G, K or V], already multiplied by the neurons' slopes.
        of_q_D …: how the sum of the attention's own output moves, likewise [D, …].
        of_norm_BTF, of_norm_BTHV: how both move with the shrinking of a token under the first norm.
        of_norm_2: with that under the second, [F, D].
    """

    def __init__(self, layer: StructuredLayer, x_BTD: Tensor, room: int, products: torch.dtype):
        self.layer, self.x, self.room, self.products = layer, x_BTD, room, products
        n, length, d_model = x_BTD.shape
        self.cos, self.sin = layer.turning(length, x_BTD)
        x_hat, r = unit(x_BTD, layer.norm_1)
        self.inverse = 1 / r  # [B, T, 1]
        self.shrink = x_hat * (self.inverse / d_model)  # its product with d is what a token shrinks by
        self.heads = Heads.of(layer, x_hat, self.cos, self.sin)
        y = x_BTD if layer.parallel else x_BTD + F.linear(self.heads.attend(layer), layer.o, layer.o_bias)
        self.y_hat, rho = unit(y, layer.norm_2)
        self.inverse_2 = 1 / rho
        zeros, d_ff = x_BTD.new_zeros, layer.d_ff
        self.of_q, self.of_q_D = (zeros(m, layer.heads, layer.key_dim) for m in (d_ff, d_model))
        self.of_k, self.of_k_D = (zeros(m, layer.kv_heads, layer.key_dim) for m in (d_ff, d_model))
        self.of_v, self.of_v_D = (zeros(m, layer.kv_heads, layer.value_dim) for m in (d_ff, d_model))
        self.of_slopes = zeros(layer.ffn.weight.shape[0])
        self.of_norm_BTF = zeros(n, length, d_ff)
        self.of_norm_BTHV = zeros(n, length, layer.heads, layer.value_dim)
        self.of_norm_2 = zeros(d_ff, d_model)

    def queries(self, first: int, last: int) -> None:
        """All that the queries of positions first … last - 1 see."""
        layer, here = self.layer, slice(first, last)
        n, d_model = self.x.shape[0], self.x.shape[2]
        y_hat = self.y_hat[:, here]
        slope, pre = layer.slopes(y_hat)
        slope = slope * self.inverse_2[:, here]
        self.of_slopes += slope.sum((0, 1))
        stretch_BTF = self.neurons(slope * pre) / d_model
        del pre
        if layer.parallel:  # neurons do not read the attention
            self.of_norm_2 += stretch_BTF.flatten(0, 1).T @ y_hat.flatten(0, 1)
            slope = slope[..., :0]
        rows = slope.shape[-1]
        # eight columns more (the first of them 1) sum over tokens by themselves; eight keep rows aligned
        factors = slope.new_zeros(n, last - first, rows + 8)
        factors[..., :rows], factors[..., rows] = slope, 1
        factors = factors.view(-1, rows + 8).to(self.products)
        w_BTHV = (y_hat @ layer.o).unflatten(-1, (layer.heads, -1))
        views = (HeadView(self, head, first, last, slope, factors, w_BTHV[:, :, head]) for head in range(layer.heads))
        if layer.parallel:
            for view in views:
                view.gather()
            return
        seen_BTD = y_hat.clone()  # how y^ . dy moves with d
        back = y_hat.new_zeros(n, last - first, last)  # the same as keys are stretched
        of = [y_hat.new_zeros(n, last - first, *m.shape[1:]) for m in (self.of_q, self.of_k, self.of_v)]
        for view in views:
            view.gather()
            through, through_v, as_query, as_keys = view.stream()
            of[0][:, :, view.head] += through[..., : layer.key_dim]
            of[1][:, :, view.kv] += through[..., layer.key_dim :]
            of[2][:, :, view.kv] += through_v
            seen_BTD -= as_query * self.shrink[:, here]
            back += as_keys
        for moved, projection in zip(of, (layer.q, layer.k, layer.v), strict=True):
            seen_BTD += moved.flatten(2) @ projection.weight
        seen_BTD -= back @ self.shrink[:, :last]
        self.of_norm_2 += stretch_BTF.flatten(0, 1).T @ seen_BTD.flatten(0, 1)

    def neurons(self, x: Tensor) -> Tensor:
        """[..., R] -> [..., F]: both branches of a neuron together."""
        return x[..., : self.layer.d_ff] + x[..., self.layer.d_ff :] if self.layer.gated else x

    def total(self) -> Tensor:
        """The sum, from what was gathered."""
        layer, tokens = self.layer, self.x.shape[0] * self.x.shape[1]
        neurons = self.neurons((self.of_slopes[:, None] * layer.ffn.weight).T).T - self.of_norm_2
        neurons -= self.of_norm_BTF.flatten(0, 1).T @ self.shrink.flatten(0, 1)
        attention = -(self.of_norm_BTHV.flatten(2).flatten(0, 1).T @ self.shrink.flatten(0, 1))
        total = layer.down @ neurons + layer.o @ attention
        for of, of_D, weight in (
            (self.of_q, self.of_q_D, layer.q.weight),
            (self.of_k, self.of_k_D, layer.k.weight),
            (self.of_v, self.of_v_D, layer.v.weight),
        ):
            total += (of_D.flatten(1) + layer.down @ of.flatten(1)) @ weight
        total.diagonal().add_(tokens)
        return total


class HeadView:
    """One head's queries at positions first … last - 1 and the keys that they see."""

    def __init__(
        self, sweep: Sweep, head: int, first: int, last: int, slope_BTR: Tensor, factors: Tensor, w_BTV: Tensor
    ):
        layer, heads = sweep.layer, sweep.heads
        self.sweep, self.layer, self.head, self.kv = sweep, layer, head, head // layer.group
        self.here, self.keys = slice(first, last), slice(0, last)
        self.slope, self.factors, self.w = slope_BTR, factors, w_BTV
        q, k = heads.q_BHTK[:, head, self.here], heads.k_BGTK[:, self.kv, self.keys]
        self.v = heads.v_BGTV[:, self.kv, self.keys]
        self.score = score = q @ k.mT * layer.scale
        hidden = torch.ones(score.shape[1:], dtype=torch.bool, device=score.device).triu_(first + 1)
        self.p = score.masked_fill(hidden, -torch.inf).softmax(-1)
        # how a score moves as its query, or its key, is stretched
        q_free, k_free = heads.q_free[:, head, self.here], heads.k_free[:, self.kv, self.keys]
        self.as_query = score if heads.q_free is heads.q_BHTK else q_free @ k.mT * layer.scale
        self.as_key = score if heads.k_free is heads.k_BGTK else q @ k_free.mT * layer.scale
        self.o = self.p @ self.v
        self.q = q * layer.scale

        inverse = sweep.inverse[:, self.keys]
        self.reach = self.p @ inverse  # how o_t moves with W_v d
        self.q_norm = None if heads.q_norm is None else heads.q_norm.at(slice(None), head, self.here)
        self.k_norm = None if heads.k_norm is None else heads.k_norm.at(slice(None), self.kv, self.keys)
        per_key = inverse if self.k_norm is None else inverse / self.k_norm.r
        turns = [table[None, self.keys] * per_key for table in (sweep.cos, sweep.sin)]
        still = per_key[..., : int(2 * sweep.cos.shape[-1] < layer.key_dim)]
        self.e = torch.cat((k, *turns, still), dim=-1)  # [B, keys, X]
        # a norm takes from W_k d what lies along the key, in proportion to the score
        self.along = None if self.k_norm is None else self.k_norm.hat * per_key / layer.key_dim
        self.step = sweep.inverse[:, self.here] * layer.scale
        self.turns = [table[None, self.here] * self.step for table in (sweep.cos, sweep.sin)]
        self.o_matrix = layer.o.unflatten(1, (layer.heads, -1))[:, head]  # [D, V]
        self.u = layer.ffn.weight[: slope_BTR.shape[-1]] @ self.o_matrix  # [R, V]: what a neuron reads of this head

    def turned(self, weights: Tensor, v: Tensor | None = None) -> Tensor:
        """Sums over keys of weights E (x) v as coefficients of W_q d and W_k d: [B, T, 2K], with v [B, T, J, 2K]."""
        kind, width = weights.dtype if v is None else v.dtype, self.layer.key_dim

        def over_keys(weights: Tensor, e: Tensor) -> Tensor:
            if v is None:
                return weights @ e
            product = weights.to(kind) @ (e[:, :, None].to(kind) * v[..., None]).flatten(2)
            return product.unflatten(-1, (v.shape[-1], -1))

        def lifted(x: Tensor) -> Tensor:
            return x if v is None else x[:, :, None]

        sums = over_keys(weights, self.e)
        out = sums.new_empty(*sums.shape[:-1], 2 * width)
        cos, sin, step, q = (lifted(x) for x in (*self.turns, self.step, self.q))
        turn_back(sums, cos, sin, step, q, out)
        if self.q_norm is not None:
            norm = self.q_norm
            HeadNorm(lifted(norm.hat), lifted(norm.r), norm.weight).moved_back_(out[..., :width])
        if self.k_norm is not None and self.along is not None:
            out[..., width:] *= self.k_norm.weight
            out[..., width:] -= over_keys(weights * self.score, self.along)
        return out

    def gather(self) -> None:
        """Adds to the sweep what this head does to its own output and to the neurons behind it."""
        sweep, head, kv, width = self.sweep, self.head, self.kv, self.layer.key_dim
        queries, keys = self.p * self.as_query, self.p * self.as_key
        both = self.p + keys
        stretched = queries @ self.v - queries.sum(-1, keepdim=True) * self.o  # how o_t moves with its query
        around = self.turned(self.p).flatten(0, 1)
        neurons, own = self.products()

        own = self.o_matrix @ (own - self.o.flatten(0, 1).T @ around)
        sweep.of_q_D[:, head] += own[:, :width]
        sweep.of_k_D[:, kv] += own[:, width:]
        sweep.of_v_D[:, kv] += self.reach.sum() * self.o_matrix
        sweep.of_norm_BTHV[:, self.keys, head] += both.sum(1)[..., None] * self.v - keys.mT @ self.o
        sweep.of_norm_BTHV[:, self.here, head] += stretched
        if self.layer.parallel:
            return
        pulled_o = self.slope * (self.o @ self.u.T)  # [B, T, R]
        neurons = sweep.neurons((neurons - pulled_o.flatten(0, 1).T @ around).T).T
        sweep.of_q[:, head] += neurons[:, :width]
        sweep.of_k[:, kv] += neurons[:, width:]
        sweep.of_v[:, kv] += sweep.neurons(((self.slope * self.reach).sum((0, 1))[:, None] * self.u).T).T
        kind = sweep.products
        per_key = (self.v @ self.u.T) * (both.mT.to(kind) @ self.slope.to(kind))
        per_key -= keys.mT.to(kind) @ pulled_o.to(kind)
        sweep.of_norm_BTF[:, self.keys] += sweep.neurons(per_key)
        sweep.of_norm_BTF[:, self.here] += sweep.neurons(self.slope * (stretched @ self.u.T))

    def products(self) -> tuple[Tensor, Tensor]:
        """The large ones: sum_t slope_t W_in W_o (O_t + E_t (x) o_t), [R, 2K], and the same without slope, [V, 2K]."""
        layer, kind, rows = self.layer, self.sweep.products, self.slope.shape[-1]
        n, queries, n_keys = self.p.shape
        per_column = self.e.element_size() * (n * n_keys + 2 * n * queries + rows)
        most = min(COLUMNS, self.sweep.room // 2 // per_column) // (2 * layer.key_dim)
        chunk = min(layer.value_dim, max(1, most // 8 * 8 or most))
        neurons, own = self.slope.new_zeros(rows, 2 * layer.key_dim), []
        for first in range(0, layer.value_dim, chunk):
            part = slice(first, first + chunk)
            turned = self.turned(self.p, self.v[..., part].to(kind))
            weighted = (self.factors.T @ turned.flatten(2).flatten(0, 1)).unflatten(-1, (-1, 2 * layer.key_dim))
            neurons += torch.bmm(self.u[:, None, part].to(kind), weighted[:rows])[:, 0]
            own.append(weighted[rows])
        return neurons, torch.cat(own).to(neurons.dtype)

    def stream(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How y^_t . dy_t moves: with W_q d and W_k d, [B, T, 2K], with W_v d, [B, T, V], and as the query, [B, T, 1],
        and the keys, [B, T, keys], are stretched."""
        at_values = self.w @ self.v.mT
        centred = self.p * (at_values - (self.o * self.w).sum(-1, keepdim=True))
        as_query = (centred * self.as_query).sum(-1, keepdim=True)
        return self.turned(centred), self.reach * self.w, as_query, centred * self.as_key + self.p * at_values
