"""Feed-forwards and activations against their formulas, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext

ACTIVATIONS = {
    "relu": lambda z: max(0.0, z),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "silu": lambda z: z / (1 + math.exp(-z)),
}
FIXED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(component, randn, name):
    x = 3 * randn(200)
    wanted = torch.tensor([ACTIVATIONS[name](z) for z in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(component("activation", name)(x), wanted, rtol=0, atol=1e-14)


def dot(row, x):
    return sum(w * z for w, z in zip(row, x, strict=True))


def affine(linear, x):
    """W x + b, a dot product at a time."""
    bias = linear.bias.tolist() if linear.bias is not None else [0.0] * linear.d_out
    return [dot(row, x) + b for row, b in zip(linear.weight.tolist(), bias, strict=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(component, randn, activation, bias):
    ffn = component("ffn", {"type": "mlp", "d_ff": 11, "activation": activation, "bias": bias}, d_model=6)
    x = randn(2, 3, 6)
    y = ffn(x, ForwardContext())
    for b in range(2):
        for t in range(3):
            hidden = [ACTIVATIONS[activation](z) for z in affine(ffn.up, x[b, t].tolist())]
            wanted = torch.tensor(affine(ffn.down, hidden), dtype=torch.float64)
            torch.testing.assert_close(y[b, t], wanted, rtol=0, atol=1e-12)


GATED = [(name, {"type": name}) for name in FIXED] + [
    (f"gated-{a}", {"type": "gated", "activation": a}) for a in FIXED.values()
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "slot"), GATED, ids=[name for name, _ in GATED])
def test_gated(component, randn, name, slot, bias):
    ffn = component("ffn", {**slot, "d_ff": 11, "bias": bias}, d_model=6)
    act = ACTIVATIONS[slot.get("activation") or FIXED[name]]
    x = randn(4, 6)
    y = ffn(x, ForwardContext())
    for n in range(4):
        gate, up = affine(ffn.gate, x[n].tolist()), affine(ffn.up, x[n].tolist())
        wanted = affine(ffn.down, [act(g) * u for g, u in zip(gate, up, strict=True)])
        torch.testing.assert_close(y[n], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "activation"), FIXED.items())
def test_the_named_glus_are_gated_with_that_activation(component, randn, name, activation):
    named = component("ffn", {"type": name, "d_ff": 11})
    general = component("ffn", {"type": "gated", "d_ff": 11, "activation": activation})
    general.load_state_dict(named.state_dict())
    x = randn(2, 3, 16)
    assert torch.equal(named(x, ForwardContext()), general(x, ForwardContext()))


def test_roles(component):
    ffn = component("ffn", {"type": "swiglu", "d_ff": 11})
    assert {name: getattr(ffn, name).role for name in ("gate", "up", "down")} == {
        "gate": "gate",
        "up": "up",
        "down": "down",
    }
