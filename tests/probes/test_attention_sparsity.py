"""Attention sparsity against loops over heads, queries and keys, with probabilities from the models themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.model.build import build_model
from sparsekit.probes import attention_sparsity
from sparsekit.probes.anatomy import Score
from sparsekit.probes.attention_sparsity import AttentionSparsity, probabilities
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered

T = 24
IDS = torch.randint(0, 64, (3, T), generator=torch.Generator().manual_seed(1))
TOKENS = Tokens.of(IDS, 2)
NAMES = ("below_0.001", "below_0.0001", "below_uniform", "entropy", "support", "top_8", "first_token")


def grown(model: Any) -> Any:
    """In float64, with weights of some size."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def naive(p_BHTS: Tensor, visible_TS: Tensor, min_visible: int = 16, top: int = 8) -> dict[str, list[float]]:
    """By head, the mean over queries; a loop over all."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for head in range(p_BHTS.shape[1]):
        values: dict[str, list[float]] = {name: [] for name in NAMES}
        for sequence in range(p_BHTS.shape[0]):
            for query in range(p_BHTS.shape[2]):
                seen = [float(p) for p, v in zip(p_BHTS[sequence, head, query], visible_TS[query], strict=True) if v]
                n = len(seen)
                if n < min_visible:
                    continue
                entropy = -sum(p * math.log(p) for p in seen if p > 0)
                values["below_0.001"].append(sum(p < 1e-3 for p in seen) / n)
                values["below_0.0001"].append(sum(p < 1e-4 for p in seen) / n)
                values["below_uniform"].append(sum(p < 1 / n for p in seen) / n)
                values["entropy"].append(entropy / math.log(n))
                values["support"].append(math.exp(entropy) / n)
                values["top_8"].append(sum(sorted(seen)[-top:]))
                values["first_token"].append(float(p_BHTS[sequence, head, query, 0]))
        for name in NAMES:
            found[name].append(float(np.mean(values[name])))
    return found


def causal(window: int | None = None, sinks: int = 0) -> Tensor:
    query, key = torch.arange(T)[:, None], torch.arange(T)
    return (key <= query) & ((query - key < (window or T)) | (key < sinks))


def eager_probabilities(model: Any) -> list[Tensor]:
    """Of each layer of a sparsekit model whose kernel is eager, by catching what the kernel works out."""
    caught: list[Tensor] = []
    for layer in model.layers:
        kernel = layer.attention.kernel
        plain = kernel.probabilities

        def catching(*args: Any, plain: Any = plain) -> Tensor:
            caught.append(plain(*args))
            return caught[-1]

        kernel.probabilities = catching
    with torch.no_grad():
        model(IDS)
    return caught


HEADS = {"n_heads": 4, "kernel": "eager"}
ATTENTIONS = {
    "gqa": ({"type": "gqa", "n_kv_heads": 2, **HEADS}, causal()),
    "mqa, qk_norm": ({"type": "mqa", "qk_norm": "rmsnorm", **HEADS}, causal()),
    "window": ({"type": "mha", "window": 18, **HEADS}, causal(18)),
    "window and sinks": ({"type": "mha", "window": 17, "sinks": 2, **HEADS}, causal(17, 2)),
    "alibi, softcap": ({"type": "mha", "position": "alibi", "softcap": 3.0, **HEADS}, causal()),
    "mla": ({"type": "mla", "kv_rank": 8, **HEADS}, causal()),
    "sparsemax": ({"type": "mha", "normalizer": "sparsemax", **HEADS}, causal()),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_head_against_the_loop(tiny, name, monkeypatch):
    attention, visible = ATTENTIONS[name]
    if name == "sparsemax":
        pytest.importorskip("entmax")
    model = grown(build_model(tiny(attention=attention), seed=0))
    wanted = [naive(p, visible) for p in eager_probabilities(model)]
    monkeypatch.setattr(attention_sparsity, "MOST_SCORES", 4 * 2 * T * 5)  # blocks of 5 queries
    result = AttentionSparsity().run(layered(model), TOKENS)
    for measure in NAMES:
        heads = np.array([of_layer[measure] for of_layer in wanted])
        np.testing.assert_allclose(result.matrices[measure], heads, rtol=0, atol=1e-9)
        np.testing.assert_allclose(result.per_layer[measure], heads.mean(1), rtol=0, atol=1e-9)
        assert result.scalars[measure] == pytest.approx(heads.mean(), abs=1e-9)
        low, high = result.intervals[measure]
        assert low <= result.scalars[measure] <= high


def test_learned_sinks_take_their_share(tiny):
    attention = {"type": "mha", "sink_logits": True, **HEADS}
    model = grown(build_model(tiny(attention=attention), seed=0))
    told = list(eager_probabilities(model))
    result = AttentionSparsity().run(layered(model), TOKENS)
    for layer, p in enumerate(told):
        assert p.sum(-1).max() < 1
        np.testing.assert_allclose(result.matrices["top_8"][layer], naive(p, causal())["top_8"], atol=1e-9)
        whole = naive(p / p.sum(-1, keepdim=True), causal())
        np.testing.assert_allclose(result.matrices["entropy"][layer], whole["entropy"], atol=1e-9)


def test_uniform_attention_is_not_sparse_at_all(tiny):
    model = build_model(tiny(), seed=0).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.q.weight.zero_()
    result = AttentionSparsity(AttentionSparsity.Params(top=4)).run(layered(model), TOKENS)
    assert result.scalars["entropy"] == pytest.approx(1)
    assert result.scalars["support"] == pytest.approx(1)
    assert result.scalars["below_0.001"] == 0
    sizes = range(16, T + 1)
    assert result.scalars["first_token"] == pytest.approx(np.mean([1 / n for n in sizes]))
    assert result.scalars["top_4"] == pytest.approx(np.mean([4 / n for n in sizes]))


def test_attention_to_one_key_is_as_sparse_as_can_be():
    q = torch.ones(1, 1, T, 1, dtype=torch.float64)
    k = torch.zeros(1, 1, T, 1, dtype=torch.float64)
    k[:, :, 0] = 1
    p, visible = probabilities(q, k, Score(1e4), 0, T)
    found = naive(p, visible[0, 0])
    assert found["first_token"] == [1.0]
    assert found["support"][0] == pytest.approx(np.mean([1 / n for n in range(16, T + 1)]))
    assert found["below_0.0001"][0] == pytest.approx(np.mean([1 - 1 / n for n in range(16, T + 1)]))


def test_blocks_need_no_more_than_they_hold(tiny, monkeypatch):
    model = grown(build_model(tiny(), seed=0))
    whole = AttentionSparsity().run(layered(model), TOKENS)
    widths: list[int] = []
    plain = attention_sparsity.probabilities

    def watching(*args: Any) -> Any:
        found = plain(*args)
        widths.append(found[0].numel())
        return found

    monkeypatch.setattr(attention_sparsity, "probabilities", watching)
    monkeypatch.setattr(attention_sparsity, "MOST_SCORES", 1000)
    parts = AttentionSparsity().run(layered(model), TOKENS)
    assert max(widths) <= 1000
    for name, value in whole.scalars.items():
        assert parts.scalars[name] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_hugging_face_windows_and_caps_are_what_the_model_says(kind):
    from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 64, "intermediate_size": 48, "max_position_embeddings": 64, "sliding_window": 18}
    configs = [MistralConfig(**sizes)]
    if kind == "eager":  # its cap needs it
        configs.append(Gemma2Config(**sizes, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0))
    for config in configs:
        torch.manual_seed(0)
        told = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = grown(told)
        with torch.no_grad():
            wanted = model(IDS, output_attentions=True).attentions
        other = AutoModelForCausalLM.from_config(config, attn_implementation=kind).double().eval()
        other.load_state_dict(model.state_dict())
        result = AttentionSparsity().run(layered(other), TOKENS)
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * 2
        for layer, p in enumerate(wanted):
            visible = causal(18 if types[layer] == "sliding_attention" else None)
            heads = naive(p.double(), visible)
            for measure in NAMES:  # eager attention comes to its weights in float32
                np.testing.assert_allclose(result.matrices[measure][layer], heads[measure], rtol=0, atol=1e-6)


def test_too_short_sequences_are_refused(tiny):
    view = layered(build_model(tiny(), seed=0))
    with pytest.raises(DataError) as refused:
        AttentionSparsity().run(view, Tokens.of(IDS[:, :12]))
    assert str(refused.value) == (
        "attention_sparsity: no query sees 16 keys; give longer sequences or a lower min_visible"
    )
    narrow = layered(build_model(tiny(attention={**ATTENTIONS["window"][0], "window": 9}), seed=0))
    result = AttentionSparsity().run(narrow, TOKENS)
    assert (result.scalars, result.meta["remarks"][1]) == ({}, "layer 1: not applicable: no query sees 16 keys")
    assert np.isnan(result.per_layer["entropy"]).all()
