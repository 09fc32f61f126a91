"""Whether a layer does more than an affine map of its input could.

Shapes, beside those of base.py: R branches, of which 0 is the undisturbed one; f_l = h_{l+1} - h_l.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from sparsekit.components.contracts import wide
from sparsekit.errors import DataError
from sparsekit.probes.base import Array, Probe, ProbeResult, Tokens
from sparsekit.probes.branches import (
    BranchParams,
    Counted,
    Plan,
    compiled,
    empty_states,
    groups,
    interval,
    losses,
    through,
)
from sparsekit.probes.layered import MOST_LOGITS_ELSEWHERE, LayeredModel, Pass, ViewError

USEFUL = 1.1  # a layer is useful if the loss without what only it can do is more than this times the model's
TOKENS_A_COLUMN = 4  # fitting tokens for each of the d + 1 columns, below which a fit says little


class Usefulness(Probe):
    """Loss with layer l replaced by the affine least-squares map of its input to its output, over the model's loss.

    The map minimises sum ||h_l W + b - f_l||^2 + lambda ||W||^2 over the fitting tokens, and h_l is added to what it
    gives; lambda = ``ridge`` trace(C) / d, C the scatter matrix of h_l about its mean. Normal equations are summed up
    and solved in float64, those of all layers in one pass, or in as many as the memory limit demands. Per layer,
    ``loss_ratio`` = L_l / L; scalars: ``usefulness``, the share of layers whose ratio is above 1.1, and
    ``mean_log_loss_ratio``, which does not move in steps of 1/L.

    * ``held_out``: even sequences fit and odd ones evaluate (the model's own loss is taken on them, too); else all
      sequences do both.
    * ``compat`` "released": what the paper's released code computes, to hold published numbers against. All sequences
      fit and evaluate, the map is put in with its matrix transposed, and the last layer's is fitted to what comes after
      the final norm.

    Intervals resample the evaluated sequences with the fit held fixed.

    Raises:
        DataError: there are fewer than 4 (d + 1) tokens to fit, or none to evaluate, or no map can be fitted.
        ViewError: ``compat``, and no final norm can be found.

    Source: arXiv 2603.15389
    """

    class Params(BranchParams):
        held_out: bool = True
        ridge: NonNegativeFloat = 1e-9
        compat: Literal["released"] | None = None

    @torch.no_grad()
    def run(self, view: LayeredModel, tokens: Tokens) -> ProbeResult:
        fit, evaluate = self._halves(view, tokens)
        plan = Plan.of(view, tokens, self.params, 1 + view.n_layers, view.dtype)
        # of a layer two d x d matrices in float64, beside what a batch takes
        at_a_time = int(self.params.memory_gb * 1e9 / 2 // (16 * view.d_model**2))
        losses_RS = torch.zeros(1 + view.n_layers, len(evaluate.ids_ST), dtype=wide(view.dtype), device=view.device)
        counted = Counted(view)
        with compiled(view, self.params.compile):
            for some in groups(range(view.n_layers), min(at_a_time, plan.states - 1)):
                maps = fitted(view, fit, some, self.params, plan)
                replaced(view, evaluate, some, maps, losses_RS, plan)
        result = found(losses_RS.double().cpu().numpy().T, self.seed)
        result.remark("intervals: sequences are resampled with the fit held fixed")
        if self.params.compat:
            result.remark("compat=released: maps are transposed, and fitted on the sequences that evaluate them")
        batches, layers = (-(-len(half.ids_ST) // plan.sequences) for half in (fit, evaluate)), view.n_layers
        counted.floor = sum(n * m for n, m in zip(batches, (layers, layers * (layers + 1) // 2), strict=True))
        result.meta |= counted.told()
        return result

    def _halves(self, view: LayeredModel, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """The sequences to fit on and those to evaluate on."""
        fit = evaluate = tokens
        held_out = self.params.held_out and not self.params.compat
        if held_out:
            fit, evaluate = tokens.select(slice(0, None, 2)), tokens.select(slice(1, None, 2))
        n, length = fit.ids_ST.shape
        needed = TOKENS_A_COLUMN * (view.d_model + 1)
        if n * length < needed:
            sequences = -(-needed // length) * (2 if held_out else 1)
            raise DataError(
                f"usefulness: {n * length} tokens are too few to fit an affine map of {view.d_model} channels, which "
                f"takes {needed}; give {sequences} sequences of {length} tokens or more"
            )
        if not len(evaluate.ids_ST):
            raise DataError(
                "usefulness: there is no second sequence to evaluate on; give two or more, or held_out=false"
            )
        return fit, evaluate


class Affine(NamedTuple):
    """x + x W + b."""

    weight_DD: Tensor
    bias_D: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        z = x.to(self.weight_DD.dtype)
        return torch.addmm(z.flatten(0, -2) + self.bias_D, z.flatten(0, -2), self.weight_DD).view_as(x)


class NormalEquations:
    """Sums over tokens, in float64, from which the least-squares map of h_l to f_l follows."""

    def __init__(self, d_model: int, device: torch.device):
        zeros = torch.zeros(2 * d_model + 2, d_model, dtype=torch.float64, device=device)
        self.xx_DD, self.xf_DD, (self.x_D, self.f_D) = zeros.split([d_model, d_model, 2])
        self.n = 0

    def add(self, h_BTD: Tensor, out_BTD: Tensor) -> None:
        x_ND = h_BTD.flatten(0, 1).double()
        f_ND = out_BTD.flatten(0, 1).double() - x_ND
        self.xx_DD.addmm_(x_ND.T, x_ND)
        self.xf_DD.addmm_(x_ND.T, f_ND)
        self.x_D += x_ND.sum(0)
        self.f_D += f_ND.sum(0)
        self.n += len(x_ND)

    def solve(self, ridge: float, dtype: torch.dtype, layer: int) -> Affine:
        """The map, and nothing of the sums is left.

        Raises:
            DataError: channels depend on each other, so that without a ridge there is no one map.
        """
        mean_D, mean_f_D = self.x_D / self.n, self.f_D / self.n
        self.xx_DD.addr_(self.x_D, mean_D, alpha=-1)
        self.xf_DD.addr_(self.x_D, mean_f_D, alpha=-1)
        diagonal = self.xx_DD.diagonal()
        diagonal += ridge * diagonal.mean()
        factor_DD, info = torch.linalg.cholesky_ex(self.xx_DD)
        if info.item():
            raise DataError(
                f"usefulness: the channels before layer {layer} depend on each other, so that no one affine map fits "
                f"best; give more tokens, or a ridge larger than {ridge:g}"
            )
        weight_DD = torch.cholesky_solve(self.xf_DD, factor_DD)
        return Affine(weight_DD.to(dtype), (mean_f_D - mean_D @ weight_DD).to(dtype))


def fitted(view: LayeredModel, tokens: Tokens, layers: Sequence[int], params: Any, plan: Plan) -> list[Affine]:
    """The affine maps of some layers, from one pass over the tokens."""
    equations = {layer: NormalEquations(view.d_model, view.device) for layer in layers}
    for ids_BT in tokens.batches(plan.sequences):
        batch = view.start(ids_BT)
        h = batch.h_0
        for layer in range(layers[-1] + 1):
            out = batch.layer(layer, h)
            if layer in equations:
                last = params.compat and layer == view.n_layers - 1
                equations[layer].add(h, after_final_norm(batch, out) if last else out)
            h = out
    maps = [equations.pop(layer).solve(params.ridge, wide(view.dtype), layer) for layer in layers]
    return [Affine(weight_DD.T, bias_D) for weight_DD, bias_D in maps] if params.compat else maps


def after_final_norm(batch: Pass, h_BTD: Tensor) -> Tensor:
    """What the final norm makes of h_L: what the first module that the head hands it to returns.

    Raises:
        ViewError: it is handed to none, or not as it is.
    """
    view = batch.view
    inside = {id(module) for block in view.blocks for module in block.modules()}
    most = max(1, MOST_LOGITS_ELSEWHERE // view.vocab_size)
    pieces = []
    for piece_N1D in h_BTD.reshape(-1, 1, view.d_model).split(most):
        found: list[Tensor] = []

        def after(module: Any, inputs: Any, output: Any, x: Tensor = piece_N1D, found: list[Tensor] = found) -> None:
            read = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].data_ptr() == x.data_ptr()
            if read and isinstance(output, Tensor) and output.numel() == x.numel():
                found.append(output)

        with ExitStack() as undo:
            for module in view.model.modules():
                if id(module) not in inside:
                    undo.callback(module.register_forward_hook(after).remove)
            batch.head(piece_N1D)
        if not found:
            raise ViewError(f"usefulness: {type(view.model).__name__} shows no final norm, which compat=released wants")
        pieces.append(found[0])
    return torch.cat(pieces).view_as(h_BTD)


def replaced(
    view: LayeredModel, tokens: Tokens, layers: Sequence[int], maps: Sequence[Affine], losses_RS: Tensor, plan: Plan
) -> None:
    """Writes the losses of sequences, in row 0 the model's, in row 1 + l with layer l replaced; one pass."""
    first = 0
    for ids_BT in tokens.batches(plan.sequences):
        batch, which = view.start(ids_BT), slice(first, first + len(ids_BT))
        states_RBTD = empty_states(batch, 1 + len(layers))
        states_RBTD[0] = batch.h_0
        running = 1
        for layer in range(view.n_layers):
            if layer in layers:
                states_RBTD[running] = maps[running - 1](states_RBTD[0])
            through(batch, layer, states_RBTD[:running], plan.branches)
            running += int(layer in layers)
        lost_RB = losses(batch, states_RBTD, plan.branches)
        losses_RS[0, which] = lost_RB[0]
        losses_RS[1 + layers[0] : 2 + layers[-1], which] = lost_RB[1:]
        first += len(ids_BT)


def found(losses_SR: Array, seed: int) -> ProbeResult:
    """The measures from the losses of sequences: the model's, and with each layer replaced."""

    def ratios(mean_R: Array) -> Array:
        return np.asarray(mean_R[1:] / mean_R[0])

    measures: dict[str, Callable[[Array], float]] = {
        "usefulness": lambda mean_R: float((ratios(mean_R) > USEFUL).mean()),
        "mean_log_loss_ratio": lambda mean_R: float(np.log(ratios(mean_R)).mean()),
    }
    mean_R = losses_SR.mean(0)
    return ProbeResult(
        scalars={name: measure(mean_R) for name, measure in measures.items()},
        per_layer={"loss_ratio": ratios(mean_R)},
        intervals={name: interval(losses_SR, measure, seed) for name, measure in measures.items()},
    )
