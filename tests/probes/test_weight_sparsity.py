"""Weight sparsity against formulas written out entry by entry, and on matrices whose measures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.model.build import build_model
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered
from sparsekit.probes.weight_sparsity import MEASURES, WeightSparsity, matrices, measure

NO_TOKENS = Tokens.of(torch.zeros(1, 2, dtype=torch.int64))


def naive(weight: torch.Tensor) -> dict[str, float]:
    """Entry by entry."""
    entries = [float(w) for w in weight.flatten()]
    n, x = len(entries), sorted(abs(w) for w in entries)
    l1, l2 = sum(x), math.sqrt(sum(w * w for w in entries))
    mean = sum(entries) / n
    m2, m4 = (sum((w - mean) ** power for w in entries) / n for power in (2, 4))
    s = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    p = [v / sum(s) for v in s if v > 0]
    found = {
        # half the relative mean absolute difference, which is what Gini's sum comes to
        "gini": sum(abs(a - b) for a in x for b in x) / (2 * n * l1),
        "hoyer": (math.sqrt(n) - l1 / l2) / (math.sqrt(n) - 1),
        "l1_over_l2": l1 / l2,
        "kurtosis": m4 / m2**2,
        "stable_rank": sum(s**2) / s[0] ** 2,
        "effective_rank": math.exp(-sum(v * math.log(v) for v in p)),
    }
    for r in (0.01, 0.1):
        found[f"below_{r:g}_rms"] = sum(abs(w) < r * l2 / math.sqrt(n) for w in entries) / n
    for tau in (1e-4, 1e-3, 1e-2):
        found[f"below_{tau:g}"] = sum(abs(w) < tau for w in entries) / n
    return found


@given(
    rows=st.integers(2, 7), columns=st.integers(2, 7), scale=st.sampled_from([1e-3, 1.0, 50.0]), seed=st.integers(0, 99)
)
def test_a_matrix_measures_what_the_formulas_say(rows, columns, scale, seed):
    weight = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight[0, 0] = 0
    found = measure(weight)
    assert set(found) == set(MEASURES)
    for name, wanted in naive(weight).items():
        assert found[name] == pytest.approx(wanted, rel=1e-9, abs=1e-12), name


def test_matrices_whose_measures_are_known():
    alone = torch.zeros(4, 4, dtype=torch.float64)
    alone[1, 2] = -3
    found = measure(alone)
    assert found["gini"] == pytest.approx(15 / 16)  # 1 - 1/n
    assert [found[name] for name in ("hoyer", "l1_over_l2", "stable_rank", "effective_rank")] == pytest.approx([1] * 4)
    assert found["below_0.0001"] == found["below_0.1_rms"] == 15 / 16
    equal = measure(torch.full((3, 3), 0.5, dtype=torch.float64))
    assert equal["gini"] == pytest.approx(0, abs=1e-15)
    assert equal["hoyer"] == pytest.approx(0, abs=1e-15)
    assert equal["kurtosis"] == 0  # no spread at all: 0/0
    turned = measure(torch.eye(5, dtype=torch.float64))
    assert (turned["stable_rank"], turned["effective_rank"]) == pytest.approx((5, 5))
    assert measure(torch.tensor([[1.0, -1.0]], dtype=torch.float64))["kurtosis"] == 1
    assert set(measure(torch.zeros(3, 2)).values()) == {0.0, 1.0}  # nothing divides by 0; all is below an absolute tau
    assert measure(torch.zeros(3, 2))["below_0.1_rms"] == 0


def test_a_change_of_scale_moves_absolute_shares_alone():
    weight = torch.randn(6, 9, dtype=torch.float64)
    small, large = measure(1e-3 * weight), measure(weight)
    moved = {name for name in MEASURES if small[name] != pytest.approx(large[name])}
    assert moved <= {"below_0.0001", "below_0.001", "below_0.01"}
    assert "below_0.01" in moved


def test_a_model_by_role_and_layer(tiny):
    model = build_model(tiny(n_layers=3), seed=0).double()
    with torch.no_grad():
        model.layers[1].ffn.down.weight[:, ::2] = 0
        model.layers[2].attention.q.weight.zero_()
    result = WeightSparsity().run(layered(model), NO_TOKENS)
    for layer, block in enumerate(model.layers):
        linears = {role: getattr(block.attention, role).weight for role in "qkvo"}
        linears |= {role: getattr(block.ffn, role).weight for role in ("gate", "up", "down")}
        of_layer = [measure(weight.detach()) for weight in linears.values()]
        for name in MEASURES:
            for role, values in zip(linears, of_layer, strict=True):
                assert result.per_layer[f"{role}/{name}"][layer] == values[name]
            assert result.per_layer[name][layer] == pytest.approx(np.mean([v[name] for v in of_layer]))
    assert result.scalars["gini"] == pytest.approx(result.per_layer["gini"].mean())
    assert result.scalars["zero_matrices"] == 1
    assert result.per_layer["down/below_0.0001"][1] >= 0.5
    assert next(iter(result.scalars)) == "gini", "the report leads with what is free of scale"
    assert result.intervals["gini"] is None


def test_experts_are_measured_one_by_one(tiny, moe):
    shared = {"type": "swiglu", "d_ff": 24}
    model = build_model(tiny(ffn=moe(shared_expert=shared), n_layers=1), seed=0).double()
    view = layered(model)
    result = WeightSparsity().run(view, NO_TOKENS)
    stacked = model.layers[0].ffn.experts.up.weight.detach()
    wanted = np.mean([measure(weight)["hoyer"] for weight in stacked])
    assert result.per_layer["up/hoyer"][0] == pytest.approx(wanted)
    assert (
        result.per_layer["shared_up/hoyer"][0] == measure(model.layers[0].ffn.shared_expert.up.weight.detach())["hoyer"]
    )
    names = [name for name, _ in matrices(view, 0)]
    assert len(names) == len(set(names)) == 4 + 3 + 3 + 1, "the router goes by its own name"
    assert any("router" in name for name in names)


def test_ranks_can_be_left_out(tiny):
    result = WeightSparsity(WeightSparsity.Params(ranks=False)).run(layered(build_model(tiny(), seed=0)), NO_TOKENS)
    assert not [name for name in result.per_layer if "rank" in name]
    assert "gini" in result.scalars


def test_hugging_face_matrices_are_told_apart_where_they_are_fused():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=32, initializer_range=0.3)
    )
    result = WeightSparsity().run(layered(model.double().eval()), NO_TOKENS)
    fused = model.transformer.h[1].attn.c_attn.weight.detach()  # [d_in, 3 d_out]
    for role, weight in zip("qkv", fused.T.chunk(3), strict=True):
        assert result.per_layer[f"{role}/gini"][1] == pytest.approx(measure(weight)["gini"])
    roles = {name.split("/")[0] for name in result.per_layer if "/" in name}
    assert roles >= {"q", "k", "v", "up", "down"}
    assert len(roles) == 6, "every matrix once, under a role or under its own name"
