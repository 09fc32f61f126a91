"""Attention whole: projections, heads, positions, query-key norms, and the identities between head layouts."""

from __future__ import annotations

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model
from sparsekit.model.cache import KVCache
from tests.components.test_kernels import attend, biased, capped, causal, streaming
from tests.components.test_normalizers import sparsemax_by_sorting
from tests.components.test_positions import rotated

EXACT = {"rtol": 0, "atol": 1e-12}


def heads_of(x, weight, width):
    """x W^T cut into heads, [B, heads, T, width], head by head."""
    return torch.stack([x @ weight[i : i + width].T for i in range(0, len(weight), width)], dim=1)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("slot", "n_kv"),
    [
        ({"type": "mha", "n_heads": 4}, 4),
        ({"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, 2),
        ({"type": "mqa", "n_heads": 4, "window": 2}, 1),
        ({"type": "gqa", "n_heads": 3, "n_kv_heads": 3, "head_dim": 10}, 3),
        ({"type": "mha", "n_heads": 4, "position": "none"}, 4),
        ({"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "qk_norm": {"type": "rmsnorm", "eps": 0.01}}, 2),
    ],
    ids=["mha", "gqa", "mqa-window", "head_dim", "no-position", "qk_norm"],
)
def test_the_formula(component, randn, slot, n_kv, kernel):
    attention, x = component("attention", {**slot, "kernel": kernel}), randn(2, 7, 16)
    width = slot.get("head_dim", 4)
    q, k, v = (heads_of(x, getattr(attention, name).weight.detach(), width) for name in "qkv")
    assert (q.shape[1], k.shape[1], v.shape[1]) == (slot["n_heads"], n_kv, n_kv)
    if "qk_norm" in slot:
        q = q / (q.square().mean(-1, keepdim=True) + 0.01).sqrt() * attention.q_norm.weight.detach()
        k = k / (k.square().mean(-1, keepdim=True) + 0.01).sqrt() * attention.k_norm.weight.detach()
    if "position" not in slot:
        q, k = (rotated(z, [range(7)] * 2, 10000.0) for z in (q, k))
    z = attend(q, k, v, width**-0.5, lambda b, t, s: 0 <= t - s < slot.get("window", 99))
    wanted = sum(z[:, h] @ attention.o.weight[:, h * width : (h + 1) * width].T for h in range(slot["n_heads"]))
    torch.testing.assert_close(attention(x, ForwardContext()), wanted, **EXACT)


def test_qk_norms_are_two(component):
    attention = component("attention", {"type": "mha", "n_heads": 2, "qk_norm": "rmsnorm"})
    assert attention.q_norm.weight is not attention.k_norm.weight
    assert attention.q_norm.weight.shape == (8,)


@pytest.mark.parametrize(("name", "n_kv"), [("mha", 4), ("mqa", 1)])
def test_mha_and_mqa_are_ends_of_gqa(component, randn, name, n_kv):
    one = component("attention", {"type": name, "n_heads": 4})
    other = component("attention", {"type": "gqa", "n_heads": 4, "n_kv_heads": n_kv})
    other.load_state_dict(one.state_dict())
    x = randn(2, 5, 16)
    assert torch.equal(one(x, ForwardContext()), other(x, ForwardContext()))


def test_gqa_is_mha_with_repeated_keys_and_values(component, randn):
    gqa = component("attention", {"type": "gqa", "n_heads": 4, "n_kv_heads": 2})
    mha = component("attention", {"type": "mha", "n_heads": 4})
    state = gqa.state_dict()
    for name in ("k.weight", "v.weight"):
        state[name] = state[name].view(2, 4, 16).repeat_interleave(2, dim=0).view(16, 16)
    mha.load_state_dict(state)
    x = randn(2, 5, 16)
    torch.testing.assert_close(gqa(x, ForwardContext()), mha(x, ForwardContext()), **EXACT)


def test_bias_reaches_all_four_projections(component):
    attention = component("attention", {"type": "mha", "n_heads": 4, "bias": True})
    assert all(getattr(attention, name).bias.shape == (16,) for name in "qkvo")
    some = component("attention", {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "bias": "qkv"})
    assert [getattr(some, name).bias is None for name in "qkvo"] == [False, False, False, True]
    assert some.k.bias.shape == (8,)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_qk_norm_over_the_projection_and_a_scale_of_its_own(component, randn, kernel):
    """OLMo 2: queries of all heads are normalised together, before they are cut into heads."""
    norm = {"qk_norm": {"type": "rmsnorm", "eps": 0.01}, "qk_norm_over": "projection", "position": "none"}
    slot = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "score_scale": 0.3, "kernel": kernel, **norm}
    attention, x = component("attention", slot), randn(2, 7, 16)
    assert attention.q_norm.weight.shape == (16,)
    assert attention.k_norm.weight.shape == (8,)

    def normed(name):
        y = x @ getattr(attention, name).weight.T
        y = y / (y.square().mean(-1, keepdim=True) + 0.01).sqrt() * getattr(attention, f"{name}_norm").weight
        return torch.stack(y.detach().split(4, dim=-1), dim=1)

    z = attend(normed("q"), normed("k"), heads_of(x, attention.v.weight.detach(), 4), 0.3, lambda b, t, s: s <= t)
    wanted = z.transpose(1, 2).flatten(2) @ attention.o.weight.T
    torch.testing.assert_close(attention(x, ForwardContext()), wanted, **EXACT)
    with pytest.raises(ValueError, match="qk_norm is over the channels of all heads together"):
        attention.split(2)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 1, 3], [2, 7]])
def test_in_pieces_through_the_cache(component, randn, kernel, window, chunks):
    slot = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "kernel": kernel, "window": window}
    attention, x, cache, parts = component("attention", slot), randn(2, 9, 16), KVCache(32), []
    for n_tokens in chunks:
        start = cache.length
        parts.append(attention(x[:, start : start + n_tokens], cache.context(n_tokens, x.device)))
        cache.length += n_tokens
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, ForwardContext()), **EXACT)


def test_documents_are_as_if_apart(component, randn):
    """With no positions, tokens of a packed document come out as if it stood alone."""
    attention = component("attention", {"type": "mha", "n_heads": 4, "position": "none"})
    x = randn(1, 7, 16)
    packed = attention(x, ForwardContext(documents_BT=torch.tensor([[0, 0, 0, 1, 1, 1, 1]])))
    alone = [attention(part, ForwardContext()) for part in (x[:, :3], x[:, 3:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)


def test_rotary_documents_are_as_if_apart(component, randn):
    """Rotary scores know differences of positions only, so the same holds with them."""
    attention = component("attention", {"type": "mha", "n_heads": 4})
    x = randn(1, 7, 16)
    packed = attention(x, ForwardContext(documents_BT=torch.tensor([[0, 0, 0, 1, 1, 1, 1]])))
    alone = [attention(part, ForwardContext()) for part in (x[:, :3], x[:, 3:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)


# --- what an attention may ask for besides

OPTIONS = {
    "window-sinks": ({"window": 3, "sinks": 2}, {"sees": streaming(None, 3, 2)}),
    "softcap": ({"softcap": 0.8, "kernel": "eager"}, {"change": capped(0.8)}),
    "alibi": ({"position": "alibi"}, {"change": biased}),
    "sink_logits": ({"sink_logits": True, "kernel": "eager"}, {}),
    "normalizer": ({"normalizer": "sparsemax", "kernel": "eager"}, {"normalise": sparsemax_by_sorting}),
    "output_gate": ({"output_gate": True}, {}),
}


@pytest.mark.parametrize("layout", [{"type": "mha"}, {"type": "gqa", "n_kv_heads": 2}, {"type": "mqa"}], ids=str)
@pytest.mark.parametrize(("options", "told"), OPTIONS.values(), ids=OPTIONS)
def test_options(component, randn, options, told, layout):
    slot = {"n_heads": 8, "head_dim": 4, "position": "none", **layout, **options}
    attention, x = component("attention", slot), randn(2, 7, 16)
    q, k, v = (heads_of(x, getattr(attention, name).weight.detach(), 4) for name in "qkv")
    if "sink_logits" in options:
        assert attention.sink_H.abs().min() > 0, "the fixture moves what starts at 0"
        told = {"sinks": attention.sink_H.tolist()}
    z = attend(q, k, v, 0.5, **{"sees": causal, **told}).transpose(1, 2).flatten(2)
    if "output_gate" in options:
        z = z / (1 + torch.exp(-x @ attention.gate.weight.T))
    torch.testing.assert_close(attention(x, ForwardContext()), z @ attention.o.weight.T, **EXACT)


def test_what_options_add(component):
    """A logit a head that starts at 0, and a projection of the stream."""
    attention = component("attention", {"type": "mha", "n_heads": 4, "sink_logits": True, "kernel": "eager"})
    attention.reset_parameters()
    assert attention.sink_H.tolist() == [0.0] * 4
    gated = component("attention", {"type": "mha", "n_heads": 4, "output_gate": True})
    assert gated.gate.role == "gate"
    assert gated.gate.weight.shape == (16, 16)


CACHED = {
    "window-sinks": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "window": 2, "sinks": 1},
    "alibi": {"type": "mha", "n_heads": 4, "position": "alibi"},
    "alibi-eager": {"type": "mha", "n_heads": 4, "position": "alibi", "kernel": "eager"},
    "learned": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "position": "learned"},
    "eager": {"type": "mha", "n_heads": 4, "kernel": "eager", "softcap": 1.0, "sink_logits": True, "output_gate": True},
    "sparsemax": {"type": "mqa", "n_heads": 4, "kernel": "auto", "normalizer": "sparsemax"},
    "mla": {"type": "mla", "n_heads": 4, "kv_rank": 6, "rope_head_dim": 4},
    "mla-q_rank": {"type": "mla", "n_heads": 4, "kv_rank": 6, "q_rank": 5, "rope_head_dim": 4, "kernel": "eager"},
    "mla-window": {"type": "mla", "n_heads": 4, "kv_rank": 6, "window": 3, "position": "alibi"},
}


@pytest.mark.parametrize("slot", CACHED.values(), ids=CACHED)
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 1, 3]])
def test_options_in_pieces_through_the_cache(component, randn, slot, chunks):
    attention, x, cache, parts = component("attention", slot), randn(2, 9, 16), KVCache(32), []
    for n_tokens in chunks:
        start = cache.length
        parts.append(attention(x[:, start : start + n_tokens], cache.context(n_tokens, x.device)))
        cache.length += n_tokens
    torch.testing.assert_close(torch.cat(parts, 1), attention(x, ForwardContext()), **EXACT)


APART = [
    {"window": 3, "sinks": 1},
    {"position": "alibi"},
    {"position": "alibi", "kernel": "eager", "softcap": 1.0, "sink_logits": True},
    {"position": {"type": "rope", "fraction": 0.5, "scaling": "yarn"}},
]


@pytest.mark.parametrize("options", APART, ids=lambda options: "-".join(options))
def test_documents_are_as_if_apart_with_options(component, randn, options):
    """Sinks are each document's own."""
    attention, x = component("attention", {"type": "mha", "n_heads": 4, **options}), randn(1, 11, 16)
    packed = attention(x, ForwardContext(documents_BT=torch.tensor([[0] * 5 + [1] * 6])))
    alone = [attention(part, ForwardContext()) for part in (x[:, :5], x[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, 1), **EXACT)


def test_sinks_without_a_window_are_refused(tiny):
    with pytest.raises(SparsekitError, match=r"sinks \(2\) are keys that a window would hide; give a window"):
        build_model(tiny(attention={"type": "mha", "n_heads": 4, "sinks": 2}))


# --- multi-head latent attention, DeepSeek-V2


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x):
    """RoPE on [batch, seq, width]."""
    return rotated(x[:, None], [range(x.shape[1])] * len(x), 10000.0)[:, 0]


def latent_attention(m, x, n_heads, d_head, d_rope, d_value):
    """Eq. 9-19, a head at a time; letters as in the paper."""
    W = {name: linear.weight.detach() for name, linear in m.named_children() if hasattr(linear, "role")}
    c_Q = x if m.q_down is None else rms(x @ W["q_down"].T, m.q_norm.weight.detach())  # 12; none without q_rank
    c_KV = rms(x @ W["kv_down"].T, m.kv_norm.weight.detach())  # 9
    k_R = turned(x @ W["k_rope"].T)  # 15, one for all heads
    u = torch.zeros_like(x)
    for i in range(n_heads):
        q = c_Q @ W["q"][i * (d_head + d_rope) : (i + 1) * (d_head + d_rope)].T  # 13, 14
        q = torch.cat((q[..., :d_head], turned(q[..., d_head:])), -1)  # 16
        k = torch.cat((c_KV @ W["k"][i * d_head : (i + 1) * d_head].T, k_R), -1)  # 10, 17
        v = c_KV @ W["v"][i * d_value : (i + 1) * d_value].T  # 11
        o = attend(q[:, None], k[:, None], v[:, None], (d_head + d_rope) ** -0.5, causal)[:, 0]  # 18
        u = u + o @ W["o"][:, i * d_value : (i + 1) * d_value].T  # 19
    return u


MLA = [
    ({}, (4, 4, 16, 4)),
    ({"q_rank": 7, "rope_head_dim": 6}, (4, 4, 6, 4)),
    ({"q_rank": 5, "head_dim": 10, "rope_head_dim": 2, "v_head_dim": 3}, (4, 10, 2, 3)),
    ({"n_heads": 3, "head_dim": 5, "rope_head_dim": 4, "v_head_dim": 8}, (3, 5, 4, 8)),
]


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "auto"])
@pytest.mark.parametrize(("slot", "sizes"), MLA)
def test_mla(component, randn, slot, sizes, kernel):
    made = component("attention", {"type": "mla", "n_heads": 4, "kv_rank": 6, "kernel": kernel, **slot})
    x = randn(2, 5, 16)
    torch.testing.assert_close(made(x, ForwardContext()), latent_attention(made, x, *sizes), **EXACT)


@pytest.mark.parametrize(("slot", "sizes"), MLA)
@pytest.mark.parametrize("seq_len", [1, 12])
def test_what_mla_costs(component, slot, sizes, seq_len):
    made = component("attention", {"type": "mla", "n_heads": 4, "kv_rank": 6, **slot})
    heads, d_head, d_rope, d_value = sizes
    rank, d = slot.get("q_rank"), 16
    wide = heads * (d_head + d_rope)
    weights = (d * rank + rank * wide if rank else d * wide) + d * 6 + d * d_rope
    weights += 6 * heads * (d_head + d_value) + heads * d_value * d
    assert sum(p.numel() for p in made.parameters()) == weights + 6 + (rank or 0), "and the norms' scales"
    per_key = heads * (d_head + d_rope + d_value)
    assert made.flops_per_token(seq_len) == 2 * (weights + seq_len * per_key)
    cache = KVCache(8)
    made(torch.zeros(1, 3, d, dtype=torch.float64), cache.context(3, torch.device("cpu")))
    kept = sum(x[:, :, :1].numel() for x in cache.layers[0])
    assert made.cache_bytes_per_token(2) == 2 * kept == 2 * per_key


def test_the_latent_carries_all_that_mla_knows_of_a_key_but_its_position(component, randn):
    """Tokens of one latent differ in value by nothing, whatever else they are."""
    made = component("attention", {"type": "mla", "n_heads": 4, "kv_rank": 2})
    with torch.no_grad():
        made.kv_down.weight.zero_()
    assert not made(randn(2, 5, 16), ForwardContext()).any()
