"""How much later layers depend on a layer: skip it, and see what they do differently.

Shapes, beside those of base.py: R branches, of which 0 is the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.probes.base import Array, Probe, ProbeResult, Tokens
from sparsekit.probes.branches import BranchParams, Counted, Plan, compiled, empty_states, groups, interval
from sparsekit.probes.layered import MOST_LOGITS, MOST_LOGITS_ELSEWHERE, LayeredModel, Pass, ViewError


class Causal(Probe):
    """How skipping layer s changes what each later layer l adds: C[s,l] = mean ||f_l^(skip s) - f_l|| / mean ||f_l||.

    f_l = h_{l+1} - h_l; skipping s means h_{s+1} = h_s; means over sequences and tokens. The matrix ``effect``
    [skipped, measured] is nan where l <= s; per layer, ``effect`` is its mean over l > s (nan for the last layer, which
    has no later one). Scalars: ``causal``, the mean of that over s, and ``depth_score`` = sum_l l e_l / sum_l e_l with
    l from 1, of the e_l per layer. At layer m the states of all skips s < m are one batch with the dense one, and
    states and f_l are float32 where the model computes in less.

    * ``ratio`` "token_max": per token ||f_l^(skip s) - f_l|| / ||f_l||, its maximum over a sequence's tokens, the mean
      of that over sequences.
    * ``future``: s is skipped at positions < t only and the effect is measured at positions >= t, t one seeded
      position a sequence.
    * ``output``: also, per layer, ``output_effect`` = mean over tokens of ||softmax - softmax^(skip s)||_2, as a scalar
      its mean over s, and ``output_depth_score``.

    Raises:
        ViewError: the model has one layer only.

    Source: arXiv 2603.15389, after Csordas, Manning & Potts 2025, arXiv 2505.13898
    """

    class Params(BranchParams):
        ratio: Literal["means", "token_max"] = "means"
        future: bool = False
        output: bool = False

    @torch.no_grad()
    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        n, length = tokens.ids_ST.shape
        if view.n_layers < 2:
            raise ViewError("causal: the model has one layer, and none after it; give one of two layers or more")
        if self.params.future and length < 2:
            raise ViewError("causal: 'future' parts a sequence in two; give sequences of two tokens or more")
        skipped = range(view.n_layers if self.params.output else view.n_layers - 1)
        plan = Plan.of(view, tokens, self.params, 1 + len(skipped), wide(view.dtype))
        sums = Sums(self, view, n, length)
        counted = Counted(view)
        with compiled(view, self.params.compile):
            first = 0
            for ids_BT in tokens.batches(plan.sequences):
                batch, which = view.start(ids_BT), slice(first, first + len(ids_BT))
                for some in groups(skipped, plan.states - 1):
                    sums.follow(batch, some, which, plan.branches)
                first += len(ids_BT)
                counted.floor += view.n_layers * (view.n_layers + 1) // 2
        result = sums.result(self.seed)
        result.meta |= counted.told()
        return result


class Sums:
    """What is added up, by sequence, on the device.

    Attributes:
        effect_LLS: [skipped, measured, sequence], the mean over tokens of ||f_l^(skip s) - f_l||, or the largest ratio.
        dense_LS: the mean over tokens of ||f_l||.
        output_LS: the mean over tokens by how much the prediction moves.
        later_ST: positions at which effects are measured, if not at all.
    """

    def __init__(self, probe: Causal, view: LayeredModel, n_sequences: int, length: int):
        self.params, self.view = probe.params, view
        n_layers, device = view.n_layers, view.device
        zeros = torch.zeros(n_layers + 2, n_layers, n_sequences, dtype=wide(view.dtype), device=device)
        self.effect_LLS, (self.dense_LS, self.output_LS) = zeros.split([n_layers, 2])
        self.later_ST: Tensor | None = None
        if probe.params.future:
            generator = torch.Generator().manual_seed(probe.seed)
            cut_S1 = torch.randint(1, length, (n_sequences, 1), generator=generator)
            self.later_ST = (torch.arange(length) >= cut_S1).to(device)

    def follow(self, batch: Pass, skips: Sequence[int], which: slice, at_a_time: int) -> None:
        """Sends the dense state and, as they arise, those of some skips through all layers."""
        later_BT = None if self.later_ST is None else self.later_ST[which]
        states_RBTD = empty_states(batch, 1 + len(skips), wide(self.view.dtype))
        states_RBTD[0] = batch.h_0
        running = 1
        for layer in range(self.view.n_layers):
            if layer in skips:
                states_RBTD[running] = states_RBTD[0]
            self._layer(batch, layer, states_RBTD[:running], skips[0], which, later_BT, at_a_time)
            if layer in skips:
                if later_BT is not None:
                    torch.where(later_BT[..., None], states_RBTD[0], states_RBTD[running], out=states_RBTD[running])
                running += 1
        if self.params.output:
            moved_RBT = self._moved(batch, states_RBTD)
            self.output_LS[skips[0] : skips[-1] + 1, which] = mean_over(moved_RBT, later_BT)

    def _layer(
        self, batch: Pass, layer: int, states_RBTD: Tensor, skip: int, which: slice, later_BT: Tensor | None, most: int
    ) -> None:
        """One layer for all branches there are, in place; adds what it did differently to the sums.

        Branch 1 skips ``skip``, branch 2 the next layer, and so on; ``most`` of them run at a time.
        """
        dense_BTD = dense_BT = None
        for first in range(0, len(states_RBTD), most):
            h = states_RBTD[first : first + most]
            x = h.to(self.view.dtype)
            out = batch.layer(layer, x.flatten(0, 1)).view_as(h)
            f = out.to(h.dtype) - x
            if x is h:
                h.copy_(out)
            else:
                h += f
            if dense_BTD is None or dense_BT is None:
                dense_BTD, f, first = f[0], f[1:], 1
                dense_BT = torch.linalg.vector_norm(dense_BTD, dim=-1)
                self.dense_LS[layer, which] = mean_over(dense_BT, later_BT)
            if len(f):
                change_RBT = torch.linalg.vector_norm(f.sub_(dense_BTD), dim=-1)
                rows = slice(skip + first - 1, skip + first - 1 + len(f))
                self.effect_LLS[rows, layer, which] = self._over_tokens(change_RBT, dense_BT, later_BT)

    def _over_tokens(self, change_RBT: Tensor, dense_BT: Tensor, later_BT: Tensor | None) -> Tensor:
        if self.params.ratio == "means":
            return mean_over(change_RBT, later_BT)
        ratio_RBT = torch.where(change_RBT > 0, change_RBT / dense_BT, 0)
        return (ratio_RBT if later_BT is None else torch.where(later_BT, ratio_RBT, 0)).amax(-1)

    def _moved(self, batch: Pass, states_RBTD: Tensor) -> Tensor:
        """[R - 1, B, T] how far the predicted distributions move; logits exist for a bounded number of tokens."""
        most = max(1, MOST_LOGITS.get(self.view.device.type, MOST_LOGITS_ELSEWHERE) // (4 * self.view.vocab_size))

        def predicted(h_BTD: Tensor) -> Tensor:
            return batch.head(h_BTD).to(states_RBTD.dtype).softmax(-1)

        moved_RBT = states_RBTD.new_empty(len(states_RBTD) - 1, *states_RBTD.shape[1:3])
        for row in range(states_RBTD.shape[1]):
            for first in range(0, states_RBTD.shape[2], most):
                at = slice(row, row + 1), slice(first, first + most)
                dense_1TV = predicted(states_RBTD[0][at])
                for state_BTD, moved_BT in zip(states_RBTD[1:], moved_RBT, strict=True):
                    moved_BT[at] = torch.linalg.vector_norm(predicted(state_BTD[at]) - dense_1TV, dim=-1)
        return moved_RBT

    def result(self, seed: int) -> ProbeResult:
        """What the sums come to; here the host waits for the device."""
        effect, dense, output = (x.double().cpu().numpy() for x in (self.effect_LLS, self.dense_LS, self.output_LS))
        # [S, L, L + 1]: of a sequence the effects, and in the last column what they are held against
        samples = np.concatenate([effect.transpose(2, 0, 1), dense.T[:, :, None]], axis=2)
        matrix = self._matrix(samples.mean(0))
        per_layer = of_each(matrix)
        result = ProbeResult(
            scalars={"causal": float(per_layer[:-1].mean()), "depth_score": depth_score(per_layer)},
            per_layer={"effect": per_layer},
            matrices={"effect": matrix},
            intervals={
                "causal": interval(samples, lambda mean: of_each(self._matrix(mean))[:-1].mean(), seed),
                "depth_score": interval(samples, lambda mean: depth_score(of_each(self._matrix(mean))), seed),
            },
        )
        result.meta["axes"] = {"effect": ("skipped", "measured")}
        result.remark("effect: nan where no later layer is left")
        still = int((samples[:, :, -1].mean(0) == 0).sum())
        if still:
            result.remark(f"effect: {still} layers add nothing; 0/0 is taken as 0")
        if self.params.output:
            moved = output.T.mean(0)
            result.per_layer["output_effect"] = moved
            result.scalars |= {"output_effect": float(moved.mean()), "output_depth_score": depth_score(moved)}
            result.intervals |= {
                "output_effect": interval(output.T, np.mean, seed),
                "output_depth_score": interval(output.T, depth_score, seed),
            }
        return result

    def _matrix(self, mean: Array) -> Array:
        """C[s, l], nan where l <= s, from [L, L + 1]: the effects, and what they are held against."""
        effect, dense = mean[:, :-1].copy(), mean[:, -1]
        if self.params.ratio == "means":
            with np.errstate(divide="ignore", invalid="ignore"):
                effect = np.where(effect == 0, 0, effect / dense)
        effect[np.tril_indices(len(effect))] = np.nan
        return effect


def mean_over(values: Tensor, where_BT: Tensor | None) -> Tensor:
    """The mean over tokens, the last axis; over some of them where told."""
    if where_BT is None:
        return values.mean(-1)
    return (values * where_BT).sum(-1) / where_BT.sum(-1)


def of_each(matrix: Array) -> Array:
    """[L] the mean over the later layers of a row; nan for the last."""
    n_layers = len(matrix)
    return np.array([matrix[s, s + 1 :].mean() if s + 1 < n_layers else np.nan for s in range(n_layers)])


def depth_score(effect_L: Array) -> float:
    """sum_l l e_l / sum_l e_l with l from 1, over the layers that have an e_l; 0 where all are 0."""
    depth, known = np.arange(1, len(effect_L) + 1), ~np.isnan(effect_L)
    total = effect_L[known].sum()
    return float((depth[known] * effect_L[known]).sum() / total) if total > 0 else 0.0
