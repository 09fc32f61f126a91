"""sparsekit's models layer by layer: the same logits, swapped layers, branches, sites, edits, parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.components.contracts import Residual
from sparsekit.model.build import build_model
from sparsekit.probes.anatomy import ExpertRows
from sparsekit.probes.layered import ViewError, layered
from sparsekit.registry import registry

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
MIXTURE = {
    "type": "moe", "n_experts": 4, "router": {"type": "top_k", "k": 2}, "expert": {"type": "swiglu", "d_ff": 16},
}  # fmt: skip
BLOCKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated_attention": {"attention": {"type": "mqa", "n_heads": 4, "qk_norm": "rmsnorm", "output_gate": True}},
    "window": {"attention": {"type": "mha", "n_heads": 4, "window": 3, "sinks": 1, "softcap": 5.0, "kernel": "eager"}},
    "alibi": {"attention": {"type": "mha", "n_heads": 4, "position": "alibi"}},
    "latent": {"attention": {"type": "mla", "n_heads": 4, "kv_rank": 8, "rope_head_dim": 4}},
    "mlp": {"ffn": {"type": "mlp", "d_ff": 48, "bias": True}, "norm": "layernorm"},
    "mixture": {"ffn": MIXTURE},
    "shared": {"ffn": {**MIXTURE, "shared_expert": {"type": "swiglu", "d_ff": 16}, "shared_combine": "mean"}},
    "switch": {"ffn": {**MIXTURE, "router": {"type": "switch", "capacity_factor": 1.0}}},
    "hash": {"ffn": {**MIXTURE, "router": {"type": "hash"}}},
    **{
        name: {"residual": {"type": name, "scale": 0.5} if name != "mix_ln" else name}
        for name in registry("residual").names()
    },
}


def model_of(block: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    attention = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}
    whole = {"attention": attention, "ffn": {"type": "swiglu", "d_ff": 48}, **block}
    spec = {"d_model": 32, "n_layers": 3, "vocab_size": 64, "max_seq_len": 16, "block": whole}
    model = build_model(spec, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(params=list(BLOCKS))
def named(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, model_of(BLOCKS[request.param])


def through(batch: Any, order: list[int]) -> Tensor:
    h = batch.h_0
    for layer in order:
        h = batch.layer(layer, h)
    return h


@torch.no_grad()
def test_layers_in_order_and_swapped(named: tuple[str, Any]) -> None:
    _, model = named
    batch = layered(model).start(IDS)
    torch.testing.assert_close(batch.head(through(batch, [0, 1, 2])), model(IDS))
    losses = F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(batch.losses(through(batch, [0, 1, 2])), losses.mean(1))
    swapped = copy.deepcopy(model)
    swapped.layers[0], swapped.layers[1] = swapped.layers[1], swapped.layers[0]
    torch.testing.assert_close(batch.head(through(batch, [1, 0, 2])), swapped(IDS))


@torch.no_grad()
def test_branches_run_as_each_of_them_alone(named: tuple[str, Any]) -> None:
    """Also where experts have room for so many tokens of a batch, and where the choice goes by token id."""
    _, model = named
    view = layered(model)
    batch = view.start(IDS)
    streams = [batch.h_0 * scale for scale in (1.0, 0.3, 3.0)]
    together = batch.layer(1, torch.cat(streams)).view(3, *batch.h_0.shape)
    assert view.layer_calls == 3
    for out, h in zip(together, streams, strict=True):
        torch.testing.assert_close(out, batch.layer(1, h))


@torch.no_grad()
def test_what_sub_layers_add(named: tuple[str, Any]) -> None:
    name, model = named
    batch = layered(model).start(IDS)
    out, seen = batch.observe(1, batch.h_0, ["attn_out", "ffn_out"])
    assert torch.equal(out, batch.layer(1, batch.h_0))
    if name not in ("post_norm", "deep_norm"):  # which normalise the sum
        torch.testing.assert_close(batch.h_0 + seen["attn_out"] + seen["ffn_out"], out)
        silent = dict.fromkeys(seen, torch.zeros_like)
        torch.testing.assert_close(batch.observe(1, batch.h_0, [], silent)[0], batch.h_0)
    if name in ("pre_norm", "parallel"):
        block, context = model.layers[1], batch.context(1)
        norm = block.residual.norm if name == "parallel" else block.residual.attention_norm
        torch.testing.assert_close(seen["attn_out"], 0.5 * block.attention(norm(batch.h_0), context))


@torch.no_grad()
def test_activations_of_the_experts_that_tokens_visit_add_up(named: tuple[str, Any]) -> None:
    name, model = named
    view = layered(model)
    batch, ffn = view.start(IDS), model.layers[1].ffn
    wanted_sites = [site for site in ("ffn_act", "shared_act", "router") if view.sites(1)[site] is None]
    outputs: list[Tensor] = []
    hook = ffn.register_forward_hook(lambda m, args, out: outputs.append(out))
    _, seen = batch.observe(1, batch.h_0, wanted_sites)
    hook.remove()
    anatomy = view.anatomy(1)
    if not isinstance(seen["ffn_act"], ExpertRows):
        down = anatomy.down
        y = seen["ffn_act"] @ down.weight.T
        torch.testing.assert_close(y if down.bias is None else y + down.bias, outputs[0])
        return
    y_ND = torch.zeros(18, 32, dtype=torch.float64)
    for site in ("ffn_act", "shared_act"):
        for act, token, expert, weight in zip(*seen.get(site, ((), (), (), ())), strict=True):
            matrices = anatomy.experts.down if site == "ffn_act" else anatomy.experts.shared["down"]
            matrix = matrices.weight[expert] if site == "ffn_act" else matrices.weight
            y_ND[token] += weight * (matrix @ act)
    torch.testing.assert_close(y_ND.view(2, 9, 32), outputs[0])
    assert seen["router"].token_M is not None
    assert ("shared_act" in seen) == (name == "shared")


@torch.no_grad()
def test_scored_queries_and_keys(named: tuple[str, Any]) -> None:
    """normalise(cap(scale q k^T) + slopes distance, masked) v, projected and gated, is the attention's output."""
    name, model = named
    view = layered(model)
    batch, attention = view.start(IDS), model.layers[1].attention
    read: list[Tensor] = []
    hook = attention.o.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    _, seen = batch.observe(1, batch.h_0, ["q", "k", "v", "score"])
    hook.remove()
    q, k, v, score = (seen[site] for site in ("q", "k", "v", "score"))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-2, -1) * score.scale
    if score.softcap is not None:
        scores = score.softcap * torch.tanh(scores / score.softcap)
    place = torch.arange(9)
    if score.slopes_H is not None:
        scores = scores + score.slopes_H[:, None, None] * (place[None, :] - place[:, None])
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if score.mask is None else score.mask
    z = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(groups, 1)
    wanted = z.transpose(1, 2).flatten(2)
    if name == "gated_attention":
        x = model.layers[1].residual.attention_norm(batch.h_0)
        wanted = wanted * torch.sigmoid(attention.gate(x))
    torch.testing.assert_close(read[0], wanted)


@torch.no_grad()
def test_the_anatomy_is_the_layer() -> None:
    """h + s A(n_1 h), then the feed-forward, from the parts alone."""
    for residual in ("pre_norm", "layernorm_scaling"):
        model = model_of({"residual": {"type": residual, "scale": 0.7}})
        view = layered(model)
        batch, a = view.start(IDS), view.anatomy(2)
        h, rope = batch.h_0, batch.rope(2)

        def turn(x: Tensor, rope: Any = rope) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat((first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin), dim=-1)

        q, k, v = ((a.norm_1(h) @ w.weight.T).unflatten(-1, (-1, 8)).transpose(1, 2) for w in (a.q, a.k, a.v))
        z = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, scale=a.scale, enable_gqa=True)
        h = h + a.branch_scale * z.transpose(1, 2).flatten(2) @ a.o.weight.T
        x = a.norm_2(h)
        h = h + a.branch_scale * (a.activation(x @ a.gate.weight.T) * (x @ a.up.weight.T)) @ a.down.weight.T
        torch.testing.assert_close(batch.layer(2, batch.h_0), h)
        assert (a.residual, a.branch_scale, a.attention_extras, a.missing) == ("pre_norm", 0.7, (), {})


def test_what_is_missing_says_why() -> None:
    view = layered(model_of(BLOCKS["mixture"]))
    assert view.sites(0)["shared_act"] == "not applicable: there is no shared expert"
    assert view.anatomy(0).missing["up"] == "the feed-forward is a mixture of experts"
    assert view.anatomy(0).experts.gate.weight.shape == (4, 16, 32)
    dense = layered(model_of({"residual": "post_norm"}))
    assert dense.sites(0)["router"] == "not applicable: SwiGLU has no router"
    assert dense.anatomy(0).residual == "post_norm"
    with pytest.raises(ViewError) as error:
        dense.start(torch.zeros(1, 17, dtype=torch.int64))
    assert str(error.value) == "sequences of 17 tokens are longer than the model's max_seq_len, 16"


@torch.no_grad()
def test_state_beside_the_stream_belongs_to_its_layer() -> None:
    """Each layer adds the first layer's output: skipping that layer changes the stream, and not what is handed on."""

    class Momentum(Residual):
        def forward(self, x: Tensor, state: Any, context: Any, attention: Any, ffn: Any) -> Any:
            first = state.get("first", torch.zeros_like(x))
            x = x + attention(x, context) + 0.1 * first
            return x, {"first": state.get("first", x)}

    registry("residual").register("momentum_for_this_test")(Momentum)
    try:
        model = model_of({"residual": "momentum_for_this_test"})
        batch = layered(model).start(IDS)
        torch.testing.assert_close(batch.head(through(batch, [0, 1, 2])), model(IDS))
        first = batch.layer(0, batch.h_0)
        alone = batch.h_0 + model.layers[1].attention(batch.h_0, batch.context(1)) + 0.1 * first
        torch.testing.assert_close(batch.layer(1, batch.h_0), alone)
        torch.testing.assert_close(batch.layer(1, batch.h_0.repeat(3, 1, 1)), alone.repeat(3, 1, 1))
    finally:
        registry("residual").unregister("momentum_for_this_test")


def test_gradients_flow_where_they_are_wanted() -> None:
    batch = layered(model_of({})).start(IDS)
    h = batch.h_0.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(batch.losses(batch.layer(0, h)).sum(), h)
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_compiled_layers_are_observed_and_stay_compiled() -> None:
    model = model_of({}, torch.float32)
    for layer in model.layers:
        layer.compile(backend="eager")
    batch = layered(model).start(IDS)
    wanted = batch.layer(1, batch.h_0)
    out, seen = batch.observe(1, batch.h_0, ["attn_out", "q", "ffn_act"])
    torch.testing.assert_close(out, wanted)
    assert set(seen) == {"attn_out", "q", "ffn_act"}
    assert model.layers[1]._compiled_call_impl is not None
