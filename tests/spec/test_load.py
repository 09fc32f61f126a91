"""From files to a spec: reading, ``extends``, ``--set``, and a spec's identity."""

from __future__ import annotations

import copy
import json

import pytest

from sparsekit.errors import SpecError
from sparsekit.spec.load import dump, fingerprint, load_spec, may_change, read_json, read_raw, validate, with_packages


@pytest.fixture
def write(tmp_path):
    """``write("a/b.json", {...})``: a file below the test's folder; its path."""

    def make(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return make


# --- reading


def test_a_file_a_string_and_a_dict_are_the_same_spec(raw, write):
    path = write("run.json", raw)
    assert dump(load_spec(path)) == dump(load_spec(str(path))) == dump(load_spec(raw))


def test_a_run_is_named_after_its_file_unless_it_says(raw, write):
    del raw["name"]
    assert load_spec(write("quick.json", raw)).name == "quick"
    assert load_spec(write("other.json", {**raw, "name": "mine"})).name == "mine"
    assert load_spec(raw).name == "run"


def test_a_bare_model_is_a_run_with_defaults(raw):
    assert dump(load_spec(raw["model"]))["model"] == dump(load_spec(raw))["model"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"bad\.json:1:2: not JSON: "),
        ('{\n  "a": 1,\n  "b" 2\n}', r"bad\.json:3:7: not JSON: "),
        ("[]", r"bad\.json: expected a JSON object"),
        ('{"model": {"d_model": 1, "d_model": 2}}', r"bad\.json: the key 'd_model' stands twice in one object"),
    ],
)
def test_what_is_no_json_object(write, content, words):
    with pytest.raises(SpecError, match=words):
        load_spec(write("bad.json", content))


def test_files_that_cannot_be_read(write, tmp_path):
    write("small.json", {})
    with pytest.raises(SpecError, match=r"smal\.json: no such file \(did you mean 'small\.json'\?\)$"):
        read_json(tmp_path / "smal.json")
    with pytest.raises(SpecError, match="is a folder, not a JSON file"):
        read_json(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(SpecError, match=r"latin\.json: not UTF-8 text \(byte 10\)"):
        read_json(tmp_path / "latin.json")


# --- extends


def test_extends_merges_deeply(raw, write):
    write("base.json", raw)
    child = {
        "extends": "base.json",
        "name": "child",
        "model": {"d_model": 64, "block": {"attention": {"n_kv_heads": 4}}},
    }
    spec = load_spec(write("child.json", child))
    wanted = copy.deepcopy(raw)
    wanted.update(name="child")
    wanted["model"]["d_model"] = 64
    wanted["model"]["block"]["attention"]["n_kv_heads"] = 4
    assert dump(spec) == dump(load_spec(wanted))


def test_extends_at_any_depth_and_relative_to_the_file_that_says_it(raw, write):
    write("models/parts/block.json", raw["model"]["block"])
    write("models/small.json", {**raw["model"], "block": {"extends": "parts/block.json"}})
    write("runs/base.json", {"model": {"extends": "../models/small.json"}})
    spec = load_spec(write("child.json", {"extends": "runs/base.json", "model": {"n_layers": 2}}))
    assert dump(spec.model) == dump(load_spec({**raw["model"], "n_layers": 2}).model)


def test_extends_in_a_list(raw, write):
    write("sample.json", {"type": "sample", "temperature": 0.5})
    raw["train"] = {"callbacks": ["progress", {"extends": "sample.json", "top_k": 3}]}
    callbacks = load_spec(write("run.json", raw)).train.callbacks
    assert [c.type for c in callbacks] == ["progress", "sample"]
    assert (callbacks[1].params.temperature, callbacks[1].params.top_k) == (0.5, 3)


def test_a_slot_of_another_type_is_replaced_whole(raw, write):
    write("base.json", raw)  # its ffn is a swiglu with d_ff 48
    child = {"extends": "base.json", "model": {"block": {"ffn": {"type": "mlp", "d_ff": 7}, "norm": "layernorm"}}}
    spec = load_spec(write("child.json", child))
    assert (
        spec.model.block.ffn.dump().items()
        >= {"type": "mlp", "d_ff": 7, "bias": False, "activation": {"type": "gelu"}}.items()
    )
    assert spec.model.block.norm.type == "layernorm"


def test_the_shorthand_below_and_above(raw, write):
    raw["model"]["block"]["norm"] = "layernorm"
    write("base.json", raw)
    changed = load_spec(write("child.json", {"extends": "base.json", "model": {"block": {"norm": {"eps": 0.5}}}}))
    assert changed.model.block.norm.dump().items() >= {"type": "layernorm", "eps": 0.5, "bias": True}.items()


def test_a_slot_that_names_no_type_is_of_its_default_one(raw, write):
    """So another type takes its place whole, and the same one what it says."""
    raw["train"] = {"optimizer": {"lr": 0.5, "betas": [0.5, 0.5]}}
    raw["model"]["block"]["attention"]["position"] = {"theta": 77}
    write("base.json", raw)
    write("model.json", raw["model"])
    position = {"block": {"attention": {"position": {"type": "learned"}}}}
    cases = [
        {"extends": "base.json", "train": {"optimizer": {"type": "sgd"}}, "model": position},
        {"extends": "base.json", "train": {"optimizer": "sgd"}, "model": {"extends": "model.json", **position}},
        {"extends": "base.json", "train": {"optimizer": "sgd", "seed": 3}, "model": position},
    ]
    for case in cases:
        spec = load_spec(write("child.json", case))
        assert (spec.train.optimizer.type, spec.train.optimizer.params.lr) == ("sgd", 0.1)
        assert spec.model.block.attention.params.position.type == "learned"
    for same in ("adamw", {"type": "adamw"}, {"betas": [0.9, 0.9]}):
        spec = load_spec(write("child.json", {"extends": "base.json", "train": {"optimizer": same}}))
        assert (spec.train.optimizer.type, spec.train.optimizer.params.lr) == ("adamw", 0.5)
    bare = load_spec(write("child.json", {"extends": "model.json", **position}))
    assert bare.model.block.attention.params.position.type == "learned"
    for text in ("train.optimizer=sgd", "train.optimizer.type=sgd", 'train.optimizer={"type": "sgd"}'):
        assert load_spec(raw, [text]).train.optimizer.params.lr == 0.1
    for text in ("train.optimizer=adamw", "train.optimizer.type=adamw", 'train.optimizer={"eps": 1e-6}'):
        assert load_spec(raw, [text]).train.optimizer.params.lr == 0.5


def test_what_a_slot_in_a_list_is_merged_over_has_no_default(raw):
    raw["train"] = {"callbacks": [{"prompt": "x"}]}
    with pytest.raises(SpecError, match="train.callbacks.0: expected the name of a registered callback"):
        load_spec(raw, ["train.callbacks.0.top_k=3"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.json": {"extends": "a.json"}}, r"extends: a\.json extends itself, by way of a\.json$"),
        (
            {"a.json": {"extends": "b.json"}, "b.json": {"model": {"extends": "a.json"}}},
            r"extends: a\.json extends itself, by way of a\.json -> b\.json$",
        ),
        ({"a.json": {"extends": "b.json"}, "c.json": {}}, r"b\.json: no such file"),
        ({"a.json": {"extends": 3}}, "extends: expected the path of a JSON file, got 3"),
    ],
)
def test_extends_that_leads_nowhere(write, files, words):
    for name, content in files.items():
        path = write(name, content)
    with pytest.raises(SpecError, match=words):
        load_spec(path.with_name("a.json"))


def test_one_file_may_be_extended_twice(raw, write):
    write("norm.json", {"type": "layernorm", "bias": False})
    raw["model"]["block"]["norm"] = {"extends": "norm.json"}
    raw["model"]["final_norm"] = {"extends": "norm.json"}
    spec = load_spec(write("run.json", raw))
    assert spec.model.block.norm == spec.model.final_norm


# --- overrides


def get(spec, path):
    here = dump(spec)
    for part in path.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part]
    return here


CALLBACKS = ["progress", {"type": "sample", "top_k": 5}]
OVERRIDES = [
    ("name=123", "name", "123"),
    ("name=true", "name", "true"),
    ("name=null", "name", "null"),
    ("name=a=b", "name", "a=b"),
    ("name=", "name", ""),
    ('name="quoted"', "name", "quoted"),
    ("packages.torch=1", "packages.torch", "1"),
    ("train.optimizer.lr=3e-4", "train.optimizer.lr", 3e-4),
    ("train.optimizer.lr=1", "train.optimizer.lr", 1.0),
    ("train.max_steps=5", "train.max_steps", 5),
    ("train.max_grad_norm=null", "train.max_grad_norm", None),
    ("train.compile=true", "train.compile", True),
    ("train.precision=bf16", "train.precision", "bf16"),
    (" train.seed =7", "train.seed", 7),
    ("train.optimizer.betas=[0.8, 0.9]", "train.optimizer.betas", [0.8, 0.9]),
    ("model.block.norm=layernorm", "model.block.norm.type", "layernorm"),
    ("model.block.norm.type=layernorm", "model.block.norm.type", "layernorm"),
    ("model.block.norm.eps=1e-3", "model.block.norm.eps", 1e-3),
    ("model.block.norm.eps=1e-3", "model.block.norm.type", "rmsnorm"),
    ('train.schedule={"type": "constant"}', "train.schedule.type", "constant"),
    ("model.block.attention.position.theta=500", "model.block.attention.position.theta", 500.0),
    ("model.block.attention.qk_norm=rmsnorm", "model.block.attention.qk_norm.type", "rmsnorm"),
    ("model.block.attention.window=null", "model.block.attention.window", None),
    ("model.layers.-1.norm=none", "model.layers", {"-1": {"norm": "none"}}),
    ("model.layers.1:3.norm.eps=0.5", "model.layers", {"1:3": {"norm": {"eps": 0.5}}}),
    ("train.callbacks=[]", "train.callbacks", []),
    ("train.callbacks.0=tensorboard", "train.callbacks.0.type", "tensorboard"),
    ("train.callbacks.1.top_k=9", "train.callbacks.1.top_k", 9),
    ("train.callbacks.-1.top_k=9", "train.callbacks.1.top_k", 9),
]


@pytest.mark.parametrize(("text", "path", "wanted"), OVERRIDES, ids=[f"{text}-{path}" for text, path, _ in OVERRIDES])
def test_overrides_are_typed_by_the_schema(raw, text, path, wanted):
    raw["train"] = {"callbacks": CALLBACKS}
    got = get(load_spec(raw, [text]), path)
    assert got == wanted
    assert type(got) is type(wanted)


def test_a_slot_that_is_set_with_its_type_is_set_whole(raw, tmp_path):
    raw["data"] = {"tokenizer": {"type": "bpe", "vocab_size": 300}}
    raw["train"] = {"callbacks": [{"type": "sample", "top_k": 5}]}
    own = tmp_path / "tokenizer.json"
    assert load_spec(raw, [f'data.tokenizer={{"type": "bpe", "path": "{own}"}}']).data.tokenizer.params.path == str(own)
    sample = load_spec(raw, ['train.callbacks.0={"type": "sample", "prompt": "x"}']).train.callbacks[0]
    assert (sample.params.prompt, sample.params.top_k) == ("x", type(sample.params)().top_k)
    assert load_spec(raw, ["train.callbacks.0=sample"]).train.callbacks[0].params.top_k == 5
    keep = load_spec({**raw, "train": {"keep": {"every": 5}}}, ['train.keep={"last": 7}']).train.keep
    assert (keep.last, keep.every) == (7, 5)


def test_through_a_shorthand(raw):
    raw["model"]["block"]["norm"] = "layernorm"
    spec = load_spec(raw, ["model.block.norm.bias=false"])
    assert spec.model.block.norm.dump().items() >= {"type": "layernorm", "eps": 1e-5, "bias": False}.items()


def test_a_parameter_of_a_string_slot_stays_a_string(raw):
    raw["train"] = {"callbacks": ["progress", "sample"]}
    spec = load_spec(raw, ["train.callbacks.1.prompt=42"])
    assert spec.train.callbacks[1].params.prompt == "42"


def test_the_last_override_wins_and_the_source_is_left_alone(raw):
    before = copy.deepcopy(raw)
    assert load_spec(raw, ["train.seed=1", "train.seed=2"]).train.seed == 2
    changed = load_spec(raw, ["model.block.ffn.type=mlp", "model.block.ffn.d_ff=6", "model.block.ffn.bias=true"])
    assert changed.model.block.ffn.dump()["d_ff"] == 6
    assert raw == before


def test_overrides_of_a_bare_model_are_named_as_in_a_run(raw):
    assert load_spec(raw["model"], ["model.n_layers=1", "train.seed=3"]).model.n_layers == 1
    assert read_raw(raw["model"], ["train.seed=3"])["train"] == {"seed": 3}


@pytest.mark.parametrize("text", ["train.seed", "=3", "a..b=3", ".=1", "train.=3", ""])
def test_overrides_that_are_none(raw, problems, text):
    assert problems(raw, [text]) == [f"--set {text}: expected path=value, such as train.optimizer.lr=3e-4"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model.dmodel=3", "model: unknown key 'dmodel' (did you mean 'd_model'?); keys: d_model, "),
        ("model.block.attention.n_head=3", "model.block.attention: unknown key 'n_head' (did you mean 'n_heads'?)"),
        ("train.optimizer.lrr=3", "train.optimizer: unknown key 'lrr' (did you mean 'lr'?); keys: lr, "),
        ("train.optimizer.lr=abc", 'train.optimizer.lr: expected a valid number, got "abc"'),
        ("train.seed=1.0", "train.seed: expected a valid integer, got 1.0"),
        ("model.d_model=", 'model.d_model: expected a valid integer, got ""'),
        ("model.d_model.x=3", 'model.d_model: expected a valid integer, got {"x": 3}'),
        ("model.block.norm=rmsnom", "model.block.norm: unknown norm 'rmsnom' (did you mean 'rmsnorm'?)"),
        ("model.block=3", "model.block: expected a valid dictionary or instance of BlockSpec, got 3"),
        ("train.optimizer.lr=NaN", "train.optimizer.lr: expected a finite number, got NaN"),
        ("train.callbacks.2=sample", "--set train.callbacks.2=sample: there is no item 2 in a list of 2"),
        ("train.callbacks.-3=sample", "--set train.callbacks.-3=sample: there is no item -3 in a list of 2"),
        ("train.callbacks.x=sample", "--set train.callbacks.x=sample: there is no item x in a list of 2"),
        ("train.optimizer.betas.0=0.5", "train.optimizer.betas: expected a valid list, got "),
    ],
)
def test_overrides_that_do_not_fit(raw, problems, text, line):
    raw["train"] = {"callbacks": CALLBACKS}
    (told,) = problems(raw, [text])
    assert told.startswith(line)


# --- what a resumed run may change


@pytest.mark.parametrize("path", [
    "name", "packages.some", "parallel.data", "train.callbacks", "train.keep.last", "train.compile",
    "train.objective.chunk_tokens", "model.block.attention.kernel.type", "model.layers.-1.attention.kernel",
    "model.blocks.a.ffn.dispatch",
])  # fmt: skip
def test_free_paths(path):
    assert may_change(path)


@pytest.mark.parametrize("path", [
    "train.seed", "train.precision", "train.micro_batch_size", "train.objective.z_loss", "train.objective.type",
    "train.compiler", "model.block.attention.n_heads", "model.blocks.kernel.ffn.d_ff", "model.blocks.dispatch.ffn.d_ff",
    "data.seq_len", "data.streaming.workers",
])  # fmt: skip
def test_paths_that_are_not_free(path):
    assert not may_change(path)


# --- identity


def test_the_resolved_spec_reads_back_as_itself(raw, moe):
    raw["model"]["layers"] = {"0": {"ffn": moe()}, "-1": {"norm": "none"}}
    spec = load_spec(raw)
    again = validate(json.loads(json.dumps(dump(spec))))
    assert dump(again) == dump(spec)
    assert again == spec
    assert fingerprint(again) == fingerprint(spec)
    assert again.model.per_layer == spec.model.per_layer


def test_a_resolved_spec_holds_every_default(raw):
    resolved = dump(load_spec(raw))
    position = resolved["model"]["block"]["attention"]["position"]
    assert (position["type"], position["theta"]) == ("rope", 10000.0)
    assert resolved["train"]["optimizer"]["type"] == "adamw"


def test_fingerprints(raw):
    one = fingerprint(load_spec(raw))
    assert one == fingerprint(load_spec(dict(reversed(raw.items()))))
    assert one == fingerprint(load_spec({**raw, "name": "other"}))
    assert one == fingerprint(load_spec(raw).model_copy(update={"packages": {"x": "1"}}))
    assert one == fingerprint(load_spec(raw, ["model.block.norm=rmsnorm"])), "a default that is said changes nothing"
    for change in ("train.seed=1", "model.block.norm.eps=0.5", "model.block.norm=none", "data.document_mask=true"):
        assert fingerprint(load_spec(raw, [change])) != one
    assert fingerprint(load_spec(raw).model) == fingerprint(load_spec({**raw, "train": {"seed": 5}}).model)


def test_packages(raw, problems):
    assert with_packages(load_spec(raw)).packages == {}, "built-ins are of no package but ours"
    raw["packages"] = {"sparsekit-no-such": "1.2"}
    assert load_spec(raw).packages == raw["packages"], "a package that is not needed is not asked for"
    raw["model"]["block"]["ffn"] = "no_such_ffn"
    missing = "packages: made with sparsekit-no-such 1.2, which is not installed; install that package"
    assert problems(raw) == [missing], "nothing of the name that it would bring"
    raw["model"]["d_model"] = -1
    assert problems(raw) == [missing, "model.d_model: expected greater than 0, got -1"]


def test_a_file_that_extends_a_missing_one(tmp_path, raw, problems):
    (tmp_path / "base.json").write_text(json.dumps({"model": {"extends": "tyni.json"}}))
    (tmp_path / "tiny.json").write_text(json.dumps(raw["model"]))
    (tmp_path / "tyni.txt").write_text("")
    asking = tmp_path / "asking.json"
    asking.write_text(json.dumps({"extends": "base.json"}))
    missing = tmp_path / "tyni.json"
    line = f"{tmp_path / 'base.json'}: model.extends: {missing}: no such file (did you mean 'tiny.json'?)"
    assert problems(asking) == [line]
    asking.write_text(json.dumps({"extends": "asked.json"}))
    (tmp_path / "base.json").unlink()
    assert problems(asking) == [f"{asking}: extends: {tmp_path / 'asked.json'}: no such file"], "and not itself"


def test_a_value_that_begins_as_json_and_is_none(raw, problems):
    told = "the value is not JSON: Expecting property name enclosed in double quotes at its character 2"
    for path in ("model.block.attention", "data.streaming"):
        assert problems(raw, [f"{path}={{bad json"]) == [f"--set {path}={{bad json: {told}"]
    assert load_spec(raw, ["name=[draft"]).name == "[draft", "a string may begin so"
    assert problems(raw, ["model.nowhere={x"])[0].startswith("model: unknown key 'nowhere'")
