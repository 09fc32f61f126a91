"""mosa against its formula, a head and a token at a time, and against multi-head attention where it must be that."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model

D, H, K, T = 8, 3, 4, 13


@pytest.fixture
def mosa(component):
    return lambda **params: component("attention", {"type": "mosa", "n_heads": H, "head_dim": K, **params}, d_model=D)


def turned(vector, position):
    """rope: pair (i, i + K/2) by position 10000^(-2i/K)."""
    out = list(vector)
    for i in range(K // 2):
        angle = position * 10000 ** (-2 * i / K)
        a, b = vector[i], vector[i + K // 2]
        out[i], out[i + K // 2] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(out)


def by_hand(made, x, k, documents=None, first=False):
    """The output [T, D] of one sequence without the dense part, and what each head chose."""
    length, out, choices = len(x), torch.zeros_like(x), []
    documents = documents or [0] * length
    for h in range(H):
        scores = [1 / (1 + math.exp(-float(made.router.weight[h] @ row))) for row in x]
        chosen = []
        for document in sorted(set(documents)):
            own = [t for t in range(length) if documents[t] == document]
            ranked = sorted(own, key=lambda t: (first and t == own[0], scores[t]), reverse=True)
            chosen += ranked[: len(own) * k // length]
        choices.append(sorted(chosen))
        for t in chosen:
            seen = [s for s in chosen if s <= t and documents[s] == documents[t]]
            q = turned(made.q.weight[h] @ x[t], t)
            logits = torch.stack([q @ turned(made.k.weight[h] @ x[s], s) for s in seen]) / math.sqrt(K)
            p = logits.softmax(0)
            z = sum(a * (made.v.weight[h] @ x[s]) for a, s in zip(p, seen, strict=True))
            out[t] += scores[t] * (made.o.weight[h] @ z)
    return out, choices


@pytest.mark.parametrize(("sparsity", "k"), [(1, T), (2, 6), (4, 3), (1000, 2)])
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_by_hand(mosa, randn, sparsity, k, first):
    made, x = mosa(sparsity=sparsity, include_first=first), randn(2, T, D)
    got = made(x, ForwardContext())
    for b in range(2):
        wanted, choices = by_hand(made, x[b], k, first=first)
        assert (got[b] - wanted).abs().max() < 1e-9
        assert all(len(chosen) == k for chosen in choices)
        assert not first or all(chosen[0] == 0 for chosen in choices)


@torch.no_grad()
def test_positions_are_the_given_ones(mosa, randn):
    """Scores go by differences of positions, so that all shifted alike give the same, and some apart another."""
    made, x = mosa(sparsity=2), randn(1, T, D)
    plain = made(x, ForwardContext())
    shifted = made(x, ForwardContext(positions_BT=torch.arange(T)[None] + 7))
    apart = made(x, ForwardContext(positions_BT=torch.arange(T)[None] * 3))
    assert (plain - shifted).abs().max() < 1e-9
    assert (plain - apart).abs().max() > 1e-6


@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_documents_choose_among_their_own(mosa, randn, first):
    """k is 6 of 13: a document of 1 gets none, of 5 two and of 7 three."""
    made, x, documents = mosa(sparsity=2, include_first=first), randn(2, T, D), [0] + [1] * 5 + [2] * 7
    got = made(x, ForwardContext(documents_BT=torch.tensor([documents, documents])))
    for b in range(2):
        wanted, choices = by_hand(made, x[b], 6, documents, first)
        assert [len(chosen) for chosen in choices] == [5] * H
        assert (got[b] - wanted).abs().max() < 1e-9


@torch.no_grad()
def test_all_tokens_at_full_weight_are_multi_head_attention(mosa, component, randn):
    made, x = mosa(sparsity=1), randn(2, T, D)
    made.router.register_forward_hook(lambda module, inputs, output: output.new_full(output.shape, 1e4))
    full = component("attention", {"type": "mha", "n_heads": H, "head_dim": K}, d_model=D)
    for name in "qkv":
        full.get_submodule(name).weight.copy_(made.get_submodule(name).weight.flatten(0, 1))
    full.o.weight.copy_(made.o.weight.permute(1, 0, 2).flatten(1))
    assert (made(x, ForwardContext()) - full(x, ForwardContext())).abs().max() < 1e-9


@torch.no_grad()
def test_a_head_has_k_keys(mosa, randn):
    made, seen = mosa(sparsity=4), []
    made.kernel.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].shape))
    made(randn(2, T, D), ForwardContext())
    assert seen == [(H * 2, 1, 3, K)]


@torch.no_grad()
def test_the_choice_leaks_the_future(mosa, randn):
    """A later token that a head likes takes the place of an earlier one; where all are taken, nothing leaks."""
    x = randn(1, T, D)
    other = x.clone()
    other[0, -1] = 5 * randn(D)
    for sparsity, leaks in ((4, True), (1, False)):
        made = mosa(sparsity=sparsity)
        moved = (made(x, ForwardContext()) - made(other, ForwardContext()))[0, :-1].abs().max()
        assert bool(moved > 1e-6) is leaks
    assert made.causal is False


@torch.no_grad()
def test_dense_is_added(mosa, randn):
    dense = {"type": "mha", "n_heads": 2, "window": 3}
    made, x = mosa(dense=dense), randn(2, T, D)
    beside = made.dense(x, ForwardContext())
    made.dense = None
    assert (mosa(dense=dense)(x, ForwardContext()) - made(x, ForwardContext()) - beside).abs().max() < 1e-12
    assert mosa(dense=dense).prepare(T, x.device, ForwardContext()) is not None, "its mask is shared by layers"


def test_costs_are_those_of_the_chosen(mosa):
    made, one_head = mosa(sparsity=4), 4 * D * K
    gate, chosen = H * D, 3
    assert made.active_parameters() == round(gate + H / 4 * one_head)
    pairs = 4 * H * K * chosen**2 / T
    assert made.flops_per_token(T) == pytest.approx(2 * (gate + H * chosen / T * one_head) + pairs)
    assert sum(p.numel() for p in made.parameters()) == gate + H * one_head
    assert made.cache_bytes_per_token(2) == 0


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"n_heads": 3}, r"d_model \(8\) is not divisible by n_heads \(3\); give head_dim"),
        ({"position": "alibi"}, "position 'alibi' goes by places among the chosen tokens; use rope"),
        ({"sparsity": 0.5}, r"sparsity: expected greater than or equal to 1, got 0\.5"),
    ],
)
def test_mistakes(params, told):
    block = {"attention": {"type": "mosa", "n_heads": 2, **params}, "ffn": {"type": "swiglu", "d_ff": 16}}
    with pytest.raises(SpecError, match=told):
        build_model({"d_model": 8, "n_layers": 1, "vocab_size": 19, "max_seq_len": 48, "block": block})
