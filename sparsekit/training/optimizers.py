"""How gradients become updates: the contract, which parameter gets which settings, and AdamW and SGD."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.optim.sgd import sgd

from sparsekit import spec
from sparsekit.components.contracts import Embedding, Linear, Norm, wide
from sparsekit.errors import SpecError, did_you_mean
from sparsekit.training.gradients import local

GROUPS = "train.optimizer.groups"
VECTORS = ("embed", "norm", "bias")  # roles whose parameters map no vector to a vector
TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


class Optimizer:
    """Makes a torch optimizer for a model; the trainer sets each group's lr to its ``peak_lr`` times the schedule.

    Its state is tensors only: laid out as their parameter is, so that they are sharded with it, or of no dimension.
    Nothing in a step may make the host wait for the device.

    Attributes:
        states_per_parameter: numbers it keeps for each parameter, for the memory estimate.
    """

    class Params(spec.Params):
        lr: PositiveFloat = 1e-3

    states_per_parameter: ClassVar[int]

    def __init__(self, params: Any):
        self.params = params

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        raise NotImplementedError


class GroupSpec(spec.Params):
    """Settings of some parameters: an ``lr`` of their own, or ``lr_scale`` times the usual one; their decay."""

    lr: NonNegativeFloat | None = None
    lr_scale: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _says_something(self) -> GroupSpec:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("give lr or lr_scale, not both")
        if (self.lr, self.lr_scale, self.weight_decay) == (None, None, None):
            raise ValueError("says nothing; give lr, lr_scale or weight_decay")
        return self


@dataclass(frozen=True)
class Owned:
    """A parameter and what it is.

    Attributes:
        name: in the model.
        role: of a projection what its Linear says; else embed, norm, bias, or other.
        d_in: of a projection's matrices, the width of what they read; None of anything else.
    """

    name: str
    parameter: nn.Parameter
    role: str
    d_in: int | None

    @property
    def is_matrix(self) -> bool:
        """Whether it maps vectors to vectors (experts stack their biases, which makes them 2-D and no matrix)."""
        return self.role not in VECTORS and self.parameter.ndim >= 2


def owned_parameters(model: nn.Module) -> list[Owned]:
    """The parameters that train, each once, in the model's order."""
    found, seen = [], set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            role = role_of(module, name)
            projects = isinstance(module, Linear) and role != "bias"
            d_in = parameter.shape[-1] if projects else None  # not the module's own, which may be a rank's share
            found.append(Owned(f"{path}.{name}" if path else name, parameter, role, d_in))
    return found


def role_of(module: nn.Module, name: str) -> str:
    """What a module's own parameter is for."""
    if name == "bias":
        return "bias"
    if isinstance(module, Linear):
        return module.role
    if isinstance(module, (Embedding, nn.Embedding)):
        return "embed"
    return "norm" if isinstance(module, (Norm, *TORCH_NORMS)) else "other"


class Grouped(Optimizer):
    """An optimizer whose settings may differ by parameter.

    ``groups`` maps a role (q k v o gate up down router head, embed, norm, bias, other), or a pattern of parameter
    names (what holds a dot or a ``*``: ``layers.0.*``), to settings of its parameters; the first key that matches, in
    the order written, counts. Without it matrices decay by ``weight_decay`` and nothing else does (norms, biases,
    embeddings), or, with ``decay`` "all", everything.
    """

    class Params(Optimizer.Params):
        weight_decay: NonNegativeFloat = 0.1
        decay: Literal["matrices", "all"] = "matrices"
        groups: dict[str, GroupSpec] = Field(default_factory=dict)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """torch's ``param_groups``: one for each set of settings, in the order in which the model has them.

        Raises:
            SpecError: a key of ``groups`` reaches no parameter.
        """
        owned = owned_parameters(model)
        chosen = matches(self.params.groups, owned)
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for one in owned:
            settings = self.settings(one)
            group = chosen.get(one.name)
            if group is not None:
                settings["lr"] *= 1.0 if group.lr_scale is None else group.lr_scale
                own = {"lr": group.lr, "weight_decay": group.weight_decay}
                settings |= {key: value for key, value in own.items() if value is not None}
            found.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(one.parameter)
        return list(found.values())

    def settings(self, owned: Owned) -> dict[str, Any]:
        """What a parameter is trained with where ``groups`` says nothing of it: at least lr and weight_decay."""
        decays = self.params.decay == "all" or owned.is_matrix
        return {"lr": self.params.lr, "weight_decay": self.params.weight_decay if decays else 0.0}


def matches(groups: dict[str, GroupSpec], owned: list[Owned]) -> dict[str, GroupSpec]:
    """The first of the groups that matches, by parameter name.

    Raises:
        SpecError: a key matches no parameter, or only those that keys before it match.
    """
    chosen: dict[str, str] = {}
    for key in groups:
        by_name = "*" in key or "." in key
        reached = [one.name for one in owned if (fnmatchcase(one.name, key) if by_name else one.role == key)]
        if not reached:
            roles = list(dict.fromkeys(one.role for one in owned))
            near = did_you_mean(key, [one.name for one in owned] if by_name else roles)
            raise SpecError([f"{GROUPS}.{key}: matches no parameter{near}; roles of this model: {', '.join(roles)}"])
        if not set(reached) - chosen.keys():
            earlier = chosen[reached[0]]
            raise SpecError([f"{GROUPS}.{key}: all that it matches is matched before, by {earlier!r}; put it first"])
        for name in reached:
            chosen.setdefault(name, key)
    return {name: groups[key] for name, key in chosen.items()}


class WidthScalingSpec(spec.Params):
    """The width at which the learning rate was found."""

    base_d_model: PositiveInt


class Adaptive(Grouped):
    """An optimizer whose step has a size of its own whatever the gradient's, as Adam's; knows muP's learning rates.

    With ``width_scaling`` a learning rate found at width ``base_d_model`` fits any width. With n = d_in / base_d_model,
    where d_in is what a matrix reads:

    ============================================ ============= ===============
    parameters                                   lr times      init ``mup``
    ============================================ ============= ===============
    embeddings, norms, biases, what is no Linear 1             std
    q k v o gate up down                         1 / n         std / sqrt(n)
    head                                         1 / n         std / n
    router                                       1 / n         std / sqrt(n)
    ============================================ ============= ===============

    Widen by heads and leave ``head_dim``, as attention divides by sqrt(head_dim) and not by head_dim.

    Source: Yang et al. 2022, arXiv 2203.03466, table 3 (Adam), to which table 8 is equivalent: there the head's logits
    are multiplied by 1 / n in place of its weight and its learning rate, as ``model.logit_scale`` does for a tied table
    """

    class Params(Grouped.Params):
        width_scaling: WidthScalingSpec | None = None

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """As any grouped optimizer's.

        Raises:
            SpecError: also where widths are to be scaled and embeddings are tied, with nothing to scale the logits.
        """
        model_spec = getattr(model, "spec", None)
        if self.params.width_scaling is not None and model_spec is not None and model_spec.tie_embeddings:
            base = self.params.width_scaling.base_d_model
            if model_spec.logit_scale == 1.0 and model_spec.d_model != base:
                told = "a tied table is read and written at one learning rate, so the logits must be scaled"
                mend = f"set model.logit_scale to {base}/{model_spec.d_model} = {base / model_spec.d_model:g}"
                raise SpecError([f"train.optimizer.width_scaling: {told}; {mend}"])
        return super().parameter_groups(model)

    def settings(self, owned: Owned) -> dict[str, Any]:
        settings = super().settings(owned)
        if self.params.width_scaling is not None and owned.d_in is not None:
            settings["lr"] *= self.width_factor(owned, self.params.width_scaling.base_d_model / owned.d_in)
        return settings

    def width_factor(self, owned: Owned, ratio: float) -> float:
        """By which a projection's lr is multiplied; ``ratio`` is base_d_model / d_in."""
        return ratio


class AdamW(Adaptive):
    """Adam with decoupled weight decay, of matrices only by default (norms, biases and embeddings are not decayed).

    ``decay`` "all" decays every parameter.

    Source: Loshchilov & Hutter 2017, arXiv 1711.05101, alg. 2
    """

    class Params(Adaptive.Params):
        betas: list[float] = Field(default=[0.9, 0.95], min_length=2, max_length=2)
        eps: PositiveFloat = 1e-8

    states_per_parameter = 2

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameter_groups(model),
            lr=self.params.lr, betas=tuple(self.params.betas), eps=self.params.eps, fused=True,
        )  # fmt: skip


class SGD(Grouped):
    """m <- momentum m + g + decay w; w <- w - lr m, or with nesterov w <- w - lr (g + decay w + momentum m).

    Weight decay is coupled: it joins the gradient, and is of matrices only by default, and 0.

    Source: Sutskever et al. 2013, On the Importance of Initialization and Momentum in Deep Learning, sec. 2
    """

    class Params(Grouped.Params):
        lr: PositiveFloat = 0.1
        weight_decay: NonNegativeFloat = 0.0
        momentum: float = Field(default=0.9, ge=0, lt=1)
        nesterov: bool = False

        @model_validator(mode="after")
        def _nesterov_has_momentum(self) -> Any:
            if self.nesterov and not self.momentum:
                raise ValueError("nesterov needs a momentum above 0")
            return self

    states_per_parameter = 1

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        defaults = {"lr": self.params.lr, "momentum": self.params.momentum, "nesterov": self.params.nesterov}
        return SGDStep(self.parameter_groups(model), defaults)


class Step(torch.optim.Optimizer):
    """Base of the steps taken here: on this rank's shards, and leaving all as it is where ``found_inf`` is 1.

    A subclass defines :meth:`update`, in which whatever may hold a bad gradient is made harmless (:meth:`gradients`),
    and every factor by which something moves is chosen on the device (:meth:`unless_bad`).
    """

    takes_found_inf = True
    found_inf: Tensor  # set by training.gradients.masked_step for the time of a step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self.update(group, parameters)

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        raise NotImplementedError

    @property
    def bad(self) -> Tensor | None:
        """1 on the device where this step must leave no trace, else 0; None where nobody asked."""
        return getattr(self, "found_inf", None)

    def state_of(self, parameters: list[nn.Parameter], key: str) -> list[Tensor]:
        """This rank's part of a state shaped as its parameter, which begins at 0."""
        for parameter in parameters:
            state = self.state[parameter]
            if key not in state:
                state[key] = torch.zeros_like(parameter)
        return [local(self.state[parameter][key]) for parameter in parameters]

    def gradients(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """This rank's part of the gradients, emptied where the step is bad, as 0 times NaN is NaN."""
        found = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if self.bad is not None:
            is_bad = self.bad.bool()
            for gradient in found:
                gradient.masked_fill_(is_bad, 0)
        return found

    def unless_bad(self, value: float, otherwise: float, like: Tensor) -> Any:
        """A number, or where a step may be bad a tensor that holds the same or, on the device, ``otherwise``."""
        if self.bad is None:
            return value
        dtype = wide(like.dtype)  # a bfloat16 knows nothing between 1 and .996
        return torch.full((), value, dtype=dtype, device=like.device).masked_fill_(self.bad.bool(), otherwise)


class SGDStep(Step):
    """torch's fused SGD on this rank's shards (it does not know sharded tensors)."""

    def update(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        has_momentum = group["momentum"] > 0
        buffers: list[Any] = self.state_of(parameters, "momentum") if has_momentum else [None] * len(parameters)
        sgd(
            [local(p.detach()) for p in parameters], [local(p.grad) for p in parameters if p.grad is not None], buffers,
            fused=True, found_inf=self.bad, lr=group["lr"], momentum=group["momentum"], nesterov=group["nesterov"],
            weight_decay=group["weight_decay"], dampening=0.0, maximize=False,
        )  # fmt: skip
