"""stratified against a walk through the strata, a token at a time."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext

EXPERT = {"type": "swiglu", "d_ff": 5}


def walk(made, strata, x):
    """(output, experts visited, [(stratum, probabilities, chosen)]) of one token."""
    start = [sum(strata[:level]) for level in range(len(strata))]
    level, added, visited, asked = 0, torch.zeros_like(x), [], []
    while level < len(strata):
        read = x + added
        if level and len(made.norms):
            norm = made.norms[level - 1]
            read = read / (read.square().mean() + norm.params.eps).sqrt() * norm.weight
        logits = [float(w @ read) for w in made.gates[level].weight.detach()]
        p = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
        best = max(range(len(p)), key=p.__getitem__)
        expert = start[level] + best
        weight = {name: made.experts.get_parameter(f"{name}.weight")[expert] for name in ("gate", "up", "down")}
        gate = weight["gate"] @ read
        added = added + p[best] * (weight["down"] @ (gate * torch.sigmoid(gate) * (weight["up"] @ read)))
        visited.append(expert)
        asked.append((level, p, best, logits))
        level = max(i for i, s in enumerate(start) if s <= expert) + 1
    return added, visited, asked


@pytest.mark.parametrize("strata", [[4], [2, 2], [1, 3, 2], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("norm", [None, "rmsnorm"])
@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_the_walk(component, randn, strata, norm, dispatch):
    slot = {"type": "stratified", "strata": strata, "expert": EXPERT, "norm": norm, "dispatch": dispatch}
    made, x = component("ffn", slot).train(), randn(2, 9, 6)
    got, n_visits = made(x, ForwardContext()), 0
    losses = [[] for _ in strata]
    for b in range(2):
        for t in range(9):
            with torch.no_grad():
                y, visited, asked = walk(made, strata, x[b, t])
            assert (got[b, t] - y).abs().max() < 1e-9
            assert 1 <= len(visited) <= len(strata)
            assert visited == sorted(set(visited)), "strata strictly increase"
            n_visits += len(visited)
            for level, p, best, logits in asked:
                losses[level].append((p, best, math.log(sum(map(math.exp, logits)))))
    assert float(made.passes) == pytest.approx(n_visits / 18)
    assert float(made.load.sum()) == pytest.approx(n_visits / 18)
    balance = z = 0.0
    for there in losses:
        if there:  # of a stratum where no token stands nothing is asked
            n_open = len(there[0][0])
            share = [sum(p[e] for p, _, _ in there) / len(there) for e in range(n_open)]
            chosen = [sum(best == e for _, best, _ in there) / len(there) for e in range(n_open)]
            balance += n_open * sum(a * b for a, b in zip(share, chosen, strict=True))
            z += sum(lse**2 for _, _, lse in there) / len(there)
    assert float(made.load_balance_loss) == pytest.approx(balance / len(strata), rel=1e-9)
    assert float(made.z_loss) == pytest.approx(z / len(strata), rel=1e-9)


def test_one_stratum_is_the_mixture_of_top_1(component, randn):
    """Outputs bit for bit; gradients, the losses' among them, but for the order of sums."""
    x = randn(2, 9, 6)
    one = component("ffn", {"type": "stratified", "strata": [4], "expert": EXPERT}).train()
    router = {"type": "top_k", "k": 1}
    moe = component("ffn", {"type": "moe", "n_experts": 4, "router": router, "expert": EXPERT}).train()
    moe.experts.load_state_dict(one.experts.state_dict())
    moe.router.gate.load_state_dict(one.gates[0].state_dict())
    assert torch.equal(one(x, ForwardContext()), moe(x, ForwardContext()))
    upstream = randn(2, 9, 6)
    pairs = [(one.gates[0].weight, moe.router.gate.weight), (one.experts.down.weight, moe.experts.down.weight)]
    for index in range(2):
        got, wanted = (
            torch.autograd.grad((made(x, ForwardContext()) * upstream).sum(), pair)[0]
            for made, pair in ((one, pairs[index][0]), (moe, pairs[index][1]))
        )
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("strata", "visits"), [([7], 1.0), ([1, 1], 1.5), ([2, 2], 1.5), ([1, 3], 1.25), ([1, 1, 1], 1 + 1 / 2 + 1 / 3)]
)
def test_costs_count_the_visits(component, strata, visits):
    """With experts equally likely, [1, 1] sends half of the tokens on; harmonic numbers for [1, 1, ..]."""
    made = component("ffn", {"type": "stratified", "strata": strata, "expert": EXPERT})
    assert made.experts_per_token == pytest.approx(visits)
    gates = sum(sum(strata[level:]) for level in range(len(strata))) * 6
    assert made.active_parameters() == round(gates + visits * 3 * 6 * 5)
    assert made.flops_per_token(8) == pytest.approx(2 * (gates + visits * 3 * 6 * 5))


def test_no_tokens(component):
    made = component("ffn", {"type": "stratified", "strata": [2, 2], "expert": EXPERT}).train()
    assert made(torch.empty(0, 6, dtype=torch.float64), ForwardContext()).shape == (0, 6)
