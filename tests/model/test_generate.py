"""Generation: neither the cache nor the batch changes anything, and tokens follow the distribution that is said."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.catalogue import BUILT_IN
from sparsekit.components.attention import KernelAttention
from sparsekit.model.build import build_model
from sparsekit.model.cache import KVCache
from sparsekit.model.generate import can_cache, generate, generate_batch, together
from sparsekit.model.sampling import Sampling

ATTENTIONS = {
    "mha": {"type": "mha", "n_heads": 4},
    "gqa": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "mqa-window": {"type": "mqa", "n_heads": 4, "window": 3},
    "window-sinks": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "window": 3, "sinks": 2},
    "eager": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "kernel": "eager", "qk_norm": "rmsnorm"},
    "extras": {
        "type": "mha",
        "n_heads": 4,
        "kernel": "eager",
        "softcap": 2.0,
        "sink_logits": True,
        "output_gate": True,
    },
    "sparsemax": {"type": "mha", "n_heads": 4, "normalizer": "sparsemax", "kernel": "eager"},
    "mla": {"type": "mla", "n_heads": 4, "kv_rank": 8, "rope_head_dim": 4, "v_head_dim": 6},
    "mla-window": {"type": "mla", "n_heads": 4, "kv_rank": 8, "q_rank": 6, "rope_head_dim": 4, "window": 4, "sinks": 1},
    "no-position": {"type": "mha", "n_heads": 4, "position": "none"},
    "learned": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "position": "learned"},
    "alibi": {"type": "mha", "n_heads": 4, "position": "alibi"},
    "alibi-sinks": {"type": "mha", "n_heads": 4, "position": "alibi", "kernel": "eager", "sink_logits": True},
}
POSITIONS = [{"type": "rope", "scaling": "yarn"}, {"type": "rope", "fraction": 0.5}, "alibi", "learned", "none"]
PROMPT = [3, 14, 15, 9, 2]
PROMPTS = [[5, 1], PROMPT, [7], list(range(20, 31)), [8, 8, 8], PROMPT[::-1]]


def lively(spec, dtype=torch.float64):
    return build_model({"init": {"type": "normal", "std": 0.3}, **spec}, dtype=dtype).eval()


def test_every_attention_and_position_is_tried():
    assert {slot["type"] for slot in ATTENTIONS.values()} == set(BUILT_IN["attention"])
    named = {slot if isinstance(slot, str) else slot["type"] for slot in POSITIONS}
    assert named == set(BUILT_IN["position"])


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_teacher_forced_logits_are_the_same_with_the_cache(tiny, moe, attention):
    model = lively(tiny(attention=attention, ffn=moe()))
    check_in_pieces(model)


@pytest.mark.parametrize("position", POSITIONS, ids=str)
@pytest.mark.parametrize("attention", ["mha", "gqa", "mqa-window", "window-sinks", "eager", "extras", "mla"])
def test_so_they_are_at_every_position(tiny, attention, position):
    check_in_pieces(lively(tiny(attention={**ATTENTIONS[attention], "position": position})))


def test_so_they_are_with_positions_in_the_embedding(tiny):
    check_in_pieces(lively(tiny(embedding="token_and_position", attention=ATTENTIONS["no-position"])))


def check_in_pieces(model):
    assert can_cache(model)
    ids = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    whole, cache, parts = model(ids), KVCache(32), []
    for n_tokens in (5, 1, 1, 3, 1, 1):
        start = cache.length
        parts.append(model(ids[:, start : start + n_tokens], cache.context(n_tokens, ids.device)))
        cache.length += n_tokens
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if "alibi" not in name])
def test_sequences_of_different_lengths_share_a_cache(tiny, moe, attention):
    """Right-padded together, then a few tokens at a time: the logits of each are those of the sequence alone."""
    model = lively(tiny(attention=ATTENTIONS[attention], ffn=moe()))
    ids = torch.randint(64, (3, 14), generator=torch.Generator().manual_seed(0))
    whole, lengths, cache = model(ids), [7, 4, 1], KVCache(32)
    first = model(ids[:, :7], cache.context(7, ids.device))  # what stands past 4 and 1 is padding
    for row, length in enumerate(lengths):
        torch.testing.assert_close(first[row, :length], whole[row, :length], rtol=0, atol=1e-10)
    cache.length = 7
    for n_tokens in (1, 1, 3, 2):
        pieces = torch.stack([ids[row, at : at + n_tokens] for row, at in enumerate(lengths)])
        got = model(pieces, cache.ragged(lengths, n_tokens, ids.device))
        wanted = torch.stack([whole[row, at : at + n_tokens] for row, at in enumerate(lengths)])
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
        lengths = [at + n_tokens for at in lengths]
        cache.length += n_tokens


def greedy(model, ids, n_tokens):
    """The likeliest token again and again, the whole sequence run each time; past the limit, its last half."""
    ids, limit, out = ids[-model.spec.max_seq_len :], model.spec.max_seq_len, []
    for _ in range(n_tokens):
        if len(ids) > limit:
            ids = ids[-max(1, limit // 2) :]
        out.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        ids = [*ids, out[-1]]
    return out


CASES = [(name, True) for name in ATTENTIONS] + [(name, False) for name in ("gqa", "window-sinks", "alibi")]


@pytest.mark.parametrize(("attention", "cached"), CASES)
@pytest.mark.parametrize(("limit", "prompt"), [(32, PROMPT), (8, list(range(20))), (1, PROMPT)])
def test_greedy(tiny, attention, cached, limit, prompt, monkeypatch):
    monkeypatch.setattr(KernelAttention, "caches", cached)
    if not cached:  # then nothing may be cached
        monkeypatch.setattr(KVCache, "extend", lambda *_: pytest.fail("the cache is used"))
    model = lively(tiny(attention=ATTENTIONS[attention], max_seq_len=limit))
    got = list(generate(model, prompt, 20, temperature=0))
    assert got == greedy(model, prompt, 20)
    assert len(set(got)) > 2, "a model that says one thing only would hide much"


# --- batches


def batched(model, prompts, n_tokens, **options):
    told = [[] for _ in prompts]
    for index, token in generate_batch(model, prompts, n_tokens, **options):
        told[index].append(token)
    return told


@pytest.mark.parametrize(("attention", "cached"), CASES)
@pytest.mark.parametrize("limit", [32, 12])
def test_a_batch_says_what_each_prompt_says_alone(tiny, attention, limit, cached, monkeypatch):
    """Also past the limit, which prompts of different lengths reach at different times."""
    monkeypatch.setattr(KernelAttention, "caches", cached)
    model = lively(tiny(attention=ATTENTIONS[attention], max_seq_len=limit))
    wanted = [greedy(model, prompt, 14) for prompt in PROMPTS]
    assert batched(model, PROMPTS, 14, sampling=Sampling(0)) == wanted
    assert batched(model, PROMPTS, 14, sampling=Sampling(0), batch_size=4) == wanted


@pytest.mark.parametrize("router", [{"type": "top_k", "k": 2}, "switch", "expert_choice"], ids=str)
def test_experts_that_couple_sequences_do_not_couple_prompts(tiny, moe, router):
    model = lively(tiny(ffn=moe(router=router)))
    wanted = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert batched(model, PROMPTS, 8, sampling=Sampling(0)) == wanted


def test_what_may_run_together(tiny, moe):
    lengths = [2, 5, 1, 5, 3]
    assert together(lively(tiny()), lengths) == [[1, 3, 4, 0, 2]]
    assert together(lively(tiny()), lengths, 2) == [[1, 3], [4, 0], [2]]
    assert together(lively(tiny(attention=ATTENTIONS["alibi"])), lengths, 2) == [[1, 3], [4], [0], [2]]
    assert together(lively(tiny(ffn=moe(router="switch"))), lengths) == [[1], [3], [4], [0], [2]]


def test_a_prompt_that_ends_leaves_the_others_alone(tiny):
    model = lively(tiny())
    whole = [greedy(model, prompt, 12) for prompt in PROMPTS]
    ends_at = [3, 0, 7, 1, 12, 5]
    counts = [0] * len(PROMPTS)

    def ends(index, token):
        counts[index] += 1
        return counts[index] > ends_at[index]

    got = batched(model, PROMPTS, 12, sampling=Sampling(0), ends=ends)
    assert got == [ids[:n] for ids, n in zip(whole, ends_at, strict=True)]
    assert counts == [4, 1, 8, 2, 12, 6], "what has ended is not asked again"


def test_each_prompt_draws_from_its_own_generator(tiny):
    model, sampling = lively(tiny()), Sampling(1.5, top_k=20)
    got = batched(model, PROMPTS, 10, sampling=sampling, seed=7)
    alone = [list(generate(model, ids, 10, temperature=1.5, top_k=20, seed=7 + i)) for i, ids in enumerate(PROMPTS)]
    assert got == alone
    twice = batched(model, [PROMPT, PROMPT], 10, sampling=sampling, seed=7)
    assert twice[0] != twice[1]


def test_top_1_is_greedy(tiny):
    model = lively(tiny())
    wanted = list(generate(model, PROMPT, 15, temperature=0))
    for options in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert list(generate(model, PROMPT, 15, seed=4, **options)) == wanted


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
        ({"ids_T": []}, "the prompt is empty: give at least one token"),
        ({"temperature": -1}, "temperature must be >= 0 and top_k >= 1, got -1 and None"),
        ({"temperature": math.nan}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k >= 1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"min_p": 1.5}, r"min_p must be in 0 \.\. 1, got 1.5"),
    ],
)
def test_mistakes(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        list(generate(lively(tiny()), **{"ids_T": PROMPT, "max_new_tokens": 3, **options}))


# --- sampling


def distribution(logits, temperature, top_k, top_p, min_p):
    """By the definitions, with sorting in plain Python."""
    p = [math.exp(z / temperature - max(logits) / temperature) for z in logits]

    def scaled(kept):
        return [x / sum(p[i] for i in kept) if i in kept else 0.0 for i, x in enumerate(p)]

    kept = set(range(len(p)))
    if top_k is not None:
        kept = set(sorted(kept, key=lambda i: -p[i])[:top_k])
    p = scaled(kept)
    if top_p is not None:
        total, order = 0.0, sorted(kept, key=lambda i: -p[i])
        kept = set()
        for i in order:
            if total >= top_p:
                break
            kept.add(i)
            total += p[i]
        p = scaled(kept)
    if min_p is not None:
        kept = {i for i in kept if p[i] >= min_p * max(p)}
        p = scaled(kept)
    return p


@settings(max_examples=60)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12, unique=True),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.none() | st.integers(1, 13),
    st.none() | st.floats(0.05, 0.97),
    st.none() | st.floats(0.01, 0.99),
)
def test_the_distribution_that_is_drawn_from(levels, temperature, top_k, top_p, min_p):
    logits = [level / 9 for level in levels]
    got = Sampling(temperature, top_k, top_p, min_p).probabilities(torch.tensor([logits], dtype=torch.float64))
    wanted = torch.tensor([distribution(logits, temperature, top_k, top_p, min_p)], dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 4, "min_p": 0.1}])
def test_draws_follow_the_distribution(options):
    logits, draws = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0]), 4000
    sampling = Sampling(2.0, **options)
    p = sampling.probabilities(logits)
    generator = torch.Generator().manual_seed(0)
    tokens = sampling.pick(logits.expand(draws, -1), [generator] * draws)
    share = tokens.bincount(minlength=5) / draws
    assert ((share - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()
