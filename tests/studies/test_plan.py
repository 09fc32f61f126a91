"""What a study is read as, and which runs it stands for."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sparsekit import describe, load_spec
from sparsekit.errors import SpecError
from sparsekit.spec.load import dump
from sparsekit.studies import plan as planning
from sparsekit.studies import remembered
from sparsekit.studies.axes import short_names
from sparsekit.studies.count import TOLD
from sparsekit.studies.plan import Plan, expand, run_id
from sparsekit.studies.schema import study_schema
from sparsekit.studies.spec import StudySpec, load_study
from sparsekit.studies.study import resolved

from .conftest import HEADS, LAYERS, RAW

Planned = Callable[..., Plan]


def content(run: Any) -> dict[str, Any]:
    return {key: value for key, value in run.resolved.items() if key != "name"}


def test_axes_and_seeds_are_crossed(raw: dict[str, Any], planned: Planned) -> None:
    raw["axes"] = {HEADS: [4, 2, 1], LAYERS: [2, 3]}
    plan = planned(raw)
    wanted = list(itertools.product((4, 2, 1), (2, 3), (0, 1)))
    assert [run.id for run in plan.runs] == [f"n_kv_heads={h},n_layers={n},seed={s}" for h, n, s in wanted]
    for run, (heads, layers, seed) in zip(plan.runs, wanted, strict=True):
        alone = load_spec(raw["base"], [f"{HEADS}={heads}", f"{LAYERS}={layers}", f"train.seed={seed}"])
        assert content(run) == {key: value for key, value in dump(alone).items() if key != "name"}
        told = describe(alone)
        assert (run.parameters, run.active_parameters) == (told.parameters, told.active_parameters)
        assert run.tokens is not None
        assert run.flops == told.training_flops_per_token * run.tokens
        assert run.tokens == told.tokens
        assert run.spec.name == run.id


def test_zipped_axes_go_together(raw: dict[str, Any], planned: Planned) -> None:
    raw["axes"] = {LAYERS: [2, 3, 4], HEADS: [4, 1], "model.d_model": [16, 24, 32]}
    raw["zip"] = [[LAYERS, "model.d_model"]]
    plan = planned(raw, "seeds=[0]")
    assert [run.id for run in plan.runs] == [
        f"n_layers={n},d_model={d},n_kv_heads={h},seed=0" for n, d in ((2, 16), (3, 24), (4, 32)) for h in (4, 1)
    ]
    assert [factor.name for factor in plan.factors] == ["n_layers+d_model", "n_kv_heads"]
    assert plan.factor("model.d_model") == plan.factor("n_layers") == 0


def test_a_variant_changes_several_paths_and_slots_whole(raw: dict[str, Any], planned: Planned) -> None:
    mha = {"type": "mha", "n_heads": 2}
    variants = {"plain": {}, "deep": {LAYERS: 3, "model.block.attention": mha, "train.optimizer.lr": 0.5}}
    raw["axes"] = {"scheme": variants}
    plain, deep = planned(raw, "seeds=[0]").runs
    assert plain.labels == {"scheme": "plain"}
    assert content(plain) == {k: v for k, v in dump(load_spec(raw["base"])).items() if k != "name"}
    assert deep.resolved["model"]["n_layers"] == 3
    assert deep.resolved["model"]["block"]["attention"]["type"] == "mha"
    assert "n_kv_heads" not in deep.resolved["model"]["block"]["attention"], "a slot with its type is replaced whole"
    assert deep.resolved["train"]["optimizer"]["lr"] == 0.5


def test_settings_that_are_one_run_are_run_once(raw: dict[str, Any], planned: Planned) -> None:
    raw["axes"] = {LAYERS: [2, 3], "depth": {"given": {}, "two": {LAYERS: 2}}}
    plan = planned(raw)
    assert len(plan.runs) == 8
    assert [run.id for run in plan.distinct] == [
        f"n_layers={n},depth={d},seed={s}" for n, d in ((2, "given"), (3, "given")) for s in (0, 1)
    ]
    same = [run.folder.name for run in plan.runs if run.labels["depth"] == "two" and run.seed == 1]
    assert same == ["n_layers=2,depth=given,seed=1"] * 2


def test_short_names_are_as_long_as_it_takes(raw: dict[str, Any], planned: Planned) -> None:
    raw["axes"] = {"model.block.ffn.d_ff": [24], "data.seq_len": [8], "train.optimizer.betas": [[0.9, 0.95]]}
    raw["axes"]["model.layers"] = [{"0": {"ffn": {"d_ff": 8}}}]
    (run,) = planned(raw, "seeds=[3]").runs
    assert list(run.labels) == ["d_ff", "seq_len", "betas", "layers"]
    assert run.id.startswith("d_ff=24,seq_len=8,betas=_0.9,_0.95_,layers=")
    assert len(Path(run.id).parts) == 1
    raw["axes"] = {"model.init.std": [0.02], "model.embedding.init.std": [1.0]}
    names = short_names(list(raw["axes"]))
    assert names == {"model.init.std": "model.init.std", "model.embedding.init.std": "embedding.init.std"}


def test_long_and_odd_names_make_folders_of_their_own() -> None:
    one, other = run_id({"a": "x" * 300}), run_id({"a": "x" * 299 + "y"})
    assert one != other
    assert max(len(one), len(other)) < 200
    assert "/" not in run_id({"path": "../../etc/passwd"})
    assert run_id({"path": "a/b"}) != run_id({"path": "a_b"})


def test_extends_is_read_from_where_the_study_stands(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "studies").mkdir()
    (tmp_path / "runs/base.json").write_text(json.dumps(raw["base"]))
    raw["base"] = {"extends": "../runs/base.json", "train": {"max_steps": 4}}
    raw["axes"] = {"size": {"own": {}, "file": {"model": {"extends": "../model.json"}}}}
    (tmp_path / "model.json").write_text('{"n_layers": 5}')
    path = tmp_path / "studies/one.json"
    path.write_text(json.dumps({k: v for k, v in raw.items() if k != "name"}))
    monkeypatch.chdir(tmp_path / "runs")
    plan = expand(load_study(path))
    assert plan.study.folder == Path("runs/one"), "a study without a name has its file's"
    assert {run.resolved["train"]["max_steps"] for run in plan.runs} == {4}
    assert [run.resolved["model"]["n_layers"] for run in plan.runs[::2]] == [2, 5]


FILES = {
    "models/small.json": {"d_model": 16, "n_layers": 3, "block": {"extends": "block.json"}},
    "models/block.json": {"ffn": {"extends": "ffn.json"}},
    "models/ffn.json": {"type": "geglu", "d_ff": 48},
    "models/size.json": {"d_ff": 40},
    "models/broken.json": {"block": {"extends": "blok.json"}},
    "run.json": {"model": {"n_layers": 5}, "train": {"max_steps": 3, "log_every": 2}},
}
SMALL, FFN, SIZE = ({"extends": f"models/{name}.json"} for name in ("small", "ffn", "size"))
EXTENDING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model": SMALL}, {LAYERS: 3, "model.block.ffn.type": "geglu", "model.vocab_size": 257}),
    ({"model": SMALL | {"n_layers": 4}}, {LAYERS: 4, "model.block.ffn.d_ff": 48}),
    ({"model.block.ffn": FFN}, {LAYERS: 2, "model.block.ffn.type": "geglu", "model.block.ffn.d_ff": 48}),
    ({"model.block.ffn": SIZE}, {"model.block.ffn.type": "swiglu", "model.block.ffn.d_ff": 40}),
    ({"model.layers": {"0": {"ffn": FFN}}}, {"model.block.ffn.type": "swiglu", "model.layers.0.ffn.type": "geglu"}),
    ({"extends": "run.json"}, {LAYERS: 5, "train.max_steps": 3, "train.micro_batch_size": 4}),
    ({"train": {"log_every": 4}, "train.max_steps": 7, "extends": "run.json"}, {"train.max_steps": 7, LAYERS: 5,
                                                                               "train.log_every": 4}),
    ({"extends": "models/small.json", LAYERS: 6}, {LAYERS: 6, "model.block.ffn.type": "geglu", "train.max_steps": 6}),
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name, content in FILES.items():
        (tmp_path / name).write_text(json.dumps(content))


def at(raw: Any, path: str) -> Any:
    for part in path.split("."):
        raw = raw[part]
    return raw


@pytest.mark.parametrize(("variant", "wanted"), EXTENDING, ids=[json.dumps(variant) for variant, _ in EXTENDING])
def test_a_variant_extends_files_and_is_written_down_without(
    raw: dict[str, Any], planned: Planned, files: None, variant: dict[str, Any], wanted: dict[str, Any]
) -> None:
    raw["axes"] = {"which": {"own": {}, "other": variant}}
    plan = planned(raw, "seeds=[0]")
    run = plan.runs[-1]
    assert {path: at(run.resolved, path) for path in wanted} == wanted
    plan.study.folder.mkdir()
    (plan.study.folder / "study.json").write_text(json.dumps(resolved(plan)))
    assert expand(load_study(plan.study.folder)).runs == plan.runs


def test_values_that_extend_are_named_as_their_files(raw: dict[str, Any], planned: Planned, files: None) -> None:
    raw["axes"] = {"model.block.ffn": [{"extends": "models/size.json"}, {"type": "reglu", "d_ff": 8}]}
    plan = planned(raw, "seeds=[0]")
    assert [run.id for run in plan.runs] == ["ffn=size,seed=0", "ffn=reglu,seed=0"]
    assert [run.resolved["model"]["block"]["ffn"]["d_ff"] for run in plan.runs] == [40, 8]


def test_a_study_that_was_written_down_is_the_same_study(raw: dict[str, Any], planned: Planned, tmp_path: Path) -> None:
    raw["evaluate"] = {"tasks": ["t"], "include_path": "tasks"}
    raw["claims"] = [{"says": "s", "measure": "val_loss", "axis": HEADS, "direction": "falls"}]
    plan = planned(raw, "base.train.max_steps=9", "seeds=[5]")
    folder = plan.study.folder
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(resolved(plan)))
    again = expand(load_study(folder))
    assert again.runs == plan.runs
    assert again.study.folder == folder
    assert again.study.spec.claims == plan.study.spec.claims
    assert again.study.spec.evaluate is not None
    assert again.study.spec.evaluate.include_path == str(tmp_path / "tasks")


# --- overrides and mistakes


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("seeds=[7]", lambda s: s.seeds, [7]),
        ("axes.model.n_layers=[3]", lambda s: s.axes[LAYERS], [3]),
        (f"axes.{HEADS}=[2]", lambda s: s.axes[HEADS], [2]),
        ("probe_on.sequences=2", lambda s: s.probe_on.sequences, 2),
        ("name=other", lambda s: s.name, "other"),
        ("probes.0.type=moments", lambda s: s.probes[0], {"type": "moments"}),
    ],
)
def test_set_overrides_the_study(
    raw: dict[str, Any], tmp_path: Path, override: str, where: Callable[[StudySpec], Any], value: Any
) -> None:
    path = tmp_path / "s.json"
    raw["probes"] = [{"type": "variance"}]
    path.write_text(json.dumps(raw))
    assert where(load_study(path, [override]).spec) == value


MISTAKES = [
    ({"axes": {"model.n_layer": [2]}}, [], "axes.model.n_layer: unknown field 'n_layer' (did you mean 'n_layers'?)"),
    (
        {"axes": {"s": {"a": {"model.block.residul": "x"}}}}, [],
        "axes.s.a.model.block.residul: unknown field 'residul' (did you mean 'residual'?)",
    ),
    (
        {"axes": {"model.block.attention.type": ["gqa", "gpa"]}}, [],
        "type=gpa: model.block.attention: unknown attention 'gpa' (did you mean 'gqa'?); "
        "registered: gqa, mha, mla, mqa",
    ),
    (
        {"axes": {HEADS: [4, 3], LAYERS: [2, 3]}}, [],
        "n_kv_heads=3,n_layers=2 (and 1 more setting): model.block.attention: n_heads (4) is not divisible by "
        "n_kv_heads (3)",
    ),
    (
        {"axes": {"s": {"a": {"model": {"extends": "smal.json"}}}}}, [],
        "axes.s.a.model.extends: FOLDER/smal.json: no such file (did you mean 'small.json'?)",
    ),
    ({"axes": {"s": {"a": {"extends": 3}}}}, [], "axes.s.a.extends: expected the path of a JSON file, got 3"),
    (
        {"axes": {"model": [{"extends": "models/broken.json"}]}}, [],
        "axes.model: FOLDER/models/broken.json: block.extends: FOLDER/models/blok.json: no such file (did you mean "
        "'block.json'?)",
    ),
    ({"axes": {"train.seed": [1]}}, [], 'axes.train.seed: seeds are no axis; give them as "seeds": [0, 1, 2]'),
    (
        {"axes": {LAYERS: 3}}, [],
        "axes: model.n_layers: expected a list of values, or an object of named variants, each path: value",
    ),
    (
        {"axes": {LAYERS: [2, 2]}}, [],
        "axes: model.n_layers: a value stands there twice, or two look alike; name them as variants",
    ),
    ({"axes": {"seed": {"a": {}}}}, [], "axes.seed: is the name of a column of the table; choose another"),
    ({"axes": {"train.callbacks.0": ["progress"]}}, [], "axes.train.callbacks.0: there is no item 0 in a list of 0"),
    ({"seeds": [0, 0]}, [], "seeds: a seed stands there twice"),
    ({"zip": [[HEADS, "model.n_layer"]]}, [], "zip.0: no axis 'model.n_layer'"),
    (
        {"axes": {HEADS: [4, 1], LAYERS: [2]}, "zip": [[HEADS, LAYERS]]}, [],
        "zip.0: axes that go together have as many values as each other, not model.block.attention.n_kv_heads 2, "
        "model.n_layers 1",
    ),
    ({"probes": ["varianc"]}, [], "probes.0: unknown probe 'varianc' (did you mean 'variance'?); registered: "),
    ({"probes": ["variance", {"type": "permutation", "pair": 1}]}, [], "probes.1.pair: unknown key"),
    (
        {"base": None, "model": {}}, [],
        "FOLDER/small.json: is the spec of a run, not of a study; sparsekit train FOLDER/small.json trains it",
    ),
    ({"clams": []}, [], "clams: unknown field (did you mean 'claims'?)"),
    ({"train": {}}, [], "train: unknown field (did you mean 'base.train'?)"),
    (
        {"claims": [{"says": "x", "measure": "m", "axis": "n_layers", "direction": "falls"}]}, [],
        "claims.0.axis: no axis 'n_layers'; axes: model.block.attention.n_kv_heads",
    ),
    (
        {"claims": [{"says": "x", "measure": "m", "axis": HEADS, "order": [4, 2]}]}, [],
        "claims.0.axis: model.block.attention.n_kv_heads has no value '2'; values: 4, 1",
    ),
    (
        {"claims": [{"says": "x", "measure": "m", "axis": HEADS}]}, [],
        'claims.0: give "direction": "rises" or "falls", or the "order" of values in which it rises',
    ),
    ({"claims": [{"says": "x", "measure": "m[a]", "axis": HEADS, "direction": "falls"}]}, [],
     "claims.0.measure: 'm[a]' names no measure; give one such as val_loss, or variance/resid[-1] of one layer"),
    ({"figures": [{"type": "per_layer"}]}, [], "figures.0: a figure per_layer needs 'measures'"),
    ({"figures": [{"type": "per_layer", "measures": ["m"], "layer": 1}]}, [],
     "figures.0: a figure per_layer takes measures, not 'layer'"),
    ({}, ["base.train.max_step=3"], "base.train: unknown key 'max_step' (did you mean 'max_steps'?); keys: "),
    ({}, ["train.max_steps=3"],
     "--set train.max_steps=3: a study has no 'train' (did you mean 'base.train.max_steps'?)"),
    ({"launch": {"nproc": 2}}, [],
     "n_kv_heads=4 (and 1 more setting): train.global_batch_tokens: 64 is not a multiple of 128, a micro-batch on each "
     "process"),
    ({}, ["seeds"], "--set seeds: expected path=value, such as seeds=[0,1] or base.train.max_steps=100"),
    ({}, ["probes.3.type=x"], "--set probes.3.type=x: there is no item 3 in a list of 1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "overrides", "told"), MISTAKES, ids=[told[:40] for *_, told in MISTAKES])
def test_a_mistake_is_a_line(
    raw: dict[str, Any], planned: Planned, tmp_path: Path, files: None,
    change: dict[str, Any], overrides: list[str], told: str,
) -> None:  # fmt: skip
    with pytest.raises(SpecError) as error:
        planned({key: value for key, value in (raw | change).items() if value is not None}, *overrides)
    (line,) = str(error.value).splitlines()
    line = line.replace(str(tmp_path), "FOLDER")
    assert line == told or (told.endswith(": ") and line.startswith(told))


def test_mistakes_of_many_settings_are_not_all_told(raw: dict[str, Any], planned: Planned) -> None:
    raw["axes"] = {"model.block.attention.type": [f"x{i}" for i in range(50)]}
    with pytest.raises(SpecError) as error:
        planned(raw)
    lines = str(error.value).splitlines()
    assert len(lines) == TOLD + 1
    assert lines[-1] == f"… and {50 - TOLD} more mistakes"


def test_the_schema_takes_what_the_library_takes(raw: dict[str, Any]) -> None:
    schema = study_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(raw))
    assert list(validator.iter_errors(raw | {"seeds": ["a"]}))
    assert list(validator.iter_errors(raw | {"probes": ["varianc"]}))
    assert list(validator.iter_errors(raw | {"base": {"train": {"max_step": 3}}}))


# --- what is remembered


def test_a_plan_that_is_remembered_is_the_same(
    raw: dict[str, Any], planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = planned(raw)
    monkeypatch.setattr(planning, "count", lambda *_: pytest.fail("counted again"))
    assert planned(raw) == fresh
    judged = raw | {"claims": [{"says": "s", "measure": "m", "axis": HEADS, "direction": "falls"}], "seeds": [9]}
    assert [run.seed for run in planned(judged).runs] == [9, 9], "claims and seeds cost nothing to change"


@pytest.mark.parametrize("change", ["base", "axes", "order", "probes", "set", "extends", "axis extends", "code"])
def test_a_plan_is_counted_again_when_anything_has_changed(
    raw: dict[str, Any], planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    base = tmp_path / "base.json"
    base.write_text(json.dumps(raw["base"]))
    raw["base"] = {"extends": "base.json"}
    axis = tmp_path / "axis.json"
    axis.write_text('{"n_layers": 3}')
    raw["axes"] = {HEADS: [4, 1], "depth": {"two": {LAYERS: 2}, "file": {"model": {"extends": "axis.json"}}}}
    counted: list[int] = []
    real = planning.count
    monkeypatch.setattr(planning, "count", lambda *given: counted.append(1) or real(*given))
    planned(raw)
    planned(raw)
    assert len(counted) == 1
    overrides = ["base.model.n_layers=4"] if change == "set" else []
    if change == "base":
        raw["base"]["train"] = {"max_steps": 3}
    elif change == "axes":
        raw["axes"][HEADS] = [4, 2]
    elif change == "order":
        raw["axes"] = dict(reversed(raw["axes"].items()))
    elif change == "probes":
        raw["probes"] = ["moments"]
    elif change == "extends":
        base.write_text(json.dumps({**json.loads(base.read_text()), "parallel": {"data": "ddp"}}))
    elif change == "axis extends":
        axis.write_text('{"n_layers": 4}')
    elif change == "code":
        code = tmp_path / "code"
        code.mkdir()
        (code / "a.py").write_text("x = 1\n")
        monkeypatch.setattr(remembered, "CODE", code)
    plan = planned(raw, *overrides)
    assert len(counted) == 2
    assert [factor.axes[0].key for factor in plan.factors] == list(raw["axes"])


def test_a_remembered_plan_imports_no_torch(raw: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    raw["axes"] = {"train.optimizer.lr": [i / 100 for i in range(1, 101)]}
    path.write_text(json.dumps(raw | {"seeds": list(range(10))}))
    code = (
        "import sys; from sparsekit.cli import app\n"
        f"app(['study', {str(path)!r}, '--plan'], standalone_mode=False); print('torch' in sys.modules)"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "12"
    ]
    assert [text.splitlines()[-1] for text in told] == ["True", "False"]
    assert "1000 (100 settings x 10 seeds): 1000 to run" in told[1]
    assert "… 987 more" in told[1]
    assert len(told[1].splitlines()) < 40


def test_the_fixture_is_what_a_user_would_write() -> None:
    StudySpec.model_validate(RAW)
