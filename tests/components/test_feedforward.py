"""Feed-forwards against their formulas, number by number."""

from __future__ import annotations

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model
from tests.components.test_activations import ACTIVATIONS

FIXED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}


def dot(row, x):
    return sum(w * z for w, z in zip(row, x, strict=True))


def affine(linear, x):
    """W x + b, a dot product at a time."""
    bias = linear.bias.tolist() if linear.bias is not None else [0.0] * linear.d_out
    return [dot(row, x) + b for row, b in zip(linear.weight.tolist(), bias, strict=True)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(component, randn, activation, bias):
    slot, act = ACTIVATIONS[activation]
    ffn = component("ffn", {"type": "mlp", "d_ff": 11, "activation": slot, "bias": bias}, d_model=6)
    x = randn(2, 3, 6)
    y = ffn(x, ForwardContext())
    for b in range(2):
        for t in range(3):
            hidden = [act(z) for z in affine(ffn.up, x[b, t].tolist())]
            wanted = torch.tensor(affine(ffn.down, hidden), dtype=torch.float64)
            torch.testing.assert_close(y[b, t], wanted, rtol=0, atol=1e-12)


GATED = [(name, {"type": name}) for name in FIXED] + [
    (f"gated-{a}", {"type": "gated", "activation": a}) for a in FIXED.values()
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "slot"), GATED, ids=[name for name, _ in GATED])
def test_gated(component, randn, name, slot, bias):
    ffn = component("ffn", {**slot, "d_ff": 11, "bias": bias}, d_model=6)
    _, act = ACTIVATIONS[slot.get("activation") or FIXED[name]]
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


@pytest.mark.parametrize("bias", [False, True])
def test_drelu(component, randn, bias):
    ffn, x = component("ffn", {"type": "drelu", "d_ff": 11, "bias": bias}, d_model=6), randn(4, 6)
    y = ffn(x, ForwardContext())
    for n in range(4):
        gate, up = affine(ffn.gate, x[n].tolist()), affine(ffn.up, x[n].tolist())
        wanted = affine(ffn.down, [max(0.0, g) * max(0.0, u) for g, u in zip(gate, up, strict=True)])
        torch.testing.assert_close(y[n], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


def hidden_of(ffn, x):
    """What enters the down projection."""
    seen = []
    ffn.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ffn(x, ForwardContext())
    return seen[0]


def test_drelu_is_reglu_wherever_up_is_not_negative(component, randn):
    drelu, reglu = (component("ffn", {"type": name, "d_ff": 200}) for name in ("drelu", "reglu"))
    reglu.load_state_dict(drelu.state_dict())
    x = randn(5, 16)
    up = x @ drelu.up.weight.T
    one, other = hidden_of(drelu, x), hidden_of(reglu, x)
    assert torch.equal(one[up >= 0], other[up >= 0])
    assert not one[up < 0].any()
    assert other[up < 0].any()


@pytest.mark.parametrize(("name", "density"), [("drelu", 0.25), ("reglu", 0.5), ("mlp", 0.5)])
def test_density_at_initialisation(component, randn, name, density):
    """Of symmetric weights each branch is positive half of the time. 64 tokens by 512 neurons: known to 0.0024."""
    slot = {"type": name, "d_ff": 512, **({"activation": "relu"} if name == "mlp" else {})}
    hidden = hidden_of(component("ffn", slot, d_model=64), randn(64, 64))
    assert abs(float((hidden != 0).double().mean()) - density) < 0.0125


@pytest.mark.parametrize("k", [1, 4, 11])
def test_top_k_ffn(component, randn, k):
    ffn, x = component("ffn", {"type": "top_k_ffn", "d_ff": 11, "k": k}, d_model=6), randn(2, 3, 6)
    y = ffn(x, ForwardContext())
    for b in range(2):
        for t in range(3):
            hidden = [max(0.0, z) for z in affine(ffn.up, x[b, t].tolist())]
            kept = sorted(range(11), key=lambda i: -hidden[i])[:k]
            wanted = affine(ffn.down, [hidden[i] if i in kept else 0.0 for i in range(11)])
            torch.testing.assert_close(y[b, t], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 7, 60])
def test_top_k_ffn_lets_at_most_k_through(component, randn, k):
    hidden = hidden_of(component("ffn", {"type": "top_k_ffn", "d_ff": 64, "k": k}), randn(50, 16))
    used = (hidden != 0).sum(-1)
    assert int(used.max()) <= k
    if k == 7:
        assert (used == 7).all(), "of 64 neurons more than 7 are positive"
    if k == 60:
        assert (used < 60).all(), "what relu has put to 0 does not count as let through"


def test_top_k_ffn_with_all_neurons_is_a_relu_mlp(component, randn):
    top = component("ffn", {"type": "top_k_ffn", "d_ff": 24, "k": 24})
    mlp = component("ffn", {"type": "mlp", "d_ff": 24, "activation": "relu"})
    mlp.load_state_dict(top.state_dict())
    x = randn(2, 3, 16)
    torch.testing.assert_close(top(x, ForwardContext()), mlp(x, ForwardContext()), rtol=0, atol=1e-13)


def test_only_neurons_that_are_let_through_learn(component, randn):
    ffn, x = component("ffn", {"type": "top_k_ffn", "d_ff": 24, "k": 3}), randn(1, 16)
    used = hidden_of(ffn, x)[0] != 0
    ffn(x, ForwardContext()).square().sum().backward()
    assert torch.equal(ffn.up.weight.grad.any(1), used)
    assert torch.equal(ffn.down.weight.grad.any(0), used)


def test_top_k_ffn_refuses_more_neurons_than_there_are(tiny):
    with pytest.raises(SparsekitError, match=r"k \(9\) is above d_ff \(8\)"):
        build_model(tiny(ffn={"type": "top_k_ffn", "d_ff": 8, "k": 9}))
