"""Residual schemes against their formulas, and what they do to the variance of a deep stack."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit.components.contracts import Build, FeedForward, ForwardContext
from sparsekit.model.build import build_model
from sparsekit.spec import Slot


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def pre_norm(x, A, F, n, m, s, i, L):
    h = x + s * A(n(x))
    return h + s * F(m(h))


def post_norm(x, A, F, n, m, s, i, L):
    h = n(x + s * A(x))
    return m(h + s * F(h))


def output_norm(x, A, F, n, m, s, i, L):
    h = x + s * n(A(x))
    return h + s * m(F(h))


def peri_norm(x, A, F, n, m, s, i, L):
    h = x + s * n[1](A(n[0](x)))
    return h + s * m[1](F(m[0](h)))


def layernorm_scaling(x, A, F, n, m, s, i, L):
    h = x + s * A(n(x) / math.sqrt(i))
    return h + s * F(m(h) / math.sqrt(i))


def deep_norm(x, A, F, n, m, s, i, L):
    alpha = (2 * L) ** 0.25
    h = n(alpha * x + s * A(x))
    return m(alpha * h + s * F(h))


def parallel(x, A, F, n, m, s, i, L):
    return x + s * (A(n(x)) + F(n(x)))


def parallel_two_norms(x, A, F, n, m, s, i, L):
    return x + s * (A(n(x)) + F(m(x)))


FORMULAS = {
    f.__name__: f
    for f in (
        pre_norm,
        post_norm,
        output_norm,
        peri_norm,
        layernorm_scaling,
        deep_norm,
        parallel,
        parallel_two_norms,
    )
}


def norms_of(residual):
    """The scheme's norms as functions, written anew: (the attention's, the feed-forward's)."""

    def one(module):
        if isinstance(module, nn.ModuleList):
            return [one(inner) for inner in module]
        return lambda x: rms(x, module.weight)

    if hasattr(residual, "norm"):
        return one(residual.norm), None
    return one(residual.attention_norm), one(residual.ffn_norm)


@pytest.fixture
def parts(component):
    attention = component("attention", {"type": "mha", "n_heads": 4})
    return attention, component("ffn", {"type": "mlp", "d_ff": 9})


def applied(residual, x, parts):
    y, state = residual(x, {}, ForwardContext(), *parts)
    assert state == {}
    return y


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("layer", [0, 6])
@pytest.mark.parametrize("name", FORMULAS)
def test_residual_schemes(component, randn, parts, name, layer, scale):
    facts = {"norm": Slot("norm").validate("rmsnorm")}
    residual = component("residual", {"type": name, "scale": scale}, facts=facts, layer_index=layer, n_layers=7)
    weights = list(residual.parameters())
    assert len(weights) == {"peri_norm": 4, "parallel": 1}.get(name, 2)
    assert all(not torch.equal(one, other) for one, other in pairwise(weights)), "each place has a norm of its own"
    A, F = (lambda x, part=part: part(x, ForwardContext()) for part in parts)
    x = randn(2, 5, 16)
    wanted = FORMULAS[name](x, A, F, *norms_of(residual), scale, layer + 1, 7)
    torch.testing.assert_close(applied(residual, x, parts), wanted, rtol=0, atol=1e-12)


# Li, Yin & Liu: post_norm in the first floor(share L) layers
MIXED = [(0.25, 12, 3), (0.25, 24, 6), (0.25, 7, 1), (0.25, 2, 0), (0.0, 4, 0), (1.0, 4, 4), (0.29, 100, 29)]


@pytest.mark.parametrize(("share", "n_layers", "n_post"), MIXED)
def test_mix_ln_at_its_boundary(component, randn, parts, share, n_layers, n_post):
    facts, x = {"norm": Slot("norm").validate("rmsnorm")}, randn(2, 5, 16)
    for layer in {0, max(n_post - 1, 0), min(n_post, n_layers - 1), n_layers - 1}:
        where = {"facts": facts, "layer_index": layer, "n_layers": n_layers}
        mixed = component("residual", {"type": "mix_ln", "share": share, "scale": 0.5}, **where)
        plain = component("residual", {"type": "post_norm" if layer < n_post else "pre_norm", "scale": 0.5}, **where)
        plain.load_state_dict(mixed.scheme.state_dict())
        assert torch.equal(applied(mixed, x, parts), applied(plain, x, parts)), layer


def test_without_norms_the_schemes_are_one(component, randn, parts):
    """Where every norm is the identity only the order of things and their scales remain."""
    facts, x = {"norm": Slot("norm").validate("none")}, randn(2, 5, 16)
    ys = [
        applied(component("residual", name, facts=facts), x, parts)
        for name in ("pre_norm", "post_norm", "output_norm", "peri_norm", "layernorm_scaling", "mix_ln")
    ]
    for y in ys[1:]:
        torch.testing.assert_close(y, ys[0], rtol=0, atol=1e-12)


class Momentum(FeedForward):
    """Adds half of what the layer before gave."""

    stateful = True

    def forward(self, x_BTD, state, context):
        y = x_BTD + 0.5 * state.get("momentum", torch.zeros_like(x_BTD))
        return y, {**state, "momentum": y}


@pytest.mark.parametrize("name", ["pre_norm", "post_norm", "output_norm", "peri_norm", "layernorm_scaling", "mix_ln"])
def test_state_goes_through_and_comes_back(component, randn, name):
    residual = component("residual", name, facts={"norm": Slot("norm").validate("none")})
    attention = component("attention", {"type": "mha", "n_heads": 4})
    x, before = randn(1, 3, 16), randn(1, 3, 16)
    build = Build(16, 32, 0, 2, Slot("linear").validate("plain"), Slot("init").validate("normal"))
    y, state = residual(x, {"momentum": before}, ForwardContext(), attention, Momentum(Momentum.Params(), build))
    h = x + attention(x, ForwardContext())
    torch.testing.assert_close(state["momentum"], h + 0.5 * before, rtol=0, atol=1e-13)
    torch.testing.assert_close(y, h + h + 0.5 * before, rtol=0, atol=1e-13)


# --- the curse of depth, on a toy of 24 layers

LAYERS = 24
BOUNDED, GROWING = ("post_norm", "deep_norm"), ("pre_norm", "parallel", "output_norm", "peri_norm")


@functools.cache
def variances(residual, n_steps, seed=0):
    """Variance over channels of every layer's output after training so long on a Markov chain; [24], first layer first.

    Weights start from N(0, 1 / d_model), with which a branch of normalised input has an output of about its size.
    """
    ffn = {"type": "swiglu", "d_ff": 64}
    block = {"residual": residual, "attention": {"type": "mha", "n_heads": 2}, "ffn": ffn}
    sizes = {"d_model": 32, "n_layers": LAYERS, "vocab_size": 64, "max_seq_len": 32}
    model = build_model({**sizes, "block": block, "init": {"type": "normal", "std": 32**-0.5}}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    follow = torch.randint(64, (64, 4), generator=generator)  # each token has four that may come next

    def batch(n):
        ids = [torch.randint(64, (n,), generator=generator)]
        for _ in range(32):
            ids.append(follow[ids[-1], torch.randint(4, (n,), generator=generator)])
        return torch.stack(ids, 1)

    optimizer, begins, ends = torch.optim.AdamW(model.parameters(), lr=3e-3), None, None
    probed = batch(16)[:, :-1]
    for _ in range(n_steps):
        ids = batch(8)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        begins, ends = (float(loss.detach()) if begins is None else begins), float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert n_steps < 200 or ends < begins - 0.3, "it has learned something"
    seen = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(float(out[0].var(-1, correction=0).mean())))
    with torch.no_grad():
        model(probed)
    return seen


def hold_depth_to_its_schemes(n_steps):
    every = {name: variances(name, n_steps) for name in (*BOUNDED, *GROWING, "layernorm_scaling", "mix_ln")}
    growth = {name: v[-1] / v[0] for name, v in every.items()}
    for name in BOUNDED:
        assert 0.8 < min(every[name]) <= max(every[name]) < 1.3, name
    for name in GROWING:
        assert growth[name] > 10, name
        assert every[name][0] < every[name][5] < every[name][11] < every[name][17] < every[name][23], name
    assert 1.5 < growth["layernorm_scaling"] < growth["pre_norm"] / 4
    assert every["layernorm_scaling"][-1] < every["pre_norm"][-1] / 5
    mixed = every["mix_ln"]
    assert 0.8 < min(mixed[:6]) <= max(mixed[:6]) < 1.3, "its first quarter is post_norm"
    assert mixed[-1] > 10 * mixed[5], "the rest pre_norm"


def test_variance_over_depth_at_initialisation():
    """pre_norm's branches are of one size, so variance grows by the layer; layernorm_scaling's add up as 1/l does."""
    hold_depth_to_its_schemes(0)
    for name in GROWING:
        assert 1.5 < variances(name, 0)[23] / variances(name, 0)[11] < 2.5, f"{name}: twice as deep, twice the variance"
    scaled = variances("layernorm_scaling", 0)
    assert 1.05 < scaled[23] / scaled[11] < 1.4, "sum of 1/l to 24 over that to 12: 1.22"


def test_variance_over_depth_after_20_steps():
    hold_depth_to_its_schemes(20)


@pytest.mark.slow
def test_variance_over_depth_after_200_steps():
    hold_depth_to_its_schemes(200)
