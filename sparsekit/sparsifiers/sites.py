"""Where activations can be masked: the inputs of a layer's projections, found by structure.

Shapes, here and in this package: N tokens, I inputs of a projection (O its outputs), D d_model, F d_ff.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.components.contracts import Linear
from sparsekit.errors import DataError
from sparsekit.probes.anatomy import Weight
from sparsekit.probes.decoder import weight_of
from sparsekit.probes.huggingface import HuggingFaceView
from sparsekit.probes.layered import LayeredModel, trial_ids
from sparsekit.probes.sublayers import is_linear

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
# whose inputs are a feed-forward's neurons; in a mixture those of the routed experts, and of the shared one
DOWN, EXPERTS, SHARED = "down", "experts", "shared"
SiteOf = tuple[int, str]  # layer, projection


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward, whose down projection reads act(W_gate x) * (W_up x), or act(W_up x).

    Attributes:
        reader: the module that is called with x.
        module: the feed-forward itself, whose output is the down projection's; None where it is no module of its own.
        down: with its module.
        gate, up, activation: gate is None where there is none; all three are where they were not found.
        missing: why there is no gate to look at, or None.
        scale: by which its output is multiplied, as a shared expert's may be.
    """

    reader: nn.Module
    module: nn.Module | None
    down: Weight
    gate: Weight | None
    up: Weight | None
    activation: Callable[[Tensor], Tensor] | None
    missing: str | None
    scale: float = 1.0

    def gates(self, x: Tensor) -> Tensor:
        """act(W_gate x), [..., D] -> [..., F]."""
        assert self.gate is not None and self.activation is not None, "asked for where there is one"
        return self.activation(nn.functional.linear(x, self.gate.weight, self.gate.bias))


def feed_forward(view: LayeredModel, layer: int) -> FeedForward | str:
    """A layer's feed-forward, or why there is none whose neurons can be masked."""
    anatomy = view.anatomy(layer)
    if anatomy.experts is not None:
        return "the feed-forward is a mixture of experts"
    if anatomy.down is None or anatomy.down.module is None or anatomy.ffn is None:
        return anatomy.missing.get("experts") or anatomy.missing.get("down", "no down projection was found")
    if anatomy.down.weight.ndim != 2:
        return f"{type(anatomy.ffn).__name__} has one down projection for several experts"
    module: nn.Module | None = anatomy.ffn
    reader = anatomy.ffn
    if reader is view.blocks[layer]:
        assert isinstance(view, HuggingFaceView), "a sparsekit block has a feed-forward of its own"
        module, reader = None, view.sublayers(layer).linears["ffn"][0]
    missing = anatomy.missing.get("gate") if anatomy.gate is None else None
    if anatomy.gate is not None and anatomy.activation is None:
        missing = anatomy.missing.get("activation", "no activation was found")
    parts = anatomy.down, anatomy.gate, anatomy.up, anatomy.activation
    return FeedForward(reader, module, *parts, missing)


def feed_forwards(view: LayeredModel, gated: bool = False) -> tuple[dict[int, FeedForward], dict[int, str]]:
    """The layers' feed-forwards, and why layers have none; with ``gated`` also where a gate was not found.

    Raises:
        DataError: no layer has one.
    """
    found: dict[int, FeedForward] = {}
    missing: dict[int, str] = {}
    for layer in range(view.n_layers):
        parts = feed_forward(view, layer)
        if isinstance(parts, str):
            missing[layer] = parts
        elif gated and parts.missing is not None:
            missing[layer] = parts.missing
        else:
            found[layer] = parts
    return found, demand_some(found, missing)


def linears(view: LayeredModel, layer: int) -> dict[str, Weight]:
    """A layer's projections by role; one that serves several roles at once goes by its own name.

    Routers and routed experts are left out.
    """
    anatomy, block = view.anatomy(layer), view.blocks[layer]
    role_of = {}
    for role in ROLES:
        weight: Weight | None = getattr(anatomy, role)
        if weight is not None and weight.module is not None:
            role_of[weight.module] = role
    allowed: set[nn.Module] | None = None
    if isinstance(view, HuggingFaceView):
        parts = view.sublayers(layer)
        mixed = anatomy.experts is not None
        allowed = {*parts.linears["attention"], *(() if mixed else parts.linears["ffn"])}
    found: dict[str, Weight] = {}
    for path, module in block.named_modules():
        if module in role_of or _masks(module, allowed):
            told = _weight(module)
            leaf = path.rpartition(".")[2]
            name = role_of.get(module, leaf if leaf not in (*found, *role_of.values()) else path)
            if told is not None:
                found[name] = told
    return found


def _masks(module: nn.Module, allowed: set[nn.Module] | None) -> bool:
    """Whether it is a projection of one matrix, and no router's."""
    if isinstance(module, Linear):
        return module.role != "router" and module.weight.ndim == 2
    return is_linear(module) if allowed is None else module in allowed


def _weight(module: nn.Module) -> Weight | None:
    """Its matrix as [d_out, d_in], or None where it does more than multiply with one."""
    if isinstance(module, Linear):
        return weight_of(module, {}, module.role)
    matrix: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    matrix, bias = matrix.detach(), None if bias is None else bias.detach()
    for each in (matrix, matrix.T):  # GPT-2's are kept the other way round
        x_NI = torch.linspace(-1, 1, each.shape[1], device=each.device).to(each.dtype)[None]
        try:
            with torch.no_grad():
                y_NO = module(x_NI)
        except RuntimeError:
            continue
        wanted = nn.functional.linear(x_NI, each, bias)
        if y_NO.shape == wanted.shape and torch.allclose(y_NO, wanted, rtol=1e-2, atol=1e-3):
            return Weight(each, bias, module)
    return None


def all_linears(view: LayeredModel) -> dict[int, dict[str, Weight]]:
    """Of every layer that has any.

    Raises:
        DataError: none has.
    """
    found = {layer: linears(view, layer) for layer in range(view.n_layers)}
    demand_some({layer: parts for layer, parts in found.items() if parts}, {0: "it has no projections"})
    return found


def demand_some(found: Mapping[Any, Any], missing: dict[int, str]) -> dict[int, str]:
    """Why layers are missing.

    Raises:
        DataError: all are.
    """
    if not found:
        raise DataError(f"no layer's activations can be masked; of layer 0: {missing[0]}")
    return missing


def stages(view: LayeredModel, layer: int, parts: dict[str, Weight]) -> list[list[str]]:
    """A layer's projections in the order in which they are called, those that read the same tensor side by side."""
    called: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda module, args: called.append((name, args[0]))  # kept, so that no other has its memory

    batch = view.start(trial_ids(view.vocab_size))
    with torch.no_grad(), ExitStack() as undo:
        for name, weight in parts.items():
            assert weight.module is not None
            undo.callback(weight.module.register_forward_pre_hook(note(name)).remove)
        batch.observe(layer, batch.h_0, [])
    found: list[list[str]] = []
    last: Tensor | None = None
    for name, x in called:
        if last is not None and x.data_ptr() == last.data_ptr() and x.numel() == last.numel():
            found[-1].append(name)
        else:
            found.append([name])
        last = x
    return found


def stage_of(groups: Sequence[Sequence[str]], name: str) -> Sequence[str]:
    """The projections that read what the named one reads."""
    return next((group for group in groups if name in group), [name])
