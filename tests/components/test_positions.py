"""Rotary positions against multiplication by complex numbers; alibi and learned positions against loops."""

from __future__ import annotations

import cmath
import math
from itertools import pairwise

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model


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


@pytest.mark.parametrize(("fraction", "channels"), [(0.25, 2), (0.5, 4), (0.75, 6), (1.0, 8)])
def test_partial_rope_turns_the_first_channels_and_no_others(component, randn, fraction, channels):
    rope = component("position", {"type": "rope", "fraction": fraction}, facts={"head_dim": 8})
    q, k = randn(2, 3, 5, 8), randn(2, 1, 5, 8)
    for got, x in zip(rope(q, k, ForwardContext()), (q, k), strict=True):
        assert torch.equal(got[..., channels:], x[..., channels:])
        wanted = rotated(x[..., :channels], [range(5)] * 2, 10000.0)
        torch.testing.assert_close(got[..., :channels], wanted, rtol=0, atol=1e-12)


def test_partial_rope_scores_depend_on_the_difference_of_positions_only(component, randn):
    rope = component("position", {"type": "rope", "fraction": 0.5}, facts={"head_dim": 8})
    q, k, scores = randn(1, 2, 6, 8), randn(1, 2, 6, 8), []
    for shift in (0, 19):
        one, other = rope(q, k, ForwardContext(positions_BT=torch.arange(6)[None] + shift))
        scores.append(one @ other.transpose(-1, -2))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-12)


def test_rope_refuses_an_odd_number_of_channels(tiny):
    position = {"type": "rope", "fraction": 0.4}
    with pytest.raises(SparsekitError, match="rope turns pairs of channels, but 3 of head_dim 8 are to turn"):
        build_model(tiny(attention={"type": "mha", "n_heads": 4, "position": position}))


# --- scaling


def frequencies_of(rope):
    """What the tables hold at position 1: (frequency, factor) of each pair."""
    pairs = [complex(c, s) for c, s in zip(rope.cos[1].tolist(), rope.sin[1].tolist(), strict=True)]
    return [cmath.phase(z) for z in pairs], [abs(z) for z in pairs]


def scaled(component, scaling, channels, theta):
    slot = {"type": "rope", "theta": theta, "scaling": scaling}
    return component("position", slot, facts={"head_dim": channels}, max_seq_len=64)


def linear_frequencies(channels, theta, factor):
    return [theta ** (-2 * i / channels) / factor for i in range(channels // 2)], 1.0


def ntk_frequencies(channels, theta, factor):
    """The base that gives the slowest pair what linear interpolation would give it."""
    base = theta * factor ** (channels / (channels - 2))
    return [base ** (-2 * i / channels) for i in range(channels // 2)], 1.0


def yarn_frequencies(channels, theta, factor, length, fast, slow):
    """Peng et al. 2023, sec. 3.2 and the released code: the ramp goes by the pair's index."""

    def pair_that_turns(times):  # length = times * 2 pi theta^(2i / channels), solved for i
        return math.log(length / (2 * math.pi * times), theta) * channels / 2

    low, high = max(0, math.floor(pair_that_turns(fast))), min(channels - 1, math.ceil(pair_that_turns(slow)))
    out = []
    for i in range(channels // 2):
        frequency = theta ** (-2 * i / channels)
        if i <= low:
            kept = 1.0
        elif i >= high:
            kept = 0.0
        else:
            kept = 1 - (i - low) / (high - low)
        out.append(kept * frequency + (1 - kept) * frequency / factor)
    return out, 0.1 * math.log(factor) + 1


def llama3_frequencies(channels, theta, factor, length, low, high):
    """By wavelength, as Meta's released code has it: long ones divided, short ones kept, a smooth share between."""
    out = []
    for i in range(channels // 2):
        frequency = theta ** (-2 * i / channels)
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            out.append(frequency)
        elif wavelength > length / low:
            out.append(frequency / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            out.append((1 - smooth) * frequency / factor + smooth * frequency)
    return out, 1.0


SCALINGS = {
    "linear": ({"type": "linear", "factor": 4.0}, lambda r, t: linear_frequencies(r, t, 4.0)),
    "ntk": ({"type": "ntk", "factor": 4.0}, lambda r, t: ntk_frequencies(r, t, 4.0)),
    "yarn": ({"type": "yarn", "factor": 8.0}, lambda r, t: yarn_frequencies(r, t, 8.0, 2048, 32, 1)),
    "yarn-other": (
        {"type": "yarn", "factor": 3.0, "original_max_seq_len": 300, "beta_fast": 9.0, "beta_slow": 2.0},
        lambda r, t: yarn_frequencies(r, t, 3.0, 300, 9, 2),
    ),
    "llama3": ({"type": "llama3"}, lambda r, t: llama3_frequencies(r, t, 8.0, 8192, 1, 4)),
    "llama3-other": (
        {"type": "llama3", "factor": 3.0, "original_max_seq_len": 300, "low_turns": 0.5, "high_turns": 9.0},
        lambda r, t: llama3_frequencies(r, t, 3.0, 300, 0.5, 9.0),
    ),
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("channels", [4, 16, 64])
@pytest.mark.parametrize(("slot", "formula"), SCALINGS.values(), ids=SCALINGS)
def test_rope_scaling(component, slot, formula, channels, theta):
    frequencies, factor = formula(channels, theta)
    got, factors = frequencies_of(scaled(component, slot, channels, theta))
    assert got == pytest.approx(frequencies, rel=1e-12)
    assert factors == pytest.approx([factor] * (channels // 2), rel=1e-12)


def test_llama3_wants_its_turns_in_order(component):
    with pytest.raises(SparsekitError, match=r"low_turns \(4.0\) is not below high_turns \(4.0\)"):
        build_model({
            "d_model": 8, "n_layers": 1, "vocab_size": 9, "max_seq_len": 8, "block": {"ffn": {"type": "mlp", "d_ff": 8},
            "attention": {"type": "mha", "n_heads": 1,
                          "position": {"type": "rope", "scaling": {"type": "llama3", "low_turns": 4.0}}}},
        })  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_1_changes_nothing(component, name):
    rope = scaled(component, {"type": name, "factor": 1.0}, 16, 10000.0)
    plain = component("position", "rope", facts={"head_dim": 16}, max_seq_len=64)
    torch.testing.assert_close(rope.cos, plain.cos, rtol=0, atol=1e-13)
    torch.testing.assert_close(rope.sin, plain.sin, rtol=0, atol=1e-13)


def test_what_the_papers_say_of_the_ends(component):
    """NTK and YaRN leave the fastest pair alone and divide the slowest by the factor, as linear does to all."""
    plain, _ = frequencies_of(component("position", "rope", facts={"head_dim": 64}))
    for name in ("linear", "ntk", "yarn"):
        got, _ = frequencies_of(scaled(component, {"type": name, "factor": 4.0}, 64, 10000.0))
        ratios = [a / b for a, b in zip(plain, got, strict=True)]
        assert ratios[-1] == pytest.approx(4, rel=1e-12)
        assert ratios[0] == pytest.approx(4 if name == "linear" else 1, rel=1e-12)
        assert all(slower >= faster - 1e-12 for faster, slower in pairwise(ratios))


def test_yarn_lengthens_queries_and_keys_alike(component, randn):
    """Its temperature: scores grow by the square of the factor on cosine and sine."""
    slot, x = {"type": "yarn", "factor": 4.0}, randn(1, 1, 6, 16)
    rotated_x, _ = scaled(component, slot, 16, 10000.0)(x, x, ForwardContext())
    torch.testing.assert_close(rotated_x.norm(dim=-1), x.norm(dim=-1) * (0.1 * math.log(4) + 1), rtol=1e-12, atol=0)


# --- alibi and learned


PAPER = {
    8: [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256],
    # those of 8 heads, and then the first, third, fifth and seventh of 16 heads
    12: [*(2.0**-h for h in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    1: [2.0**-8],
    2: [2.0**-4, 2.0**-8],
}


@pytest.mark.parametrize(("n_heads", "slopes"), PAPER.items())
def test_alibi_slopes(component, n_heads, slopes):
    made = component("position", "alibi", facts={"n_heads": n_heads})
    assert made.slopes_H.tolist() == pytest.approx(slopes, rel=1e-15)


def test_alibi_slopes_are_not_rounded_with_the_model(component):
    made = component("position", "alibi", facts={"n_heads": 12}, dtype=torch.bfloat16)
    assert made.slopes_H.dtype == torch.float32
    assert made.slopes_H.tolist() == pytest.approx(PAPER[12], rel=1e-7)


def test_learned(component, randn):
    facts = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6}
    learned = component("position", "learned", facts=facts, max_seq_len=9)
    q, k = randn(2, 4, 5, 6), randn(2, 2, 5, 6)
    positions = [[3, 1, 4, 8, 0], [0, 0, 7, 2, 2]]
    for places, context in (
        ([range(5)] * 2, ForwardContext()),
        (positions, ForwardContext(positions_BT=torch.tensor(positions))),
    ):
        got_q, got_k = learned(q, k, context)
        for b in range(2):
            for t in range(5):
                p = places[b][t]
                torch.testing.assert_close(got_q[b, :, t], q[b, :, t] + learned.query_SHK[p], rtol=0, atol=1e-15)
                torch.testing.assert_close(got_k[b, :, t], k[b, :, t] + learned.key_SGK[p], rtol=0, atol=1e-15)
