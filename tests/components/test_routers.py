"""The top-k router, its losses and its ways of balancing against loops."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext, attach_loss
from sparsekit.components.routers import largest
from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model


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


# --- jitter


def test_jitter_is_for_training_alone(router, randn):
    made, plain, x = router(jitter=0.3), router(), randn(9, 6)
    one, other = (module.eval()(x, ForwardContext()) for module in (made, plain))
    assert torch.equal(one.weight_M, other.weight_M)
    made.train(), plain.train()
    torch.manual_seed(0)
    noise = torch.empty_like(x).uniform_(0.7, 1.3)
    torch.manual_seed(0)
    jittered = made.logits(x, ForwardContext())
    torch.testing.assert_close(jittered, (x * noise) @ made.gate.weight.T, rtol=0, atol=1e-14)
    assert not torch.equal(made(x, ForwardContext()).weight_M, made(x, ForwardContext()).weight_M)
    assert torch.equal(plain(x, ForwardContext()).weight_M, plain(x, ForwardContext()).weight_M)


def test_jitter_stays_within_its_bounds(component):
    made = component("router", {"type": "top_k", "k": 1, "jitter": 0.2}, d_model=1, facts={"n_experts": 1}).train()
    ratio = (made.logits(torch.ones(5000, 1).double(), ForwardContext()) / made.gate.weight).detach()
    assert 0.8 <= float(ratio.min()) < 0.801
    assert 1.199 < float(ratio.max()) <= 1.2


# --- expert groups


def in_groups(row, k, n_groups, k_groups):
    """DeepSeek-V3: the k best experts of the k_groups groups whose two best scores have the largest sum."""
    size = len(row) // n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(n_groups)]
    groups.sort(key=lambda group: -sum(sorted((row[e] for e in group), reverse=True)[:2]))
    allowed = [e for group in groups[:k_groups] for e in group]
    return sorted(allowed, key=lambda e: -row[e])[:k]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("k", "n_groups", "k_groups"), [(2, 4, 1), (3, 4, 2), (4, 2, 1), (1, 8, 1), (3, 8, 3), (5, 1, 1)]
)
def test_expert_groups(router, randn, k, n_groups, k_groups, score):
    made, x = router(n_experts=8, k=k, n_groups=n_groups, k_groups=k_groups, score=score).eval(), randn(40, 6)
    scores = scores_of(logits_of(made, x), score)
    routing = made(x, ForwardContext())
    chosen = routing.expert_M.view(40, k).tolist()
    assert chosen == [in_groups(row, k, n_groups, k_groups) for row in scores]
    assert all(len({e * n_groups // 8 for e in row}) <= k_groups for row in chosen)
    wanted = [row[e] for row, experts in zip(scores, chosen, strict=True) for e in experts]
    torch.testing.assert_close(routing.weight_M, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-13)
    if 1 < n_groups < 8 and k > 1:
        assert chosen != best(scores, k), "groups do keep tokens from some experts"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_groups": 3}, r"n_experts \(4\) is not divisible by n_groups \(3\)"),
        ({"n_groups": 2, "k_groups": 3}, r"k_groups \(3\) is above n_groups \(2\)"),
        ({"k": 3, "n_groups": 2}, r"k \(3\) is above the 2 experts of k_groups \(1\) groups"),
        ({"k": 5}, r"k \(5\) is above n_experts \(4\)"),
    ],
)
def test_groups_that_do_not_fit_are_refused(tiny, moe, params, message):
    with pytest.raises(SparsekitError, match=message):
        build_model(tiny(ffn=moe(router={"type": "top_k", "k": 2, **params})))


@pytest.mark.parametrize("k", [1, 3, 8, 9])
def test_compiled_the_same_experts_are_chosen(randn, k):
    """One after the other for a few, equal scores included; in another order of operations only."""
    scores = randn(200, 12)
    scores[5] = scores[5].sign()  # many are equal: any k of the largest are right
    scores[6, k:] = -torch.inf  # as of groups that are shut
    found = torch.compile(largest, backend="eager", fullgraph=True, dynamic=False)(scores, k)
    values = scores.gather(1, found)
    torch.testing.assert_close(values, scores.topk(k).values, rtol=0, atol=0)
    assert all(len(set(row)) == k for row in found.tolist())


# --- balancing by a bias


@pytest.mark.parametrize("groups", [{}, {"n_groups": 2, "k_groups": 1}])
def test_the_bias_joins_the_choice_and_not_the_weights(router, randn, groups):
    made, x = router(n_experts=6, k=2, score="sigmoid", bias_rate=0.1, **groups).eval(), randn(30, 6)
    bias = [0.5, -0.3, 0.0, 0.1, -2.0, 0.4]
    made.bias_E.copy_(torch.tensor(bias))
    scores = scores_of(logits_of(made, x), "sigmoid")
    lifted = [[v + b for v, b in zip(row, bias, strict=True)] for row in scores]
    chosen = [in_groups(row, 2, groups.get("n_groups", 1), 1) for row in lifted]
    routing = made(x, ForwardContext())
    assert routing.expert_M.view(30, 2).tolist() == chosen != best(scores, 2)
    wanted = torch.tensor([row[e] for row, experts in zip(scores, chosen, strict=True) for e in experts]).double()
    torch.testing.assert_close(routing.weight_M, wanted, rtol=0, atol=1e-7)


def test_the_bias_moves_by_its_rate_against_the_load(router, randn):
    made, x = router(n_experts=4, k=1, bias_rate=0.25), randn(12, 6)
    made(x, ForwardContext())
    counts = [made(x, ForwardContext()).expert_M.tolist().count(e) for e in range(4)]
    assert made.chosen_E.tolist() == pytest.approx([n / 12 for n in counts], abs=1e-15)
    assert not made.bias_E.any(), "a forward moves nothing"
    made.after_step({"chosen_E": made.chosen_E})
    assert made.bias_E.tolist() == [0.25 * (-1 if n > 3 else int(n < 3)) for n in counts]
    made.after_step({"chosen_E": torch.tensor([0.25, 0.75, 0.0, 0.0])})
    expected = [0.25 * (-1 if n > 3 else int(n < 3)) + d for n, d in zip(counts, [0, -0.25, 0.25, 0.25], strict=True)]
    assert made.bias_E.tolist() == pytest.approx(expected, abs=1e-7)


def test_nothing_of_the_bias_is_in_the_backward(router, randn):
    made, plain, x = (
        router(bias_rate=0.1, load_balance=0.0, z_loss=0.0),
        router(load_balance=0.0, z_loss=0.0),
        randn(9, 6),
    )
    assert [n for n, _ in made.named_parameters()] == ["gate.weight"]
    assert set(made.state_dict()) == {"gate.weight", "bias_E"}, "it is saved, the counters are not"
    gradients = [torch.autograd.grad(m(x, ForwardContext()).weight_M.sum(), m.gate.weight) for m in (made, plain)]
    assert torch.equal(gradients[0][0], gradients[1][0]), "at a bias of 0 nothing has changed"


def test_the_bias_balances_a_skewed_router(router, randn):
    made, x = router(n_experts=8, k=2, score="sigmoid", bias_rate=0.005), randn(256, 6)
    x[:, 0] = 1.0
    with torch.no_grad():
        made.gate.weight[:, 0] = torch.linspace(-2, 2, 8)  # the last experts are everybody's
    peaks = []
    for _ in range(500):
        made(x, ForwardContext())
        peaks.append(float(made.chosen_E.max() / made.chosen_E.mean()))
        made.after_step({"chosen_E": made.chosen_E})
    assert peaks[0] > 2.5
    assert sum(peaks[-20:]) / 20 < 1.15
