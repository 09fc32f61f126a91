"""The three sparsities together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsekit.errors import DataError
from sparsekit.model.build import build_model
from sparsekit.probes.activation_sparsity import ActivationSparsity
from sparsekit.probes.attention_sparsity import AttentionSparsity
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered
from sparsekit.probes.sparsity import Sparsity
from sparsekit.probes.weight_sparsity import WeightSparsity

TOKENS = Tokens.of(torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1)), 2)


@pytest.mark.parametrize("metric", ["nonzero", "fat_eps", "cett_ppl"])
def test_it_is_the_three(tiny, metric):
    view = layered(build_model(tiny(), seed=0))
    view.layer_calls = 0
    whole = Sparsity(Sparsity.Params(metric=metric, top=4, eps=0.05)).run(view, TOKENS)
    if metric != "cett_ppl":
        assert view.layer_calls == 2 * 2, "attention and activations share a pass"
    parts = {
        "weights": WeightSparsity(),
        "attention": AttentionSparsity(AttentionSparsity.Params(top=4)),
        "activations": ActivationSparsity(ActivationSparsity.Params(metric=metric, eps=0.05)),
    }
    for field in ("scalars", "per_layer", "matrices", "intervals", "arrays"):
        wanted = {
            f"{name}/{key}": value
            for name, probe in parts.items()
            for key, value in getattr(probe.run(view, TOKENS), field).items()
        }
        found = getattr(whole, field)
        assert set(found) == set(wanted)
        for key, value in wanted.items():
            if value is not None:
                np.testing.assert_array_equal(found[key], value)
    assert whole.meta["activations/metric"] == metric
    assert whole.meta["axes"]["attention/entropy"] == ("layer", "head")
    assert whole.meta["axes"]["activations/heat_map"] == ("layer", "token")
    if metric == "cett_ppl":
        assert whole.meta["activations/thresholds"].count(",") == 1


def test_what_does_not_apply_is_left_out(tiny, moe):
    view = layered(build_model(tiny(ffn=moe(dispatch="loop")), seed=0))
    short = Tokens.of(TOKENS.ids_ST[:, :8], 2)
    result = Sparsity().run(view, short)
    assert {name.split("/")[0] for name in result.scalars} == {"weights"}
    assert any(
        "not applicable: attention_sparsity: no query sees 16 keys" in remark for remark in result.meta["remarks"]
    )
    assert any("not applicable: activation_sparsity: no layer can be measured" in r for r in result.meta["remarks"])


def test_parameters_are_those_of_the_three():
    names = set(Sparsity.Params.model_fields)
    for probe in (WeightSparsity, AttentionSparsity, ActivationSparsity):
        assert set(probe.Params.model_fields) <= names
    assert len(names) == sum(
        len(p.Params.model_fields) for p in (WeightSparsity, AttentionSparsity, ActivationSparsity)
    )


def test_a_model_without_anything_to_measure_is_refused():
    view = layered(build_model({"d_model": 8, "n_layers": 1, "vocab_size": 16, "max_seq_len": 8,
                                "block": {"attention": {"type": "mha", "n_heads": 2},
                                          "ffn": {"type": "mlp", "d_ff": 8}}}, seed=0))  # fmt: skip
    with pytest.raises(DataError, match="no query sees 16 keys"):
        AttentionSparsity().run(view, Tokens.of(torch.zeros(1, 8, dtype=torch.int64)))
