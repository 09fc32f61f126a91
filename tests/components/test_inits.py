"""What weights are drawn from, by role."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.build import build_model

STD, D, D_FF, N_EXPERTS = 0.05, 128, 256, 3
WRITERS = ("o", "down")


@pytest.fixture
def weights(tiny):
    """``weights(init, n_layers)``: (name, role, weight) of every matrix, the embedding and the router's included."""

    def make(init, n_layers=4, seed=0, **changes):
        attention = {"type": "mha", "n_heads": 4, "bias": True}
        ffn = {"type": "moe", "n_experts": N_EXPERTS, "router": "top_k", "expert": {"type": "swiglu", "d_ff": D_FF}}
        ffn = {**ffn, "router": {"type": "top_k", "k": 2}, "shared_expert": {"type": "mlp", "d_ff": D_FF}}
        sizes = {"d_model": D, "vocab_size": 512, "n_layers": n_layers}
        model = build_model(tiny(init=init, ffn=ffn, attention=attention, **sizes, **changes), seed=seed)
        found = [("embedding", "embed", model.embedding.weight.detach())]
        for name, module in model.named_modules():
            if hasattr(module, "role"):
                found.append((name, module.role, module.weight.detach()))
                assert module.bias is None or not module.bias.any()
        return found

    return make


def expect(name, weight, std):
    """The spread of n normal numbers is known to std / sqrt(2n), their mean to std / sqrt(n)."""
    n = weight.numel()
    assert abs(float(weight.std()) - std) <= 5 * std / math.sqrt(2 * n), name
    assert abs(float(weight.mean())) <= 5 * std / math.sqrt(n), name


def deep_norm(role, fan_in, n_layers):
    return (8 * n_layers) ** -0.25 if role in ("v", "o", "gate", "up", "down") else 1


def mup(role, fan_in, n_layers):
    ratio = 64 / fan_in
    return {"embed": 1, "head": ratio}.get(role, math.sqrt(ratio))


FACTORS = {
    "normal": ({}, lambda role, fan_in, n_layers: 1),
    "depth_scaled": ({}, lambda role, fan_in, n_layers: 1 / math.sqrt(2 * n_layers) if role in WRITERS else 1),
    "zero_out": ({}, lambda role, fan_in, n_layers: 0 if role in WRITERS else 1),
    "deep_norm": ({}, deep_norm),
    "mup": ({"base_width": 64}, mup),
}


@pytest.mark.parametrize("n_layers", [2, 8])
@pytest.mark.parametrize("name", FACTORS)
def test_spread_by_role(weights, name, n_layers):
    params, factor = FACTORS[name]
    roles = set()
    for where, role, weight in weights({"type": name, "std": STD, **params}, n_layers):
        fan_in = D_FF if role == "down" else D
        assert role == "embed" or weight.shape[-1] == fan_in
        expect(where, weight, STD * factor(role, fan_in, n_layers))
        roles.add(role)
    assert roles == {"embed", "q", "k", "v", "o", "gate", "up", "down", "router", "head"}


@pytest.mark.parametrize("name", [*FACTORS, "trunc_normal"])
def test_each_expert_is_drawn_for_itself(weights, name):
    experts = [w for where, role, w in weights({"type": name, "std": STD}) if w.ndim == 3 and role == "up"]
    assert len(experts) == 4
    for weight in experts:
        assert weight.shape == (N_EXPERTS, D_FF, D)
        assert not torch.equal(weight[0], weight[1])
        for matrix in weight:
            expect(name, matrix, float(weight.std()))


@pytest.mark.parametrize("name", FACTORS)
def test_roles_multiply_further(weights, name):
    params, factor = FACTORS[name]
    roles = {"router": 0.1, "embed": 3.0, "o": 0.5, "k": 0.0}
    for where, role, weight in weights({"type": name, "std": STD, "roles": roles, **params}):
        fan_in = D_FF if role == "down" else D
        expect(where, weight, STD * factor(role, fan_in, 4) * roles.get(role, 1))


@pytest.mark.parametrize("cutoff", [1.0, 2.0, 3.0])
def test_trunc_normal(weights, cutoff):
    """Cut at c, a normal distribution keeps the variance 1 - 2 c phi(c) / (2 Phi(c) - 1)."""
    inside = math.erf(cutoff / math.sqrt(2))
    kept = math.sqrt(1 - 2 * cutoff * math.exp(-cutoff * cutoff / 2) / math.sqrt(2 * math.pi) / inside)
    roles = {"q": 0.5, "v": 0.0}
    for where, role, weight in weights({"type": "trunc_normal", "std": STD, "cutoff": cutoff, "roles": roles}):
        std = STD * roles.get(role, 1)
        expect(where, weight, std * kept)
        assert float(weight.abs().max()) <= cutoff * std * (1 + 1e-6), where
        assert float(weight.abs().max()) >= 0.85 * cutoff * std, "and reaches that far"


def test_trunc_normal_scales_like_normal_where_nothing_is_cut(weights):
    for where, _, weight in weights({"type": "trunc_normal", "std": STD, "cutoff": 8.0}):
        expect(where, weight, STD)


@pytest.mark.parametrize("residual", ["pre_norm", "layernorm_scaling", "output_norm", "peri_norm", "parallel"])
def test_zero_out_makes_every_layer_the_identity(tiny, moe, residual):
    model = build_model(tiny(init="zero_out", residual=residual, ffn=moe(shared_expert={"type": "swiglu", "d_ff": 8})))
    x = torch.randn(2, 5, 32)
    for layer in model.layers:
        assert torch.equal(layer(x, {}, ForwardContext())[0], x)


@pytest.mark.parametrize("name", [*FACTORS, "trunc_normal"])
def test_the_seed_gives_the_weights(weights, name):
    """Each by its name: more layers or another width elsewhere leave the first ones as they are."""
    init = {"type": name, "std": STD}
    one, same, other = (weights(init, seed=seed) for seed in (0, 0, 1))
    for (where, _, a), (_, _, b), (_, _, c) in zip(one, same, other, strict=True):
        assert torch.equal(a, b), where
        assert not torch.equal(a, c) or not a.any(), where
    if name not in ("depth_scaled", "deep_norm"):
        deeper = {where: weight for where, _, weight in weights(init, n_layers=6)}
        assert all(torch.equal(weight, deeper[where]) for where, _, weight in one)


@pytest.mark.parametrize(("init", "grows"), [("mup", False), ("normal", True)])
def test_mup_keeps_the_size_of_activations_over_widths(component, init, grows):
    """Of unit inputs the outputs of a hidden matrix have the standard deviation std sqrt(base_width) at any width."""
    sizes = []
    for width in (64, 1024):
        model = {"d_model": width, "n_layers": 1, "vocab_size": 8, "max_seq_len": 8, "init": {"type": init, "std": STD}}
        block = {"attention": {"type": "mha", "n_heads": 4}, "ffn": {"type": "mlp", "d_ff": 8}}
        q = build_model({**model, "block": block}).layers[0].attention.q
        sizes.append(float(q(torch.randn(500, width)).detach().std()))
    assert sizes[1] / sizes[0] == pytest.approx(4 if grows else 1, rel=0.05)
    if not grows:
        assert sizes[1] == pytest.approx(STD * math.sqrt(256), rel=0.05)
