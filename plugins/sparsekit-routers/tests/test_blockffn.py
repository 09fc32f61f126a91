"""blockffn against its formulas, a token at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SparsekitError

E, T, CHUNK = 5, 7, 3


@pytest.fixture
def router(component):
    return lambda **params: component("router", {"type": "blockffn", "chunk": CHUNK, **params}, n_experts=E)


def scores_of(made, x):
    return [[max(0.0, z) for z in raw_of(made, row)] for row in x]


def raw_of(made, row):
    return [sum(w * v for w, v in zip(weights, row.tolist(), strict=True)) for weights in made.gate.weight.tolist()]


def weights_of(made, scores):
    """relu, then RMSNorm, by hand; 0 where no expert is wanted."""
    eps, gain = made.params.norm.params.eps, made.norm.weight.tolist()
    return [[gain[e] * a[e] / math.sqrt(sum(v * v for v in a) / E + eps) for e in range(E)] for a in scores]


def test_router(router, randn):
    made, x = router().eval(), randn(2 * T, 6)
    scores = scores_of(made, x)
    routing = made(x, ForwardContext())
    assert routing.token_M is None
    assert not routing.complete
    wanted = [e if a[e] > 0 else E for a in scores for e in range(E)]
    assert routing.expert_M.tolist() == wanted
    assert 0 < wanted.count(E) < len(wanted)
    weights = torch.tensor(weights_of(made, scores), dtype=torch.float64).flatten()
    torch.testing.assert_close(routing.weight_M, weights, rtol=0, atol=1e-9)


def test_mixture(component, randn):
    """The whole layer as a double loop, to 1e-9, grouped and looped."""
    router = {"type": "blockffn", "chunk_loss": 0, "locality_loss": 0}
    expert = {"type": "mlp", "d_ff": 4, "activation": "silu"}
    x = randn(2, T, 6)
    for dispatch in ("grouped", "loop"):
        slot = {"type": "moe", "n_experts": E, "router": router, "expert": expert, "dispatch": dispatch}
        made = component("ffn", slot)
        up, down = made.experts.up.weight, made.experts.down.weight
        got = made(x, ForwardContext())
        for b in range(2):
            weights = weights_of(made.router, scores_of(made.router, x[b]))
            for t in range(T):
                y = torch.zeros(6, dtype=torch.float64)
                for e in range(E):
                    hidden = up[e] @ x[b, t]
                    y += weights[t][e] * (down[e] @ (hidden * torch.sigmoid(hidden)))
                assert (got[b, t] - y).abs().max() < 1e-9


def test_the_size_of_the_scores_does_not_matter(router, randn):
    made, x = router(norm={"type": "rmsnorm", "eps": 1e-30}).eval(), randn(9, 6)
    before = made(x, ForwardContext())
    after = made(37.0 * x, ForwardContext())
    torch.testing.assert_close(before.weight_M, after.weight_M, rtol=1e-12, atol=0)
    assert before.expert_M.tolist() == after.expert_M.tolist()


def losses_of(made, x):
    """(chunk loss, chunk sparsity, locality loss) of sequences [B, T, D], from the definitions."""
    misses, silent, n_chunks, bce, n_pairs = 0.0, 0, 0, 0.0, 0
    for sequence in x:
        scores = scores_of(made, sequence)
        p = [[a / sum(row) if sum(row) else 0.0 for a in row] for row in scores]
        for start in range(0, len(p), made.params.chunk):
            n_chunks += 1
            for e in range(E):
                missed = math.prod(1 - row[e] for row in p[start : start + made.params.chunk])
                misses += missed
                silent += all(row[e] == 0 for row in p[start : start + made.params.chunk])
        raw = [[made.params.sharpness * z for z in raw_of(made, row)] for row in sequence]
        for before, now in pairwise(raw):
            for a, b in zip(before, now, strict=True):
                target, guess = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
                bce -= target * math.log(guess) + (1 - target) * math.log(1 - guess)
                n_pairs += 1
    return 1 - misses / (n_chunks * E), silent / (n_chunks * E), bce / n_pairs


@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_losses(router, randn, chunk):
    made, x = router(chunk=chunk).train(), randn(2, T, 6)
    made(x.flatten(0, 1), ForwardContext(seq_len=T))
    chunk_loss, chunk_sparsity, locality = losses_of(made, x)
    assert float(made.chunk_loss) == pytest.approx(chunk_loss, abs=1e-9)
    assert float(made.chunk_sparsity) == pytest.approx(chunk_sparsity, abs=1e-9)
    assert float(made.locality_loss) == pytest.approx(locality, abs=1e-9)
    zeros = sum(a == 0 for row in scores_of(made, x.flatten(0, 1)) for a in row)
    assert float(made.token_sparsity) == pytest.approx(zeros / (2 * T * E))
    if chunk == 1:  # then the loss is the mean of p, which sums to 1 over experts
        wanted = [sum(row) > 0 for row in scores_of(made, x.flatten(0, 1))]
        assert float(made.chunk_loss) == pytest.approx(sum(wanted) / (2 * T * E))


def test_the_gradient_of_the_losses(router, randn):
    """By differences in the router's weight; what the mixture makes of the weights adds nothing here."""
    made, x = router(chunk_loss=0.3, locality_loss=0.7).train(), randn(2, T, 6)
    context = ForwardContext(seq_len=T, loss_scale=0.5)
    (got,) = torch.autograd.grad(0 * made(x.flatten(0, 1), context).weight_M.sum(), made.gate.weight)

    def total():
        chunk, _, locality = losses_of(made, x)
        return 0.5 * (0.3 * chunk + 0.7 * locality)

    for e, d in ((0, 0), (3, 4), (4, 5)):
        with torch.no_grad():
            made.gate.weight[e, d] += 1e-5
            above = total()
            made.gate.weight[e, d] -= 2e-5
            below = total()
            made.gate.weight[e, d] += 1e-5
        assert float(got[e, d]) == pytest.approx((above - below) / 2e-5, rel=1e-5)


def test_at_most(router, randn):
    made, x = router(max_experts=2).eval(), randn(9, 6)
    whole = router().eval()
    routing, full = made(x, ForwardContext()), whole(x, ForwardContext())
    weights = full.weight_M.view(9, E).tolist()
    for n, row in enumerate(scores_of(made, x)):
        best = sorted(range(E), key=lambda e: -row[e])[:2]
        wanted = {(e, weights[n][e]) for e in best if row[e] > 0}
        pairs = zip(routing.expert_M.view(9, 2)[n].tolist(), routing.weight_M.view(9, 2)[n].tolist(), strict=True)
        assert {pair for pair in pairs if pair[0] < E} == wanted


def test_needs_sequences_for_its_losses(router, randn, component):
    with pytest.raises(SparsekitError, match="set chunk_loss and locality_loss to 0 there"):
        router().train()(randn(9, 6), ForwardContext())
    inner = {"type": "moe", "n_experts": 2, "router": "blockffn", "expert": {"type": "mlp", "d_ff": 3}}
    made = component("ffn", {"type": "moe", "n_experts": 2, "expert": inner}).train()
    with pytest.raises(SparsekitError, match="which a mixture inside an expert cannot tell"):
        made(randn(1, 4, 6), ForwardContext())


def test_the_losses_make_neighbours_share_experts(router, randn):
    """Descending on the losses alone, more experts are out of use by a whole chunk."""
    made, x = router(chunk_loss=1.0, locality_loss=1.0).train(), randn(4 * T, 6)
    context = ForwardContext(seq_len=T)
    made(x, context)
    before = float(made.chunk_sparsity)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        (0 * made(x, context).weight_M.sum()).backward()
        optimizer.step()
    made(x, context)
    assert float(made.chunk_sparsity) > before + 0.1
