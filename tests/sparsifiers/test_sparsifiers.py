"""Every sparsifier: realised sparsity, exact no-ops, definitions, optimality, and what they have in common."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import DataError, SpecError
from sparsekit.probes.activation_sparsity import ActivationSparsity
from sparsekit.probes.base import Tokens
from sparsekit.probes.cett import above
from sparsekit.probes.layered import layered
from sparsekit.probes.neurons import Down
from sparsekit.sparsifiers.base import losses
from sparsekit.sparsifiers.choose import make
from sparsekit.sparsifiers.inputs import Teal
from sparsekit.sparsifiers.installed import Installed
from sparsekit.sparsifiers.rules import Limit, Rule, largest, quantile

from .models import ALL, TOKENS, ids, logits, made, ours, theirs

CONTEXT = ForwardContext()
MODELS = {"ours": ours, "llama": theirs, "phi3": lambda: theirs("phi3"), "gpt2": lambda: theirs("gpt2")}
CASES = [(name, sparsity) for name in ALL for sparsity in (0.25, 0.5, 0.75)]


@pytest.fixture(scope="module", params=MODELS)
def view(request: pytest.FixtureRequest) -> Any:
    """One whose gate is a module, one whose gate is half of one, one without a gate."""
    return layered(MODELS[request.param]())


@pytest.mark.parametrize(("name", "sparsity"), CASES)
def test_realised_sparsity_is_what_was_asked_for(view: Any, name: str, sparsity: float) -> None:
    """By counting zeros anew, with hooks of the test's own."""
    calibration = made(name, sparsity=sparsity).calibrate(view, TOKENS)
    counts: dict[Any, list[int]] = {}

    def count(where: Any) -> Any:
        def before(module: Any, args: Any) -> None:
            seen = counts.setdefault(where, [0, 0])
            seen[0] += int((args[0] == 0).sum())
            seen[1] += args[0].numel()

        return before

    with calibration.install(view) as installed:
        handles = [
            site.weight.module.register_forward_pre_hook(count(where)) for where, site in installed.sites.items()
        ]
        with torch.no_grad():
            logits(view.model, TOKENS.ids_ST)
        for handle in handles:
            handle.remove()
        realised = installed.realised()
    assert calibration.realised == pytest.approx(realised, abs=1e-3)
    turned = {where for where, site in installed.sites.items() if site.rule.basis_II is not None}
    counted = {where: zeros / n for where, (zeros, n) in counts.items() if where not in turned}
    assert {w: share for w, share in realised.items() if w not in turned} == pytest.approx(counted)
    assert calibration.sparsity == pytest.approx(sparsity, abs=0.01)
    if name not in ("cett", "fat_eps", "teal-greedy", "teal-global"):  # those have their sparsity over all layers
        assert list(realised.values()) == pytest.approx([sparsity] * len(realised), abs=0.01)


NOTHING = [
    ("cett", {"sparsity": 0.0}), ("cett", {"cett": 0.0}), ("fat_eps", {"eps": 0.0}), ("fat_eps", {"sparsity": 0.0}),
    ("top_k", {"k": 1.0}), ("top_k", {"sparsity": 0.0}), ("teal", {"sparsity": 0.0}),
    ("teal-greedy", {"sparsity": 0.0}), ("teal-global", {"sparsity": 0.0}), ("wina", {"sparsity": 0.0}),
    ("cats", {"sparsity": 0.0}), ("chess-attention", {"sparsity": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params"), NOTHING, ids=[f"{n}-{p}" for n, p in NOTHING])
def test_dropping_nothing_changes_no_bit(view: Any, name: str, params: dict[str, float]) -> None:
    calibration = made(name, **params).calibrate(view, TOKENS)
    before = logits(view.model)
    with calibration.install(view):
        assert torch.equal(logits(view.model), before)


# --- each from its definition


def neurons(ffn: Any, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gate, up, a), each [N, F]."""
    gate, up = F.silu(x_ND @ ffn.gate.weight.T), x_ND @ ffn.up.weight.T
    return gate, up, gate * up


@pytest.mark.parametrize("name", ["cett", "fat_eps", "top_k", "cats", "chess"])
def test_a_feed_forward_drops_what_the_definition_says(name: str) -> None:
    model = ours(dtype=torch.float64)
    sample = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    calibration = made(name, sparsity=0.5).calibrate(layered(model), TOKENS)
    with torch.no_grad(), calibration.install(model):
        for layer, block in enumerate(model.layers):
            ffn, limit = block.ffn, calibration.limits[layer, "down"]
            got = ffn(sample, CONTEXT)[0]
            for x_D, y_D in zip(sample[0], got, strict=True):
                gate, _, a = (each[0] for each in neurons(ffn, x_D[None]))
                wanted = torch.zeros(32, dtype=torch.float64)
                ranked = sorted(range(48), key=lambda i: -abs(float(a[i])))
                for i in range(48):
                    n_D = a[i] * ffn.down.weight[:, i]
                    by_gate = name in ("fat_eps", "cats", "chess")
                    size = abs(float(gate[i])) if by_gate else float(n_D.norm())
                    at = limit.threshold if name != "chess" else limit.threshold[i]
                    kept = i in ranked[:24] if name == "top_k" else size > float(at)
                    wanted += n_D if kept else 0
                assert torch.allclose(y_D, wanted, atol=1e-12)


def test_chess_thresholds_are_the_papers() -> None:
    """t_i = sqrt(T / E[up_i^2]), T the quantile of gate^2 E[up^2], on what the feed-forward reads."""
    model = ours(dtype=torch.float64)
    read: list[Tensor] = []
    handle = model.layers[0].ffn.register_forward_pre_hook(lambda m, args: read.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(TOKENS.ids_ST)
        handle.remove()
        gate, up, _ = neurons(model.layers[0].ffn, read[0])
        squared_F = up.square().mean(0)
        importance = (gate.square() * squared_F).flatten().sort().values
        k = round(0.4 * len(importance))
        t = (importance[k - 1].sqrt() + importance[k].sqrt()).square() / 4
    found = made("chess", sparsity=0.4).calibrate(layered(model), TOKENS).limits[0, "down"].threshold
    assert torch.allclose(found, (t / squared_F).sqrt(), rtol=1e-6)


def test_with_a_constant_up_chess_is_cats() -> None:
    model = ours({"type": "swiglu", "d_ff": 48, "bias": True})
    with torch.no_grad():
        for block in model.layers:
            block.ffn.up.weight.zero_()
            block.ffn.up.bias.fill_(1.5)
    view = layered(model)
    outputs, thresholds = [], []
    for name in ("cats", "chess"):
        calibration = made(name, sparsity=0.6).calibrate(view, TOKENS)
        thresholds.append([limit.threshold.double() for limit in calibration.limits.values()])
        with calibration.install(view) as installed:
            outputs.append(logits(model))
            assert max(abs(share - 0.6) for share in installed.realised().values()) < 0.01
    for cats, chess in zip(*thresholds, strict=True):
        assert torch.allclose(chess, cats.expand_as(chess), rtol=1e-6)
    assert torch.equal(*outputs)


# --- cett and the probe


@pytest.mark.parametrize("make_model", [ours, theirs])
def test_cett_finds_and_uses_what_the_probe_does(make_model: Any) -> None:
    model = make_model()
    view = layered(model)
    probe = ActivationSparsity(ActivationSparsity.Params(p=0.02, held_out=False))
    told = probe.run(view, TOKENS)
    calibration = make("cett:p=0.02").calibrate(view, TOKENS)
    assert calibration.thresholds(3) == pytest.approx(tuple(told.per_layer["threshold"]))
    assert calibration.meta["status"] == told.meta["status"] == "ok"
    assert calibration.sparsity == pytest.approx(1 - told.scalars["activation_ratio"], abs=1e-6)
    dense = losses(view, TOKENS).mean()
    with calibration.install(view):
        ratio = math.exp(losses(view, TOKENS).mean() - dense)
    assert ratio == pytest.approx(told.scalars["perplexity_ratio"], abs=1e-6)
    assert 1.015 < ratio <= 1.02


def test_cett_masks_are_the_probes() -> None:
    model = ours()
    view = layered(model)
    calibration = make("cett:cett=0.3").calibrate(view, TOKENS)
    thresholds = calibration.thresholds(3)
    banks = {layer: {"ffn_act": Down.of(block.ffn.down.weight)} for layer, block in enumerate(model.layers)}
    batch = view.start(TOKENS.ids_ST)
    _, seen = batch.observe(1, batch.h_0, ["ffn_act"])
    with calibration.install(view) as installed:
        kept = installed.sites[1, "down"].rule.keep(seen["ffn_act"]) & (seen["ffn_act"] != 0)
    assert torch.equal(kept.flatten(0, 1), above(thresholds, banks)(1, seen)["ffn_act"])


def test_thresholds_from_elsewhere(tmp_path: Any) -> None:
    view = layered(ours())
    released = tmp_path / "theirs.txt"
    released.write_text("thresholds=0.1,0.25,0.5\n")
    result = tmp_path / "result.json"
    result.write_text('{"meta": {"thresholds": "0.1,0.25,0.5"}}')
    given_ways = ([0.1, 0.25, 0.5], "0.1,0.25,0.5", str(released), str(result))
    for given_way in given_ways:
        calibration = make({"type": "cett", "thresholds": given_way}).calibrate(view, TOKENS)
        assert calibration.thresholds(3) == (0.1, 0.25, 0.5)
    assert make("cett:thresholds=[0.1,0.25,0.5]").params.thresholds == [0.1, 0.25, 0.5]
    for wrong, says in [
        ("0.1,0.2", "thresholds: there are 2 for 3 layers; give one a layer"),
        ("0.1,x,0.2", "thresholds: number 2 is 'x'; give one number >= 0 a layer"),
        ("none/there.txt", "none/there.txt: cannot be read as thresholds (No such file or directory); give one number"),
    ]:
        with pytest.raises(DataError) as caught:
            make({"type": "cett", "thresholds": wrong}).calibrate(view, TOKENS)
        assert str(caught.value).startswith(says)


# --- what they have in common


def test_what_cannot_be_masked_is_told() -> None:
    mixture = {"type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 16}}
    calibration = made("teal").calibrate(layered(ours(mixture)), TOKENS)
    assert {name for _, name in calibration.limits} == {"q", "k", "v", "o"}, "routers and experts stay whole"
    two = ours({"type": "drelu", "d_ff": 48})
    assert made("top_k").calibrate(layered(two), TOKENS).sparsity > 0.85
    with pytest.raises(DataError, match="DReLU is neither act"):
        made("cats").calibrate(layered(two), TOKENS)


def test_projections_of_other_attentions_have_names() -> None:
    latent = {"type": "mla", "n_heads": 4, "kv_rank": 8, "rope_head_dim": 4, "output_gate": True}
    ffn = {"type": "swiglu", "d_ff": 48}
    model = ours(block={"attention": latent, "ffn": ffn})
    calibration = made("wina-turned").calibrate(layered(model), TOKENS)
    names = {"q", "kv_down", "k_rope", "k", "v", "o", "attention.gate", "gate", "up", "down"}
    assert {name for layer, name in calibration.limits if layer == 0} == names


def test_nan_is_not_dropped() -> None:
    x = torch.tensor([[math.nan, 0.1, 5.0]])
    assert Rule(Limit(torch.tensor(1.0))).keep(x).tolist() == [[True, False, True]]
    assert Rule(Limit(torch.tensor(1.0)), inclusive=True).keep(x).tolist() == [[True, False, True]]


@given(n=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_a_quantile_drops_the_share(n: int, share: float, seed: int) -> None:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-9
    assert int((scores <= quantile(scores, share)).sum()) == round(share * n)
    assert largest(scores[None], round(share * n)).sum() == round(share * n)


@given(data=st.data(), share=st.floats(0, 1))
def test_a_quantile_of_equal_scores_is_as_near_as_it_can_be(data: Any, share: float) -> None:
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=30)), dtype=torch.float32)
    found = float((scores <= quantile(scores, share)).double().mean())
    able = {float((scores <= t).double().mean()) for t in (0.0, *scores.tolist())}
    wanted = round(share * len(scores)) / len(scores)
    assert abs(found - wanted) == pytest.approx(min(abs(each - wanted) for each in able))


def test_gradients_pass_what_stays_and_nothing_else() -> None:
    model = ours()
    with made("cats", sparsity=0.75).calibrate(layered(model), TOKENS).install(model) as installed:
        batch = ids(1, 1)
        F.cross_entropy(model(batch)[:, -1], batch[:, 0]).backward()
        down = model.layers[2].ffn.down
        silent = installed.realised()[2, "down"]
    used = (down.weight.grad.abs().sum(0) > 0).double().mean()
    assert float(used) == pytest.approx(1 - silent)


@pytest.mark.parametrize("kernels", [False, True])
def test_compiled_later_it_stands_in_one_graph(kernels: bool) -> None:
    model = ours()
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), made("cats").calibrate(layered(model), TOKENS).install(model, kernels=kernels):
        eager = model.layers[0].ffn(x, CONTEXT)
        torch._dynamo.reset()  # it gives up on code that many tests before this one had compiled
        compiled = torch.compile(model.layers[0].ffn, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, CONTEXT), eager)


def test_more_than_one_way_of_saying_how_much() -> None:
    with pytest.raises(SpecError) as caught:
        make("cett:ppl=0.01,sparsity=0.5")
    assert str(caught.value) == ("sparsifier: give one of ppl, cett, sparsity, thresholds, not ppl and sparsity")
    with pytest.raises(SpecError) as caught:
        make("teel:sparsity=0.5")
    assert "unknown sparsifier 'teel' (did you mean 'teal'?)" in str(caught.value)
    with pytest.raises(SpecError, match="sparsifier 'teal:0.5': expected name:key=value,key=value, got '0.5'"):
        make("teal:0.5")


def test_two_at_once_come_out_in_any_order() -> None:
    model = ours()
    before = logits(model)
    view = layered(model)
    first, second = (made(name).calibrate(view, TOKENS) for name in ("teal", "cats"))
    a, b = first.install(view), second.install(view)
    assert isinstance(a, Installed)
    a.remove()
    with second.install(layered(ours())):
        pass
    alone = logits(model)
    b.remove()
    with second.install(view):
        assert torch.equal(logits(model), alone)
    assert torch.equal(logits(model), before)


def test_calibration_draws_by_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.sparsifiers.rules.SAMPLE", 2000)
    view = layered(ours())

    def threshold(seed: int) -> float:
        sparsifier = Teal(Teal.Params(sparsity=0.5))
        sparsifier.seed = seed
        return float(sparsifier.calibrate(view, Tokens.of(ids(16), 4)).limits[0, "down"].threshold)

    assert threshold(0) == threshold(0) != threshold(1)
    assert threshold(0) == pytest.approx(threshold(1), rel=0.2)
