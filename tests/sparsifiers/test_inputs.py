"""Sparsifiers of what every projection reads: teal's thresholds and shares, wina's choice and its bases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered
from sparsekit.sparsifiers.base import losses
from sparsekit.sparsifiers.inputs import Raise, Wina, column_norms, orthogonal_basis, spent
from sparsekit.sparsifiers.rules import Limit, Rule, quantile

from .models import TOKENS, ids, logits, made, ours, theirs


def test_teal_thresholds_are_quantiles_of_what_is_read() -> None:
    """Of the first layer, which no mask stands before: |x| of the normalised embeddings."""
    model = ours(dtype=torch.float64)
    read: list[Tensor] = []
    handle = model.layers[0].attention.q.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    logits(model, TOKENS.ids_ST)
    handle.remove()
    sizes = read[0].detach().abs().flatten()
    found = made("teal", sparsity=0.3).calibrate(layered(model), TOKENS).limits
    for name in "qkv":
        threshold = float(found[0, name].threshold)
        dropped, kept = sizes[sizes <= threshold], sizes[sizes > threshold]
        assert len(dropped) / len(sizes) == pytest.approx(0.3, abs=2e-3), "tokens that come again have equal sizes"
        assert threshold == pytest.approx(float(dropped.max() + kept.min()) / 2)


def test_greedy_shares_spend_the_budget_where_it_costs_least() -> None:
    """What nothing depends on is dropped first, and the layer's output is nearer than with equal shares."""
    model = ours()
    with torch.no_grad():
        model.layers[1].attention.o.weight.mul_(1e-3)
    view = layered(model)
    greedy = made("teal-greedy", sparsity=0.5, step=0.125).calibrate(view, TOKENS)
    uniform = made("teal", sparsity=0.5).calibrate(view, TOKENS)
    sizes = {(layer, name): numel for (layer, name), numel in greedy.weights.items() if layer == 1}
    shares = greedy.meta["shares"]["1"]
    assert sum(shares[name] * n for (_, name), n in sizes.items()) / sum(sizes.values()) == pytest.approx(0.5)
    assert min(shares["o"], shares["v"]) > max(shares["down"], shares["up"])
    batch = view.start(TOKENS.ids_ST[:4])
    off = []
    for calibration in (greedy, uniform):
        with torch.no_grad():
            dense = batch.layer(0, batch.h_0)
        with torch.no_grad(), calibration.install(view):
            off.append(float((batch.layer(0, batch.h_0) - dense).norm()))
    assert off[0] < off[1]


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@torch.no_grad()
def test_greedy_shares_are_those_of_the_algorithm(sparsity: float) -> None:
    """Algorithm 1 written out for one layer: equal steps in weights, each time the one that leaves the least error."""
    model = ours(dtype=torch.float64, n_layers=1)
    view, few, step = layered(model), Tokens.of(ids(4), 4), 0.125
    block, batch = model.layers[0], layered(model).start(few.ids_ST)
    linears = {name: getattr(block.attention, name) for name in "qkvo"} | {
        name: getattr(block.ffn, name) for name in ("gate", "up", "down")
    }
    sizes: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        return lambda m, args: sizes.update({name: args[0].abs()} if name not in sizes else {})

    for name, linear in linears.items():
        linear.register_forward_pre_hook(look(name))
    dense = batch.layer(0, batch.h_0)
    thresholds: dict[str, float] = {}

    def mask(name: str) -> Any:
        return lambda m, args: (torch.where(args[0].abs() > thresholds.get(name, -1.0), args[0], 0), *args[1:])

    for name, linear in linears.items():
        linear.register_forward_pre_hook(mask(name))

    def error(shares: dict[str, float]) -> float:
        thresholds.clear()
        thresholds.update({n: float(quantile(sizes[n], share)) for n, share in shares.items() if share})
        return float((batch.layer(0, batch.h_0) - dense).square().sum())

    numel = {name: linear.weight.numel() for name, linear in linears.items()}
    total, largest = sum(numel.values()), max(numel.values())
    shares, left = dict.fromkeys(linears, 0.0), sparsity * total
    while left > 1e-6:
        grown = {n: min(0.99, shares[n] + step * largest / numel[n]) for n in shares if shares[n] < 0.99}
        now = error(shares)
        best = min(grown, key=lambda n: (error({**shares, n: grown[n]}) - now) / ((grown[n] - shares[n]) * numel[n]))
        taken = min(left, (grown[best] - shares[best]) * numel[best])
        shares[best] += taken / numel[best]
        left -= taken
    for linear in linears.values():
        linear._forward_pre_hooks.clear()
    found = made("teal-greedy", sparsity=sparsity, step=step).calibrate(view, few)
    assert found.meta["shares"]["0"] == pytest.approx(shares, abs=1e-6)
    assert len(set(shares.values())) > 2


steps_of_layers = st.dictionaries(
    st.integers(0, 3), st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1), st.floats(1, 9)), max_size=5)
)


@given(drawn=steps_of_layers, share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_global_budget_goes_to_the_cheapest_next_step(drawn: Any, share: float) -> None:
    raises: dict[int, list[Raise]] = {}
    for layer, steps in drawn.items():
        shares = dict.fromkeys("abc", 0.0)
        raises[layer] = []
        for name, cost, weights in steps:
            raises[layer].append(Raise(name, shares[name], shares[name] + weights / 100, weights, cost))
            shares[name] += weights / 100
    budget = share * sum(step.weights for steps in raises.values() for step in steps)
    wanted: dict[int, dict[str, float]] = {layer: {} for layer in raises}
    taken, left = dict.fromkeys(raises, 0), budget
    while left > 1e-9:
        ahead = {layer: raises[layer][taken[layer]] for layer in raises if taken[layer] < len(raises[layer])}
        layer = min(ahead, key=lambda layer: (ahead[layer].cost, layer))
        step = ahead[layer]
        part = min(1.0, left / step.weights)
        wanted[layer][step.name] = step.before + part * (step.share - step.before)
        left, taken[layer] = left - step.weights, taken[layer] + 1
    found = spent(raises, budget)
    dropped = sum(100 * share for shares in found.values() for share in shares.values())
    assert dropped == pytest.approx(budget)
    assert all(found[layer].get(n, 0) == pytest.approx(wanted[layer].get(n, 0)) for layer in raises for n in "abc")


def test_a_global_budget_spares_the_layer_that_matters() -> None:
    """Layers whose branches are small beside the stream lose more."""
    model = ours()
    with torch.no_grad():
        for linear in (model.layers[1].attention.o, model.layers[1].ffn.down):
            linear.weight.mul_(0.05)
    view = layered(model)
    found = made("teal-global", sparsity=0.5, step=0.25).calibrate(view, TOKENS)
    mean = [
        sum(found.meta["shares"][str(layer)][name] * n for (at, name), n in found.weights.items() if at == layer)
        / sum(n for (at, _), n in found.weights.items() if at == layer)
        for layer in range(3)
    ]
    assert mean[1] > 0.8 and max(mean[0], mean[2]) < 0.5
    assert sum(mean) / 3 == pytest.approx(0.5)
    dense, ratios = losses(view, TOKENS), []
    for calibration in (found, made("teal-greedy", sparsity=0.5, step=0.25).calibrate(view, TOKENS)):
        with calibration.install(view):
            ratios.append(float(abs(losses(view, TOKENS) - dense).mean()))
    assert ratios[0] < ratios[1]


# --- wina


@given(d_in=st.integers(1, 7), d_out=st.integers(7, 9), share=st.floats(0, 1), seed=st.integers(0, 999))
def test_winas_choice_is_the_best_where_columns_are_orthogonal(d_in: int, d_out: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = round(share * d_in)
    weight = torch.linalg.qr(torch.randn(d_out, d_in, generator=generator, dtype=torch.float64))[0]
    weight = weight * torch.rand(d_in, generator=generator, dtype=torch.float64) * 3
    x = torch.randn(d_in, generator=generator, dtype=torch.float64)
    rule = Rule(Limit(k=k), column_norms(weight))

    def error(kept: Any) -> float:
        mask = torch.zeros(d_in, dtype=torch.bool)
        mask[list(kept)] = True
        return float((weight @ x - weight @ torch.where(mask, x, 0)).norm())

    chosen = rule.keep(x[None])[0].nonzero()[:, 0].tolist()
    assert len(chosen) == k
    assert error(chosen) == pytest.approx(min(map(error, itertools.combinations(range(d_in), k))), abs=1e-12)


@given(rows=st.integers(1, 5), width=st.integers(1, 12), seed=st.integers(0, 999), data=st.data())
def test_with_equal_column_norms_wina_keeps_the_largest(rows: int, width: int, seed: int, data: Any) -> None:
    k = data.draw(st.integers(1, width))
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = Rule(Limit(k=k), torch.full((width,), 0.7, dtype=torch.float64)).keep(x)
    for row, mask in zip(x.tolist(), kept.tolist(), strict=True):
        ranked = sorted(range(width), key=lambda i: -abs(row[i]))
        assert {i for i in range(width) if mask[i]} == set(ranked[:k])


@pytest.mark.parametrize("shape", [(5, 12), (12, 12), (20, 12)])
def test_the_basis_makes_columns_orthogonal(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = orthogonal_basis(weight)
    gram = (weight @ basis).T @ (weight @ basis)
    assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-12)
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("make_model", [ours, theirs])
def test_the_transform_alone_leaves_the_function(make_model: Any) -> None:
    model = make_model(dtype=torch.float64)
    before = logits(model)
    calibration = made("wina-turned", sparsity=0.0).calibrate(layered(model), TOKENS)
    with calibration.install(model) as installed:
        turned = {name for (_, name), site in installed.sites.items() if site.rule.basis_II is not None}
        assert turned == {"q", "k", "v", "gate", "up"}, "o and down keep their basis"
        assert (logits(model) - before).abs().max() < 1e-10
        for name in ("k", "gate"):
            site = installed.sites[1, name]
            matrix = site.weight.weight @ site.rule.basis_II
            gram = matrix.T @ matrix
            assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-9)


def test_the_transform_makes_each_leaders_error_least() -> None:
    """Of what gate projections put out at 50%, against the same choice without the transform."""
    model = ours(dtype=torch.float64)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gate = model.layers[0].ffn.gate
    off = {}
    for transform in ("none", "column_orthogonal"):
        sparsifier = Wina(Wina.Params(sparsity=0.5, transform=transform))
        with torch.no_grad():
            dense = gate(x)
            with sparsifier.calibrate(layered(model), TOKENS).install(model):
                off[transform] = float((gate(x) - dense).norm())
    assert off["column_orthogonal"] < off["none"]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("make_model", [ours, theirs])
@torch.no_grad()
def test_projections_of_one_input_share_its_turn(make_model: Any, kernels: bool, monkeypatch: Any) -> None:
    """One product by V for q, k and v and one for gate and up, token after token; each token's is its own."""
    turns: list[Tensor] = []
    true = Rule.coordinates

    def counting(rule: Rule, x: Tensor) -> Tensor:
        turns.extend([] if rule.basis_II is None else [x])
        return true(rule, x)

    model = make_model(dtype=torch.float64)
    calibration = made("wina-turned", sparsity=0.5).calibrate(layered(model), TOKENS)
    with calibration.install(model):
        wanted = [logits(model, batch) for batch in (ids(1, 1, 5), ids(1, 1, 6))]
    with calibration.install(model, kernels=kernels):
        monkeypatch.setattr(Rule, "coordinates", counting)
        for seed, each in zip((5, 5, 6), (0, 0, 1), strict=True):
            turns.clear()
            assert torch.allclose(logits(model, ids(1, 1, seed)), wanted[each], rtol=1e-9)
            assert len(turns) == 2 * 3
