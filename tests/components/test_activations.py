"""Activations against their formulas, number by number, and what the papers say of their zeros."""

from __future__ import annotations

import math

import pytest
import torch


def phi(z):
    """The standard normal distribution function."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


# id: (slot, the function of one number)
ACTIVATIONS = {
    "relu": ("relu", lambda z: max(0.0, z)),
    "relu2": ("relu2", lambda z: max(0.0, z) ** 2),
    "gelu": ("gelu", lambda z: z * phi(z)),
    "gelu_tanh": (
        "gelu_tanh",
        lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    ),
    "silu": ("silu", lambda z: z / (1 + math.exp(-z))),
    "shifted_relu": ("shifted_relu", lambda z: max(0.0, z - 1)),
    "shifted_relu-left": ({"type": "shifted_relu", "shift": -0.5}, lambda z: max(0.0, z + 0.5)),
    "fat_relu": ({"type": "fat_relu", "threshold": 0.7}, lambda z: z if z > 0.7 else 0.0),
    "clipped_relu": ("clipped_relu", lambda z: min(max(0.0, z - 1), 1)),
    "clipped_relu-wide": ({"type": "clipped_relu", "shift": 0.5, "limit": 2.5}, lambda z: min(max(0.0, z - 0.5), 2.5)),
}


@pytest.mark.parametrize(("slot", "formula"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_values(component, randn, slot, formula):
    x = 3 * randn(200)
    wanted = torch.tensor([formula(z) for z in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(component("activation", slot)(x), wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("slot", "formula"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_gradients_are_the_slopes(component, randn, slot, formula):
    x, step = (3 * randn(200)).requires_grad_(), 1e-6
    (gradient,) = torch.autograd.grad(component("activation", slot)(x).sum(), x)
    slopes = [(formula(z + step) - formula(z - step)) / (2 * step) for z in x.tolist()]
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-7)


def test_the_gradient_of_relu2_is_2_relu(component, randn):
    x = randn(100).requires_grad_()
    (gradient,) = torch.autograd.grad(component("activation", "relu2")(x).sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach().clamp(min=0), rtol=0, atol=1e-15)


def test_gelu_tanh_stays_near_gelu(component):
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    apart = (component("activation", "gelu_tanh")(x) - component("activation", "gelu")(x)).abs().max()
    assert 1e-5 < apart < 5e-4


@pytest.mark.parametrize(
    "slot",
    [
        {"type": "shifted_relu", "shift": 0},
        {"type": "fat_relu", "threshold": 0},
        {"type": "clipped_relu", "shift": 0, "limit": 1e9},
    ],
    ids=lambda slot: slot["type"],
)
def test_without_a_shift_it_is_relu(component, randn, slot):
    x = torch.cat((randn(100), torch.zeros(1, dtype=torch.float64)))
    assert torch.equal(component("activation", slot)(x), component("activation", "relu")(x))


def test_fat_relu_leaves_what_it_lets_through(component, randn):
    """Where shifted_relu would lower it."""
    x = randn(100)
    y = component("activation", {"type": "fat_relu", "threshold": 0.3})(x)
    assert torch.equal(y[x > 0.3], x[x > 0.3])
    assert not y[x <= 0.3].any()


@pytest.mark.parametrize("slot", ["relu", "relu2", "shifted_relu", "fat_relu", "clipped_relu"])
@pytest.mark.parametrize("edge", [0.0, 0.5, 1.5])
def test_zeros_of_normal_input(component, randn, slot, edge):
    """A share Phi(edge): of n numbers it is known to sqrt(Phi (1 - Phi) / n)."""
    name = {"shifted_relu": "shift", "clipped_relu": "shift", "fat_relu": "threshold"}.get(slot)
    edge = edge if name else 0.0
    n, p = 100_000, phi(edge)
    made = component("activation", {"type": slot, name: edge} if name else slot)
    share = float((made(randn(n)) == 0).double().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_clipped_relu_is_flat_where_it_is_clipped(component):
    x = torch.tensor([0.9, 1.0 + 1e-9, 1.5, 2.0 - 1e-9, 2.1, 50.0], dtype=torch.float64, requires_grad=True)
    y = component("activation", "clipped_relu")(x)
    assert float(y.detach().max()) == 1.0
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [0, 1, 1, 1, 0, 0]
