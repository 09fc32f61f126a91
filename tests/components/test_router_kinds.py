"""The routers noisy_top_k, switch, expert_choice, top_p and hash against their papers."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.components.routers import capacity
from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model
from tests.components.test_routers import best, logits_of, losses, scores_of


@pytest.fixture
def router(component):
    def make(kind, n_experts=5, **params):
        return component("router", {"type": kind, **params}, d_model=6, facts={"n_experts": n_experts})

    return make


@pytest.fixture
def mixture(component):
    """A mixture of small experts of one hidden layer, and the dense softmax mixture of the same weights."""

    def make(router, n_experts=4, **params):
        expert = {"type": "mlp", "d_ff": 7, "activation": "relu"}
        return component(
            "ffn", {"type": "moe", "n_experts": n_experts, "router": router, "expert": expert, **params}, 6
        )

    return make


def expert_of(made, e, x):
    """Expert e of a mixture on tokens [N, D]."""
    return torch.relu(x @ made.experts.up.weight[e].T) @ made.experts.down.weight[e].T


def dense(made, x):
    """sum over all experts of softmax(W x)_e FFN_e(x)."""
    p = (x @ made.router.gate.weight.T).softmax(-1)
    return sum(p[:, e : e + 1] * expert_of(made, e, x) for e in range(made.n_experts))


def close(got, wanted, atol=1e-12):
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


# --- noisy_top_k


@pytest.mark.parametrize("k", [1, 3, 5])
def test_noisy_top_k_in_eval(router, randn, k):
    """Softmax over the k largest of the clean logits."""
    made, x = router("noisy_top_k", k=k).eval(), randn(9, 6)
    experts, weights = [], []
    for row in logits_of(made, x):
        chosen = best([row], k)[0]
        experts += chosen
        weights += [math.exp(row[e]) / sum(math.exp(row[f]) for f in chosen) for e in chosen]
    routing = made(x, ForwardContext())
    assert routing.expert_M.tolist() == experts
    close(routing.weight_M, torch.tensor(weights, dtype=torch.float64))


def noisy(made, x, seed=0):
    """(clean, spread, noisy) of a training forward at a seed; [N, E]."""
    clean, spread = x @ made.gate.weight.T, torch.log(1 + torch.exp(x @ made.noise.weight.T))
    torch.manual_seed(seed)
    return clean, spread, clean + torch.randn_like(clean) * spread


def variation(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


@pytest.mark.parametrize("k", [1, 2, 4])
def test_noisy_top_k_in_training(router, randn, k):
    """Shazeer et al. 2017, eq. 3-11, a token and an expert at a time."""
    made, x = router("noisy_top_k", k=k).train(), randn(11, 6)
    clean, spread, h = (z.tolist() for z in noisy(made, x))
    torch.manual_seed(0)
    routing = made(x, ForwardContext())
    importance, load, weights = [0.0] * 5, [0.0] * 5, []
    for n in range(11):
        chosen = best([h[n]], k)[0]
        for e in chosen:
            weights.append(math.exp(h[n][e]) / sum(math.exp(h[n][f]) for f in chosen))
            importance[e] += weights[-1]  # 6
        for e in range(5):
            others = sorted((h[n][f] for f in range(5) if f != e), reverse=True)
            z = (clean[n][e] - others[k - 1]) / spread[n][e]  # 9: kth_excluding
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))  # 10
    close(routing.weight_M, torch.tensor(weights, dtype=torch.float64))
    assert float(made.importance_loss) == pytest.approx(variation(importance), rel=1e-8)
    assert float(made.load_loss) == pytest.approx(variation(load), rel=1e-8)


def test_with_all_experts_chosen_their_load_is_even(router, randn):
    made = router("noisy_top_k", k=5).train()
    made(randn(11, 6), ForwardContext())
    assert float(made.load_loss) == 0
    assert float(made.importance_loss) > 0


def test_the_gradient_of_importance_and_load(router, randn):
    made = router("noisy_top_k", k=2, w_importance=0.3, w_load=0.7).train()
    x, leaves = randn(11, 6), [made.gate.weight, made.noise.weight]
    torch.manual_seed(0)
    got = torch.autograd.grad(0 * made(x, ForwardContext(loss_scale=0.5)).weight_M.sum(), leaves)
    clean, spread, h = noisy(made, x)
    top, chosen = h.topk(2)
    gates = torch.zeros_like(h).scatter(1, chosen, top.softmax(-1))
    chances = torch.zeros_like(h)
    for e in range(5):
        rival = torch.cat((h[:, :e], h[:, e + 1 :]), 1).sort(descending=True).values[:, 1]
        chances[:, e] = 0.5 * (1 + torch.erf((clean[:, e] - rival) / spread[:, e] / math.sqrt(2)))
    total = sum(w * v.sum(0).var(correction=0) / v.sum(0).mean() ** 2 for w, v in ((0.3, gates), (0.7, chances)))
    for one, other in zip(got, torch.autograd.grad(0.5 * total, leaves), strict=True):
        close(one, other, 1e-9)


def test_the_chance_of_choice_by_drawing_again(router, randn):
    """Eq. 8: only expert e's own noise is drawn again; of 20000 draws a share is known to 0.0036."""
    made, x = router("noisy_top_k", k=2).train(), randn(3, 6)
    clean, spread, h = noisy(made, x)
    got = made._chance_of_choice(clean, h, spread)
    for e in range(5):
        again = h[None].repeat(20000, 1, 1)
        again[..., e] = clean[:, e] + spread[:, e] * randn(20000, 3)
        drawn = (again.topk(2).indices == e).any(-1).double().mean(0)
        close(got[:, e], drawn, 0.018)


# --- switch


def by_position(experts, n_experts, capacity):
    """The experts of tokens in order, those past an expert's capacity replaced by n_experts."""
    seen, out = [0] * n_experts, []
    for e in experts:
        seen[e] += 1
        out.append(e if seen[e] <= capacity else n_experts)
    return out


def test_a_capacity_that_is_whole_stays_so():
    assert [capacity(1.1, 30, 11), capacity(1.25, 8, 10), capacity(1.25, 9, 10), capacity(1.0, 0, 4)] == [3, 1, 2, 0]


@pytest.mark.parametrize(("factor", "n_tokens"), [(1.0, 20), (1.25, 20), (0.3, 20), (2.0, 7), (1.1, 1)])
def test_switch(router, randn, factor, n_tokens):
    made, x = router("switch", capacity_factor=factor).train(), randn(n_tokens, 6)
    routing = made(x, ForwardContext())
    logits = logits_of(made, x)
    scores = scores_of(logits, "softmax")
    chosen = [row[0] for row in best(scores, 1)]
    wanted = by_position(chosen, 5, math.ceil(factor * n_tokens / 5))
    assert routing.expert_M.tolist() == wanted
    close(routing.weight_M, torch.tensor([max(row) for row in scores], dtype=torch.float64))
    assert float(made.dropped) == pytest.approx(wanted.count(5) / n_tokens, abs=1e-15)
    assert float(made.confidence) == pytest.approx(sum(map(max, scores)) / n_tokens, abs=1e-14)
    assert float(made.load_balance_loss) == pytest.approx(losses(logits, scores, 1)[0], abs=1e-12), "f counts all"


def test_switch_loses_1_at_uniform(router):
    """METHODS 78: aux / alpha is 1 where f and P are uniform."""
    made = router("switch", n_experts=6).train()
    with torch.no_grad():
        made.gate.weight.copy_(torch.eye(6))
    made(torch.eye(6).double(), ForwardContext())
    assert float(made.load_balance_loss) == pytest.approx(1.0, abs=1e-14)
    assert float(made.dropped) == 0


def test_switch_of_one_expert_is_a_dense_feed_forward(mixture, randn):
    made, x = mixture({"type": "switch", "capacity_factor": 1.0}, n_experts=1), randn(2, 5, 6)
    close(made(x, ForwardContext()), expert_of(made, 0, x))


def test_switch_drops_nobody_where_an_expert_has_room_for_all(mixture, randn):
    made, x = mixture({"type": "switch", "capacity_factor": 4.0}), randn(30, 6)
    x[:, 0] = 3.0
    with torch.no_grad():
        made.router.gate.weight[2, 0] = 10.0  # all of them want expert 2
    made(x[None], ForwardContext())
    assert made.load.tolist() == [0, 0, 1, 0]
    assert float(made.router.dropped) == 0


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_switch_gives_nothing_to_the_tokens_it_drops(mixture, randn, dispatch):
    made, x = mixture({"type": "switch", "capacity_factor": 0.5}, dispatch=dispatch), randn(16, 6)
    y, p = made(x.view(2, 8, 6), ForwardContext()).view(16, 6), (x @ made.router.gate.weight.T).softmax(-1)
    kept = by_position(p.argmax(-1).tolist(), 4, 2)
    for n, e in enumerate(kept):
        close(y[n], p[n, e] * expert_of(made, e, x[n]) if e < 4 else torch.zeros(6).double())
    assert float(made.router.dropped) == kept.count(4) / 16 > 0
    assert made.load.tolist() == pytest.approx([kept.count(e) / 16 for e in range(4)], abs=1e-15)


def test_the_gradient_reaches_a_switch_only_through_p(mixture, randn):
    made, x = mixture({"type": "switch", "capacity_factor": 4.0, "load_balance": 0.0}), randn(12, 6)
    weight, direction = made.router.gate.weight, randn(12, 6)
    (got,) = torch.autograd.grad((made(x, ForwardContext()) * direction).sum(), weight)
    p, chosen = (x @ weight.T).softmax(-1).max(-1)
    value = torch.stack([expert_of(made, int(e), x[n]) for n, e in enumerate(chosen)]).detach()
    (wanted,) = torch.autograd.grad((p * (value * direction).sum(-1)).sum(), weight)
    close(got, wanted)


# --- expert_choice


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0, 3.0, 5.0])
def test_expert_choice(router, randn, factor):
    made, x = router("expert_choice", capacity_factor=factor), randn(11, 6)
    scores, capacity = scores_of(logits_of(made, x), "softmax"), math.ceil(factor * 11 / 5)
    tokens, experts, weights = [], [], []
    for e in range(5):
        chosen = sorted(range(11), key=lambda n: -scores[n][e])[:capacity]
        tokens += chosen
        experts += [e] * len(chosen)
        weights += [scores[n][e] for n in chosen]
    routing = made(x, ForwardContext())
    assert routing.token_M.tolist() == tokens
    assert routing.expert_M.tolist() == experts
    close(routing.weight_M, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_expert_choice_of_all_tokens_is_a_dense_mixture(mixture, randn, dispatch):
    """METHODS 108."""
    made, x = mixture({"type": "expert_choice", "capacity_factor": 4.0}, dispatch=dispatch), randn(12, 6)
    close(made(x, ForwardContext()), dense(made, x))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_expert_choice_loads_all_alike(mixture, randn, factor):
    made = mixture({"type": "expert_choice", "capacity_factor": factor})
    made(randn(2, 8, 6), ForwardContext())
    assert made.load.tolist() == [factor / 4] * 4
    assert float(made.load_max) == pytest.approx(1, abs=1e-6)
    assert float(made.load_entropy) == pytest.approx(1, abs=1e-6)


def test_expert_choice_sees_the_future(mixture, randn):
    """METHODS 108: what becomes of earlier tokens depends on the last; so it is declared, and refused in training."""
    made, x = mixture({"type": "expert_choice", "capacity_factor": 1.0}), randn(1, 8, 6)
    other, moved = x.clone(), []
    for scale in (0.0, 5.0):
        other[0, -1] = scale * x[0, -1]
        moved.append((made(x, ForwardContext()) != made(other, ForwardContext()))[0, :-1].any())
    assert any(moved)
    assert not made.router.causal
    assert made.router.batch_coupled


# --- top_p


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.6, 0.9, 1.0])
def test_top_p(router, randn, p, limit):
    made, x = router("top_p", p=p, max_experts=limit).train(), randn(30, 6)
    routing, width = made(x, ForwardContext()), limit or 5
    experts, weights = routing.expert_M.view(30, width).tolist(), routing.weight_M.view(30, width).tolist()
    visits = []
    for row, got, given in zip(scores_of(logits_of(made, x), "softmax"), experts, weights, strict=True):
        kept, mass = [], 0.0
        for e in best([row], 5)[0]:
            if mass < p and len(kept) < width:
                kept.append(e)
                mass += row[e]
        assert got == kept + [5] * (width - len(kept))
        assert given == pytest.approx([row[e] for e in kept] + [0.0] * (width - len(kept)), abs=1e-14)
        assert mass >= p - 1e-12 or len(kept) == width
        assert mass - row[kept[-1]] < p, "one fewer would hold less than p"
        visits.append(len(kept))
    assert float(made.experts) == pytest.approx(sum(visits) / 30, abs=1e-14)
    assert max(visits) > min(visits) or p in (0.05, 1.0) or limit


def test_top_p_balances_first_choices(router, randn):
    """METHODS 16: E sum_e mean(p_e) share_e, the share of tokens whose likeliest expert is e."""
    made, x = router("top_p", p=0.7).train(), randn(30, 6)
    made(x, ForwardContext())
    logits = logits_of(made, x)
    assert float(made.load_balance_loss) == pytest.approx(losses(logits, scores_of(logits, "softmax"), 1)[0], abs=1e-12)


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_the_ends_of_top_p(mixture, randn, dispatch):
    """METHODS 16: a tiny p is top-1, p = 1 the dense softmax mixture."""
    x = randn(12, 6)
    every = mixture({"type": "top_p", "p": 1.0}, dispatch=dispatch).eval()
    close(every(x, ForwardContext()), dense(every, x))
    one = mixture({"type": "top_p", "p": 1e-9}, dispatch=dispatch).eval()
    top = mixture({"type": "top_k", "k": 1}, dispatch=dispatch).eval()
    top.load_state_dict(one.state_dict())
    close(one(x, ForwardContext()), top(x, ForwardContext()))


# --- hash


def told(ids):
    return ForwardContext(ids_BT=torch.as_tensor(ids))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_hash_sends_an_id_to_the_same_distinct_experts(router, randn, k):
    made, ids = router("hash", n_experts=8, k=k), torch.randint(500, (4, 50))
    routing = made(randn(200, 6), told(ids))
    assert torch.equal(routing.weight_M, torch.full((200 * k,), 1 / k, dtype=torch.float64))
    places: dict[int, list[int]] = {}
    for token, experts in zip(ids.flatten().tolist(), routing.expert_M.view(200, k).tolist(), strict=True):
        assert len(set(experts)) == k
        assert places.setdefault(token, experts) == experts
    again = made(randn(200, 6), told(ids.flip(0)))
    assert torch.equal(again.expert_M.view(4, 50, k), routing.expert_M.view(4, 50, k).flip(0))


@pytest.mark.parametrize("n_experts", [2, 8, 7, 64])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_hash_spreads_ids_evenly(router, randn, n_experts, seed):
    """chi^2 of E counts has mean E - 1 and variance 2 (E - 1) for a random table; runs and strides of ids alike."""
    made = router("hash", n_experts=n_experts, seed=seed)
    for ids in (torch.arange(20000), 64 * torch.arange(20000), 50000 + torch.arange(20000)):
        counts = made(randn(20000, 6), told(ids)).expert_M.bincount(minlength=n_experts).double()
        mean = 20000 / n_experts
        chi = float(((counts - mean) ** 2 / mean).sum())
        assert chi < n_experts - 1 + 5 * math.sqrt(2 * (n_experts - 1)), (ids[1], chi)


def test_seeds_of_the_hash_are_different_tables(router, randn):
    tables = [router("hash", n_experts=8, seed=s)(randn(5000, 6), told(torch.arange(5000))).expert_M for s in (0, 1)]
    # of two random tables a share 1/8 agrees, known to 0.0047
    assert abs(float((tables[0] == tables[1]).double().mean()) - 1 / 8) < 0.025


def test_hash_needs_ids(router, randn):
    with pytest.raises(TypeError, match="the hash router needs context.ids_BT"):
        router("hash")(randn(4, 6), ForwardContext())


def test_hash_knows_the_ids_inside_experts_too(tiny, moe):
    inner = moe(router={"type": "hash", "k": 2})
    ids, logits = torch.arange(60).view(3, 20), []
    for dispatch in ("grouped", "loop"):
        spec = tiny(ffn=moe(expert={**inner, "dispatch": dispatch}, shared_expert=inner))
        logits.append(build_model(spec, dtype=torch.float64).eval()(ids))
    close(logits[0], logits[1])


@pytest.mark.parametrize("kind", ["hash", "noisy_top_k"])
def test_more_experts_a_token_than_there_are_are_refused(tiny, moe, kind):
    with pytest.raises(SparsekitError, match=r"k \(5\) is above n_experts \(4\)"):
        build_model(tiny(ffn=moe(router={"type": kind, "k": 5})))
