"""CETT's curve, thresholds, search and text by themselves, and Sparsing Law's code with its defects."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.model.build import build_model
from sparsekit.probes import cett as module
from sparsekit.probes import released_sparsity as released
from sparsekit.probes.activation_sparsity import ActivationSparsity
from sparsekit.probes.anatomy import ExpertRows
from sparsekit.probes.base import Tokens
from sparsekit.probes.cett import Curve, read_thresholds, search, write_thresholds
from sparsekit.probes.layered import layered
from sparsekit.probes.neurons import Down, top_k

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curve_of(act_NF: Tensor, weight_DF: Tensor, points: int = 64, batch: int | None = None) -> Curve:
    curve = Curve(points)
    for rows in act_NF.split(batch or len(act_NF)):
        curve.add([(Down.of(weight_DF), rows[None])], len(rows))
    return curve


def cett(act_NF: Tensor, weight_DF: Tensor, t: float) -> float:
    """By masking and multiplying."""
    c_NF = act_NF.abs() * weight_DF.norm(dim=0)
    whole_N = (act_NF @ weight_DF.T).norm(dim=1)
    tail_N = (torch.where(c_NF < t, act_NF, 0) @ weight_DF.T).norm(dim=1)
    return float((tail_N / whole_N)[whole_N > 0].mean())


@given(
    tokens=st.integers(1, 9), d_ff=st.integers(1, 20), d_model=st.integers(1, 6), points=st.integers(1, 12),
    zeros=st.sampled_from([0.0, 0.5, 0.95]), batch=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_curve_is_what_masking_and_multiplying_gives(tokens, d_ff, d_model, points, zeros, batch, seed):
    act_NF, weight_DF = normal(tokens, d_ff, seed=seed), normal(d_model, d_ff, seed=seed + 1)
    act_NF *= normal(tokens, d_ff, seed=seed + 2).abs() > -math.log(1 - zeros)
    curve = curve_of(act_NF, weight_DF, points, batch)
    t, found = curve.measured()
    alive = (act_NF @ weight_DF.T).norm(dim=1) > 0
    assert curve.zero_tokens == int((~alive).sum())
    if not alive.any():
        assert (t, found) == ([0.0], [0.0])
        return
    assert (found[0], found[-1], len(t) <= points + 2) == (0, 1, True)
    assert t[-1] > float((act_NF.abs() * weight_DF.norm(dim=0)).max())
    assert found == pytest.approx([cett(act_NF, weight_DF, x) for x in t], abs=1e-9)


def test_orthogonal_columns_have_a_monotone_curve_that_is_known():
    """||tail||^2 is then the sum of the c^2 below t."""
    act_NF = normal(7, 16).abs()
    weight_DF = torch.linalg.qr(normal(16, 16, seed=1))[0] * torch.linspace(0.5, 2, 16, dtype=torch.float64)
    c_NF = act_NF * torch.linspace(0.5, 2, 16, dtype=torch.float64)
    t, found = curve_of(act_NF, weight_DF).measured()
    assert (np.diff(found) >= 0).all()
    assert np.diff(found).max() < 0.1, "points stand where CETT rises"
    for one_t, one in zip(t[:-1], found[:-1], strict=True):
        share_N = (torch.where(c_NF < one_t - 1e-12, c_NF, 0).square().sum(1) / c_NF.square().sum(1)).sqrt()
        assert one == pytest.approx(float(share_N.mean()), abs=1e-9)


def test_the_threshold_is_the_largest_below_which_the_curve_stays(monkeypatch):
    curve = Curve(4)
    monkeypatch.setattr(curve, "grid", lambda: (np.array([0, 1, 2, 3, 4.0]), np.array([0, 0.4, 0.2, 0.6, 1.0])))
    for target, t in {0.0: 0, 0.2: 0, 0.39: 0, 0.4: 2, 0.6: 3, 0.9: 3, 1.0: 4}.items():
        assert curve.threshold(target) == t, "0.2 is reached again at 2, but not at all smaller ones"


def test_between_measured_points_the_grid_is_finer():
    act_NF, weight_DF = normal(40, 60), normal(12, 60, seed=1)
    curve = curve_of(act_NF, weight_DF, 32)
    (t, found), (finer, interpolated) = curve.measured(), curve.grid()
    assert len(t) <= 34 < 300 < len(finer)
    assert (np.diff(finer) > 0).all()
    assert set(t) <= set(finer)
    assert interpolated[np.searchsorted(finer, t)] == pytest.approx(found, abs=1e-12)
    exact = [cett(act_NF, weight_DF, x) for x in finer]
    assert interpolated == pytest.approx(exact, abs=0.02)
    for target in (0.05, 0.2, 0.5, 0.8):
        assert cett(act_NF, weight_DF, curve.threshold(target)) == pytest.approx(target, abs=0.02)


def test_a_few_sizes_are_all_measured():
    """So that nothing is interpolated over a jump: thresholds stay on the side where CETT is at most the target."""
    act_NF = torch.ones(6, 5, dtype=torch.float64)
    act_NF[:, 0], act_NF[:, 1] = 3, 2
    t, found = curve_of(act_NF, torch.eye(5, dtype=torch.float64), 64).measured()
    assert t[:-1].tolist() == [0, 1.5, 2.5, 3]
    assert found.tolist() == pytest.approx([0, (3 / 16) ** 0.5, (7 / 16) ** 0.5, (7 / 16) ** 0.5, 1])
    curve = curve_of(act_NF, torch.eye(5, dtype=torch.float64), 64)
    assert [curve.threshold(target) for target in (0.1, 0.44, 0.7)] == [0, 1.5, 3]


def test_a_later_batch_may_exceed_the_grid():
    act_NF, weight_DF = normal(8, 10).abs(), normal(4, 10, seed=1)
    act_NF[6, 3] = 100
    t, found = curve_of(act_NF, weight_DF, 16, batch=4).measured()
    assert t[-2] < 10 < 100 * float(weight_DF[:, 3].norm()) < t[-1]
    assert found[-2] == pytest.approx(cett(act_NF, weight_DF, t[-2]), abs=1e-9)
    assert found[-2] < found[-1] == 1


def test_nearly_dead_layers_have_a_grid_of_their_own():
    """More than 99% zeros: quantiles are of what is positive."""
    act_NF = torch.zeros(50, 100, dtype=torch.float64)
    act_NF[:, 7] = normal(50).abs()
    curve = curve_of(act_NF, normal(5, 100, seed=1), 8)
    assert len(curve.measured()[0]) == 8 + 2
    assert len(curve.grid()[0]) > 40
    assert curve.threshold(0.5) > 0


def test_what_exists_at_a_time_is_bounded(monkeypatch):
    act_NF, weight_DF = normal(30, 12), normal(5, 12, seed=1)
    whole = curve_of(act_NF, weight_DF).measured()[1]
    sizes: list[int] = []
    plain = module.binned

    def watching(*args: Any) -> Tensor:
        sizes.append(plain(*args).numel())
        return plain(*args)

    monkeypatch.setattr(module, "binned", watching)
    monkeypatch.setattr(module, "MOST_TAILS_ELSEWHERE", 1000)
    assert curve_of(act_NF, weight_DF).measured()[1] == pytest.approx(whole, abs=1e-12)
    assert max(sizes) <= 1000


def test_experts_of_different_width_share_a_token():
    """A routed part and a shared one: the tail is of their sum."""
    routed, shared = normal(2, 4, 6), normal(4, 3, seed=1)
    rows = ExpertRows(
        normal(8, 6, seed=2), torch.arange(4).repeat(2), torch.tensor([0] * 4 + [1] * 4), normal(8, seed=3)
    )
    other = ExpertRows(normal(4, 3, seed=4), torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.full((4,), 0.5))
    curve = Curve(10)
    curve.add([(Down.of(routed), rows), (Down.of(shared), other)], 4)
    for t, found in zip(*curve.measured(), strict=True):
        shares: dict[float, list[float]] = {-1e-12: [], 1e-12: []}  # a neuron may stand at t itself
        for token in range(4):
            parts = [
                rows.weight_M[m] * rows.act_MF[m, i] * routed[rows.expert_M[m], :, i]
                for m in (token, token + 4) for i in range(6)
            ]  # fmt: skip
            parts += [0.5 * other.act_MF[token, i] * shared[:, i] for i in range(3)]
            for nudge, values in shares.items():
                dropped = [n for n in parts if float(n.norm()) < t * (1 + nudge)]
                values.append(float(sum(dropped, torch.zeros(4).double()).norm() / sum(parts).norm()))
        assert any(found == pytest.approx(np.mean(values), abs=1e-9) for values in shares.values())


def test_top_k_is_exact_where_many_are_equal():
    act = torch.ones(1, 3, 8)
    assert top_k(0.5, 0, {"ffn_act": act})["ffn_act"].sum(1).tolist() == [4, 4, 4]
    act[0, 1, 2:] = 0
    assert top_k(0.5, 0, {"ffn_act": act})["ffn_act"].sum(1).tolist() == [4, 2, 4], "zeros are inactive all the same"


# --- the search


def run(ratio: Any, p: float = 0.01, steps: int | None = None) -> module.Found:
    def thresholds_at(target: float) -> tuple[float]:
        return (target if steps is None else math.floor(target * steps) / steps,)

    return search(thresholds_at, lambda thresholds: ratio(thresholds[0]), p)


@given(power=st.floats(0.5, 6), scale=st.floats(0.02, 50), p=st.sampled_from([0.001, 0.01, 0.1]))
def test_the_search_finds_the_feasible_side(power, scale, p):
    tried: list[float] = []

    def ratio(cett: float) -> float:
        tried.append(cett)
        return 1 + scale * cett**power

    found = run(ratio, p)
    assert len(tried) == found.runs == len(set(tried)), "nothing is run twice"
    if 1 + scale <= 1 + p:
        assert (found.status, found.cett) == ("saturated", 1)
        return
    exact = (p / scale) ** (1 / power)
    assert found.cett - 1e-9 <= exact <= found.bracket[1] + 1e-9
    assert found.ratio == pytest.approx(1 + scale * found.cett**power)
    assert found.ratio <= 1 + p
    assert found.status == ("ok" if found.ratio >= 1 + p - min(p / 10, 1e-3) else "step")
    if exact > 1e-3 and power < 3:
        assert found.status == "ok"


def test_the_search_over_a_jump_says_so():
    found = run(lambda cett: 1.0 if cett < 0.3 else 2.0)
    assert (found.status, found.ratio) == ("step", 1.0)
    assert found.cett < 0.3 <= found.bracket[1]
    assert found.bracket[1] - found.cett <= 1e-6
    coarse = run(lambda cett: 1 + cett, p=0.3, steps=5)
    assert (coarse.status, coarse.ratio, coarse.runs <= 5) == ("step", 1.2, True)


def test_what_is_not_finite_is_not_feasible():
    found = run(lambda cett: math.nan if cett > 0.25 else 1.0)
    assert found.cett <= 0.25
    assert found.ratio == 1


# --- text


def test_thresholds_as_text():
    values = (0.1, float(np.float32(0.1)), 0.0, 1.7e-12)
    assert read_thresholds(write_thresholds(values)) == values
    assert read_thresholds("thresholds=1.2000e-01,3.4000e-02\n") == (0.12, 0.034), "as Sparsing Law's code prints them"
    for text, told in {
        "0.1,x": "thresholds: number 2 is 'x'; give one number >= 0 a layer",
        "nan": "thresholds: number 1 is 'nan'; give one number >= 0 a layer",
        "-1": "thresholds: number 1 is '-1'; give one number >= 0 a layer",
        "0.1, 0.2,0.3": "thresholds: there are 3 for 2 layers; give one a layer",
    }.items():
        with pytest.raises(DataError) as refused:
            read_thresholds(text, 2)
        assert str(refused.value) == told


# --- as released


def test_the_released_threshold_is_near_ours_where_nothing_is_wrong():
    act_NF, weight_DF = normal(200, 32), normal(8, 32, seed=1)
    theirs = released.threshold(act_NF, weight_DF, 0.3)
    assert theirs == pytest.approx(curve_of(act_NF, weight_DF, 512).threshold(0.3), rel=0.01)
    assert cett(act_NF, weight_DF, theirs) == pytest.approx(0.3, abs=1e-3)


def test_the_released_threshold_wraps_to_the_largest_below_the_first_candidate():
    act_NF, weight_DF = torch.ones(5, 4), torch.eye(4)  # all c alike: at every candidate all is dropped
    act_NF[:, 0] = 2
    t = released.threshold(act_NF, weight_DF, 0.01)
    c = act_NF.flatten()
    assert t == pytest.approx(float(c.quantile(0.99))), "where ours drops nothing"
    assert curve_of(act_NF, weight_DF).threshold(0.01) <= 1


def test_the_released_threshold_leaves_all_active_where_nearly_all_is_zero():
    act_NF = torch.zeros(50, 400)
    act_NF[:, 0] = 1
    assert released.threshold(act_NF, torch.eye(400), 0.5) == 0
    active = released.above_in_dtype((0.0,), {0: {"ffn_act": Down.of(torch.eye(400))}}, torch.float32)
    assert active(0, {"ffn_act": act_NF[None]})["ffn_act"].all()


def test_the_released_threshold_takes_the_most_where_a_token_has_no_output():
    act_NF, weight_DF = normal(20, 16).abs(), normal(8, 16, seed=1)
    act_NF[3] = 0
    c_NF = act_NF.float() * weight_DF.float().norm(dim=0)
    assert released.threshold(act_NF, weight_DF, 0.1) == pytest.approx(float(c_NF.flatten().quantile(0.99)), rel=1e-4)
    assert curve_of(act_NF, weight_DF, 64).threshold(0.1) == pytest.approx(
        curve_of(act_NF[torch.arange(20) != 3], weight_DF, 64).threshold(0.1)
    )


def test_the_released_sample_sees_few_neurons_where_its_stride_divides_the_width():
    act_NF, weight_DF = normal(64, 64).abs(), torch.eye(64, dtype=torch.float64)
    act_NF[:, 0] *= 1000
    t = released.threshold(act_NF, weight_DF, 2.0, candidates=64)  # every 64th of 64 x 64 is neuron 0 of each token
    assert t > 100 > float((act_NF * 1.0).flatten().quantile(0.95))


def test_the_released_search_takes_the_middle_even_if_it_is_not_feasible():
    found = released.search(lambda cett: (cett,), lambda thresholds: 1.0 if thresholds[0] < 0.3 else 2.0, 0.01)
    assert found.bracket[0] < 0.3 <= found.bracket[1]
    assert found.cett == sum(found.bracket) / 2
    assert found.runs == 21


@pytest.mark.parametrize("metric", ["top_k", "fat_eps", "cett", "cett_ppl"])
def test_released_metrics_in_a_model(tiny, metric):
    model = build_model(tiny(), seed=0).double()
    view = layered(model)

    def ratio(**params: Any) -> Any:
        probe = ActivationSparsity(ActivationSparsity.Params(metric=metric, k=0.3, eps=0.0, p=0.01, **params))
        return probe.run(view, Tokens.of(IDS, 2))

    result = ratio(compat="released")
    assert result.meta["compat"] == "released"
    assert result.scalars["perplexity_ratio"] > 0
    if metric == "top_k":  # of the batch, so that tokens differ
        share = result.scalars["activation_ratio"]
        assert share == pytest.approx(1 - int(24 * 48 * 0.7) / (24 * 48), abs=1e-12)
        assert np.ptp(result.arrays["heat_map"][0]) > 0 == np.ptp(ratio().arrays["heat_map"][0])
    elif metric == "fat_eps":
        assert result.scalars["activation_ratio"] == ratio().scalars["activation_ratio"] == 1
    else:
        assert "perplexity_ratio_held_out" not in result.scalars, "thresholds come from what is measured"


def test_released_refuses_mixtures(tiny, moe):
    with pytest.raises(DataError) as refused:
        ActivationSparsity(ActivationSparsity.Params(compat="released")).run(
            layered(build_model(tiny(ffn=moe()), seed=0)), Tokens.of(IDS)
        )
    assert str(refused.value) == (
        "activation_sparsity: compat 'released' measures dense feed-forwards only, and layer 0 is a mixture; "
        "leave compat out"
    )
