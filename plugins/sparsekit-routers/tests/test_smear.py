"""smear against an expert that is merged by hand."""

from __future__ import annotations

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model
from sparsekit.model.generate import can_cache, generate

E, T = 3, 10
EXPERTS = [
    {"type": "mlp", "d_ff": 5, "activation": "relu", "bias": True},
    {"type": "swiglu", "d_ff": 5},
    {"type": "top_k_ffn", "d_ff": 5, "k": 2},
]


def merged(component, made, expert, gates):
    """A lone feed-forward with the weights sum_e g_e W_e."""
    one = component("ffn", expert)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            stacked = made.experts.get_parameter(name)
            parameter.copy_(sum(g * stacked[e] for e, g in enumerate(gates)))
    return one


@pytest.mark.parametrize("expert", EXPERTS, ids=lambda slot: slot["type"])
@pytest.mark.parametrize("segment", [None, 1, 4, 5, 64])
def test_smear(component, randn, expert, segment):
    made, x = component("ffn", {"type": "smear", "n_experts": E, "expert": expert, "segment": segment}), randn(2, T, 6)
    got, size = made(x, ForwardContext()), segment or T
    for b in range(2):
        for start in range(0, T, size):
            source = x[b] if segment is None else x[b, start - size : start]
            mean = sum(source) / len(source) if len(source) else torch.zeros(6, dtype=torch.float64)
            gates = torch.softmax(torch.stack([row @ mean for row in made.gate.weight]), 0).tolist()
            one = merged(component, made, expert, gates)
            for t in range(start, min(start + size, T)):
                assert (got[b, t] - one(x[b, t], ForwardContext())).abs().max() < 1e-9


def test_one_hot_gates_give_that_expert(component, randn):
    made, x = component("ffn", {"type": "smear", "n_experts": E, "expert": EXPERTS[1]}), randn(1, T, 6)
    with torch.no_grad():
        made.gate.weight.zero_()
        made.gate.weight[1] = 1e4 * x.mean(1)[0]
    one = merged(component, made, EXPERTS[1], [0.0, 1.0, 0.0])
    assert (made(x, ForwardContext()) - one(x, ForwardContext())).abs().max() < 1e-12


def test_of_linear_experts_the_merger_is_the_ensemble(component, randn):
    """With nothing that bends between up and down, and one of them alike in all, weights and outputs mix alike."""
    made = component("ffn", {"type": "smear", "n_experts": E, "expert": EXPERTS[0]})
    made.experts.activation = torch.nn.Identity()
    x = randn(2, T, 6)
    with torch.no_grad():
        made.experts.up.weight.copy_(made.experts.up.weight[:1].expand_as(made.experts.up.weight))
        made.experts.up.bias.copy_(made.experts.up.bias[:1].expand_as(made.experts.up.bias))
    up, down = made.experts.up, made.experts.down
    gates = torch.softmax(x.mean(1) @ made.gate.weight.T, -1)
    each = [(x @ up.weight[e].T + up.bias[e]) @ down.weight[e].T + down.bias[e] for e in range(E)]
    ensemble = sum(gates[:, e, None, None] * each[e] for e in range(E))
    assert (made(x, ForwardContext()) - ensemble).abs().max() < 1e-12


def test_what_is_seen_of_the_future(component, randn):
    x = randn(1, T, 6)
    other = x.clone()
    other[0, 7] += 1
    for segment, leaks in ((None, True), (4, False)):
        made = component("ffn", {"type": "smear", "n_experts": E, "expert": EXPERTS[1], "segment": segment})
        assert made.causal is not leaks
        moved = (made(x, ForwardContext()) - made(other, ForwardContext()))[0, :7].abs().max()
        assert bool(moved > 1e-6) is leaks


def model(ffn):
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": ffn}
    return build_model({"d_model": 8, "n_layers": 1, "vocab_size": 11, "max_seq_len": 32, "block": block})


def test_generation_runs_the_whole_sequence():
    """A cache of keys and values remembers no segment; token by token would give other tokens."""
    made = model({"type": "smear", "n_experts": E, "expert": EXPERTS[1], "segment": 4}).eval()
    assert not can_cache(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(20)
    ids = [1, 2, 3]
    for token in generate(made, ids, max_new_tokens=9, temperature=0):
        with torch.no_grad():
            assert int(made(torch.tensor([ids]))[0, -1].argmax()) == token
        ids = [*ids, token]
    assert len(ids) == 12


def test_it_is_no_expert_and_some_are_not_its_experts():
    smear = {"type": "smear", "n_experts": E, "expert": EXPERTS[1]}
    with pytest.raises(SpecError, match=r"'smear' wants whole sequences, of which an expert is sent a few tokens"):
        model({"type": "moe", "n_experts": 2, "expert": smear})
    with pytest.raises(SpecError, match=r"expert 'moe' has weights that cannot be blended"):
        model({"type": "smear", "n_experts": 2, "expert": {"type": "moe", "n_experts": 2, "expert": EXPERTS[1]}})
