"""The top-k router and its losses against loops."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext, attach_loss


def logits_of(router, x):
    return [
        [sum(w * z for w, z in zip(row, token, strict=True)) for row in router.gate.weight.tolist()]
        for token in x.tolist()
    ]


def scores_of(logits, score):
    if score == "sigmoid":
        return [[1 / (1 + math.exp(-z)) for z in row] for row in logits]
    return [[math.exp(z) / sum(math.exp(y) for y in row) for z in row] for row in logits]


def best(scores, k):
    return [sorted(range(len(row)), key=lambda e: -row[e])[:k] for row in scores]


@pytest.fixture
def router(component):
    def make(n_experts=5, **params):
        return component("router", {"type": "top_k", "k": 2, **params}, d_model=6, facts={"n_experts": n_experts})

    return make


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_choice_and_weights(router, randn, k, score, renormalize):
    made, x = router(k=k, score=score, renormalize=renormalize).eval(), randn(9, 6)
    scores = scores_of(logits_of(made, x), score)
    experts, weights = [], []
    for row, chosen in zip(scores, best(scores, k), strict=True):
        experts += chosen
        total = sum(row[e] for e in chosen) if renormalize else 1.0
        weights += [row[e] / total for e in chosen]
    routing = made(x, ForwardContext())
    assert routing.expert_M.tolist() == experts
    torch.testing.assert_close(routing.weight_M, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-13)
    assert routing.token_M is None
    assert routing.complete
    assert made.experts_per_token == k


def losses(logits, scores, k):
    """(load balance, z) by the formulas of the docstring."""
    n_tokens, n_experts = len(logits), len(logits[0])
    chosen = best(scores, k)
    balance = 0.0
    for e in range(n_experts):
        share = sum(e in row for row in chosen) / n_tokens
        mean_score = sum(row[e] / sum(row) for row in scores) / n_tokens
        balance += n_experts / k * share * mean_score
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits) / n_tokens
    return balance, z


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_losses(router, randn, k, score):
    made, x = router(k=k, score=score).train(), randn(11, 6)
    made(x, ForwardContext())
    logits = logits_of(made, x)
    balance, z = losses(logits, scores_of(logits, score), k)
    assert float(made.load_balance_loss) == pytest.approx(balance, abs=1e-12)
    assert float(made.z_loss) == pytest.approx(z, abs=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 2])
def test_load_balance_is_1_where_uniform(router, k, score):
    """Tokens that each favour their own experts, all experts alike."""
    made = router(n_experts=6, k=k, score=score).train()
    with torch.no_grad():
        made.gate.weight.copy_(torch.eye(6))
    x = torch.stack([sum(torch.eye(6)[(t + i) % 6] for i in range(k)) for t in range(6)]).double()
    made(x, ForwardContext())
    assert float(made.load_balance_loss) == pytest.approx(1.0, abs=1e-14)
    with torch.no_grad():
        made.gate.weight.zero_()
        made.gate.weight[0] = 20.0
    made(x.abs() + 1, ForwardContext())
    assert float(made.load_balance_loss) > 1.2, "all tokens to one expert cost more"


def test_no_losses_outside_training(router, randn):
    made, x = router().eval(), randn(4, 6)
    routing = made(x, ForwardContext())
    weight = made.gate.weight
    (alone,) = torch.autograd.grad(routing.weight_M.sum(), weight)
    logits = x @ weight.T
    (wanted,) = torch.autograd.grad(logits.softmax(-1).topk(2).values.sum(), weight)
    torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("loss_scale", [1.0, 0.25, torch.tensor(0.5)])
def test_the_gradient_of_the_losses(router, randn, loss_scale):
    made = router(load_balance=0.3, z_loss=0.2, k=2).train()
    x, direction = randn(9, 6).requires_grad_(), randn(18)
    routing = made(x, ForwardContext(loss_scale=loss_scale))
    got = torch.autograd.grad((routing.weight_M * direction).sum(), (x, made.gate.weight))
    logits = x @ made.gate.weight.T
    scores = logits.softmax(-1)
    weights, experts = scores.topk(2)
    share = torch.stack([(experts == e).any(1).double().mean() for e in range(5)])
    balance = 5 / 2 * sum(share[e] * scores[:, e].mean() for e in range(5))
    auxiliary = 0.3 * balance + 0.2 * logits.exp().sum(-1).log().square().mean()
    total = (weights.flatten() * direction).sum() + loss_scale * auxiliary
    for one, other in zip(got, torch.autograd.grad(total, (x, made.gate.weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_scores_are_worked_out_in_float32_at_least(router, randn):
    made = router().to(torch.bfloat16)
    assert made(randn(4, 6).bfloat16(), ForwardContext()).weight_M.dtype == torch.float32


def test_an_attached_loss_changes_no_value_and_ignores_what_follows(randn):
    x, w = randn(3).requires_grad_(), randn(3).requires_grad_()
    y = attach_loss(x * 1.0, w.square().sum(), ForwardContext(loss_scale=0.5))
    assert torch.equal(y, x)
    gx, gw = torch.autograd.grad((1000.0 * y).sum(), (x, w))
    torch.testing.assert_close(gw, w.detach(), rtol=0, atol=0)
    torch.testing.assert_close(gx, torch.full((3,), 1000.0, dtype=torch.float64), rtol=0, atol=0)
