"""Skipping layers, held against whole forwards in which a hook skips them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from naive_models import NAMES, hidden, layers_of, logits_of, model_of, standing_in, tokens_of
from torch import Tensor

from sparsekit.probes.base import bootstrap
from sparsekit.probes.branches import interval
from sparsekit.probes.causal import Causal, depth_score
from sparsekit.probes.layered import ViewError, layered


def run(model, tokens, **params):
    return Causal(Causal.Params(**params)).run(layered(model), tokens)


def contributions(model, name: str, ids_ST: Tensor) -> list[Tensor]:
    states = hidden(model, layers_of(model, name), ids_ST)
    return [after - before for before, after in pairwise(states)]


@pytest.mark.parametrize("name", NAMES)
def test_the_effect_is_that_of_really_skipping(name):
    model, tokens = model_of(name), tokens_of()
    layers = layers_of(model, name)
    n = len(layers)
    dense = contributions(model, name, tokens.ids_ST)
    wanted = np.full((n, n), np.nan)
    for s in range(n - 1):
        with standing_in(layers, {s: lambda h: h}):
            skipped = contributions(model, name, tokens.ids_ST)
        for m in range(s + 1, n):
            difference = [(skipped[m][b, t] - dense[m][b, t]).norm() for b in range(9) for t in range(12)]
            size = [dense[m][b, t].norm() for b in range(9) for t in range(12)]
            wanted[s, m] = sum(difference) / sum(size)
    result = run(model, tokens)
    np.testing.assert_allclose(result.matrices["effect"], wanted, rtol=1e-9)
    per_layer = [np.mean(wanted[s, s + 1 :]) for s in range(n - 1)]
    np.testing.assert_allclose(result.per_layer["effect"], [*per_layer, np.nan], rtol=1e-9)
    assert result.scalars["causal"] == pytest.approx(np.mean(per_layer), rel=1e-9)
    weighted = sum((s + 1) * e for s, e in enumerate(per_layer)) / sum(per_layer)
    assert result.scalars["depth_score"] == pytest.approx(weighted, rel=1e-9)
    low, high = result.intervals["causal"]
    assert low < result.scalars["causal"] < high


def test_float32_is_near_float64():
    model, tokens = model_of("sparsekit"), tokens_of()
    wanted = run(model, tokens).matrices["effect"]
    np.testing.assert_allclose(run(model.float(), tokens).matrices["effect"], wanted, rtol=1e-5)


def test_a_narrow_model_keeps_its_states_in_float32():
    model, tokens = model_of("sparsekit").bfloat16(), tokens_of()
    wanted = run(model_of("sparsekit").bfloat16().float(), tokens)
    got = run(model, tokens)
    assert got.scalars["causal"] == pytest.approx(wanted.scalars["causal"], rel=1e-2)


def test_the_ratio_of_tokens():
    model, tokens = model_of("sparsekit"), tokens_of()
    dense = contributions(model, "sparsekit", tokens.ids_ST)
    with standing_in(layers_of(model), {1: lambda h: h}):
        skipped = contributions(model, "sparsekit", tokens.ids_ST)
    ratios = (skipped[3] - dense[3]).norm(dim=-1) / dense[3].norm(dim=-1)
    got = run(model, tokens, ratio="token_max").matrices["effect"][1, 3]
    assert got == pytest.approx(np.mean([max(row) for row in ratios.tolist()]), rel=1e-9)


@pytest.mark.parametrize("name", ["sparsekit", "gpt2"])
def test_the_effect_on_the_future(name):
    model, tokens = model_of(name), tokens_of()
    layers = layers_of(model, name)
    cut_S1 = torch.randint(1, 12, (9, 1), generator=torch.Generator().manual_seed(0))
    later_ST = torch.arange(12) >= cut_S1
    states = hidden(model, layers, tokens.ids_ST)
    dense = [after - before for before, after in pairwise(states)]

    def skip_the_past(h: Tensor) -> Tensor:
        return torch.where(later_ST[..., None], states[1], h)

    with standing_in(layers, {0: skip_the_past}):
        skipped = contributions(model, name, tokens.ids_ST)
    got = run(model, tokens, future=True).matrices["effect"]
    for m in range(1, len(layers)):
        change, size = (skipped[m] - dense[m]).norm(dim=-1), dense[m].norm(dim=-1)
        mean = [sum(x[b][later_ST[b]].mean() for b in range(9)) for x in (change, size)]
        assert got[0, m] == pytest.approx(float(mean[0] / mean[1]), rel=1e-9)


@pytest.mark.parametrize("name", ["sparsekit", "gpt2"])
def test_the_effect_on_what_is_predicted(name):
    model, tokens = model_of(name), tokens_of()
    layers = layers_of(model, name)
    dense = logits_of(model, tokens.ids_ST).softmax(-1)
    wanted = []
    for s in range(len(layers)):
        with standing_in(layers, {s: lambda h: h}):
            skipped = logits_of(model, tokens.ids_ST).softmax(-1)
        wanted.append((skipped - dense).norm(dim=-1).mean().item())
    result = run(model, tokens, output=True)
    np.testing.assert_allclose(result.per_layer["output_effect"], wanted, rtol=1e-9)
    assert result.scalars["output_effect"] == pytest.approx(np.mean(wanted))
    weighted = sum((s + 1) * e for s, e in enumerate(wanted)) / sum(wanted)
    assert result.scalars["output_depth_score"] == pytest.approx(weighted)
    np.testing.assert_allclose(result.matrices["effect"], run(model, tokens).matrices["effect"], rtol=1e-12)


def test_a_layer_that_adds_nothing_has_no_effect():
    model, tokens = model_of("sparsekit"), tokens_of()
    with torch.no_grad():
        for linear in (model.layers[1].attention.o, model.layers[1].ffn.down):
            linear.weight.zero_()
    result = run(model, tokens)
    effect = result.matrices["effect"]
    assert (effect[1, 2:] == 0).all()
    assert effect[0, 1] == 0, "0/0 is 0"
    assert effect[0, 2] > 0
    assert "effect: 1 layers add nothing; 0/0 is taken as 0" in result.meta["remarks"]


@pytest.mark.parametrize("memory_gb", [1e-5, 3e-5])
def test_little_memory_changes_nothing(memory_gb):
    """Fewer sequences at a time, and where that is not enough fewer skips."""
    model, tokens = model_of("sparsekit"), tokens_of()
    wanted, got = run(model, tokens, output=True), run(model, tokens, output=True, memory_gb=memory_gb)
    np.testing.assert_allclose(got.matrices["effect"], wanted.matrices["effect"], rtol=1e-12)
    np.testing.assert_allclose(got.per_layer["output_effect"], wanted.per_layer["output_effect"], rtol=1e-12)
    assert got.meta["layer_applications"] > wanted.meta["layer_applications"]


def test_no_layer_is_run_in_vain():
    result = run(model_of("sparsekit"), tokens_of())
    assert result.meta["layer_applications"] == result.meta["layer_applications_floor"] == 3 * (1 + 2 + 3 + 4)


def test_one_layer_is_refused():
    with pytest.raises(ViewError, match="causal: the model has one layer, and none after it"):
        run(model_of("sparsekit", n_layers=1), tokens_of())


def test_the_depth_score():
    assert depth_score(np.array([1.0, 1.0, 1.0])) == 2.0
    assert depth_score(np.array([0.0, 0.0, 5.0, np.nan])) == 3.0
    assert depth_score(np.zeros(3)) == 0.0


def test_intervals_are_the_bootstrap():
    samples = np.random.default_rng(1).random((7, 2, 3))
    wanted = bootstrap(samples, lambda s: s.mean(0)[1].max(), seed=4)
    assert interval(samples, lambda mean: mean[1].max(), seed=4) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    from sparsekit.probes.branches import Plan, losses
    from sparsekit.probes.causal import Sums
    from sparsekit.probes.permutation import Removals, Swaps, undisturbed, wanted_pairs, wanted_spans

    view, tokens = layered(model_of("sparsekit").bfloat16().cuda()), tokens_of(4)
    probe = Causal()
    sums, plan = Sums(probe, view, 4, 12), Plan.of(view, tokens, probe.params, 4, torch.float32)
    swaps, removals = Swaps(wanted_pairs("all", 4), 4, view.device), Removals(wanted_spans("spans", 4), 4)
    batch = view.start(tokens.ids_ST)
    with torch.no_grad():
        undisturbed(batch)  # what is made once a batch
        torch.cuda.set_sync_debug_mode("error")
        try:
            sums.follow(batch, range(3), slice(0, 4), plan.branches)
            dense_RBTD = undisturbed(batch)
            for schedule in (swaps, removals):
                losses(batch, schedule.run(batch, dense_RBTD, 2), 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
