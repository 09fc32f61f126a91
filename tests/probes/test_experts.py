"""Expert load counted token by token, and experts removed by zeroing their weights in the model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from families import make
from naive_models import losses_of, model_of, standing_in, tokens_of

from sparsekit.components.contracts import ForwardContext
from sparsekit.probes.experts import ExpertImportance, ExpertLoad
from sparsekit.probes.layered import ViewError, layered

SHARED = {"shared_expert": {"type": "swiglu", "d_ff": 8}, "shared_combine": "mean"}


def mixture_of(**changes):
    """Layer 0 is dense, layer 2 has fewer experts."""
    moe = {"type": "moe", "n_experts": 4, "router": {"type": "top_k", "k": 2}, "expert": {"type": "swiglu", "d_ff": 12}}
    moe |= changes
    dense = {"type": "swiglu", "d_ff": 24}
    attention = {"type": "mha", "n_heads": 2}
    layers = {"0": {"ffn": dense}, "2": {"ffn": {**moe, "n_experts": 3}}}
    return model_of("sparsekit", n_layers=3, block={"attention": attention, "ffn": moe}, layers=layers)


def importance(model, tokens, **params):
    return ExpertImportance(ExpertImportance.Params(**params)).run(layered(model), tokens)


@pytest.mark.parametrize("changes", [{}, SHARED, {"dispatch": "loop"}])
def test_the_load_is_what_the_routers_say_token_by_token(changes):
    model, tokens = mixture_of(**changes), tokens_of()
    states = read_by_ffn(model, tokens.ids_ST)
    result = ExpertLoad().run(layered(model), tokens)
    for layer, n_experts in ((1, 4), (2, 3)):
        load, together, largest = np.zeros(n_experts), np.zeros((n_experts, n_experts)), []
        for x_D in states[layer].flatten(0, 1):
            routing = model.layers[layer].ffn.router(x_D[None], ForwardContext())
            chosen = routing.expert_M.tolist()
            largest.append(routing.weight_M.max().item())
            for e in chosen:
                load[e] += 1
                for other in chosen:
                    together[e, other] += 1
        n_tokens = tokens.ids_ST.numel()
        np.testing.assert_allclose(result.arrays["load"][layer, :n_experts], load / n_tokens, rtol=1e-12)
        got = result.arrays["co_activation"][layer, :n_experts, :n_experts]
        np.testing.assert_allclose(got, together / n_tokens, rtol=1e-12)
        share = load / load.sum()
        entropy = -sum(p * math.log(p) for p in share) / math.log(n_experts)
        wanted = {"load_max": share.max() * n_experts, "load_entropy": entropy}
        wanted |= {"load_cv": np.std(share, ddof=1) / np.mean(share), "confidence": np.mean(largest), "dropped": 0}
        for name, value in wanted.items():
            assert result.per_layer[name][layer] == pytest.approx(value, rel=1e-9), name
    assert np.isnan(result.arrays["load"][0]).all()
    assert np.isnan(result.arrays["load"][2, 3])
    assert np.isnan(result.per_layer["load_max"][0])
    assert result.scalars["load_max"] == pytest.approx(result.per_layer["load_max"][1:].mean())
    low, high = result.intervals["load_entropy"]
    assert low < high <= 1
    assert result.meta["remarks"] == ["layer 0: not applicable: SwiGLU has no router"]


def read_by_ffn(model, ids_ST):
    """What each feed-forward is called with."""
    seen = {}
    handles = [
        layer.ffn.register_forward_pre_hook(lambda module, inputs, index=index: seen.update({index: inputs[0]}))
        for index, layer in enumerate(model.layers)
    ]
    with torch.no_grad():
        model(ids_ST)
    for handle in handles:
        handle.remove()
    return seen


def test_what_a_capacity_drops():
    model, tokens = mixture_of(router={"type": "switch", "capacity_factor": 0.5}), tokens_of(8)
    result = ExpertLoad().run(layered(model), tokens)
    kept = np.nansum(result.arrays["load"], axis=1)[1:]
    np.testing.assert_allclose(result.per_layer["dropped"][1:], 1 - kept, rtol=1e-12)
    assert (kept < 0.7).all()


@pytest.mark.parametrize("changes", [{}, SHARED, {"dispatch": "loop"}])
def test_the_importance_is_that_of_really_removing(changes):
    model, tokens = mixture_of(**changes), tokens_of()
    dense = losses_of(model, tokens.ids_ST)
    result = importance(model, tokens)
    wanted = np.full((3, 4), np.nan)
    for layer, n_experts in ((1, 4), (2, 3)):
        for e in range(n_experts):
            cut = copy.deepcopy(model)
            with torch.no_grad():
                experts = cut.layers[layer].ffn.experts
                experts.down.weight[e] = 0
            wanted[layer, e] = (losses_of(cut, tokens.ids_ST) - dense).mean()
        handle = model.layers[layer].ffn.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        lost = (losses_of(model, tokens.ids_ST) - dense).mean()
        handle.remove()
        assert result.per_layer["sublayer"][layer] == pytest.approx(lost.item(), rel=1e-9)
    np.testing.assert_allclose(result.arrays["importance"], wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.per_layer["expert_max"][1:], np.nanmax(wanted[1:], axis=1), rtol=1e-9)
    each = [np.nanmean(wanted[layer]) for layer in (1, 2)]
    assert result.scalars["expert_importance"] == pytest.approx(np.mean(each), rel=1e-9)
    low, high = result.intervals["expert_importance"]
    assert low < result.scalars["expert_importance"] < high
    only = importance(model, tokens, experts=False)
    assert only.scalars == {"sublayer_importance": pytest.approx(result.scalars["sublayer_importance"], rel=1e-12)}
    np.testing.assert_allclose(
        importance(model, tokens, memory_gb=2e-5).arrays["importance"], wanted, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_hugging_face_models(name):
    model, tokens = make(name, torch.float64), tokens_of()
    dense = losses_of(model, tokens.ids_ST)
    result, load = importance(model, tokens), ExpertLoad().run(layered(model), tokens)
    layer = 2
    np.testing.assert_allclose(np.nansum(load.arrays["load"][layer]), 2.0, rtol=1e-12)
    for e in range(4):
        cut = copy.deepcopy(model)
        with torch.no_grad():
            cut.model.layers[layer].mlp.experts.down_proj[e] = 0
        wanted = (losses_of(cut, tokens.ids_ST) - dense).mean().item()
        assert result.arrays["importance"][layer, e] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    with standing_in([model.model.layers[layer].mlp], {0: torch.zeros_like}):
        lost = (losses_of(model, tokens.ids_ST) - dense).mean().item()
    assert result.per_layer["sublayer"][layer] == pytest.approx(lost, rel=1e-9)
    assert np.isnan(result.per_layer["sublayer"][1]) == (name == "qwen3_moe")


def test_an_expert_without_weight_is_worth_nothing():
    model, tokens = mixture_of(), tokens_of()
    with torch.no_grad():
        model.layers[1].ffn.experts.down.weight[2] = 0
    assert importance(model, tokens).arrays["importance"][1, 2] == pytest.approx(0, abs=1e-14)


def test_dense_models_are_refused():
    model = model_of("sparsekit")
    for probe in (ExpertLoad(), ExpertImportance()):
        with pytest.raises(ViewError, match="no layer is a mixture whose router can be seen .*SwiGLU has no router"):
            probe.run(layered(model), tokens_of())
