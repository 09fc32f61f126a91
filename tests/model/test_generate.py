"""Generation: the cache changes nothing, and sampling follows the distribution it says."""

from __future__ import annotations

import math

import pytest
import torch

from sparsekit.components.attention import KernelAttention
from sparsekit.model.build import build_model
from sparsekit.model.generate import KVCache, generate, sample

ATTENTIONS = {
    "mha": {"type": "mha", "n_heads": 4},
    "gqa": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "mqa-window": {"type": "mqa", "n_heads": 4, "window": 3},
    "eager": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "kernel": "eager", "qk_norm": "rmsnorm"},
    "no-position": {"type": "mha", "n_heads": 4, "position": "none"},
    "mla": {"type": "mla", "n_heads": 4, "kv_rank": 8, "rope_head_dim": 4, "v_head_dim": 6},
}
PROMPT = [3, 14, 15, 9, 2]


def lively(spec, dtype=torch.float64):
    return build_model({"init": {"type": "normal", "std": 0.3}, **spec}, dtype=dtype).eval()


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_teacher_forced_logits_are_the_same_with_the_cache(tiny, moe, attention):
    model = lively(tiny(attention=attention, ffn=moe()))
    ids = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    whole, cache, parts = model(ids), KVCache(32), []
    for n_tokens in (5, 1, 1, 3, 1, 1):
        start = cache.length
        parts.append(model(ids[:, start : start + n_tokens], cache.context(n_tokens, ids.device)))
        cache.length += n_tokens
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def greedy(model, ids, n_tokens):
    """The likeliest token again and again, the whole sequence run each time; past the limit, its last half."""
    ids, limit, out = ids[-model.spec.max_seq_len :], model.spec.max_seq_len, []
    for _ in range(n_tokens):
        if len(ids) > limit:
            ids = ids[-max(1, limit // 2) :]
        out.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        ids = [*ids, out[-1]]
    return out


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize(("limit", "prompt"), [(32, PROMPT), (8, PROMPT), (8, list(range(20))), (1, PROMPT)])
def test_greedy(tiny, attention, cached, limit, prompt, monkeypatch):
    monkeypatch.setattr(KernelAttention, "caches", cached)
    if not cached:  # then nothing may be cached
        monkeypatch.setattr(KVCache, "extend", lambda *_: pytest.fail("the cache is used"))
    model = lively(tiny(attention=attention, max_seq_len=limit))
    got = list(generate(model, prompt, 20, temperature=0))
    assert got == greedy(model, prompt, 20)
    assert len(set(got)) > 2, "a model that says one thing only would hide much"


def test_top_1_is_greedy(tiny):
    model = lively(tiny())
    wanted = list(generate(model, PROMPT, 15, temperature=0))
    assert list(generate(model, PROMPT, 15, top_k=1, seed=4)) == wanted
    assert list(generate(model, PROMPT, 15, temperature=1e-4, seed=4)) == wanted


def test_seeds(tiny):
    model = lively(tiny())
    one, same, other = (list(generate(model, PROMPT, 15, seed=seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_stop(tiny):
    model = lively(tiny())
    whole = list(generate(model, PROMPT, 15, temperature=0))
    stop = whole[4]
    assert list(generate(model, PROMPT, 15, temperature=0, stop_id=stop)) == whole[: whole.index(stop)]


def test_the_mode_is_put_back(tiny):
    model = lively(tiny()).train()
    tokens = generate(model, PROMPT, 5)
    next(tokens)
    assert not model.training
    tokens.close()
    assert model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ids_T": []}, "the prompt is empty"),
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k >= 1"),
    ],
)
def test_mistakes(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        list(generate(lively(tiny()), **{"ids_T": PROMPT, "max_new_tokens": 3, **options}))


@pytest.mark.parametrize("top_k", [None, 2, 3, 9])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_sampling_follows_the_distribution(temperature, top_k):
    logits = [1.0, -0.5, 2.0, 0.3, -3.0]
    powers = [math.exp(z / temperature) for z in logits]
    allowed = sorted(range(5), key=lambda i: -powers[i])[: top_k or 5]
    generator, draws = torch.Generator().manual_seed(0), 4000
    counts = [0] * 5
    for _ in range(draws):
        counts[int(sample(torch.tensor(logits), temperature, top_k, generator))] += 1
    total = sum(powers[i] for i in allowed)
    for i in range(5):
        p = powers[i] / total if i in allowed else 0.0
        assert abs(counts[i] / draws - p) <= 5 * math.sqrt(p * (1 - p) / draws)
