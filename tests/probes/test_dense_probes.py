"""variance, moments, similarity, contributions, effective_rank against loops written from the definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from families import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.probes.base import DenseProbe, Tokens, bootstrap, dense_pass
from sparsekit.probes.contributions import Contributions
from sparsekit.probes.effective_rank import EffectiveRank
from sparsekit.probes.layered import layered
from sparsekit.probes.moments import Moments
from sparsekit.probes.similarity import Similarity, cka_matrix
from sparsekit.probes.sketch import Sketch
from sparsekit.probes.variance import Variance

TOKENS = Tokens.of(torch.randint(3, 64, (7, 10), generator=torch.Generator().manual_seed(0)), 3)
SITES = ("resid", "attn_out", "ffn_out")


@pytest.fixture(scope="module")
def view() -> Any:
    return layered(make("llama", torch.float64))


@pytest.fixture(scope="module")
def states(view: Any) -> dict[str, Tensor]:
    """Everything by full forwards with hooks, all tokens at once: resid [L+1, S, T, D], attn_out and ffn_out [L, …]."""
    kept: dict[str, list[Tensor]] = {"resid": [], "attn_out": [], "ffn_out": []}
    layers = view.model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda m, args: kept["resid"].append(args[0]))]
    for block in layers:
        hooks.append(block.register_forward_hook(lambda m, a, out: kept["resid"].append(out)))
        hooks.append(block.self_attn.register_forward_hook(lambda m, a, out: kept["attn_out"].append(out[0])))
        hooks.append(block.mlp.register_forward_hook(lambda m, a, out: kept["ffn_out"].append(out)))
    with torch.no_grad():
        view.model(input_ids=TOKENS.ids_ST, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {site: torch.stack(found) for site, found in kept.items()}


def standard(x: Any, power: int) -> Any:
    """The mean of ((x - mean) / std)^power over the last axis."""
    return np.mean(((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)) ** power, axis=-1)


def run(probe: DenseProbe, view: Any) -> Any:
    return probe.run(view, TOKENS)


def at(states: dict[str, Tensor], site: str, layer: int) -> Tensor:
    return states[site][layer + 1 if site == "resid" else layer]


def test_variance(view: Any, states: dict[str, Tensor]) -> None:
    result = run(Variance(), view)
    for site in SITES:
        for layer in range(3):
            x = at(states, site, layer)
            each = [float(torch.var(x[b, t], unbiased=True)) for b in range(7) for t in range(10)]
            assert result.per_layer[site][layer] == pytest.approx(sum(each) / 70, rel=1e-12)
            assert result.per_layer[f"{site}_rms"][layer] == pytest.approx(float(x.square().mean().sqrt()), rel=1e-12)
            assert result.per_layer[f"{site}_frobenius"][layer] == pytest.approx(float(x.norm()), rel=1e-12)
        assert result.scalars[f"{site}_mean"] == pytest.approx(result.per_layer[site].mean())
        low, high = result.intervals[f"{site}_last"]
        assert low < result.scalars[f"{site}_last"] < high


def test_moments(view: Any, states: dict[str, Tensor]) -> None:
    result = run(Moments(Moments.Params(top=4, quantile=0.9)), view)
    for site in SITES:
        for layer in range(3):
            x = at(states, site, layer).numpy()
            got = {name.removeprefix(f"{site}_"): values[layer] for name, values in result.per_layer.items()
                   if name.startswith(site)}  # fmt: skip
            flat, by_token = x.ravel(), x.reshape(70, 32)
            exact = {
                "skewness": standard(flat, 3), "kurtosis": standard(flat, 4),
                "excess_kurtosis": standard(flat, 4) - 3, "cv": flat.std(ddof=1) / abs(flat.mean()),
                "token_skewness": standard(by_token, 3).mean(), "token_skewness_std": standard(by_token, 3).std(ddof=1),
                "token_kurtosis": standard(by_token, 4).mean(), "token_kurtosis_std": standard(by_token, 4).std(ddof=1),
                "top_share": np.mean(np.sort(by_token**2)[:, -4:].sum(1) / (by_token**2).sum(1)),
            }  # fmt: skip
            for name, value in exact.items():
                assert got[name] == pytest.approx(value, rel=1e-9), name
            median = np.median(flat)
            close = {
                "iqr": np.quantile(flat, 0.75) - np.quantile(flat, 0.25), "mad": np.median(abs(flat - median)),
                "quantile_high": np.quantile(abs(flat), 0.9),
            }  # fmt: skip
            for name, value in close.items():
                assert got[name] == pytest.approx(value, rel=0.03), name
            high = np.quantile(abs(flat), 0.9)
            assert got["norm_above"] == pytest.approx((flat[abs(flat) > high] ** 2).sum() / (flat**2).sum(), abs=0.02)
            outliers = np.mean(abs(flat - flat.mean()) > 3 * flat.std())
            assert got["outliers"] == pytest.approx(outliers, abs=2 / flat.size + 1e-3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-10), min_size=1, max_size=60),
    st.floats(0, 1),
    st.sampled_from([0.001, 0.01, 0.1]),
)
def test_a_sketch_tells_quantiles_to_its_error_and_parts_add_up(numbers: list[float], q: float, error: float) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    whole, first, second = Sketch(error), Sketch(error), Sketch(error)
    whole.add(x)
    first.add(x[::2])
    second.add(x[1::2])
    first.merge(second)
    assert torch.equal(first.counts, whole.counts)
    ordered = sorted(numbers)
    exact = ordered[max(1, math.ceil(q * len(ordered))) - 1]
    assert whole.quantile(q) == pytest.approx(exact, rel=error * (1 + 1e-6), abs=0)
    median = ordered[max(1, math.ceil(len(ordered) / 2)) - 1]
    distances = sorted(abs(number - median) for number in numbers)
    mad = distances[max(1, math.ceil(len(ordered) / 2)) - 1]
    largest = max(abs(number) for number in numbers)
    assert abs(whole.mad() - mad) <= error * (largest + abs(median)) * (1 + 1e-6)


def test_similarity(view: Any, states: dict[str, Tensor]) -> None:
    result = run(Similarity(Similarity.Params(sample=1000)), view)
    h = states["resid"]
    means = h.mean((1, 2))
    for a in range(4):
        for b in range(4):
            cosine = torch.nn.functional.cosine_similarity(means[a], means[b], dim=0)
            assert result.matrices["cosine"][a, b] == pytest.approx(float(cosine), rel=1e-9)
            angles = [
                math.acos(min(1.0, float(h[a, s, t] @ h[b, s, t] / (h[a, s, t].norm() * h[b, s, t].norm()))))
                for s in range(7) for t in range(10)
            ]  # fmt: skip
            if a != b:
                assert result.matrices["angular"][a, b] == pytest.approx(sum(angles) / 70 / math.pi, rel=1e-9)
            x, y = (h[i].flatten(0, 1) - h[i].flatten(0, 1).mean(0) for i in (a, b))
            cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
            assert result.matrices["cka"][a, b] == pytest.approx(float(cka), rel=1e-9)
    for layer in range(3):
        cosine = torch.nn.functional.cosine_similarity(h[layer], h[layer + 1], dim=-1)
        assert result.per_layer["block_influence"][layer] == pytest.approx(float(1 - cosine.mean()), rel=1e-9)
        norm, head = view.model.model.norm, view.model.lm_head
        with torch.no_grad():
            p, last = (head(norm(x)).log_softmax(-1).flatten(0, 1) for x in (h[layer], h[-1]))
        kl = (p.exp() * (p - last)).sum(-1).mean()
        assert result.per_layer["lens_kl"][layer] == pytest.approx(float(kl), rel=1e-6)
        shared = [
            len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
            for a, b in zip(p, last, strict=True)
        ]
        assert result.per_layer["lens_overlap"][layer] == pytest.approx(sum(shared) / 70)
    assert result.meta["sampled_tokens"] == 70


def test_a_sample_of_tokens_is_what_is_asked_for(view: Any) -> None:
    result = run(Similarity(Similarity.Params(sample=9, lens=False)), view)
    assert result.meta["sampled_tokens"] == 9
    assert "lens_kl" not in result.per_layer


def test_cka_is_the_same_by_tokens_and_by_channels() -> None:
    x = torch.randn(3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = torch.cat((x, torch.zeros(3, 12, 5, dtype=torch.float64)), dim=-1)
    torch.testing.assert_close(cka_matrix(x), cka_matrix(wide))
    tall = torch.randn(2, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    padded = torch.cat((tall, torch.zeros(2, 40, 40, dtype=torch.float64)), dim=-1)
    torch.testing.assert_close(cka_matrix(tall), cka_matrix(padded))
    assert cka_matrix(torch.ones(2, 4, 3)).abs().sum() == 0


def test_contributions(view: Any, states: dict[str, Tensor]) -> None:
    result = run(Contributions(), view)
    for layer in range(3):
        h, attn, ffn = states["resid"][layer], states["attn_out"][layer], states["ffn_out"][layer]
        for name, added, stream in (("attn", attn, h), ("ffn", ffn, h + attn)):
            ratio = (added.norm(dim=-1) / stream.norm(dim=-1)).mean()
            cosine = torch.nn.functional.cosine_similarity(added, stream, dim=-1).mean()
            assert result.per_layer[f"{name}_ratio"][layer] == pytest.approx(float(ratio), rel=1e-9)
            assert result.per_layer[f"{name}_cosine"][layer] == pytest.approx(float(cosine), rel=1e-9)
    assert not result.per_layer["zero_denominators"].any()


def test_zero_streams_are_counted() -> None:
    view = layered(make("llama", torch.float64))
    with torch.no_grad():
        view.model.model.embed_tokens.weight.zero_()
    result = run(Contributions(), view)
    assert result.per_layer["zero_denominators"][0] == 140
    assert result.per_layer["attn_ratio"][0] == 0


def test_effective_rank(view: Any, states: dict[str, Tensor]) -> None:
    for centered in (True, False):
        result = run(EffectiveRank(EffectiveRank.Params(centered=centered)), view)
        for layer in range(3):
            x = states["resid"][layer + 1].flatten(0, 1)
            s = torch.linalg.svdvals(x - x.mean(0) if centered else x)
            p = s / s.sum()
            assert result.per_layer["effective_rank"][layer] == pytest.approx(
                float((-(p * p.log()).sum()).exp()), rel=1e-9
            )
            assert result.per_layer["stable_rank"][layer] == pytest.approx(
                float(s.square().sum() / s[0] ** 2), rel=1e-9
            )
            four = float(s.square().sum() ** 2 / s.pow(4).sum())
            assert result.per_layer["participation"][layer] == pytest.approx(four, rel=1e-9)


def test_one_pass_serves_all_and_says_the_same(view: Any) -> None:
    probes: list[DenseProbe] = [Variance(), Moments(), Similarity(), Contributions(), EffectiveRank()]
    view.layer_calls = 0
    together = dense_pass(view, TOKENS, [probe.observer(view, TOKENS) for probe in probes])
    assert view.layer_calls == 3 * 3  # batches times layers
    for probe, result in zip(probes, together, strict=True):
        alone = probe.run(view, TOKENS)
        assert alone.scalars == result.scalars
        assert alone.intervals == result.intervals


def test_float32_says_what_float64_does(view: Any) -> None:
    narrow = layered(make("llama", torch.float32))
    for probe in (Variance(), Contributions(), EffectiveRank()):
        wide = run(probe, view)
        for name, values in run(probe, narrow).per_layer.items():
            np.testing.assert_allclose(values, wide.per_layer[name], rtol=1e-5, atol=1e-5)


def test_a_site_that_is_missing_is_nan_and_told() -> None:
    view = layered(make("mamba"))
    result = run(Variance(), view)
    assert "attn_out" not in result.per_layer
    assert result.per_layer["resid"].shape == (3,)
    reason = "not applicable: no modules of the layer normalise scores over keys, not one"
    assert f"attn_out of layer 0: {reason}" in result.meta["remarks"]


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        samples = generator.normal(3.0, 2.0, size=40)
        low, high = bootstrap(samples, seed=trial, draws=200)
        covered += low < 3.0 < high
    assert 175 <= covered <= 200
    assert bootstrap(samples, seed=1) == bootstrap(samples, seed=1)
    assert bootstrap(np.ones(5)) == (1.0, 1.0)
