"""nsa against its formulas, a query and a head at a time, and against full attention where it must be that."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model
from sparsekit.model.generate import can_cache, generate, generate_batch, together
from sparsekit.model.sampling import Sampling

D, H, G, K, T = 12, 4, 2, 4, 23
SMALL = {"block": 4, "stride": 2, "select_block": 4, "n_select": 3, "n_local": 1, "window": 5}


@pytest.fixture
def nsa(component):
    def make(**params):
        slot = {"type": "nsa", "n_heads": H, "n_kv_heads": G, "head_dim": K, "position": "none", **SMALL, **params}
        return component("attention", slot, d_model=D)

    return make


def softmax(scores):
    top = max(scores)
    total = sum(math.exp(s - top) for s in scores)
    return [math.exp(s - top) / total for s in scores]


def attend(q, keys, values):
    p = softmax([float(q @ k) / math.sqrt(K) for k in keys])
    return sum(a * v for a, v in zip(p, values, strict=True))


def summary(made, blocks):
    """phi of one block [l, K]."""
    hidden = made.inner.weight @ (blocks + made.place_LK).flatten()
    return made.outer.weight @ (0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


def by_hand(made, x, documents=None):
    """The output [T, D] of one sequence, and the blocks that each query and key head chose."""
    p, length = made.params, len(x)
    q = (made.q.weight @ x.T).T.view(length, H, K)
    k, v = ((linear.weight @ x.T).T.view(length, 3, G, K) for linear in (made.k, made.v))
    out, choices = torch.zeros(length, H, K, dtype=x.dtype), {}
    starts = range(0, length - p.block + 1, p.stride)
    for g in range(G):
        ks = {i: summary(made.sum_k, k[i : i + p.block, 0, g]) for i in starts}
        vs = {i: summary(made.sum_v, v[i : i + p.block, 0, g]) for i in starts}
        for t in range(length):
            begin = 0 if documents is None else documents.index(documents[t])
            whole = [i for i in starts if begin <= i and i + p.block - 1 <= t]
            heads = range(g * H // G, (g + 1) * H // G)
            scores = {}
            for h in heads:
                if whole:
                    probabilities = softmax([float(q[t, h] @ ks[i]) / math.sqrt(K) for i in whole])
                    out[t, h] += gate(made, x[t], 0, h) * sum(
                        a * vs[i] for a, i in zip(probabilities, whole, strict=True)
                    )
                    for a, i in zip(probabilities, whole, strict=True):
                        for key in range(i, i + p.block, p.stride):  # a stride of keys scores the block it lies in
                            scores[key // p.select_block] = scores.get(key // p.select_block, 0.0) + a
            own, first = t // p.select_block, begin // p.select_block
            always = {first, *(j for j in range(own - p.n_local + 1, own + 1) if j >= first)}
            rest = sorted((j for j in range(first, own + 1) if j not in always), key=lambda j: (-scores.get(j, 0.0), j))
            chosen = always | set(rest[: max(0, p.n_select - len(always))])
            choices[t, g] = chosen
            seen = [s for s in range(begin, t + 1) if s // p.select_block in chosen]
            near = [s for s in range(begin, t + 1) if t - s < p.window]
            for h in heads:
                out[t, h] += gate(made, x[t], 1, h) * attend(q[t, h], k[seen, 1, g], v[seen, 1, g])
                out[t, h] += gate(made, x[t], 2, h) * attend(q[t, h], k[near, 2, g], v[near, 2, g])
    return (made.o.weight @ out.flatten(1).T).T, choices


def gate(made, x, branch, head):
    row = branch * H + head
    return torch.sigmoid(made.gate.weight[row] @ x + made.gate.bias[row])


CASES = [
    {},
    {"stride": 4},
    {"select_block": 8, "n_local": 2},
    {"block": 8},
    {"n_select": 9},
    {"kernel": "eager"},
    {"kernel": "auto"},
    {"block": 32, "stride": 16, "select_block": 16},  # longer than the sequence: nothing is summed up
]


@pytest.mark.parametrize("params", CASES, ids=str)
@torch.no_grad()
def test_by_hand(nsa, randn, params):
    made, x = nsa(**params), randn(2, T, D)
    got = made(x, ForwardContext())
    for b in range(2):
        wanted, choices = by_hand(made, x[b])
        assert (got[b] - wanted).abs().max() < 1e-9
    if not params:
        assert len({frozenset(c) for c in choices.values()}) > 8, "queries choose differently"


@torch.no_grad()
def test_documents(nsa, randn):
    made, x, documents = nsa(), randn(1, T, D), [0] * 9 + [1] * 3 + [2] * 11
    got = made(x, ForwardContext(documents_BT=torch.tensor([documents])))
    assert (got[0] - by_hand(made, x[0], documents)[0]).abs().max() < 1e-9


def only(made, branch):
    """Opens one branch whole and shuts the others."""
    made.gate.weight.zero_()
    made.gate.bias.fill_(-1e4)
    made.gate.bias.view(3, H)[branch] = 1e4


@pytest.mark.parametrize(("branch", "params"), [(1, {"n_select": 6}), (2, {"window": T})])
@pytest.mark.parametrize("position", ["rope", "none"])
@torch.no_grad()
def test_all_blocks_or_a_wide_window_is_full_attention(nsa, component, randn, branch, params, position):
    made, x = nsa(position=position, **params), randn(2, T, D)
    full = component(
        "attention", {"type": "gqa", "n_heads": H, "n_kv_heads": G, "head_dim": K, "position": position}, d_model=D
    )
    only(made, branch)
    full.q.load_state_dict(made.q.state_dict())
    full.o.load_state_dict(made.o.state_dict())
    for name in ("k", "v"):
        full.get_submodule(name).weight.copy_(made.get_submodule(name).weight.view(3, G * K, D)[branch])
    assert (made(x, ForwardContext()) - full(x, ForwardContext())).abs().max() < 1e-9


@torch.no_grad()
def test_of_ones_blocks_a_blocks_score_is_its_keys_probability(nsa, randn):
    """Where summaries and blocks are the same keys, the mapping is the identity, summed over a group's queries."""
    made, x = nsa(block=4, stride=4, select_block=4), randn(1, T, D)
    q, k = (linear(x).unflatten(-1, (-1, K)).transpose(1, 2) for linear in (made.q, made.k))
    query = torch.arange(T)[None]
    _, scores = made._summed(q, k[:, :G], k[:, :G], query, torch.zeros_like(query), ForwardContext())
    chosen = made._chosen(scores, T, query, torch.zeros_like(query))
    for g in range(G):
        for t in range(T):
            own = t // 4
            assert float(scores[0, g, t].sum()) == pytest.approx(H / G if t >= 3 else 0.0)
            ranked = sorted(range(1, own), key=lambda j: -float(scores[0, g, t, j]))
            assert set(chosen[0, g, t].nonzero()[:, 0].tolist()) == {0, own, *ranked[: 3 - len({0, own})]}


def model(**params):
    attention = {"type": "nsa", "n_heads": 4, "n_kv_heads": 2, **SMALL, **params}
    block = {"attention": attention, "ffn": {"type": "swiglu", "d_ff": 16}}
    return build_model({"d_model": 16, "n_layers": 2, "vocab_size": 19, "max_seq_len": 48, "block": block})


def test_generation_with_the_cache_is_that_without():
    made = model().eval()
    assert can_cache(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(10)
    ids = [3, 1, 4]
    for token in generate(made, ids, max_new_tokens=20, temperature=0):
        with torch.no_grad():
            assert int(made(torch.tensor([ids]))[0, -1].argmax()) == token
        ids = [*ids, token]
    assert len(set(ids)) > 4


@pytest.mark.parametrize("compiled", [False, True])
def test_prompts_of_different_lengths_share_a_cache(compiled):
    made, prompts = model().eval(), [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2], [7, 1, 8, 2]]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(10)
    assert together(made, [9, 1, 4]) == [[0, 2, 1]]
    sampling, got = Sampling(temperature=0), [[], [], []]
    options = {"compile": True, "backend": "eager"} if compiled else {}
    for index, token in generate_batch(made, prompts, 12, sampling=sampling, **options):
        got[index].append(token)
    assert got == [list(generate(made, prompt, 12, temperature=0)) for prompt in prompts]


def test_costs_go_by_what_is_seen():
    made, long = model().layers[0].attention, 48
    projections = 2 * 16 * (16 + 48 // 2 * 2 + 12 + 16)  # q, k, v, gate, o
    summaries, keys = 23, 3 * 4 + 5
    summing = 2 * 2 * summaries / long * 2 * (16 * 8 + 8 * 4)
    assert made.flops_per_token(long) == pytest.approx(projections + summing + 4 * (summaries + keys) * 16)
    assert made.cache_bytes_per_token(2) == 2 * 3 * 2 * 4 * 2


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"stride": 3}, r"block \(4\) is not divisible by stride \(3\)"),
        ({"select_block": 5}, r"select_block \(5\) is not divisible by stride \(2\)"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) is not divisible by n_kv_heads \(3\)"),
        ({"block": 64}, r"block \(64\) is longer than max_seq_len \(48\), so that nothing would be summed up"),
        ({"n_select": 1}, r"n_select \(1\) leaves none to choose beside the first block and n_local \(1\)"),
        ({"position": "alibi"}, "position 'alibi' has no distance to a summary; use rope"),
        ({"kernel": "flex"}, "cannot do own_mask; auto or eager or sdpa can"),
    ],
)
def test_mistakes(params, told):
    with pytest.raises(SpecError, match=told):
        model(**params)
