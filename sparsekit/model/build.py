"""From a spec to a model: on the meta device first, then memory, then weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsekit.components.contracts import ROLES, Linear
from sparsekit.errors import SpecError, did_you_mean
from sparsekit.model.decoder import Decoder
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

    Raises:
        SpecError: the spec has a mistake.
    """
    model_spec = as_model_spec(spec)
    with torch.device("meta"):
        model = Decoder(model_spec)
    _demand_known_roles(model, model_spec)
    model.to(dtype)
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        initialise(model, seed)
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


def as_model_spec(spec: SpecLike) -> ModelSpec:
    """The model part of whatever names a model."""
    if isinstance(spec, ModelSpec):
        return spec
    if isinstance(spec, RunSpec):
        return spec.model
    return validate_model(read_raw(spec)["model"])


def initialise(model: nn.Module, seed: int) -> None:
    """Fills every parameter and buffer, each module from a generator seeded by (seed, its name).

    So a weight depends neither on the order of construction nor on what else the model holds.

    Raises:
        TypeError: a module owns parameters or buffers and has no ``reset_parameters``.
    """
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    for name, module in model.named_modules():
        own = {n for n, _ in module.named_parameters(recurse=False)} | {
            n for n, _ in module.named_buffers(recurse=False)
        }
        counters = set(getattr(module, "counters", ()))
        for counter in counters:
            getattr(module, counter).zero_()
        if not own - counters:
            continue
        if not hasattr(module, "reset_parameters"):
            raise TypeError(
                f"{name} ({type(module).__name__}) owns {', '.join(sorted(own - counters))} "
                f"but has no reset_parameters() to fill them"
            )
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(_seed_of(seed, name))
            module.reset_parameters()


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
