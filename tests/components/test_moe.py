"""Mixtures of experts against the formula, token by token and expert by expert."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit.components.contracts import FeedForward, ForwardContext, Routing, counters
from sparsekit.errors import SpecError
from sparsekit.model.build import build_model
from sparsekit.registry import registry

N_EXPERTS = 5


class Given(nn.Module):
    """A router that routes as it is told."""

    def __init__(self, routing: Routing, experts_per_token: float = 2):
        super().__init__()
        self.routing, self.experts_per_token = routing, experts_per_token

    def forward(self, x_ND, context):
        return self.routing


def moe(component, routing=None, dispatch="grouped", expert=None, dtype=torch.float64, **params):
    expert = expert or {"type": "swiglu", "d_ff": 8}
    slot = {"type": "moe", "n_experts": N_EXPERTS, "expert": expert, "dispatch": dispatch, **params}
    made = component("ffn", slot, d_model=8, dtype=dtype)
    if routing is not None:
        made.router = Given(routing)
    return made


def expert_output(experts, e, x):
    """Expert e of grouped swiglu or mlp weights on one token."""
    if isinstance(experts, nn.ModuleList):
        return experts[e](x[None], ForwardContext())[0]
    bias = {name: getattr(experts, name).bias for name in ("gate", "up", "down") if hasattr(experts, name)}

    def project(name, z):
        shift = bias[name][e] if bias[name] is not None else 0
        return getattr(experts, name).weight[e] @ z + shift

    if hasattr(experts, "gate"):
        return project("down", F.silu(project("gate", x)) * project("up", x))
    return project("down", experts.activation(project("up", x)))


def formula(made, x, routing):
    """sum over the assignments (t, e, w) of w FFN_e(x_t), those with e = E left out."""
    y = torch.zeros_like(x)
    slots = len(routing.expert_M) // len(x)
    for m, e in enumerate(routing.expert_M.tolist()):
        if e < N_EXPERTS:
            t = m // slots if routing.token_M is None else int(routing.token_M[m])
            y = y.index_add(0, torch.tensor([t]), (routing.weight_M[m] * expert_output(made.experts, e, x[t]))[None])
    return y


def long(values):
    return torch.tensor(values, dtype=torch.int64)


# 6 tokens; in each case at least one expert is given no token
ROUTINGS = {
    "per_token": lambda w: Routing.per_token(long([[0, 1], [1, 3], [3, 0], [0, 1], [1, 0], [3, 1]]), w(6, 2)),
    "one_expert": lambda w: Routing.per_token(long([[2]] * 6), w(6, 1)),
    "unused": lambda w: Routing.per_token(long([[0, 5], [5, 5], [3, 4], [5, 0], [4, 0], [3, 5]]), w(6, 2), False),
    "none_used": lambda w: Routing.per_token(long([[5, 5]] * 6), w(6, 2), False),
    "by_token": lambda w: Routing(long([4, 0, 0, 1, 1, 4, 4, 4]), w(8), long([5, 0, 0, 3, 2, 5, 1, 0])),
    "by_token_unused": lambda w: Routing(long([4, 5, 0, 5, 1]), w(5), long([5, 0, 0, 3, 2]), False),
}
EXPERTS = {
    "swiglu": {"type": "swiglu", "d_ff": 8},
    "swiglu_bias": {"type": "swiglu", "d_ff": 8, "bias": True},
    "mlp_bias": {"type": "mlp", "d_ff": 7, "bias": True},
}


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_formula_forward_and_backward(component, randn, name, expert, dispatch):
    routing = ROUTINGS[name](randn)
    weights = routing.weight_M.requires_grad_()
    made = moe(component, routing, dispatch, EXPERTS[expert])
    x, direction = randn(6, 8).requires_grad_(), randn(6, 8)
    leaves = [x, weights, *made.experts.parameters()]
    got, wanted = made(x[None], ForwardContext())[0], formula(made, x, routing)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    if name == "none_used":
        assert not got.any()
        wanted = wanted + 0 * sum(leaf.sum() for leaf in leaves)
    ours = torch.autograd.grad((got * direction).sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((wanted * direction).sum(), leaves, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_grouped_equals_loop(component, randn, name, expert, dtype, tolerance):
    routing = ROUTINGS[name](randn)
    routing = routing._replace(weight_M=routing.weight_M.to(dtype))
    x, direction = randn(1, 6, 8).to(dtype), randn(1, 6, 8).to(dtype)
    outcomes = []
    for dispatch in ("grouped", "loop"):
        made = moe(component, routing, dispatch, EXPERTS[expert], dtype)
        leaf = x.clone().requires_grad_()
        y = made(leaf, ForwardContext())
        leaves = [leaf, *made.experts.parameters()]
        gradients = torch.autograd.grad((y * direction).sum(), leaves, materialize_grads=True)
        outcomes.append((y, *gradients))
    for one, other in zip(*outcomes, strict=True):
        scale = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def test_an_unused_entry_is_removed_even_where_its_weight_is_not_finite(component, randn):
    routing = ROUTINGS["unused"](randn)
    x = randn(1, 6, 8)
    clean = moe(component, routing)(x, ForwardContext())
    spoiled = x.clone()
    spoiled[0, 1] = torch.nan  # token 1 goes to no expert
    y = moe(component, routing)(spoiled, ForwardContext())
    torch.testing.assert_close(y, clean, rtol=0, atol=0)


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_shared_expert(component, randn, combine, dispatch):
    routing = ROUTINGS["per_token"](randn)
    shared = {"shared_expert": {"type": "mlp", "d_ff": 6}, "shared_combine": combine}
    made, x = moe(component, routing, dispatch, **shared), randn(6, 8)
    routed, common = formula(made, x, routing), made.shared_expert(x, ForwardContext())
    wanted = routed + common if combine == "sum" else (common + 2 * routed) / 3
    torch.testing.assert_close(made(x[None], ForwardContext())[0], wanted, rtol=0, atol=1e-12)


def test_with_its_own_router(component, randn):
    made = moe(component, router={"type": "top_k", "k": 2, "renormalize": True}).eval()
    x = randn(2, 3, 8)
    routing = made.router(x.view(6, 8), ForwardContext())
    torch.testing.assert_close(
        made(x, ForwardContext()), formula(made, x.view(6, 8), routing).view(2, 3, 8), rtol=0, atol=1e-12
    )


def test_one_expert_is_a_dense_feed_forward(component, randn):
    slot = {"type": "moe", "n_experts": 1, "router": {"type": "top_k", "k": 1}, "expert": {"type": "swiglu", "d_ff": 8}}
    made = component("ffn", slot, d_model=8)
    dense = component("ffn", {"type": "swiglu", "d_ff": 8}, d_model=8)
    dense.load_state_dict({k.removeprefix("experts."): v[0] for k, v in made.state_dict().items() if "experts" in k})
    x = randn(2, 3, 8)
    torch.testing.assert_close(made(x, ForwardContext()), dense(x, ForwardContext()), rtol=0, atol=1e-12)


def test_load_counts_assignments_over_tokens(component, randn):
    routing = ROUTINGS["unused"](randn)
    made = moe(component, routing)
    made(randn(1, 6, 8), ForwardContext())
    chosen = routing.expert_M.tolist()
    assert made.load.tolist() == pytest.approx([chosen.count(e) / 6 for e in range(N_EXPERTS)], abs=1e-12)
    assert ("", "load") in [(path, name) for path, name, _ in counters(made)]


class Gain(FeedForward):
    """FFN(x) = gain x: a parameter of its own, so it cannot be grouped."""

    grouped = False

    def __init__(self, params, build):
        super().__init__(params, build)
        self.gain = nn.Parameter(torch.empty(build.d_model))

    def reset_parameters(self):
        nn.init.ones_(self.gain)

    def forward(self, x_BTD, context):
        return x_BTD * self.gain


@pytest.fixture
def gain():
    registry("ffn").register("gain")(Gain)
    yield "gain"
    registry("ffn").unregister("gain")


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_experts_that_cannot_be_grouped_are_looped(component, randn, gain, dispatch):
    routing = ROUTINGS["by_token"](randn)
    made, x = moe(component, routing, dispatch, gain), randn(6, 8)
    assert len({id(expert.gain) for expert in made.experts}) == N_EXPERTS
    torch.testing.assert_close(made(x[None], ForwardContext())[0], formula(made, x, routing), rtol=0, atol=1e-12)
    assert made.active_parameters() == 2 * 8


def test_an_expert_that_says_it_can_be_grouped_and_cannot(component, gain, monkeypatch):
    monkeypatch.setattr(Gain, "grouped", True)
    with pytest.raises(TypeError, match="ffn 'gain' cannot be grouped: its parameter gain does not"):
        moe(component, expert=gain)


def test_a_mixture_of_mixtures(component, randn):
    inner = {"type": "moe", "n_experts": 3, "router": {"type": "top_k", "k": 1}, "expert": {"type": "mlp", "d_ff": 4}}
    routing = ROUTINGS["per_token"](randn)  # expert 2 and 4 see no token at all
    made, x = moe(component, routing, expert=inner), randn(6, 8)
    torch.testing.assert_close(made(x[None], ForwardContext())[0], formula(made, x, routing), rtol=0, atol=1e-12)
    assert all(load.isfinite().all() for _, _, load in counters(made))


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_autocast_keeps_the_stream_dtype(component, randn, dispatch):
    made = moe(component, dispatch=dispatch, dtype=torch.float32).eval()
    x = randn(1, 6, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x, ForwardContext())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, copy.deepcopy(made)(x, ForwardContext()), rtol=0.1, atol=0.1)


ROUTERS = [
    {"type": "top_k", "k": 2, "bias_rate": 0.1},
    {"type": "noisy_top_k", "k": 2},
    {"type": "switch", "capacity_factor": 0.6},
    {"type": "expert_choice", "capacity_factor": 1.5},
    {"type": "top_p", "p": 0.5},
    {"type": "hash", "k": 2},
]


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router["type"])
def test_counters(component, randn, router, dispatch):
    """Load, its peak and its entropy by hand, whatever the router."""
    made, x = moe(component, dispatch=dispatch, router=router), randn(2, 6, 8)
    context = ForwardContext(ids_BT=torch.arange(12).view(2, 6))
    torch.manual_seed(0)
    made(x, context)
    torch.manual_seed(0)
    chosen = made.router(x.view(12, 8), context).expert_M.tolist()
    counts = [chosen.count(e) for e in range(N_EXPERTS)]
    shares = [n / sum(counts) for n in counts]
    entropy = -sum(p * math.log(p) for p in shares if p) / math.log(N_EXPERTS)
    assert made.load.tolist() == pytest.approx([n / 12 for n in counts], abs=1e-12)
    assert float(made.load_max) == pytest.approx(max(counts) / (sum(counts) / N_EXPERTS), abs=1e-12)
    assert float(made.load_entropy) == pytest.approx(entropy, abs=1e-12)


def test_confidence_is_the_mean_of_the_best_scores(component, randn):
    x = randn(2, 6, 8)
    for score in ("softmax", "sigmoid"):
        made = moe(component, router={"type": "top_k", "k": 2, "score": score})
        made(x, ForwardContext())
        logits = x.view(12, 8) @ made.router.gate.weight.T
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        assert float(made.router.confidence) == pytest.approx(float(scores.detach().max(-1).values.mean()), abs=1e-14)


INNER = {"type": "moe", "n_experts": 3, "expert": {"type": "swiglu", "d_ff": 4}}
ANY = {
    "drelu": {"type": "drelu", "d_ff": 6, "bias": True},
    "reglu": {"type": "reglu", "d_ff": 6},
    "top_k_ffn": {"type": "top_k_ffn", "d_ff": 9, "k": 3},
    "mlp-relu2": {"type": "mlp", "d_ff": 6, "bias": True, "activation": "relu2"},
    "gated": {"type": "gated", "d_ff": 6, "activation": {"type": "clipped_relu", "shift": 0.1}},
    "moe": {**INNER, "router": {"type": "top_k", "k": 2}},
    "moe-switch": {**INNER, "router": "switch", "shared_expert": {"type": "mlp", "d_ff": 4}},
    "moe-top_p": {**INNER, "router": "top_p"},
    "moe-hash": {**INNER, "router": "hash"},
}


@pytest.mark.parametrize("expert", ANY.values(), ids=ANY)
def test_any_feed_forward_is_an_expert(component, randn, expert):
    """Grouped and looped alike, forward and backward."""
    x, direction, outcomes = randn(2, 6, 8), randn(2, 6, 8), []
    context = ForwardContext(ids_BT=torch.arange(12).view(2, 6))
    for dispatch in ("grouped", "loop"):
        nested = {"dispatch": dispatch} if expert["type"] == "moe" else {}
        made = moe(component, dispatch=dispatch, expert={**expert, **nested}, router={"type": "top_k", "k": 2})
        y = made(x, context)
        parameters = dict(made.named_parameters())
        gradients = torch.autograd.grad((y * direction).sum(), parameters.values(), materialize_grads=True)
        outcomes.append((y, *gradients))
        assert y.abs().max() > 0.01
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dispatch", ["grouped", "loop"])
def test_top_k_ffn_as_expert(component, randn, dispatch):
    """Expert by expert: the k largest neurons of the expert that a token visits."""
    routing = ROUTINGS["per_token"](randn)
    made, x = moe(component, routing, dispatch, {"type": "top_k_ffn", "d_ff": 9, "k": 3}), randn(6, 8)
    y, wanted = made(x[None], ForwardContext())[0], torch.zeros(6, 8).double()
    for m, e in enumerate(routing.expert_M.tolist()):
        hidden = torch.relu(made.experts.up.weight[e] @ x[m // 2])
        kept = hidden.topk(3).indices
        wanted[m // 2] += routing.weight_M[m] * (made.experts.down.weight[e][:, kept] @ hidden[kept])
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS[:1] + ROUTERS[2:3] + ROUTERS[4:5], ids=lambda router: router["type"])
def test_an_inner_mixture_that_nobody_visits_counts_nothing(component, randn, router):
    """And moves no bias: 0 of 0 tokens is 0."""
    inner = {"type": "moe", "n_experts": 3, "router": router, "expert": {"type": "mlp", "d_ff": 4}}
    made = moe(component, ROUTINGS["one_expert"](randn), expert=inner)
    made(randn(1, 6, 8), ForwardContext()).sum().backward()
    assert all(value.isfinite().all() for _, _, value in counters(made))
    idle, busy = made.experts[0].router, made.experts[2].router
    for one in (idle, busy):
        one.after_step({name: getattr(one, name) for name in one.counters})
    if router["type"] == "top_k":
        assert not idle.bias_E.any()
        assert busy.bias_E.any()


def test_fine_grained_experts_cost_what_one_large_one_does(component):
    """DeepSeekMoE: experts m times as many and 1/m as wide, m times as many visited; and what is shared is whole."""
    costs = []
    for m in (1, 4):
        router, shared = {"type": "top_k", "k": 2 * m}, {"type": "swiglu", "d_ff": 16}
        made = moe(
            component, n_experts=8 * m, router=router, expert={"type": "swiglu", "d_ff": 16 // m}, shared_expert=shared
        )
        experts = sum(p.numel() for p in made.experts.parameters())
        gate = made.router.gate.weight.numel()
        costs.append((experts, made.active_parameters() - gate, made.flops_per_token(4) - 2 * gate))
    assert costs[0] == costs[1] == (8 * 3 * 8 * 16, 3 * 3 * 8 * 16, 2 * 3 * 3 * 8 * 16)


class LooksBack(FeedForward):
    """The mean of the tokens so far."""

    token_wise = False
    grouped = False

    class Params(FeedForward.Params):
        pass

    def forward(self, x_BTD, context):
        return x_BTD.cumsum(-2) / torch.arange(1, x_BTD.shape[-2] + 1)[:, None]


@pytest.mark.parametrize("place", ["expert", "shared_expert"])
def test_what_wants_whole_sequences_is_no_expert(tiny, place):
    expert = {"type": "swiglu", "d_ff": 8}
    registry("ffn").register("looks_back")(LooksBack)
    try:
        build_model(tiny(ffn="looks_back"), device="meta")
        told = r"block\.ffn: expert 'looks_back' wants whole sequences, of which an expert is sent a few tokens; use it"
        with pytest.raises(SpecError, match=told):
            build_model(tiny(ffn={"type": "moe", "n_experts": 2, "expert": expert, place: "looks_back"}))
    finally:
        registry("ffn").unregister("looks_back")


def test_a_router_is_told_where_sequences_end(component, randn):
    """And one inside an expert, whose rows come from anywhere, that there are none."""
    inner = {"type": "moe", "n_experts": 2, "router": {"type": "top_k", "k": 1}, "expert": {"type": "mlp", "d_ff": 3}}
    made, told = moe(component, expert=inner), []
    for router in (made.router, *(expert.router for expert in made.experts)):
        router.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1].seq_len))
    made(randn(2, 6, 8), ForwardContext())
    assert told == [6, *[None] * N_EXPERTS]
    told.clear()
    made(randn(12, 8), ForwardContext())
    assert told == [None] * (1 + N_EXPERTS)
