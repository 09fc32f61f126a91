"""What a model is for a while: uncompiled, in evaluation mode, with another forward; afterwards it is what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


def run_eagerly(undo: ExitStack, module: nn.Module) -> None:
    """A module and those in it do without compilation until ``undo`` closes: it does not see hooks that come later."""
    for part in module.modules():
        if part._compiled_call_impl is not None:
            undo.callback(setattr, part, "_compiled_call_impl", part._compiled_call_impl)
            part._compiled_call_impl = None


def stand_in(undo: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Another function is a module's forward until ``undo`` closes."""
    undo.callback(_put_back, module, module.__dict__.get("forward"))
    module.forward = forward


def _put_back(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode, and then in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
