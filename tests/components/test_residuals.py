"""Residual schemes, embeddings and initialisers against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import Build, FeedForward, ForwardContext
from sparsekit.model.build import build_model
from sparsekit.spec import Slot


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
def test_residual_schemes(component, randn, name, scale):
    norm = Slot("norm").validate("rmsnorm")
    residual = component("residual", {"type": name, "scale": scale}, facts={"norm": norm})
    attention = component("attention", {"type": "mha", "n_heads": 4})
    ffn = component("ffn", {"type": "mlp", "d_ff": 9})
    x, context = randn(2, 5, 16), ForwardContext()
    y, state = residual(x, {}, context, attention, ffn)
    one, two = residual.attention_norm.weight, residual.ffn_norm.weight
    assert not torch.equal(one, two)
    if name == "pre_norm":
        h = x + scale * attention(rms(x, one), context)
        wanted = h + scale * ffn(rms(h, two), context)
    else:
        h = rms(x + scale * attention(x, context), one)
        wanted = rms(h + scale * ffn(h, context), two)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    assert state == {}


class Momentum(FeedForward):
    """Adds half of what the layer before gave."""

    stateful = True

    def forward(self, x_BTD, state, context):
        y = x_BTD + 0.5 * state.get("momentum", torch.zeros_like(x_BTD))
        return y, {**state, "momentum": y}


@pytest.mark.parametrize("name", ["pre_norm", "post_norm"])
def test_state_goes_through_and_comes_back(component, randn, name):
    residual = component("residual", name, facts={"norm": Slot("norm").validate("none")})
    attention = component("attention", {"type": "mha", "n_heads": 4})
    x, before = randn(1, 3, 16), randn(1, 3, 16)
    build = Build(16, 32, 0, 2, Slot("linear").validate("plain"), Slot("init").validate("normal"))
    y, state = residual(x, {"momentum": before}, ForwardContext(), attention, Momentum(Momentum.Params(), build))
    h = x + attention(x, ForwardContext())
    torch.testing.assert_close(state["momentum"], h + 0.5 * before, rtol=0, atol=1e-13)
    torch.testing.assert_close(y, h + h + 0.5 * before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_embedding(component, randn, scale):
    embedding = component("embedding", {"type": "token", "scale": scale}, d_model=5, facts={"vocab_size": 7})
    ids = torch.tensor([[0, 6, 3], [3, 3, 1]])
    x = embedding(ids, ForwardContext())
    for b in range(2):
        for t in range(3):
            torch.testing.assert_close(x[b, t], scale * embedding.weight[ids[b, t]], rtol=0, atol=1e-15)
    h = randn(2, 3, 5)
    torch.testing.assert_close(embedding.unembed(h), h @ embedding.weight.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("init", "shrinks"), [("normal", False), ("depth_scaled", True)])
@pytest.mark.parametrize("n_layers", [2, 8])
def test_initial_spread_by_role(tiny, init, shrinks, n_layers):
    slot = {"type": init, "std": 0.05}
    experts = {
        "type": "moe",
        "n_experts": 4,
        "router": {"type": "top_k", "k": 2},
        "expert": {"type": "swiglu", "d_ff": 128},
    }
    attention = {"type": "mha", "n_heads": 4, "bias": True}
    spec = tiny(d_model=128, vocab_size=512, n_layers=n_layers, init=slot, ffn=experts, attention=attention)
    model = build_model(spec)
    seen = set()
    for name, parameter in model.state_dict().items():
        leaf = name.split(".")[-2]
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in leaf:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            std = 0.05 / math.sqrt(2 * n_layers) if shrinks and leaf in ("o", "down") else 0.05
            n = parameter.numel()
            # the spread of n normal numbers is known to std / sqrt(2n), their mean to std / sqrt(n)
            assert abs(float(parameter.std()) - std) < 5 * std / math.sqrt(2 * n), name
            assert abs(float(parameter.mean())) < 5 * std / math.sqrt(n), name
            seen.add(leaf)
    assert seen == {"q", "k", "v", "o", "gate", "up", "down", "head", "embedding"}
