"""Hugging Face models layer by layer: every family, its own logits, sites, parts, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, make
from torch import Tensor, nn

from sparsekit.probes.anatomy import ExpertRows
from sparsekit.probes.layered import ViewError, layered

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(0))
POST_NORM = {"opt_post_norm"}  # the stream is normalised after the sum
NO_ATTENTION = {"mamba"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    model = make(request.param, torch.float64)
    return request.param, model, layered(model)


def through(batch: Any, order: list[int]) -> Tensor:
    h = batch.h_0
    for layer in order:
        h = batch.layer(layer, h)
    return h


def returns(module: nn.Module, run: Any) -> tuple[Any, Tensor]:
    """What a function returns, and what a module does in it (before anything is added to that in place)."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, a, out: kept.append((out[0] if type(out) is tuple else out).clone()))
    found = run()
    hook.remove()
    return found, kept[0]


@torch.no_grad()
def test_layer_by_layer_the_logits_are_the_models_own(family: Any) -> None:
    _, model, view = family
    wanted = model(input_ids=IDS, use_cache=False).logits
    batch = view.start(IDS)
    h = through(batch, [0, 1, 2])
    assert (batch.head(h) - wanted).norm() <= 1e-9 * wanted.norm()
    assert (view.n_layers, view.d_model, view.vocab_size) == (3, 32, 64)
    losses = F.cross_entropy(wanted[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(2, -1).mean(1)
    torch.testing.assert_close(batch.losses(h), losses, rtol=1e-6, atol=1e-6, check_dtype=False)


@torch.no_grad()
def test_the_last_state_has_not_been_normalised(family: Any) -> None:
    _, model, view = family
    hidden: list[Tensor] = []
    hook = view.blocks[-1].register_forward_hook(lambda m, a, out: hidden.append(out[0] if type(out) is tuple else out))
    model(input_ids=IDS, use_cache=False)
    hook.remove()
    assert torch.equal(through(view.start(IDS), [0, 1, 2]), hidden[0])


@torch.no_grad()
def test_swapped_layers_are_the_modules_really_swapped(family: Any) -> None:
    _, model, view = family
    swapped = copy.deepcopy(model)
    layers: Any = swapped.get_submodule(view.list_name)
    layers[0], layers[1] = layers[1], layers[0]
    types = getattr(swapped.config, "layer_types", None)
    if types is not None and len(set(types)) > 1:  # by which the model itself chooses what a layer is called with
        swapped.config.layer_types = [types[1], types[0], *types[2:]]
    batch = view.start(IDS)
    wanted = swapped(input_ids=IDS, use_cache=False).logits
    assert (batch.head(through(batch, [1, 0, 2])) - wanted).norm() <= 1e-9 * wanted.norm()


@torch.no_grad()
def test_branches_run_as_each_of_them_alone(family: Any) -> None:
    _, _, view = family
    batch = view.start(IDS)
    streams = [batch.h_0 * scale for scale in (1.0, 0.5, 2.0)]
    view.layer_calls = 0
    together = batch.layer(1, torch.cat(streams)).view(3, *batch.h_0.shape)
    assert view.layer_calls == 3
    for out, h in zip(together, streams, strict=True):
        torch.testing.assert_close(out, batch.layer(1, h), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(batch.losses(torch.cat(streams))[2:4], batch.losses(streams[1]))


@torch.no_grad()
def test_what_is_added_adds_up_and_can_be_edited(family: Any) -> None:
    name, _, view = family
    if name in NO_ATTENTION:
        assert (
            view.sites(1)["attn_out"] == "not applicable: no modules of the layer normalise scores over keys, not one"
        )
        return
    batch = view.start(IDS)
    out, seen = batch.observe(1, batch.h_0, ["attn_out", "ffn_out"])
    assert torch.equal(out, batch.layer(1, batch.h_0))
    if name not in POST_NORM:
        torch.testing.assert_close(batch.h_0 + seen["attn_out"] + seen["ffn_out"], out, rtol=1e-9, atol=1e-9)
        silent = dict.fromkeys(("attn_out", "ffn_out"), torch.zeros_like)
        torch.testing.assert_close(batch.observe(1, batch.h_0, [], silent)[0], batch.h_0)
    same, _ = batch.observe(1, batch.h_0, [], {site: lambda x: x * 1.0 for site in ("attn_out", "ffn_out")})
    torch.testing.assert_close(same, out, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_queries_and_keys_give_the_values_that_the_attention_makes(family: Any) -> None:
    """softmax(scale q k^T, masked) v, projected, is what the attention returns: so q, k, v are what it scored."""
    name, _, view = family
    if name in NO_ATTENTION:
        return
    batch, parts = view.start(IDS), view.sublayers(0)
    returned: list[Tensor] = []
    o = view.anatomy(0).o.module
    hook = o.register_forward_pre_hook(lambda m, args: returned.append(args[0]))
    _, seen = batch.observe(0, batch.h_0, ["q", "k", "v", "score"])
    hook.remove()
    q, k, v, score = (seen[site] for site in ("q", "k", "v", "score"))
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-2, -1) * score.scale
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    if score.mask is None:
        scores = scores.masked_fill(~causal, -torch.inf)
    else:
        scores = scores.masked_fill(~score.mask, -torch.inf) if score.mask.dtype == torch.bool else scores + score.mask
    wanted = (scores.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(returned[0].view_as(wanted), wanted, rtol=1e-5, atol=1e-5)
    assert parts.attention is not None


@torch.no_grad()
def test_activations_times_down_are_the_feed_forward(family: Any) -> None:
    name, _, view = family
    for layer in range(3):
        batch, anatomy = view.start(IDS), view.anatomy(layer)
        if view.sites(layer)["ffn_act"] is not None:
            assert name in NO_ATTENTION
            continue
        module = view.sublayers(layer).ffn_end
        seen, returned = returns(module, lambda b=batch, n=layer: b.observe(n, b.h_0, ["ffn_act"])[1])
        act = seen["ffn_act"]
        if isinstance(act, ExpertRows):
            down = anatomy.experts.down.weight
            assert down.shape[0] == 4
            wanted = torch.zeros(22, 32, dtype=torch.float64)
            for row, token, expert, weight in zip(*act, strict=True):
                wanted[token] += weight * (down[expert] @ row)
        else:
            wanted = act.flatten(0, 1) @ anatomy.down.weight.T
            wanted = wanted if anatomy.down.bias is None else wanted + anatomy.down.bias
        if name not in ("bloom", "mpt"):  # whose feed-forward adds the stream itself
            torch.testing.assert_close(returned.view_as(wanted), wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_dense_pre_norm_layer_is_its_anatomy(family: Any) -> None:
    """Where nothing is missing, the layer recomputed from its parts alone is the layer."""
    name, _, view = family
    anatomy = view.anatomy(1)
    if anatomy.residual != "pre_norm" or anatomy.experts or anatomy.attention_extras or anatomy.missing:
        assert name not in ("llama", "qwen2", "gpt2", "opt", "phi3", "stablelm", "granite", "gpt_neox_sequential")
        return
    batch = view.start(IDS)
    a, h = anatomy, batch.h_0

    def project(weight: Any, x: Tensor) -> Tensor:
        y = x @ weight.weight.T
        return y if weight.bias is None else y + weight.bias

    def turned(x: Tensor) -> Tensor:
        if a.rope is None:
            return x
        rope = batch.rope(1)
        first, second = x[..., : rope.channels].chunk(2, -1)
        cos, sin = rope.cos, rope.sin
        parts = (first * cos - second * sin, second * cos + first * sin, x[..., rope.channels :])
        return torch.cat(parts, dim=-1)

    def heads(weight: Any) -> Tensor:
        return project(weight, a.norm_1(h)).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)

    q, k, v = turned(heads(a.q)), turned(heads(a.k)), heads(a.v)
    k, v = (x.repeat_interleave(a.n_heads // a.n_kv_heads, 1) for x in (k, v))
    scores = (q @ k.transpose(-2, -1) * a.scale).masked_fill(~torch.ones(11, 11).tril().bool(), -torch.inf)
    h = h + a.branch_scale * project(a.o, (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    x = a.norm_2(h)
    hidden = a.activation(project(a.up, x)) if a.gate is None else a.activation(project(a.gate, x)) * project(a.up, x)
    wanted = h + a.branch_scale * project(a.down, hidden)
    torch.testing.assert_close(batch.layer(1, batch.h_0), wanted, rtol=1e-6, atol=1e-6)


def test_parts_are_found_where_they_are() -> None:
    expected = {
        "llama": ("pre_norm", "rmsnorm", ()),
        "qwen3": ("pre_norm", "rmsnorm", ("qk_norm",)),
        "olmo2": ("output_norm", None, ("qk_norm",)),
        "gemma2": ("peri_norm", "rmsnorm", ("score",)),
        "gpt_neox": ("parallel", "layernorm", ()),
        "falcon": ("parallel", "layernorm", ()),
        "bloom": ("pre_norm", "layernorm", ("score",)),
    }
    for name, (residual, norm, extras) in expected.items():
        anatomy = layered(make(name)).anatomy(1)
        found = anatomy.residual, anatomy.norm_1 and anatomy.norm_1.kind, anatomy.attention_extras
        assert found == (residual, norm, extras), name


def test_a_fused_projection_is_split_by_what_becomes_of_it() -> None:
    """NeoX keeps [head, (q, k, v), channel] in one matrix."""
    model = make("gpt_neox", torch.float64)
    anatomy = layered(model).anatomy(0)
    fused = model.gpt_neox.layers[0].attention.query_key_value.weight.detach().view(4, 3, 8, 32)
    for place, weight in enumerate((anatomy.q, anatomy.k, anatomy.v)):
        assert torch.equal(weight.weight, fused[:, place].reshape(32, 32))


@torch.no_grad()
def test_edits_of_queries_keys_values_and_activations_take_effect() -> None:
    for name in ("llama", "gemma2", "mixtral", "bloom"):
        view = layered(make(name, torch.float64))
        batch = view.start(IDS)
        for site in ("q", "k", "v", "ffn_act"):
            _, before = batch.observe(1, batch.h_0, ["attn_out", "ffn_out"])
            zero = (lambda rows: rows.act_MF * 0) if name == "mixtral" and site == "ffn_act" else torch.zeros_like
            _, after = batch.observe(1, batch.h_0, ["attn_out", "ffn_out"], {site: zero})
            place = "ffn_out" if site == "ffn_act" else "attn_out"
            assert not torch.allclose(before[place], after[place]), (name, site)
            if site in ("v", "ffn_act") and name != "bloom":  # whose projections have biases
                assert not after[place].any(), (name, site)


def test_what_is_no_stack_of_layers_is_refused_with_the_reason() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            return torch.cat([layer(x) for layer in self.layers], dim=-1)

    with pytest.raises(ViewError) as error:
        layered(Bag())
    assert str(error.value) == (
        "Bag: wants one list of layers, each called once with what the one before it returned; found none"
    )
    with pytest.raises(ViewError, match=r"^Linear: cannot be called with token ids alone \("):
        layered(nn.Linear(3, 3))
    with pytest.raises(ViewError) as error:
        layered("llama")
    assert str(error.value) == "str: is no model; give a sparsekit or Hugging Face one"


def test_layers_that_share_more_than_the_stream_are_refused() -> None:
    class Sharing(nn.Module):
        """The last layer's output joins the logits by another way, too."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.layers = nn.ModuleList(Adding() for _ in range(2))
            self.head = nn.Linear(8, 9)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.table(input_ids)
            shared: list[Tensor] = []
            for layer in self.layers:
                x = layer(x, shared)
            return self.head(x)

    class Adding(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)

        def forward(self, x: Tensor, shared: list[Tensor]) -> Tensor:
            y = super().forward(x)
            shared.append(y)
            return x + sum(shared)

    torch.manual_seed(0)
    with pytest.raises(
        ViewError, match=r"^Sharing: run one by one, the layers of layers give .*; they hand on more than the stream$"
    ):
        layered(Sharing())


def test_bfloat16_models_are_taken() -> None:
    view = layered(make("llama", torch.bfloat16))
    batch = view.start(IDS)
    h = through(batch, [0, 1, 2])
    assert (h.dtype, batch.losses(h).dtype) == (torch.bfloat16, torch.float32)
    assert view.anatomy(1).residual == "pre_norm"


@torch.no_grad()
def test_losses_never_hold_more_logits_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsekit.probes.layered as module

    view = layered(make("llama", torch.float64))
    batch = view.start(IDS)
    h = through(batch, [0, 1, 2])
    whole = batch.losses(h)
    most: list[int] = []
    head = batch.head
    monkeypatch.setattr(batch, "head", lambda x: most.append(x.shape[0] * x.shape[1]) or head(x))
    monkeypatch.setattr(module, "MOST_LOGITS_ELSEWHERE", 64 * 4)
    torch.testing.assert_close(batch.losses(h), whole)
    assert max(most) <= 4
