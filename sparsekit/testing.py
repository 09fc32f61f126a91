"""The contract kit: what every registered component, built in or plugged in, is held to.

A plug-in's own test is one line::

    def test_contract():
        check_component("ffn", MyFeedForward)

What is checked, and how, is in :mod:`sparsekit.checks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pydantic import ValidationError

from sparsekit.checks import EXAMPLES, MODEL_KINDS, NEEDED, Subject, checks_of, example
from sparsekit.registry import registry

__all__ = ["EXAMPLES", "MODEL_KINDS", "ContractError", "check_component"]


class ContractError(AssertionError):
    """The ways in which a component breaks its contract, one line each."""


def check_component(
    kind: str,
    component: str | type,
    params: dict[str, Any] | None = None,
    *,
    compile_backend: str | None = "aot_eager",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Holds one component to its contract.

    A kernel whose ``refusal`` says that it cannot be trained on the device and in the dtype is held to what needs no
    backward, and one that cannot run there at all to what needs no forward.

    Args:
        kind: of the registry, such as "ffn".
        component: a registered name, or a class (registered under a private name meanwhile, if it is not).
        params: its parameters; required ones that are left out are filled from ``EXAMPLES`` by field name.
        compile_backend: of torch.compile; None leaves that check out.
        device: where the model that it is tried in lives.
        dtype: of that model: float32, or a 16-bit one for what runs in no other.

    Raises:
        ContractError: a line for each way in which it breaks its contract.
    """
    device = torch.device(device)
    devices = [device.index or 0] if device.type == "cuda" else []
    with _registered(kind, component) as name, torch.random.fork_rng(devices=devices):
        cls = registry(kind).get(name)
        label = f"{kind} {name.removeprefix('_')!r}"
        problems: dict[str, Exception | None] = {}
        subject = Subject(kind, name, cls, {"type": name, **(params or {})}, compile_backend, device, dtype)
        for check in checks_of(subject):
            before = len(problems)
            try:
                if check is example:  # the one check that finds something out
                    subject = replace(subject, slot=_filled(subject))
                for sentence in check(subject):
                    problems.setdefault(f"{label}: {sentence} [{check.__name__}]", None)
            except Exception as error:
                problems.setdefault(f"{label}: {_sentence(error)} [{check.__name__}]", error)
            if len(problems) > before and check in NEEDED:
                break
    if problems:
        raise ContractError("\n".join(problems)) from next((e for e in problems.values() if e), None)


@contextmanager
def _registered(kind: str, component: str | type) -> Iterator[str]:
    """The name that a component has in its registry, for the while."""
    names = registry(kind)
    if isinstance(component, str):
        yield component
        return
    target = f"{component.__module__}:{component.__qualname__}"
    for entry in names.entries():
        if entry.target == target and names.get(entry.name) is component:
            yield entry.name
            return
    name = f"_{component.__name__}"
    names.register(name)(component)
    try:
        yield name
    finally:
        names.unregister(name)


def _filled(subject: Subject) -> dict[str, Any]:
    """The slot with an example for every required parameter that is not given."""
    slot = dict(subject.slot)
    for name, field in subject.cls.Params.model_fields.items():
        if field.is_required() and name not in slot:
            if name not in EXAMPLES:
                raise ValueError(f"parameter {name!r} is required: give params={{{name!r}: ...}}")
            slot[name] = EXAMPLES[name]
    return slot


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(": ".join([".".join(map(str, e["loc"])), e["msg"]]).lstrip(": ") for e in error.errors())
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
