"""The structured Jacobian against torch.autograd.functional.jacobian in float64, token sums by the definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sparsekit.model.build import build_model
from sparsekit.probes.layered import layered
from sparsekit.probes.structured_jacobian import batch_size, jacobian_sum
from sparsekit.probes.structured_layer import StructuredLayer, why_not
from sparsekit.probes.token_jacobian import change_structured

ROOMY, NARROW = 1 << 30, 1 << 12


def noisy(spec, std=0.3):
    """A float64 model none of whose parameters is at its initial, often special, value."""
    model = build_model(spec).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return layered(model)


def stream(view, sequences, length, layer=1):
    """(the batch, what layer 1 reads of it)."""
    generator = torch.Generator().manual_seed(1)
    batch = view.start(torch.randint(view.vocab_size, (sequences, length), generator=generator))
    with torch.no_grad():
        h = batch.h_0
        for index in range(layer):
            h = batch.layer(index, h)
    return batch, h.detach()


def all_derivatives(batch, h_BTD, layer=1):
    """dh'_{b,t} / dh_{b,t'} as [B, t, D, t', D]."""
    whole = torch.autograd.functional.jacobian(lambda h: batch.layer(layer, h), h_BTD)  # [B, T, D, B, T, D]
    return torch.stack([whole[b, :, :, b] for b in range(len(h_BTD))])


def token_sum(derivatives):
    """sum_b sum_t' sum_{t >= t'} by three loops."""
    n, length, d_model = derivatives.shape[:3]
    total = derivatives.new_zeros(d_model, d_model)
    for b in range(n):
        for before in range(length):
            for t in range(before, length):
                total += derivatives[b, t, :, before]
    return total


ATTENTIONS = {
    "mha": {"type": "mha", "n_heads": 3},
    "gqa": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "bias": True},
    "mqa": {"type": "mqa", "n_heads": 4, "head_dim": 6},
    "no position": {"type": "gqa", "n_heads": 6, "n_kv_heads": 2, "head_dim": 4, "position": "none"},
    "part of the channels": {
        "type": "gqa", "n_heads": 4, "n_kv_heads": 1, "position": {"type": "rope", "fraction": 0.5}, "bias": True,
    },
    "query-key norm": {
        "type": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "qk_norm": {"type": "rmsnorm", "eps": 0.01},
        "position": {"type": "rope", "fraction": 0.67}, "bias": True,
    },
    "scaled": {
        "type": "mha", "n_heads": 2,
        "position": {"type": "rope", "scaling": {"type": "yarn", "factor": 4.0, "original_max_seq_len": 8}},
    },
}  # fmt: skip
BLOCKS = {
    "swiglu": {"ffn": {"type": "swiglu", "d_ff": 20}},
    "geglu": {"ffn": {"type": "geglu", "d_ff": 20, "bias": True}, "norm": "layernorm"},
    "reglu": {"ffn": {"type": "reglu", "d_ff": 20}, "residual": {"type": "pre_norm", "scale": 0.6}},
    "parallel": {"ffn": {"type": "swiglu", "d_ff": 20}, "residual": "parallel", "norm": "layernorm"},
    "not gated": {"ffn": {"type": "mlp", "d_ff": 20, "bias": True}, "residual": "layernorm_scaling"},
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_sum_over_tokens_is_autograds(tiny, attention, block):
    view = noisy(tiny(d_model=12, attention=ATTENTIONS[attention], **BLOCKS[block]))
    batch, h = stream(view, 3, 7)
    assert why_not(view.anatomy(1)) is None
    layer = StructuredLayer(view.anatomy(1), batch.rope(1), torch.float64)
    wanted = token_sum(all_derivatives(batch, h))
    for room in (ROOMY, NARROW):  # the narrow one in several blocks of queries, and of a value's channels
        got = jacobian_sum(layer, h, room)
        assert (got - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize(("sequences", "length"), [(1, 1), (1, 2), (5, 3), (1, 33), (2, 32)])
def test_any_number_of_sequences_and_tokens(tiny, sequences, length):
    view = noisy(tiny(d_model=8, max_seq_len=40, attention={"type": "gqa", "n_heads": 4, "n_kv_heads": 2}))
    batch, h = stream(view, sequences, length)
    layer = StructuredLayer(view.anatomy(1), batch.rope(1), torch.float64)
    wanted = token_sum(all_derivatives(batch, h))
    for room in (ROOMY, NARROW):
        assert (jacobian_sum(layer, h, room) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_tokens_own_change_is_autograds(tiny, attention):
    block = BLOCKS["parallel" if attention == "mqa" else "geglu"]
    view = noisy(tiny(d_model=12, attention=ATTENTIONS[attention], **block))
    batch, h = stream(view, 3, 7)
    derivatives = all_derivatives(batch, h)
    layer = StructuredLayer(view.anatomy(1), batch.rope(1), torch.float64)
    axes = torch.eye(12, dtype=torch.float64)
    position_B = torch.tensor([0, 6, 3])
    change = change_structured(layer, h, position_B, axes[:, None].expand(-1, 3, -1))
    for b, t in enumerate(position_B.tolist()):
        torch.testing.assert_close(change[:, b].T, derivatives[b, t, :, t] - axes, rtol=1e-11, atol=1e-11)


def test_factors_in_bfloat16_come_close(tiny):
    view = noisy(tiny(d_model=32, attention={"type": "gqa", "n_heads": 4, "n_kv_heads": 2}), std=0.15)
    batch, h = stream(view, 4, 16)
    layer = StructuredLayer(view.anatomy(1), batch.rope(1), torch.float32)
    exact = jacobian_sum(StructuredLayer(view.anatomy(1), batch.rope(1), torch.float64), h, ROOMY)
    single = jacobian_sum(layer, h.float(), ROOMY)
    coarse = jacobian_sum(layer, h.float(), ROOMY, torch.bfloat16)
    deviation = (exact - 64 * torch.eye(32)).norm()
    assert (single - exact).norm() < 1e-5 * deviation
    assert 1e-5 * deviation < (coarse - exact).norm() < 1e-2 * deviation


def test_memory_bounds_blocks_and_batches(tiny, monkeypatch):
    """No more tokens go through together than fit, and the sums over keys are cut to size."""
    view = noisy(tiny(d_model=16, max_seq_len=64))
    batch, h = stream(view, 2, 64)
    layer = StructuredLayer(view.anatomy(1), batch.rope(1), torch.float64)
    assert batch_size(layer, 64, ROOMY) > batch_size(layer, 64, 1 << 21) >= 1
    largest = []
    real = torch.bmm

    def bmm(a, b):
        largest.append(b.numel())
        return real(a, b)

    monkeypatch.setattr(torch, "bmm", bmm)
    jacobian_sum(layer, h, ROOMY)
    roomy = max(largest)
    largest.clear()
    jacobian_sum(layer, h, NARROW)
    assert max(largest) < roomy


def test_what_has_no_structured_form_says_why(tiny, moe):
    plain = layered(build_model(tiny())).anatomy(0)
    assert why_not(plain) is None
    assert why_not(replace(plain, residual=None)) == "its residual scheme is not known, neither pre_norm nor parallel"
    assert why_not(replace(plain, attention_extras=("softcap", "window"))) == "its attention has softcap and window"
    assert why_not(replace(plain, norm_2=None, missing={"norm_2": "hidden"})) == "it has no norm_2: hidden"
    assert why_not(replace(plain, up=None)) == "it has no up"
    mixture = layered(build_model(tiny(ffn=moe()))).anatomy(0)
    assert why_not(mixture) == "its feed-forward is a mixture of experts"
    assert math.isclose(plain.scale, 8**-0.5)
