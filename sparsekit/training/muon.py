"""Updates that are orthogonal matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sparsekit.components.contracts import wide
from sparsekit.model.dtensor import is_dtensor, part_of
from sparsekit.training.gradients import local
from sparsekit.training.optimizers import Adaptive, Owned, Step

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

NOT_HIDDEN = ("head", "router")  # projections to what is counted (tokens, experts), not to a width
QUINTIC = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7
AT_ONCE = 2**27  # numbers; the temporaries of a batch of matrices are a few times as large


class Muon(Adaptive):
    """Momentum made orthogonal, for the matrices of hidden layers, one by one in experts; AdamW for all else.

    m <- momentum m + (1 - momentum) g; u = (1 - momentum) g + momentum m (with nesterov; else m);
    w <- w - lr (s NS(u) + decay w), NS(u) near U V^T of u = U S V^T: five steps of x <- a x + (b x x^T + c (x x^T)^2) x
    from u / |u|. With ``scale`` "match_rms_adamw" s is 0.2 sqrt(max(d_out, d_in)), so that AdamW's lr and decay fit;
    with "original" it is sqrt(max(1, d_out / d_in)).

    Embeddings, head, router, norms and biases are AdamW's, at ``adamw_lr`` (``lr`` where null). ``width_scaling``
    multiplies a matrix's lr by sqrt(base_d_model / d_in) with "match_rms_adamw" and by 1 with "original": either way
    the update's spectral norm goes as sqrt(d_out / d_in) (Yang, Simon & Bernstein 2023, arXiv 2310.17813).

    Source: Jordan et al. 2024, Muon: An Optimizer for Hidden Layers in Neural Networks; Liu et al. 2025, arXiv
    2502.16982, eq. 4
    """

    class Params(Adaptive.Params):
        momentum: float = Field(default=0.95, ge=0, lt=1)
        nesterov: bool = True
        newton_schulz_steps: PositiveInt = 5
        scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
        adamw_lr: PositiveFloat | None = None
        betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
        eps: PositiveFloat = 1e-8

    states_per_parameter = 1  # of matrices; the rest has two

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        given = self.params
        shared = {
            "lr": given.lr, "momentum": given.momentum, "nesterov": given.nesterov, "scale": given.scale,
            "newton_schulz_steps": given.newton_schulz_steps, "betas": tuple(given.betas), "eps": given.eps,
        }  # fmt: skip
        return MuonStep(self.parameter_groups(model), shared)

    def settings(self, owned: Owned) -> dict[str, Any]:
        settings = super().settings(owned)
        if is_hidden_matrix(owned):
            return {**settings, "method": "muon"}
        ratio = 1.0 if self.params.adamw_lr is None else self.params.adamw_lr / self.params.lr
        return {**settings, "lr": settings["lr"] * ratio, "method": "adamw"}

    def width_factor(self, owned: Owned, ratio: float) -> float:
        if not is_hidden_matrix(owned):
            return ratio
        return ratio**0.5 if self.params.scale == "match_rms_adamw" else 1.0


def is_hidden_matrix(owned: Owned) -> bool:
    """Whether it is a projection, or a stack of experts' projections, from one width to another."""
    return owned.d_in is not None and owned.is_matrix and owned.role not in NOT_HIDDEN


class MuonStep(Step):
    """Muon's update of the groups whose ``method`` is muon, AdamW's of the others."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        if group["method"] == "adamw":
            self._adamw(group, parameters)
            return
        for batch in batches(parameters):
            self._muon(group, batch)

    def _muon(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        weights = [local(parameter.detach()) for parameter in parameters]
        momenta = self.state_of(parameters, "momentum")
        gradients = self.gradients(parameters)
        torch._foreach_mul_(momenta, self.unless_bad(momentum, 1.0, weights[0]))
        torch._foreach_add_(momenta, gradients, alpha=1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
        matrices = [whole(update, parameter) for update, parameter in zip(updates, parameters, strict=True)]
        flat = torch.cat([matrix.reshape(-1, *matrix.shape[-2:]) for matrix in matrices])
        d_out, d_in = flat.shape[-2:]
        orthogonal = newton_schulz(flat, group["newton_schulz_steps"]).to(flat.dtype)
        size = scale_of(group["scale"], d_out, d_in)
        orthogonal.mul_(self.unless_bad(-lr * size, 0.0, weights[0]))
        parts = orthogonal.split([matrix.numel() // (d_out * d_in) for matrix in matrices])
        steps = [
            shard(part.view(matrix.shape), parameter)
            for part, matrix, parameter in zip(parts, matrices, parameters, strict=True)
        ]
        torch._foreach_mul_(weights, self.unless_bad(1 - lr * group["weight_decay"], 1.0, weights[0]))
        torch._foreach_add_(weights, steps)

    def _adamw(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        beta1, beta2 = group["betas"]
        adamw(
            [local(parameter.detach()) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            self.state_of(parameters, "exp_avg"), self.state_of(parameters, "exp_avg_sq"), [],
            [self.state[parameter]["step"] for parameter in parameters],
            fused=True, found_inf=self.bad, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip


def scale_of(kind: str, d_out: int, d_in: int) -> float:
    """By which an orthogonal update is multiplied."""
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(d_out, d_in))
    return math.sqrt(max(1.0, d_out / d_in))


def batches(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose matrices are of one shape, as many as may be worked on at once."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape[-2:], []).append(parameter)
    for alike in by_shape.values():
        batch: list[nn.Parameter] = []
        for parameter in alike:
            if batch and sum(p.numel() for p in batch) + parameter.numel() > AT_ONCE:
                yield batch
                batch = []
            batch.append(parameter)
        yield batch


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Each matrix of [n, d_out, d_in] with its singular values brought near 1.

    x <- a x + (b x x^T + c (x x^T)^2) x, from x = matrix / |matrix|, in bfloat16 on a GPU, else in float32 or wider.
    Five steps bring singular values above .002 of |matrix| between .68 and 1.21.

    Source: Jordan et al. 2024, Muon: An Optimizer for Hidden Layers in Neural Networks
    """
    a, b, c = QUINTIC
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # the product x x^T is of the shorter side
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST_NORM)
    x = x.to(torch.bfloat16 if x.device.type == "cuda" else wide(x.dtype))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def whole(update: Tensor, parameter: nn.Parameter) -> Tensor:
    """All of the matrices of which this rank holds a part; of a stack split between matrices those that it holds."""
    if not is_dtensor(parameter) or holds_whole_matrices(parameter):
        return update
    return type(parameter).from_local(
        update, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    ).full_tensor()  # fmt: skip


def shard(step: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of what :func:`whole` gathered; nothing is sent."""
    if not is_dtensor(parameter) or holds_whole_matrices(parameter):
        return step
    return part_of(step, parameter).contiguous()


def holds_whole_matrices(parameter: DTensor) -> bool:
    """Whether no matrix of a stack is cut: experts are split between ranks, each whole."""
    cut = {getattr(place, "dim", None) for place in parameter.placements if not place.is_replicate()}
    return not cut or (cut == {0} and parameter.ndim > 2)
