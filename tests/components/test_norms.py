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
