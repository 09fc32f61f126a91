"""The studies that come with the package: they plan, they are fair and affordable, and they say what the papers did."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from sparsekit import build_model, probe
from sparsekit.spec.load import read_json
from sparsekit.studies.plan import Plan, PlannedRun, expand
from sparsekit.studies.spec import load_study

FOLDER = Path(__file__).parents[2] / "specs" / "studies"
ALL = sorted(path.stem for path in FOLDER.glob("*.json"))
SMALL = [name for name in ALL if name.endswith("_small")]
DENSE = ["weight_decay", "sequence_length", "gqa_group", "depth", "recipe", "moe_vs_dense"]  # of arXiv 2603.15389
LAW = ["sparsing_law", "width_depth"]  # of arXiv 2411.02335


@functools.cache
def planned(name: str, *overrides: str) -> Plan:
    return expand(load_study(FOLDER / f"{name}.json", overrides))


def of(name: str, **labels: str) -> PlannedRun:
    """The first run of a study with these labels."""
    return next(run for run in planned(name).runs if labels.items() <= run.labels.items())


def test_every_study_that_is_promised_is_there():
    assert set(ALL) == {*DENSE, *LAW, *SMALL, "depth_tiny"}
    assert {f"{name}_small" for name in (*DENSE, "residuals", "activation")} - {"recipe_small"} == set(SMALL)


@pytest.mark.parametrize("name", ALL)
def test_it_plans_and_says_what_it_asks_and_claims(name):
    plan = planned(name)
    spec = plan.study.spec
    assert spec.name == name and spec.question.count("?") == 1 and spec.source
    assert spec.claims and all(claim.source for claim in spec.claims)
    assert {figure.type for figure in spec.figures} == {"by_axis", "along_training", "per_layer"}
    # each setting is a run of its own: an axis that changes nothing is a mistake
    assert len(plan.distinct) == len(plan.runs)


@pytest.fixture(scope="module")
def told() -> dict[str, tuple[set[str], set[str]]]:
    """By probe, the scalars and the values per layer that it tells of some model."""
    ffn = {"type": "moe", "n_experts": 2, "router": {"type": "top_k", "k": 1}, "expert": {"type": "swiglu", "d_ff": 16}}
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": ffn}
    model = build_model({"d_model": 16, "n_layers": 2, "vocab_size": 32, "max_seq_len": 32, "block": block})
    names = {choice["type"] for name in ALL for choice in planned(name).probes.values()}
    found = probe(model, sorted(names), data=torch.arange(16 * 32).view(16, 32) % 31)
    return {name: (set(result.scalars), set(result.per_layer)) for name, result in found.items()}


@pytest.mark.parametrize("name", ALL)
def test_what_it_claims_and_draws_is_measured(name, told):
    spec, probes = planned(name).study.spec, planned(name).probes
    tasks = {f"eval/{task}/acc_norm" for task in (spec.evaluate.tasks if spec.evaluate else ())}
    scalars = {f"{label}/{scalar}" for label, p in probes.items() for scalar in told[p["type"]][0]}
    layers = {f"{label}/{values}" for label, p in probes.items() for values in told[p["type"]][1]}
    scalars |= {"val_loss", "val_perplexity"} | tasks
    assert {claim.measure for claim in spec.claims} <= scalars
    for figure in spec.figures:
        assert set(figure.measures) <= (layers if figure.type == "per_layer" else scalars)
        assert figure.metric in (None, "variance/resid", "density")
    assert all(run.resolved["train"]["statistics"] for run in planned(name).runs)


@pytest.mark.parametrize("name", ALL)
def test_usefulness_has_the_tokens_that_it_takes_and_batches_divide(name):
    plan = planned(name)
    on, processes = plan.study.spec.probe_on, plan.study.spec.launch.nproc
    for run in plan.runs:
        model, train = run.resolved["model"], run.resolved["train"]
        length = on.seq_len or model["max_seq_len"]
        assert length <= model["max_seq_len"]
        if "usefulness" in plan.probes:
            assert on.sequences // 2 * length >= 4 * (model["d_model"] + 1)
        assert train["global_batch_tokens"] % (processes * train["micro_batch_size"] * model["max_seq_len"]) == 0


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_are_fair_and_affordable(name):
    plan = planned(name)
    assert len(plan.study.spec.seeds) >= 3
    assert max(run.parameters for run in plan.runs) <= 60e6
    assert sum(run.flops for run in plan.distinct) <= 4e16
    tokens = {run.labels.get("max_steps"): run.tokens for run in plan.runs}  # one study asks about tokens themselves
    assert all(run.tokens == tokens[run.labels.get("max_steps")] for run in plan.runs)
    assert len({run.resolved["train"]["global_batch_tokens"] for run in plan.runs}) == 1


@pytest.mark.parametrize("name", SMALL)
def test_one_option_puts_another_text_in_place_everywhere(name):
    plan = planned(name, 'base.data.source={"type": "text", "path": "mine.txt"}')
    assert {run.resolved["data"]["source"]["type"] for run in plan.runs} == {"text"}


@pytest.mark.parametrize("name", SMALL)
def test_every_small_study_extends_the_one_base(name):
    assert read_json(FOLDER / f"{name}.json")["base"]["extends"] == "../runs/small.json"


def test_what_else_differs_is_told():
    """Numbers of parameters, where a question speaks of them."""
    small = [run.parameters for run in planned("depth_small").runs]
    assert (round(min(small) / 1e6), round(max(small) / 1e6)) == (6, 29)
    one, eight = (of("gqa_group_small", group=g).parameters for g in ("1", "8"))
    assert round(100 * (1 - eight / one)) == 11
    dense, moe = (of("moe_vs_dense_small", ffn=kind) for kind in ("dense", "moe"))
    assert (round(dense.parameters / 1e6), round(moe.parameters / 1e6)) == (12, 45)
    assert round(dense.active_parameters / 1e6) == round(moe.active_parameters / 1e6) == 12
    assert round(of("depth", n_layers="12").parameters / 1e9, 1) == 1.0
    assert round(of("depth", n_layers="32").parameters / 1e9, 1) == 2.4


@pytest.mark.parametrize(
    ("study", "labels", "parameters", "active"),
    [
        ("depth", {"n_layers": "16"}, 1_279_854_592, 1_279_854_592),
        ("moe_vs_dense", {"architecture": "dense_1b"}, 1_279_854_592, 1_279_854_592),
        ("moe_vs_dense", {"architecture": "dense_400m"}, 475_448_832, 475_448_832),
        ("moe_vs_dense", {"architecture": "moe_400m_2b"}, 1_983_996_672, 398_549_760),
        ("moe_vs_dense", {"architecture": "moe_1b_7b"}, 7_982_644_320, 1_238_989_920),
    ],
)
def test_parameters_are_the_published_ones(study, labels, parameters, active):
    run = of(study, **labels)
    assert (run.parameters, run.active_parameters) == (parameters, active)


@pytest.mark.parametrize("name", DENSE)
def test_full_scale_settings_are_those_of_the_paper(name):
    for run in planned(name).runs:
        model, train = run.resolved["model"], run.resolved["train"]
        assert train["global_batch_tokens"] == 1024 * model["max_seq_len"]
        assert run.tokens == 5_000_000_000
        optimizer = dict(train["optimizer"])
        decay = {"weight_decay": run.labels.get("weight_decay"), "recipe": None}.get(name, "0.1")
        assert decay is None or optimizer["weight_decay"] == float(decay)
        assert (optimizer["type"], optimizer["lr"], optimizer["betas"]) == ("adamw", 4e-4, [0.9, 0.95])
        assert (optimizer["eps"], optimizer["decay"], train["max_grad_norm"]) == (1e-8, "all", 1.0)
        schedule = train["schedule"]
        assert (schedule["type"], schedule["warmup_steps"], schedule["final"]) == ("cosine", 1000, 0.1)
        assert model["vocab_size"] == 50304 and not model["tie_embeddings"]
        assert model["init"]["type"] == "normal" and model["init"]["std"] == 0.02


def test_the_recipe_adds_one_step_upon_another():
    steps = [of("recipe", recipe=label).resolved for label in ("base", "t4096", "decay_0.3", "gqa_2", "moe")]
    lengths = [step["model"]["max_seq_len"] for step in steps]
    decays = [step["train"]["optimizer"]["weight_decay"] for step in steps]
    attention = [step["model"]["block"]["attention"] for step in steps]
    assert lengths == [1024, 4096, 4096, 4096, 4096]
    assert decays == [0.1, 0.1, 0.3, 0.3, 0.3]
    assert [a["n_heads"] // a.get("n_kv_heads", a["n_heads"]) for a in attention] == [1, 1, 1, 2, 2]
    assert [step["model"]["block"]["ffn"]["type"] for step in steps] == ["swiglu"] * 4 + ["moe"]
    assert {step["model"]["n_layers"] for step in steps} == {32}


@pytest.mark.parametrize("name", [*DENSE, "sparsing_law"])
def test_published_values_stand_at_values_of_the_axis(name):
    plan = planned(name)
    told = [claim for claim in plan.study.spec.claims if claim.published]
    assert told
    for claim in told:
        assert set(claim.published) <= set(plan.factors[plan.factor(claim.axis)].labels)


def test_the_shape_of_sparsing_law():
    batches = {"0.1B": 3.27e5, "0.2B": 5.90e5, "0.4B": 7.86e5, "0.8B": 1.18e6, "1.2B": 1.57e6, "2.4B": 2.10e6}
    for size, batch in batches.items():
        run = of("sparsing_law", size=size, activation="silu")
        model, train = run.resolved["model"], run.resolved["train"]
        width, layers = model["d_model"], model["n_layers"]
        assert (run.parameters - width * model["vocab_size"]) / 1e9 == pytest.approx(float(size[:-1]), rel=0.21)
        assert train["global_batch_tokens"] == pytest.approx(batch, rel=5e-3)
        assert model["block"]["residual"]["scale"] == pytest.approx(1.4 / layers**0.5)
        assert model["logit_scale"] == pytest.approx(256 / width)
        assert (model["embedding"]["scale"], model["block"]["ffn"]["d_ff"]) == (12, 2.5 * width)
        assert model["block"]["ffn"]["activation"]["type"] == "silu"
    assert (train["schedule"]["type"], train["optimizer"]["lr"]) == ("wsd", 0.01)


def test_shapes_of_the_width_depth_study_are_of_one_size():
    runs = planned("width_depth").runs
    shapes = [(run.resolved["model"]["d_model"], run.resolved["model"]["n_layers"], run) for run in runs]
    ratios = [width / layers for width, layers, _ in shapes]
    assert ratios == sorted(ratios) and len(shapes) == 12
    for width, _, run in shapes:
        assert 0.09e9 < run.parameters - width * 50304 < 0.12e9


def test_the_tiny_study_runs(tmp_path, capsys, monkeypatch):
    """Cut to two steps of one seed, through everything that a study does."""
    import sys

    from sparsekit.cli import main

    out = tmp_path / "tiny"
    cut = ["seeds=[0]", "base.train.max_steps=2", "axes.model.n_layers=[2,3]", "base.train.eval_tokens=512"]
    options = [part for text in cut for part in ("--set", text)]
    arguments = ["sparsekit", "study", str(FOLDER / "depth_tiny.json"), "--out", str(out), "--no-report", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, capsys.readouterr().err
    assert "cannot be told (one seed)" in (out / "claims.json").read_text()
