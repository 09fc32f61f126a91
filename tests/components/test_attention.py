"""Attention whole: projections, heads, positions, query-key norms, and the identities between head layouts."""

from __future__ import annotations

import pytest
import torch

from sparsekit.components.contracts import ForwardContext
from sparsekit.model.generate import KVCache
from tests.components.test_kernels import attend
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
