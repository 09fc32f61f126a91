"""Feed-forwards neuron by neuron: what the sparsity probes are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.components.contracts import ForwardContext


@dataclass
class Neuron:
    """A token's visit to a neuron, of expert ``expert`` (-1: of the shared one)."""

    expert: int
    index: int
    a: float
    gate: float
    n_D: Tensor

    @cached_property
    def c(self) -> float:
        return float(self.n_D.norm())


def neurons(ffn: Any, x_D: Tensor) -> list[Neuron]:
    """All that one token visits in a feed-forward of sparsekit."""
    if not hasattr(ffn, "router"):
        return _of_one(ffn, x_D, None, 0, 1.0)
    routing = ffn.router(x_D[None], ForwardContext())
    k = len(routing.expert_M)
    mean = ffn.params.shared_combine == "mean"
    found = []
    for expert, weight in zip(routing.expert_M.tolist(), routing.weight_M.tolist(), strict=True):
        found += _of_one(ffn.experts, x_D, expert, expert, weight * (k / (k + 1) if mean else 1))
    if ffn.shared_expert is not None:
        found += _of_one(ffn.shared_expert, x_D, None, -1, 1 / (k + 1) if mean else 1.0)
    return found


def _of_one(ffn: Any, x_D: Tensor, row: int | None, expert: int, weight: float) -> list[Neuron]:
    def project(linear: Any) -> Tensor:
        matrix = linear.weight if row is None else linear.weight[row]
        return matrix @ x_D + (0 if linear.bias is None else linear.bias)

    if hasattr(ffn, "gate"):
        gate = F.silu(project(ffn.gate))
        a = gate * project(ffn.up)
    else:
        gate = a = F.relu(project(ffn.up))
    down = ffn.down.weight if row is None else ffn.down.weight[row]
    return [Neuron(expert, i, float(a[i]), float(gate[i]), weight * a[i] * down[:, i]) for i in range(len(a))]


def inputs(model: Any, ids_BT: Tensor) -> list[Tensor]:
    """What each feed-forward reads, [B, T, D]."""
    found: list[Tensor] = []
    hooks = [layer.ffn.register_forward_pre_hook(lambda module, args: found.append(args[0])) for layer in model.layers]
    with torch.no_grad():
        model(ids_BT)
    for hook in hooks:
        hook.remove()
    return found


def dense(model: Any, ids_ST: Tensor) -> list[list[list[list[Neuron]]]]:
    """[layer][sequence][token] -> its neurons."""
    with torch.no_grad():
        return [
            [[neurons(layer.ffn, x_D) for x_D in x_TD] for x_TD in x_BTD]
            for layer, x_BTD in zip(model.layers, inputs(model, ids_ST), strict=True)
        ]


def cett(tokens: list[list[Neuron]], t: float) -> float:
    """The mean over tokens, those of output 0 left out, of the norm of what t drops over that of all."""
    shares = []
    for visited in tokens:
        whole = sum(neuron.n_D for neuron in visited)
        tail = sum((neuron.n_D for neuron in visited if neuron.c < t), torch.zeros_like(visited[0].n_D))
        if float(whole.norm()) > 0:
            shares.append(float(tail.norm() / whole.norm()))
    return sum(shares) / len(shares)


@contextmanager
def dropping(model: Any, active: Callable[[int, Neuron], bool], seen: list[Any] | None = None) -> Iterator[None]:
    """The feed-forwards compute sum_i n_i over what is active, and the output's bias; ``seen`` gets the neurons."""

    def forward(layer: int, ffn: Any) -> Any:
        def instead(x_BTD: Tensor, context: ForwardContext) -> Tensor:
            y_BTD = torch.zeros_like(x_BTD)
            for place in torch.cartesian_prod(*(torch.arange(n) for n in x_BTD.shape[:2])).tolist():
                visited = neurons(ffn, x_BTD[tuple(place)])
                if seen is not None:
                    seen.append((layer, place, visited))
                for neuron in visited:
                    if active(layer, neuron):
                        y_BTD[tuple(place)] += neuron.n_D
            bias = getattr(getattr(ffn, "down", None), "bias", None)
            return y_BTD if bias is None else y_BTD + bias

        return instead

    for index, layer in enumerate(model.layers):
        layer.ffn.forward = forward(index, layer.ffn)
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in model.layers:
            del layer.ffn.forward


def loss(model: Any, ids_ST: Tensor) -> float:
    """Mean next-token cross-entropy."""
    with torch.no_grad():
        logits = model(ids_ST)[:, :-1].double()
    return float(F.cross_entropy(logits.flatten(0, 1), ids_ST[:, 1:].flatten()))
