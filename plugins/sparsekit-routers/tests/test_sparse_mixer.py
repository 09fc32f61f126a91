"""sparse_mixer against SparseMixer-v2's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from sparsekit_routers.sparse_mixer import FAR

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model

E = 5


@pytest.fixture
def router(component):
    def make(**params):
        slot = {"type": "sparse_mixer", "load_balance": 0, "z_loss": 0, **params}
        return component("router", slot, n_experts=E)

    return make


def band(scores, taken, eps):
    """{expert: probability} of those not taken that are close to the best of them."""
    left = [e for e in range(E) if e not in taken]
    best = max(scores[e] for e in left)
    close = [e for e in left if best - scores[e] <= 2 * eps * max(abs(scores[e]), best)]
    total = sum(math.exp(scores[e]) for e in close)
    return {e: math.exp(scores[e]) / total for e in close}


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.5])
def test_eval(router, randn, k, eps):
    made, x = router(k=k, jitter_eps=eps).eval(), randn(11, 6)
    experts, weights = [], []
    for row in (x @ made.gate.weight.T).tolist():
        taken = []
        for _ in range(k):
            p = band(row, taken, eps)
            best = max(p, key=p.get)
            taken.append(best)
            experts.append(best)
            weights.append(p[best])
    routing = made(x, ForwardContext())
    assert routing.expert_M.tolist() == experts
    assert routing.weight_M.sub(torch.tensor(weights, dtype=torch.float64)).abs().max() < 1e-9


def test_training(router, randn):
    """Experts by their probabilities; the likeliest's weight is whole, another's by chance 3/4 a third."""
    n, made = 40000, router(k=2, jitter_eps=0.5).train()
    x = randn(1, 6)
    row = (x @ made.gate.weight.T).tolist()[0]
    torch.manual_seed(0)
    routing = made(x.expand(n, 6), ForwardContext())
    experts, weights = routing.expert_M.view(n, 2), routing.weight_M.view(n, 2)
    first = band(row, [], 0.5)
    assert len(first) > 1, "the case is worth a test"
    for e in range(E):
        share = float((experts[:, 0] == e).double().mean())
        assert share == pytest.approx(first.get(e, 0.0), abs=4 * 0.5 / math.sqrt(n))
    for a in first:
        then = band(row, [a], 0.5)
        here = experts[:, 0] == a
        for slot, p in ((0, first), (1, then)):
            for e in p if slot else [a]:
                drawn = weights[here & (experts[:, slot] == e), slot]
                near = {p[e]} if e == max(p, key=p.get) else {p[e], p[e] * FAR}
                for value in drawn.unique().tolist():
                    assert min(abs(value - wanted) for wanted in near) < 1e-9
                if len(near) == 2 and len(drawn) > 500:
                    whole = float((drawn - p[e]).abs().lt(1e-9).double().mean())
                    assert whole == pytest.approx(0.25, abs=4 * 0.5 / math.sqrt(len(drawn)))
    assert not set(experts[:, 0].tolist()) - set(first)
    assert (experts[:, 0] != experts[:, 1]).all()


def test_the_gradient_is_that_of_the_softmax_whatever_the_multiplier(router, randn):
    made, x = router(k=1, jitter_eps=0.5).train(), randn(64, 6)
    torch.manual_seed(3)
    routing = made(x, ForwardContext())
    upstream = randn(64)
    (got,) = torch.autograd.grad(routing.weight_M @ upstream, made.gate.weight)
    wanted, third = torch.zeros_like(got), 0
    rows, chosen = (x @ made.gate.weight.T).tolist(), routing.expert_M.tolist()
    for row, g, e, w, token in zip(rows, upstream, chosen, routing.weight_M.tolist(), x, strict=True):
        p = band(row, [], 0.5)
        third += abs(w - FAR * p[e]) < 1e-9
        for other in p:
            wanted[other] += g * p[e] * ((other == e) - p[other]) * token
    assert third > 3, "some weights were cut to a third"
    assert (got - wanted).abs().max() < 1e-9


def test_the_midpoint_is_exact_for_cubics(router, randn):
    """Of f(w E), a cubic in w, the mean gradient over the draws of c is (f(pi) - f(0)) d log pi / d scores."""
    made = router(k=1, jitter_eps=0.5).train()
    x = randn(1, 6)
    row = (x @ made.gate.weight.T).tolist()[0]
    p = band(row, [], 0.5)
    e = min(p, key=p.get)
    a, b, c = 0.7, -1.3, 2.1
    torch.manual_seed(0)
    n = 60000
    weight = made(x.expand(n, 6), ForwardContext())
    drawn = weight.weight_M[weight.expert_M == e]
    whole = (drawn.detach() - p[e]).abs() < 1e-9
    slopes = a + 2 * b * drawn.detach() + 3 * c * drawn.detach() ** 2
    estimate = 0.25 * slopes[whole][0] + 0.75 * slopes[~whole][0]
    assert float(p[e] * estimate) == pytest.approx(a * p[e] + b * p[e] ** 2 + c * p[e] ** 3, abs=1e-9)


def test_without_heun_the_weight_is_the_probability(router, randn):
    made, x = router(k=1, jitter_eps=0.5, heun=False).train(), randn(200, 6)
    routing = made(x, ForwardContext())
    for row, e, w in zip(
        (x @ made.gate.weight.T).tolist(), routing.expert_M.tolist(), routing.weight_M.tolist(), strict=True
    ):
        assert w == pytest.approx(band(row, [], 0.5)[e], abs=1e-9)


def test_a_k_that_is_too_large():
    router = {"type": "sparse_mixer", "k": 3}
    ffn = {"type": "moe", "n_experts": 2, "router": router, "expert": {"type": "mlp", "d_ff": 4}}
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": ffn}
    with pytest.raises(SpecError, match=r"block\.ffn\.router: k \(3\) is above n_experts \(2\)"):
        build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 8, "block": block})
