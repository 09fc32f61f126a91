"""Swapped and left-out layers, held against models whose modules are really swapped or left out."""

from __future__ import annotations

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from naive_models import NAMES, layers_of, losses_of, model_of, standing_in, tokens_of
from pydantic import ValidationError
from torch import nn

from sparsekit.probes.layered import ViewError, layered
from sparsekit.probes.permutation import Permutation


def run(model, tokens, **params):
    return Permutation(Permutation.Params(**params)).run(layered(model), tokens)


def swapped(model: nn.Module, name: str, i: int, j: int) -> nn.Module:
    """A copy in which two modules have changed places."""
    model = copy.deepcopy(model)
    layers = layers_of(model, name)
    layers[i], layers[j] = layers[j], layers[i]
    return model


def naive(model: nn.Module, name: str, ids_ST: torch.Tensor) -> np.ndarray:
    n = len(layers_of(model, name))
    dense, score = losses_of(model, ids_ST).mean(), np.zeros((n, n))
    for i, j in combinations(range(n), 2):
        loss = losses_of(swapped(model, name, i, j), ids_ST).mean()
        score[i, j] = score[j, i] = abs(loss - dense) / dense
    return score


@pytest.mark.parametrize("name", [n for n in NAMES if n != "gemma3"])
@pytest.mark.parametrize("exact", [False, True])
def test_the_score_is_that_of_really_swapping(name, exact):
    model, tokens = model_of(name), tokens_of()
    wanted = naive(model, name, tokens.ids_ST)
    n = len(wanted)
    result = run(model, tokens, exact=exact)
    np.testing.assert_allclose(result.matrices["score"], wanted, rtol=1e-9, atol=1e-12)
    assert (result.matrices["score"] == result.matrices["score"].T).all()
    pairs = [wanted[i, j] for i, j in combinations(range(n), 2)]
    assert result.scalars["permutation"] == pytest.approx(np.mean(pairs), rel=1e-9)
    of_layers = [sum(wanted[i, j] for j in range(n) if j != i) / (n - 1) for i in range(n)]
    np.testing.assert_allclose(result.per_layer["score"], of_layers, rtol=1e-9)
    weighted = sum((i + 1) * p for i, p in enumerate(of_layers)) / sum(range(1, n + 1))
    assert result.scalars["depth_weighted"] == pytest.approx(weighted, rel=1e-9)


def test_arguments_travel_with_their_layer():
    """Sliding and full attention differ in their masks; swapping modules alone would leave the masks behind."""
    model, tokens = model_of("gemma3"), tokens_of()
    layers = layers_of(model, "gemma3")
    batch = layered(model).start(tokens.ids_ST)
    h = batch.h_0
    for layer in (1, 0, 2):
        h = batch.layer(layer, h)
    dense = losses_of(model, tokens.ids_ST).mean()
    wanted = (batch.losses(h).mean() - dense).abs() / dense
    assert len(layers) == 3
    assert run(model, tokens).matrices["score"][0, 1] == pytest.approx(wanted.item(), rel=1e-9)


def test_exact_is_bit_for_bit_the_permuted_model():
    model, tokens = model_of("sparsekit").float(), tokens_of(8)
    score = run(model, tokens, exact=True).matrices["score"]

    def loss(model: nn.Module) -> float:
        view, losses = layered(model), []
        for ids_BT in tokens.batches():
            batch = view.start(ids_BT)
            h = batch.h_0
            for layer in range(view.n_layers):
                h = batch.layer(layer, h)
            losses.append(batch.losses(h))
        with torch.no_grad():
            logits = model(ids_BT)
        assert torch.equal(batch.head(h), logits), "the view's way is the model's, bit for bit"
        return torch.cat(losses).double().numpy().mean()

    with torch.no_grad():
        dense = loss(model)
        for i, j in combinations(range(4), 2):
            assert score[i, j] == abs(loss(swapped(model, "sparsekit", i, j)) - dense) / dense


def test_identical_layers_may_change_places():
    model = model_of("sparsekit")
    model.layers[2].load_state_dict(model.layers[1].state_dict())
    score = run(model, tokens_of()).matrices["score"]
    assert score[1, 2] == pytest.approx(0, abs=1e-14)
    assert score[0, 1] > 1e-6


def test_identity_layers_may_change_places():
    model = model_of("sparsekit")
    with torch.no_grad():
        for layer in model.layers[1:3]:
            layer.attention.o.weight.zero_()
            layer.ffn.down.weight.zero_()
    result = run(model, tokens_of(), removal="layers")
    assert result.matrices["score"][1, 2] == 0
    np.testing.assert_allclose(result.per_layer["removal"][1:3], 0, atol=1e-14)


@pytest.mark.parametrize("pairs", ["adjacent", "1-3", "3-1"])
def test_some_pairs(pairs):
    model, tokens = model_of("sparsekit"), tokens_of()
    wanted, got = run(model, tokens).matrices["score"], run(model, tokens, pairs=pairs)
    asked = [(0, 1), (1, 2), (2, 3)] if pairs == "adjacent" else [(1, 3)]
    there = np.eye(4, dtype=bool)
    for i, j in asked:
        there[i, j] = there[j, i] = True
    np.testing.assert_allclose(got.matrices["score"][there], wanted[there], rtol=1e-12)
    assert np.isnan(got.matrices["score"][~there]).all()
    assert got.scalars["permutation"] == pytest.approx(np.mean([wanted[i, j] for i, j in asked]))
    if pairs != "adjacent":
        assert np.isnan(got.per_layer["score"][[0, 2]]).all()
        assert got.scalars["depth_weighted"] == pytest.approx(wanted[1, 3])


@pytest.mark.parametrize("name", ["sparsekit", "gpt2"])
def test_what_is_left_out(name):
    model, tokens = model_of(name), tokens_of()
    layers = layers_of(model, name)
    n, dense = len(layers), losses_of(model, tokens.ids_ST)
    wanted = np.full((n, n), np.nan)
    change = np.zeros((n, 9))
    for first in range(n):
        for last in range(first, n):
            with standing_in(layers, {s: lambda h: h for s in range(first, last + 1)}):
                lost = losses_of(model, tokens.ids_ST) - dense
            wanted[first, last] = lost.mean()
            if first == last:
                change[first] = lost
    result = run(model, tokens, pairs="none", removal="spans")
    np.testing.assert_allclose(result.matrices["removal"], wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.per_layer["removal"], np.diag(wanted), rtol=1e-9, atol=1e-12)
    assert result.scalars == {"removal": pytest.approx(np.diag(wanted).mean(), rel=1e-9)}
    low, high = result.intervals["removal"]
    assert low < result.scalars["removal"] < high
    assert "score" not in result.matrices
    layers_only = run(model, tokens, removal="layers")
    np.testing.assert_allclose(layers_only.per_layer["removal"], np.diag(wanted), rtol=1e-9, atol=1e-12)
    assert "removal" not in layers_only.matrices
    assert set(layers_only.scalars) == {"permutation", "depth_weighted", "removal"}


@pytest.mark.parametrize("memory_gb", [1e-5, 4e-5])
@pytest.mark.parametrize("exact", [False, True])
def test_little_memory_changes_nothing(memory_gb, exact):
    model, tokens = model_of("sparsekit"), tokens_of()
    wanted = run(model, tokens, removal="spans")
    got = run(model, tokens, removal="spans", memory_gb=memory_gb, exact=exact)
    for matrix in ("score", "removal"):
        np.testing.assert_allclose(got.matrices[matrix], wanted.matrices[matrix], rtol=1e-9, atol=1e-12)


def test_no_layer_is_run_in_vain():
    n = 4
    fewest = n + sum((n - 1 - i) * (n - i) for i in range(n))
    meta = run(model_of("sparsekit"), tokens_of(8)).meta
    assert meta["layer_applications"] == meta["layer_applications_floor"] == 2 * fewest
    meta = run(model_of("sparsekit"), tokens_of(8), pairs="none", removal="layers").meta
    assert meta["layer_applications"] == meta["layer_applications_floor"] == 2 * (n + 3 + 2 + 1)


def test_mistakes_are_told():
    with pytest.raises(ViewError, match="permutation: pairs=2-9 are no two of the layers 0 to 3"):
        run(model_of("sparsekit"), tokens_of(), pairs="2-9")
    with pytest.raises(ViewError, match="permutation: pairs=2-2 are no two"):
        run(model_of("sparsekit"), tokens_of(), pairs="2-2")
    with pytest.raises(ViewError, match="one layer, which has none to change places with; say pairs=none"):
        run(model_of("sparsekit", n_layers=1), tokens_of())
    with pytest.raises(ValidationError):
        Permutation.Params(pairs="some")
    assert run(model_of("sparsekit", n_layers=1), tokens_of(), pairs="none", removal="layers").scalars


@pytest.mark.slow
def test_layers_may_be_compiled():
    model, tokens = model_of("sparsekit").float(), tokens_of()
    wanted = run(model, tokens)
    got = run(model, tokens, compile=True)
    np.testing.assert_allclose(got.matrices["score"], wanted.matrices["score"], atol=1e-5)
    assert all(layer._compiled_call_impl is None for layer in model.layers), "they are as they were"
