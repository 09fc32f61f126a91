"""From a spec to a model: on the meta device first, then memory, then weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.components.contracts import ROLES, Component, Linear, wide
from sparsekit.errors import SpecError, did_you_mean
from sparsekit.model.decoder import Decoder
from sparsekit.model.dtensor import is_dtensor, part_of
from sparsekit.spec.load import read_raw, validate_model
from sparsekit.spec.model import ModelSpec
from sparsekit.spec.run import RunSpec

SpecLike = ModelSpec | RunSpec | Mapping[str, Any]


def build_model(
    spec: SpecLike, *, seed: int = 0, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """An initialised model.

    Args:
        spec: a run spec, a model spec, or a bare model dict.
        seed: of the weights; the same seed gives the same weights on any number of processes.
        device: where it lives; "meta" allocates and draws nothing.
        dtype: of the parameters. Below float32 they are drawn in float32 and rounded, and buffers (a router's bias
            moves by less than bfloat16 can add) stay in float32.

    Raises:
        SpecError: the spec has a mistake.
    """
    model_spec = as_model_spec(spec)
    with torch.device("meta"):
        model = Decoder(model_spec)
    _demand_known_roles(model, model_spec)
    model.to(wide(dtype))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if torch.device(device).type != "meta":
        materialise(model, seed, device)
    return model


def _demand_known_roles(model: nn.Module, spec: ModelSpec) -> None:
    """Refuses a role that no projection can have, which would silently reach nothing.

    Roles beside the usual ones are known only when the components that use them are built.
    """
    known = {*ROLES, *(module.role for module in model.modules() if isinstance(module, Linear))}
    for name, choice in spec.slots():
        for role in getattr(choice.params, "roles", ()):
            if role not in known:
                told = f"unknown role {role!r}{did_you_mean(role, known)}; roles: {', '.join(sorted(known))}"
                raise SpecError([f"model.{name}.roles: {told}"])


def demand_causal(model: Decoder) -> None:
    """Refuses to train a language model that sees what it is to predict.

    Raises:
        SpecError: a component is not causal, and the spec does not allow that.
    """
    leaks = [name for name, m in model.named_modules() if isinstance(m, Component) and not m.causal]
    if leaks and not model.spec.allow_leak:
        problem = f"{leaks[0]} is not causal, so the loss would mean nothing; set it to true to train anyway"
        raise SpecError([f"model.allow_leak: {problem}"])


def as_model_spec(spec: SpecLike) -> ModelSpec:
    """The model part of whatever names a model."""
    if isinstance(spec, ModelSpec):
        return spec
    if isinstance(spec, RunSpec):
        return spec.model
    return validate_model(read_raw(spec)["model"])


def materialise(model: nn.Module, seed: int, device: str | torch.device) -> None:
    """Gives a model on the meta device memory and weights; of what is sharded, to each process its shard."""
    model.to_empty(device=device)
    initialise(model, seed)


def initialise(model: nn.Module, seed: int) -> None:
    """Fills every parameter and buffer, each module from a generator seeded by (seed, its name).

    So a weight depends neither on the order of construction nor on what else the model holds. What is sharded, or
    narrower than float32, is drawn whole and in float32, and each process keeps its part: the same weights on any
    number of processes, and never more than one module's of them whole.

    Raises:
        TypeError: a module owns parameters or buffers and has no ``reset_parameters``.
    """
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    for name, module in model.named_modules():
        own = {**module._parameters, **module._buffers}
        counters = set(getattr(module, "counters", ()))
        for counter in counters:
            getattr(module, counter).zero_()
        drawn = sorted(key for key, tensor in own.items() if tensor is not None and key not in counters)
        if not drawn:
            continue
        if not hasattr(module, "reset_parameters"):
            told = f"{name} ({type(module).__name__}) owns {', '.join(drawn)}"
            raise TypeError(f"{told} but has no reset_parameters() to fill them")
        with torch.random.fork_rng(devices=devices), torch.no_grad(), _whole(module):
            torch.manual_seed(_seed_of(seed, name))
            module.reset_parameters()


@contextmanager
def _whole(module: nn.Module) -> Iterator[None]:
    """A module whose own tensors are whole and at least float32 meanwhile; what they then hold is kept."""
    places: list[tuple[dict[str, Any], str, Tensor]] = []
    kinds: Any = (module._parameters, module._buffers)
    for tensors in kinds:
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            dtype = wide(tensor.dtype) if tensor.is_floating_point() else tensor.dtype
            if is_dtensor(tensor) or dtype != tensor.dtype:
                places.append((tensors, name, tensor))
                whole = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
                tensors[name] = nn.Parameter(whole) if tensors is module._parameters else whole
    try:
        yield
        for tensors, name, tensor in places:
            whole = tensors[name].detach()
            if is_dtensor(tensor):
                tensor.to_local().copy_(part_of(whole, tensor))
            else:
                tensor.copy_(whole)
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
