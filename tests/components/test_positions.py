"""Rotary positions against multiplication by complex numbers."""

from __future__ import annotations

import cmath

import pytest
import torch

from sparsekit.components.contracts import ForwardContext


def rotated(x, positions, theta):
    """Each pair (i, i + K/2) of x [B, H, T, K] as a complex number, times exp(j position theta^(-2i/K))."""
    y = torch.empty_like(x)
    n_batch, n_heads, n_tokens, width = x.shape
    for b in range(n_batch):
        for h in range(n_heads):
            for t in range(n_tokens):
                for i in range(width // 2):
                    pair = complex(x[b, h, t, i], x[b, h, t, i + width // 2])
                    pair *= cmath.exp(1j * positions[b][t] * theta ** (-2 * i / width))
                    y[b, h, t, i], y[b, h, t, i + width // 2] = pair.real, pair.imag
    return y


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rope_turns_pairs(component, randn, theta):
    rope = component("position", {"type": "rope", "theta": theta}, facts={"head_dim": 6})
    q, k = randn(2, 3, 5, 6), randn(2, 1, 5, 6)
    in_order = [list(range(5))] * 2
    for got, x in zip(rope(q, k, ForwardContext()), (q, k), strict=True):
        torch.testing.assert_close(got, rotated(x, in_order, theta), rtol=0, atol=1e-12)


def test_rope_follows_the_positions_of_the_context(component, randn):
    rope = component("position", "rope", facts={"head_dim": 6})
    q, k = randn(2, 3, 4, 6), randn(2, 1, 4, 6)
    positions = [[3, 1, 4, 31], [0, 0, 9, 2]]
    for got, x in zip(rope(q, k, ForwardContext(positions_BT=torch.tensor(positions))), (q, k), strict=True):
        torch.testing.assert_close(got, rotated(x, positions, 10000.0), rtol=0, atol=1e-12)


def test_scores_depend_on_the_difference_of_positions_only(component, randn):
    rope = component("position", "rope", facts={"head_dim": 8})
    q, k = randn(1, 2, 6, 8), randn(1, 2, 6, 8)
    scores = []
    for shift in (0, 1, 17):
        rotated_q, rotated_k = rope(q, k, ForwardContext(positions_BT=torch.arange(6)[None] + shift))
        scores.append(rotated_q @ rotated_k.transpose(-1, -2))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores[2], scores[0], rtol=0, atol=1e-12)
    assert (scores[0] - q @ k.transpose(-1, -2)).abs().max() > 0.1, "but they do depend on it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tables_are_exact_to_their_dtype_after_a_cast(component, dtype):
    rope = component("position", "rope", facts={"head_dim": 8}, max_seq_len=4096, dtype=dtype)
    fresh = component("position", "rope", facts={"head_dim": 8}, max_seq_len=4096, dtype=torch.float64)
    there_and_back = rope.to(torch.bfloat16).to(dtype)
    assert there_and_back.cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = torch.finfo(there_and_back.cos.dtype).eps
    assert (there_and_back.cos.double() - fresh.cos).abs().max() <= tolerance
    assert (there_and_back.sin.double() - fresh.sin).abs().max() <= tolerance


def test_rotation_keeps_the_dtype_of_the_queries(component, randn):
    rope = component("position", "rope", facts={"head_dim": 8}, dtype=torch.bfloat16)
    x = randn(1, 1, 4, 8).bfloat16()
    assert {out.dtype for out in rope(x, x, ForwardContext())} == {torch.bfloat16}


def test_none_leaves_everything(component, randn):
    q, k = randn(1, 2, 3, 4), randn(1, 2, 3, 4)
    same_q, same_k = component("position", "none", facts={"head_dim": 4})(q, k, ForwardContext())
    assert torch.equal(q, same_q)
    assert torch.equal(k, same_k)
