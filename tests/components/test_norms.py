"""Norms against their formulas, row by row."""

from __future__ import annotations

import math

import pytest
import torch

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm(component, randn, eps):
    norm, x = component("norm", {"type": "rmsnorm", "eps": eps}, d_model=7), randn(2, 3, 7)
    y = norm(x)
    for b in range(2):
        for t in range(3):
            row = x[b, t].tolist()
            rms = math.sqrt(sum(v * v for v in row) / 7 + eps)
            wanted = torch.tensor(
                [v / rms * w for v, w in zip(row, norm.weight.tolist(), strict=True)], dtype=torch.float64
            )
            torch.testing.assert_close(y[b, t], wanted, **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layernorm(component, randn, eps, bias):
    norm, x = component("norm", {"type": "layernorm", "eps": eps, "bias": bias}, d_model=7), randn(5, 7)
    y = norm(x)
    shifts = norm.bias.tolist() if bias else [0.0] * 7
    for n in range(5):
        row = x[n].tolist()
        mean = sum(row) / 7
        deviation = math.sqrt(sum((v - mean) ** 2 for v in row) / 7 + eps)
        parts = zip(row, norm.weight.tolist(), shifts, strict=True)
        wanted = torch.tensor([(v - mean) / deviation * w + b for v, w, b in parts], dtype=torch.float64)
        torch.testing.assert_close(y[n], wanted, **EXACT)


def test_none_is_the_identity(component, randn):
    x = randn(2, 3)
    assert torch.equal(component("norm", "none")(x), x)


@pytest.mark.parametrize("name", ["rmsnorm", "layernorm"])
def test_the_width_is_what_the_parent_says(component, randn, name):
    assert component("norm", name, d_model=16, facts={"width": 5})(randn(2, 5)).shape == (2, 5)
    assert component("norm", name, d_model=16).weight.shape == (16,)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_dynamic_tanh(component, randn, alpha):
    norm, x = component("norm", {"type": "dynamic_tanh", "alpha": alpha}, d_model=7), randn(5, 7)
    y, learned = norm(x), norm.alpha.item()
    assert 0 < abs(learned - alpha) < 0.5, "the fixture moves every parameter a little"
    for n in range(5):
        parts = zip(x[n].tolist(), norm.weight.tolist(), norm.bias.tolist(), strict=True)
        wanted = torch.tensor([w * math.tanh(learned * v) + b for v, w, b in parts], dtype=torch.float64)
        torch.testing.assert_close(y[n], wanted, **EXACT)


def test_dynamic_tanh_begins_as_tanh_of_alpha_x(component, randn):
    norm, x = component("norm", {"type": "dynamic_tanh", "alpha": 0.3}), randn(5, 16)
    norm.reset_parameters()
    torch.testing.assert_close(norm(x), torch.tanh(0.3 * x), **EXACT)


def test_dynamic_tanh_has_no_statistics(component, randn):
    """A channel depends on itself alone."""
    norm, x = component("norm", "dynamic_tanh"), randn(1, 16)
    other = x.clone()
    other[0, 3] += 1
    assert (norm(x) != norm(other)).nonzero().tolist() == [[0, 3]]


NORMS = ["rmsnorm", "layernorm", "dynamic_tanh"]


def plain(name, norm, x):
    """The norm before scale and shift."""
    if name == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if name == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return torch.tanh(norm.alpha * x)


@pytest.mark.parametrize("name", NORMS)
def test_without_affine_nothing_follows_the_statistics(component, randn, name):
    norm, x = component("norm", {"type": name, "affine": False}), randn(5, 16)
    assert [n for n, _ in norm.named_parameters()] == (["alpha"] if name == "dynamic_tanh" else [])
    torch.testing.assert_close(norm(x), plain(name, norm, x), **EXACT)


@pytest.mark.parametrize("name", NORMS)
def test_a_zero_centred_weight_is_what_the_scale_differs_from_1_by(component, randn, name):
    norm, x = component("norm", {"type": name, "zero_centered": True}), randn(5, 16)
    usual = component("norm", name)
    shift = getattr(norm, "bias", None)
    wanted = plain(name, norm, x) * (1 + norm.weight) + (0 if shift is None else shift)
    torch.testing.assert_close(norm(x), wanted, **EXACT)
    with torch.no_grad():
        usual.load_state_dict({**norm.state_dict(), "weight": 1 + norm.weight})
    torch.testing.assert_close(norm(x), usual(x), **EXACT)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_scale_is_1_at_initialisation(component, name, zero_centered):
    norm = component("norm", {"type": name, "zero_centered": zero_centered})
    norm.reset_parameters()
    assert torch.equal(norm.weight, torch.full((16,), 0.0 if zero_centered else 1.0, dtype=torch.float64))
    assert torch.equal(norm.scale(), torch.ones(16, dtype=torch.float64))
