"""Costs: parameters against the published models, FLOPs against torch's counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.errors import SpecError
from sparsekit.model.accounting import activation_bytes, describe
from sparsekit.model.build import build_model
from sparsekit.model.cache import KVCache
from sparsekit.spec.load import load_spec
from sparsekit.training.recompute import recompute

VOCABULARY = 50304


def reference(d_model, n_layers, n_heads, ffn):
    block = {"attention": {"type": "mha", "n_heads": n_heads}, "ffn": ffn}
    return {"d_model": d_model, "n_layers": n_layers, "vocab_size": VOCABULARY, "max_seq_len": 4096, "block": block}


def experts(n_experts, k, d_ff, shared=None):
    slot = {
        "type": "moe",
        "n_experts": n_experts,
        "router": {"type": "top_k", "k": k},
        "expert": {"type": "swiglu", "d_ff": d_ff},
    }
    return {**slot, "shared_expert": {"type": "swiglu", "d_ff": shared}} if shared else slot


# the reference architectures of the study "CoD", with their parameters and active parameters as published
REFERENCES = {
    "dense 1B": (reference(2048, 16, 16, {"type": "swiglu", "d_ff": 8192}), 1_279_854_592, 1_279_854_592),
    "dense 400M": (reference(1536, 16, 12, {"type": "swiglu", "d_ff": 2304}), 475_448_832, 475_448_832),
    "MoE 400M-2B": (reference(768, 16, 12, experts(32, 4, 1536, shared=1536)), 1_983_996_672, 398_549_760),
    "MoE 1B-7B": (reference(1120, 32, 16, experts(64, 8, 1120)), 7_982_644_320, 1_238_989_920),
    "MoE 2B-13B": (reference(2048, 16, 16, experts(64, 8, 2048)), 13_361_547_264, 2_087_258_112),
}


@pytest.mark.parametrize(("spec", "parameters", "active"), REFERENCES.values(), ids=REFERENCES)
def test_parameters_of_the_reference_architectures(spec, parameters, active):
    description = describe(spec)
    assert description.parameters == parameters
    assert description.active_parameters == active


def test_layers_are_told_where_they_differ(tiny, moe):
    spec = tiny(n_layers=7, ffn=moe(router={"type": "top_k", "k": 1}))
    spec["layers"] = {"0": {"ffn": {"type": "swiglu", "d_ff": 8}}, "2::3": {"attention": {"window": 4}}}
    spec["layers"]["-1"] = {"norm": "layernorm", "residual": "post_norm", "attention": {"qk_norm": "rmsnorm"}}
    heads, mixture = "n_heads=4, n_kv_heads=2", "moe(n_experts=4, router=top_k(k=1), expert=swiglu(d_ff=24))"
    described = describe(spec)
    assert described.layers == [
        {"layers": places, "attention": f"gqa({attention})", "norm": norm, "residual": residual, "ffn": ffn}
        for places, attention, norm, residual, ffn in (
            ("0", heads, "rmsnorm", "pre_norm", "swiglu(d_ff=8)"),
            ("1, 3-4", heads, "rmsnorm", "pre_norm", mixture),
            ("2, 5", "n_heads=4, window=4, n_kv_heads=2", "rmsnorm", "pre_norm", mixture),
            ("6", "n_heads=4, qk_norm=rmsnorm, n_kv_heads=2", "layernorm", "post_norm", mixture),
        )
    ]  # fmt: skip
    spec["layers"] = {"1::2": {"attention": {"window": 4}}}
    assert [row["layers"] for row in describe(spec).layers] == ["0:7:2", "1:6:2"]
    *_, names, first, second = str(describe(spec)).splitlines()
    assert names.split() == ["layers", "attention", "norm", "residual", "ffn"]
    assert first.startswith("0:7:2   gqa(") and second.startswith("1:6:2   gqa(") and mixture in second


def by_hand(d, n_layers, vocabulary, d_ff, kv_share, n_experts, k):
    """Parameters of a SwiGLU mixture from its sizes: (all, active)."""
    attention = 2 * d * d + 2 * d * d * kv_share
    rest = 2 * vocabulary * d + n_layers * (attention + 2 * d + d * n_experts) + d
    return rest + n_layers * n_experts * 3 * d * d_ff, rest + n_layers * k * 3 * d * d_ff


def test_parameters_by_hand(tiny, moe):
    description = describe(tiny(n_layers=3, ffn=moe()))
    assert (description.parameters, description.active_parameters) == by_hand(32, 3, 64, 24, 0.5, 4, 2)


def test_tied_parameters_count_once(tiny):
    assert describe(tiny()).parameters - describe(tiny(tie_embeddings=True)).parameters == 64 * 32


FFNS = {
    "swiglu": {"type": "swiglu", "d_ff": 48},
    "mlp": {"type": "mlp", "d_ff": 40},
    "moe": experts(4, 2, 24),
    "moe-shared": experts(5, 3, 24, shared=16),
}
ATTENTIONS = {
    "mha": {"type": "mha", "n_heads": 4},
    "gqa": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 10},
    "mqa": {"type": "mqa", "n_heads": 2, "qk_norm": "rmsnorm"},
    "mla": {"type": "mla", "n_heads": 4, "kv_rank": 8, "q_rank": 10, "rope_head_dim": 4, "v_head_dim": 6},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS)
def test_flops_are_what_torch_counts(tiny, ffn, attention, tied):
    ffn = {**ffn, "dispatch": "loop"} if ffn["type"] == "moe" else ffn
    model = build_model(tiny(attention={**attention, "kernel": "eager"}, ffn=ffn, tie_embeddings=tied)).eval()
    ids = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert model.flops_per_token(12) * ids.numel() == counter.get_total_flops()


def test_training_flops_are_what_torch_counts(tiny):
    """Backward takes twice the forward's products, but for the input's gradient of the first ones: the embedding's."""
    model = build_model(tiny(attention={"type": "mha", "n_heads": 4, "kernel": "eager"}))
    ids = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    assert 3 * model.flops_per_token(12) * ids.numel() == counter.get_total_flops()
    assert describe(tiny()).training_flops_per_token == 3 * describe(tiny()).flops_per_token


def test_a_window_costs_its_reach(tiny):
    whole = describe(tiny(attention={"type": "mha", "n_heads": 4})).flops_per_token
    windowed = describe(tiny(attention={"type": "mha", "n_heads": 4, "window": 8})).flops_per_token
    assert whole - windowed == 2 * 4 * (32 - 8) * 32


def test_cache_bytes_are_what_a_cache_holds(tiny):
    spec = tiny(n_layers=3, layers={"0": {"attention": {"n_kv_heads": 4}}, "1": {"attention": ATTENTIONS["mla"]}})
    model, cache = build_model(spec), KVCache(10)
    model(torch.zeros(1, 10, dtype=torch.int64), cache.context(10, torch.device("cpu")))
    held = sum(t.numel() * t.element_size() for pair in cache.layers.values() for t in pair)
    assert describe(spec).cache_bytes_per_token * 10 == held


def test_memory_and_tokens_of_a_run(tiny):
    model = tiny(vocab_size=300)
    train = {"max_steps": 7, "micro_batch_size": 2, "global_batch_tokens": 256, "precision": "bf16"}
    spec = load_spec({"model": model, "train": train})
    run, bare = describe(spec), describe(model)
    assert run.parameters == bare.parameters
    assert run.weight_bytes == 4 * run.parameters
    assert run.training_bytes == 16 * run.parameters, "weights, gradients and AdamW's two moments, float32 each"
    assert run.cache_bytes_per_token * 2 == bare.cache_bytes_per_token
    assert run.tokens == 7 * 256
    assert bare.tokens is None
    assert run.seq_len == 32
    assert describe(load_spec({"model": model, "train": {"max_tokens": 999}})).tokens == 999
    shorter = describe(load_spec({"model": model, "data": {"seq_len": 16}}))
    assert (shorter.seq_len, shorter.flops_per_token < run.flops_per_token) == (16, True)


@pytest.mark.parametrize("which", ["full", 2, 3, "none"])
def test_recomputed_layers_keep_their_input_alone(tiny, which):
    """As training wraps them."""
    raw = {"model": tiny(n_layers=3, vocab_size=257), "parallel": {"activation_checkpoint": which}}
    trained = build_model(raw["model"], device="meta")
    recompute(trained, which)
    told = describe(load_spec(raw)).activation_bytes
    assert told == activation_bytes(trained, 8, 32)
    whole = describe(load_spec(raw["model"])).activation_bytes
    n_recomputed = {"full": 3, 2: 1, 3: 1, "none": 0}[which]
    assert (told < whole) == (n_recomputed > 0)
    one = (whole - describe(load_spec({**raw["model"], "n_layers": 2})).activation_bytes) - 4 * 8 * 32 * 32
    assert told == pytest.approx(whole - n_recomputed * one, rel=0.02), "a layer, but for its input"


def test_layouts_by_hand(tiny, moe):
    """Two layers with mixtures of 4 experts: embedding and head 257 x 32, attention 32 x (32 + 16 + 16 + 32)."""
    raw = {"model": tiny(vocab_size=257, ffn=moe())}

    def parameters(**parallel):
        told = describe(load_spec({**raw, "parallel": parallel}))
        assert told.gradient_bytes == told.weight_bytes == told.optimizer_bytes // 2 == told.training_bytes // 4
        return told.processes, told.weight_bytes // 4

    table, norms, router, attention, experts = (
        2 * 257 * 32,
        (2 * 2 + 1) * 32,
        2 * 4 * 32,
        2 * 96 * 32,
        2 * 4 * 3 * 24 * 32,
    )
    assert parameters() == parameters(data="ddp") == (1, table + norms + router + attention + experts)
    assert parameters(tensor=2) == (2, table + norms + router + attention // 2 + experts // 2)
    assert parameters(expert=4, data="ddp") == (4, table + norms + router + attention + experts // 4)
    sharded = 2 * 65 * 32 + (norms + router + attention) // 4
    assert parameters(expert=4) == (4, sharded + experts // 4)
    assert parameters(expert=4, tensor=2) == (8, sharded - attention // 8 + experts // 8)


def test_layouts_that_cannot_be(tiny, moe):
    def line(ffn, **parallel):
        with pytest.raises(SpecError) as told:
            describe(load_spec({"model": tiny(vocab_size=257, ffn=ffn), "parallel": parallel}))
        (problem,) = told.value.problems
        return problem

    assert line(moe(), tensor=3).startswith("parallel.tensor: 3 processes cannot share layers.0.attention: ")
    assert line(moe(), expert=3) == (
        "parallel.expert: 3 processes cannot share layers.0.ffn: n_experts (4) cannot be divided by 3"
    )
    dense = {"type": "swiglu", "d_ff": 48}
    assert line(dense, expert=2) == "parallel.expert: the model has no experts to divide; leave it at 1"
