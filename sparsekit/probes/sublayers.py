"""Which of a layer's modules is the attention and which the feed-forward, by what they do and not by their names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsekit.probes.layered import ViewError
from sparsekit.probes.score import SOFTMAXES


@dataclass(frozen=True)
class Sublayers:
    """The modules of a layer, None where they were not found; ``missing`` says why.

    Attributes:
        attention: the child in which scores are normalised.
        ffn: the other child with matrices, or the layer itself where the matrices are its own children.
        ffn_end: the module whose output is the feed-forward's.
        down: the projection that the feed-forward ends with; None in a mixture.
        linears: all projections below the attention and the feed-forward, in the order in which they are called.
    """

    attention: nn.Module | None
    ffn: nn.Module | None
    ffn_end: nn.Module | None
    down: nn.Module | None
    linears: dict[str, list[nn.Module]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def demand(self, name: str) -> nn.Module:
        """A module by name.

        Raises:
            ViewError: it was not found.
        """
        module = getattr(self, name)
        if module is None:
            raise ViewError(self.missing.get(name, f"no {name} was found in the layer"))
        return module


class _Normalised(TorchFunctionMode):
    """Notes which child is at work when weights over keys are normalised."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.at_work: list[str] = []
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.at_work:
            over_keys = (
                func in SOFTMAXES and args[0].ndim >= 3 and args[0].shape[-1] in (self.tokens, self.tokens + 1)
            )  # + a sink
            if func is F.scaled_dot_product_attention or over_keys:
                self.found.append(self.at_work[-1])
        return func(*args, **(kwargs or {}))


def is_linear(module: nn.Module) -> bool:
    """A module with one matrix and at most a bias, such as nn.Linear or GPT-2's Conv1D."""
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    return weight is not None and weight.ndim == 2 and set(own) <= {"weight", "bias"} and not list(module.children())


def sublayers_of(block: nn.Module, run: Callable[[], Any], shape: Any) -> Sublayers:
    """Finds them by running the layer once on a stream [B, T, D] of the shape."""
    children = dict(block.named_children())
    normalised = _Normalised(shape[1])
    called: list[nn.Module] = []
    ended: list[str] = []
    with ExitStack() as undo:
        for name, child in children.items():
            undo.callback(child.register_forward_pre_hook(_push(normalised.at_work, name)).remove)
            undo.callback(child.register_forward_hook(_pop(normalised.at_work, ended)).remove)
        for module in block.modules():
            if is_linear(module):
                undo.callback(module.register_forward_hook(lambda m, *_: called.append(m)).remove)
        undo.enter_context(normalised)
        run()
    missing: dict[str, str] = {}
    where = sorted(set(normalised.found))
    attention = children[where[0]] if len(where) == 1 else None
    if attention is None:
        missing["attention"] = f"{len(where) or 'no'} modules of the layer normalise scores over keys, not one"
    called = list(dict.fromkeys(called))
    rest = [name for name in dict.fromkeys(ended) if children[name] is not attention and _has_matrices(children[name])]
    ffn, end, down = None, None, None
    if len(rest) == 1 and not is_linear(children[rest[0]]):
        ffn = end = children[rest[0]]
        inside = [m for m in called if m in set(ffn.modules())]
        stacked = any(p.ndim == 3 for p in ffn.parameters())
        listed = any(isinstance(m, nn.ModuleList) for m in ffn.modules())
        if inside and not stacked and not listed:
            down = inside[-1]
        else:
            missing["down"] = "the feed-forward is a mixture of experts"
    elif rest and all(is_linear(children[name]) for name in rest):
        ffn, end = block, children[rest[-1]]
        down = end
    else:
        missing["ffn"] = f"the layer has {len(rest) or 'no'} modules with matrices beside attention, not one"
    linears = {"attention": [m for m in called if attention is not None and m in set(attention.modules())]}
    others = [m for m in called if m not in set(linears["attention"])]
    linears["ffn"] = others if ffn is block else [m for m in others if ffn is not None and m in set(ffn.modules())]
    return Sublayers(attention, ffn, end, down, linears, missing)


def _has_matrices(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters())


def _push(stack: list[str], name: str) -> Any:
    return lambda *_: stack.append(name)


def _pop(stack: list[str], ended: list[str]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        ended.append(stack.pop())

    return hook
