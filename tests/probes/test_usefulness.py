"""Layers replaced by affine maps, held against torch.linalg.lstsq and whole forwards in which a hook puts them in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive_models import NAMES, hidden, layers_of, losses_of, model_of, standing_in, tokens_of

from sparsekit.errors import DataError
from sparsekit.probes.layered import ViewError, layered
from sparsekit.probes.usefulness import Usefulness


def run(model, tokens, **params):
    return Usefulness(Usefulness.Params(**params)).run(layered(model), tokens)


def affine(x_BTD: torch.Tensor, f_BTD: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """W and b that fit f to x; the ridge as d more rows that say 0, about the mean."""
    x, f = x_BTD.flatten(0, 1), f_BTD.flatten(0, 1)
    mean, mean_f = x.mean(0), f.mean(0)
    centred, d = x - mean, x.shape[1]
    strength = ridge * centred.square().sum() / d
    rows = torch.cat([centred, strength.sqrt() * torch.eye(d, dtype=x.dtype)])
    weight = torch.linalg.lstsq(rows, torch.cat([f - mean_f, torch.zeros_like(rows[:d])])).solution
    return weight, mean_f - mean @ weight


def naive(model, name: str, fit_ids, test_ids, ridge: float = 0.0) -> tuple[list[float], float]:
    """(loss with each layer replaced, loss)."""
    layers = layers_of(model, name)
    dense = losses_of(model, test_ids).mean().item()
    replaced = []
    states = hidden(model, layers, fit_ids)
    for layer in range(len(layers)):
        weight, bias = affine(states[layer], states[layer + 1] - states[layer], ridge)
        with standing_in(layers, {layer: lambda h, weight=weight, bias=bias: h + h @ weight + bias}):
            replaced.append(losses_of(model, test_ids).mean().item())
    return replaced, dense


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("held_out", [True, False])
def test_the_ratio_is_that_of_really_replacing(name, held_out):
    model, tokens = model_of(name), tokens_of(37)
    ids_ST = tokens.ids_ST
    fit_ids, test_ids = (ids_ST[0::2], ids_ST[1::2]) if held_out else (ids_ST, ids_ST)
    replaced, dense = naive(model, name, fit_ids, test_ids, ridge=1e-3)
    result = run(model, tokens, held_out=held_out, ridge=1e-3)
    ratios = np.array(replaced) / dense
    np.testing.assert_allclose(result.per_layer["loss_ratio"], ratios, rtol=1e-9)
    assert result.scalars["usefulness"] == (ratios > 1.1).mean()
    assert result.scalars["mean_log_loss_ratio"] == pytest.approx(np.log(ratios).mean(), rel=1e-8)
    low, high = result.intervals["mean_log_loss_ratio"]
    assert low < result.scalars["mean_log_loss_ratio"] < high
    assert result.meta["remarks"] == ["intervals: sequences are resampled with the fit held fixed"]


def test_the_usual_ridge_is_hardly_one():
    model, tokens = model_of("sparsekit"), tokens_of(37)
    replaced, dense = naive(model, "sparsekit", tokens.ids_ST[0::2], tokens.ids_ST[1::2])
    got = run(model, tokens).per_layer["loss_ratio"]
    np.testing.assert_allclose(got, np.array(replaced) / dense, rtol=1e-6)
    np.testing.assert_allclose(run(model, tokens, ridge=0.0).per_layer["loss_ratio"], np.array(replaced) / dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("held_out", [True, False])
def test_an_affine_layer_is_useless(dtype, held_out):
    model = model_of("sparsekit")
    generator = torch.Generator().manual_seed(0)
    matrix = 0.3 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    bias = torch.randn(16, generator=generator, dtype=torch.float64)

    def affine(module, inputs, output):
        return inputs[0] @ matrix.to(inputs[0].dtype) + bias.to(inputs[0].dtype), output[1]

    handle = model.to(dtype).layers[1].register_forward_hook(affine)
    ratios = run(model, tokens_of(37), held_out=held_out).per_layer["loss_ratio"]
    handle.remove()
    assert ratios[1] == pytest.approx(1.0, abs=1e-8 if dtype == torch.float64 else 1e-5)
    assert abs(ratios[0] - 1) > 1e-3
    assert abs(ratios[2] - 1) > 1e-3


def test_float32_is_near_float64():
    model, tokens = model_of("sparsekit"), tokens_of(37)
    wanted = run(model, tokens).per_layer["loss_ratio"]
    np.testing.assert_allclose(run(model.float(), tokens).per_layer["loss_ratio"], wanted, rtol=1e-4)


@pytest.mark.parametrize("memory_gb", [1.5e-5, 5e-5])
def test_little_memory_changes_nothing(memory_gb):
    """Layers are fitted in groups, of which each takes a pass."""
    model, tokens = model_of("sparsekit"), tokens_of(37)
    wanted, got = run(model, tokens), run(model, tokens, memory_gb=memory_gb)
    np.testing.assert_allclose(got.per_layer["loss_ratio"], wanted.per_layer["loss_ratio"], rtol=1e-12)
    assert got.meta["layer_applications"] > wanted.meta["layer_applications"]


def test_no_layer_is_run_in_vain():
    meta = run(model_of("sparsekit"), tokens_of(24)).meta
    assert meta["layer_applications"] == meta["layer_applications_floor"] == 3 * 4 + 3 * (1 + 2 + 3 + 4)


def test_too_few_tokens_are_refused():
    model = model_of("sparsekit")
    said = (
        "usefulness: 60 tokens are too few to fit an affine map of 16 channels, which takes 68; "
        "give 12 sequences of 12 tokens or more"
    )
    with pytest.raises(DataError) as error:
        run(model, tokens_of(10))
    assert str(error.value) == said
    run(model, tokens_of(12))
    run(model, tokens_of(6), held_out=False)
    with pytest.raises(DataError, match="60 tokens are too few .* give 6 sequences"):
        run(model, tokens_of(5), held_out=False)


def test_nothing_to_evaluate_on_is_refused():
    model = model_of("sparsekit", max_seq_len=80)
    with pytest.raises(DataError, match="no second sequence to evaluate on; give two or more, or held_out=false"):
        run(model, tokens_of(1, length=80))


def test_dependent_channels_without_a_ridge_are_refused():
    model = model_of("sparsekit")
    with torch.no_grad():
        model.embedding.weight[:, 3] = model.embedding.weight[:, 2] = 0
    with pytest.raises(DataError, match="the channels before layer 0 depend on each other.* a ridge larger than 0$"):
        run(model, tokens_of(37), ridge=0.0)
    run(model, tokens_of(37))


FINAL_NORMS = {"sparsekit": "norm", "llama": "model.norm", "gpt2": "transformer.ln_f"}


@pytest.mark.parametrize("name", FINAL_NORMS)
def test_what_the_released_code_computes(name):
    """The map of all tokens, its matrix transposed; that of the last layer to what comes after the final norm."""
    model, tokens = model_of(name), tokens_of(37)
    layers, norm = layers_of(model, name), model.get_submodule(FINAL_NORMS[name])
    states = hidden(model, layers, tokens.ids_ST)
    with torch.no_grad():
        targets = [*states[1:-1], norm(states[-1])]
    dense, wanted = losses_of(model, tokens.ids_ST).mean(), []
    for layer, target in enumerate(targets):
        weight, bias = affine(states[layer], target - states[layer], ridge=1e-3)
        matrix = torch.eye(len(weight), dtype=weight.dtype) + weight
        with standing_in(layers, {layer: lambda h, matrix=matrix, bias=bias: h @ matrix.T + bias}):
            wanted.append((losses_of(model, tokens.ids_ST).mean() / dense).item())
    result = run(model, tokens, compat="released", ridge=1e-3)
    np.testing.assert_allclose(result.per_layer["loss_ratio"], wanted, rtol=1e-9)
    assert any("compat=released" in remark for remark in result.meta["remarks"])
    assert abs(result.per_layer["loss_ratio"] - run(model, tokens).per_layer["loss_ratio"]).max() > 1e-3


def test_a_model_that_shows_no_final_norm_has_no_released_measure():
    class Hidden(torch.nn.Module):
        def forward(self, x):
            return x[..., :1]

    model = model_of("sparsekit")
    model.norm = Hidden()
    model.head.forward = lambda x, context: x.expand(*x.shape[:-1], 32)
    with pytest.raises(ViewError, match="Decoder shows no final norm, which compat=released wants"):
        run(model, tokens_of(37), compat="released")
    assert run(model, tokens_of(37)).scalars
