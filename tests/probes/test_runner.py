"""``sparsekit.probe``: its targets, its probes by name, what it puts back, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make

import sparsekit
from sparsekit import spec
from sparsekit.errors import DataError, SparsekitError, SpecError
from sparsekit.model.build import build_model
from sparsekit.probes import results
from sparsekit.probes.base import DenseProbe, Probe, ProbeResult, Tokens
from sparsekit.probes.layered import ViewError
from sparsekit.probes.runner import choose, probe, run_probes, undisturbed
from sparsekit.registry import registry
from sparsekit.spec.load import validate

SPEC = {
    "d_model": 32, "n_layers": 2, "vocab_size": 257, "max_seq_len": 16,
    "block": {"attention": {"type": "mha", "n_heads": 4}, "ffn": {"type": "swiglu", "d_ff": 48}},
}  # fmt: skip
MIXTURE = {"type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 16}}
IDS = torch.randint(0, 64, (6, 8), generator=torch.Generator().manual_seed(0))
DENSE = ["variance", "moments", "similarity", "contributions", "effective_rank"]


class Disturbing(Probe):
    """Does to a model and to random numbers what a probe may do."""

    def run(self, view: Any, tokens: Tokens) -> ProbeResult:
        drawn = float(torch.rand(())), float(np.random.rand()), random.random()
        view.model.train()
        with torch.enable_grad():
            for p in view.model.parameters():
                p.requires_grad_(True)
            batch = view.start(tokens.ids_ST)
            batch.losses(batch.layer(0, batch.h_0)).sum().backward()
        for buffer in view.model.buffers():
            buffer.add_(1)
        return ProbeResult({"first": drawn[0], "second": drawn[1], "third": drawn[2]})


def test_the_model_is_left_as_it_was() -> None:
    raw = {**SPEC, "block": {**SPEC["block"], "ffn": MIXTURE}}
    model = build_model(raw)
    model.train()
    model.layers[0].eval()
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 3 > 0)
        p.grad = torch.full_like(p, 0.5) if number % 2 else None
    torch.manual_seed(5), np.random.seed(6), random.seed(7)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = [module.training for module in model.modules()]
    before = [(p.detach().clone(), p.grad, p.requires_grad) for p in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    probe(model, [Disturbing(), *DENSE], IDS)
    assert [module.training for module in model.modules()] == modes
    for p, (value, gradient, takes) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.grad is gradient
        assert p.requires_grad == takes
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_an_error_in_a_probe_leaves_it_as_it_was_too() -> None:
    model = build_model(SPEC).train()
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        model.norm.weight.requires_grad_(False)
        raise ZeroDivisionError
    assert model.training
    assert model.norm.weight.requires_grad


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    model = build_model(SPEC)
    first, again, other = (probe(model, [Disturbing()], IDS, seed=seed)["Disturbing"] for seed in (1, 1, 2))
    assert first.scalars == again.scalars
    assert all(first.scalars[name] != other.scalars[name] for name in first.scalars)


def test_probes_of_the_undisturbed_model_share_one_pass() -> None:
    from sparsekit.probes.layered import layered

    view = layered(build_model(SPEC))
    for layer in range(2):
        view.sites(layer)
    run_probes(view, choose(DENSE), Tokens.of(IDS, 4))
    assert view.layer_calls == 2 * 2  # batches times layers


def test_what_was_measured_is_told() -> None:
    result = probe(build_model(SPEC), "variance", IDS, seed=3)["variance"]
    told = {
        key: result.meta[key]
        for key in ("probe", "sequences", "seq_len", "tokens", "seed", "dtype", "device", "layers")
    }
    assert told == {
        "probe": "variance", "sequences": 6, "seq_len": 8, "tokens": 48, "seed": 3, "dtype": "float32", "device": "cpu",
        "layers": 2,
    }  # fmt: skip
    assert result.meta["data_fingerprint"] == Tokens.of(IDS).fingerprint
    assert result.meta["versions"]["torch"] == torch.__version__
    assert result.meta["wall_seconds"] >= 0


def test_names_parameters_dicts_and_probes() -> None:
    chosen = choose(["similarity:sample=9,lens=false", {"type": "moments", "top": 3}, "similarity", Disturbing()])
    assert list(chosen) == ["similarity", "moments", "similarity-2", "Disturbing"]
    assert (chosen["similarity"].params.sample, chosen["similarity"].params.lens) == (9, False)
    assert chosen["moments"].params.top == 3
    assert sparsekit.probe is probe
    assert set(DENSE) <= set(choose(None))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("varience", "probe: unknown probe 'varience' (did you mean 'variance'?); registered: "),
        ("similarity:samples=3", "probe.samples: unknown key"),
        ("similarity:sample=0", "probe.sample: Input should be greater than 0"),
        ("similarity:sample", "probe 'similarity:sample': expected name:key=value,key=value, got 'sample'"),
    ],
)
def test_mistakes_in_naming_probes(given: str, told: str) -> None:
    with pytest.raises(SpecError) as error:
        probe(build_model(SPEC), given, IDS)
    assert str(error.value).startswith(told)


def test_a_third_partys_probe_is_found_by_name() -> None:
    class Loudness(Probe):
        """The norm of the embeddings."""

        class Params(Probe.Params):
            times: float = 1.0

        def run(self, view: Any, tokens: Tokens) -> ProbeResult:
            return ProbeResult({"norm": self.params.times * float(view.start(tokens.ids_ST).h_0.norm())})

    registry("probe").register("loudness_for_this_test")(Loudness)
    try:
        model = build_model(SPEC)
        once, twice = (probe(model, f"loudness_for_this_test:times={n}", IDS) for n in (1.0, 2.0))
        assert twice["loudness_for_this_test"].scalars["norm"] == 2 * once["loudness_for_this_test"].scalars["norm"]
    finally:
        registry("probe").unregister("loudness_for_this_test")


class Refusing(DenseProbe):
    """Is never applicable."""

    def observer(self, view: Any, tokens: Tokens) -> Any:
        raise ViewError("there is nothing to see")


def test_what_is_not_applicable_is_an_error_if_named_and_told_if_not() -> None:
    model, told = build_model(SPEC), []
    with pytest.raises(ViewError, match="^there is nothing to see$"):
        probe(model, [Refusing()], IDS)
    tokens = Tokens.of(IDS)
    chosen = {"refusing": Refusing(), **choose("variance")}
    found = run_probes(model, chosen, tokens, everything=True, report=lambda name, share: told.append(name))
    assert list(found) == ["variance"]
    assert "refusing: not applicable: there is nothing to see" in told


def test_targets(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SPEC))
    by_path = probe(str(path), "variance", IDS)["variance"]
    assert by_path.scalars == probe(SPEC, "variance", IDS)["variance"].scalars
    assert by_path.scalars == probe(validate({"model": SPEC}), "variance", IDS)["variance"].scalars
    assert by_path.scalars == probe(build_model(SPEC), "variance", IDS)["variance"].scalars
    assert by_path.meta["target"] == str(path)


def test_a_hugging_face_folder_without_a_tokenizer(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path / "model")
    found = probe(f"hf:{tmp_path / 'model'}", ["variance"], sequences=3, seq_len=10, out=tmp_path / "out")
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    assert found["variance"].scalars == probe(model, "variance", ids)["variance"].scalars
    assert found["variance"].meta["remarks"] == ["the folder has no tokenizer: measured on uniformly random token ids"]
    assert (tmp_path / "out" / "variance.png").stat().st_size > 5000
    with pytest.raises(SparsekitError) as error:
        probe(f"hf:{tmp_path / 'nothing'}", "variance", IDS)
    assert str(error.value).startswith(f"hf:{tmp_path / 'nothing'}: cannot be loaded (")


def test_a_hugging_face_folders_own_tokenizer_reads_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "the", "and", "of", "to", "a", ","])}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    make("llama").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    text.write_text("the cat and a dog " * 20)
    found = probe(f"hf:{folder}", "variance", str(text), sequences=4, seq_len=10)["variance"]
    period = [2, 0, 3, 6, 0]
    wanted = Tokens.of(torch.tensor([(period * 4)[:10]] * 4)).fingerprint
    assert found.meta["data_fingerprint"] == wanted


def test_text_for_a_run(tmp_path: Path, raw_run: dict[str, Any]) -> None:
    found = probe(raw_run, "variance", sequences=5, seed=1)["variance"]
    assert (found.meta["sequences"], found.meta["seq_len"]) == (5, 16)
    again = probe(raw_run, "variance", sequences=5, seed=1)["variance"]
    other = probe(raw_run, "variance", sequences=5, seed=2)["variance"]
    assert found.meta["data_fingerprint"] == again.meta["data_fingerprint"] != other.meta["data_fingerprint"]
    many = probe(raw_run, "variance", sequences=10**6)["variance"]
    assert many.meta["remarks"][0].startswith("the text has ")


@pytest.fixture
def raw_run(tmp_path: Path) -> dict[str, Any]:
    text = tmp_path / "text.txt"
    text.write_text("it is a truth universally acknowledged\n" * 100)
    return {"model": SPEC, "data": {"source": {"type": "text", "path": str(text)}}}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (torch.zeros(3), "data: expected ids of shape [sequences, tokens >= 2], got (3,) torch.float32"),
        (torch.full((2, 4), 300), "data: token ids up to 300 do not fit the model's vocabulary of 257"),
        (
            "nowhere/text.txt",
            "nowhere/text.txt: no such text; give a text file, a data spec (.json) or the name of a source",
        ),
    ],
)
def test_mistakes_in_data(data: Any, told: str) -> None:
    with pytest.raises(DataError) as error:
        probe(SPEC, "variance", data)
    assert str(error.value) == told


def test_a_model_in_memory_needs_tokens() -> None:
    with pytest.raises(DataError) as error:
        probe(build_model(SPEC), "variance")
    assert str(error.value) == "data: a model in memory needs token ids [sequences, tokens] to be measured on"


def test_unknown_data_keys_are_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as error:
        probe(SPEC, "variance", {"sauce": "embedded"})
    assert str(error.value) == "data.sauce: unknown key"


class Odd(Probe):
    """Has all that a result can have."""

    def run(self, view: Any, tokens: Tokens) -> ProbeResult:
        result = ProbeResult({"a": 1.5, "b": math.nan}, {"x": np.array([1.0, math.nan])})
        result.matrices = {"small": np.arange(4.0).reshape(2, 2), "large": np.ones((80, 80))}
        result.intervals = {"a": (1.0, 2.0), "b": None}
        result.arrays = {"three": np.zeros((2, 3, 4), dtype=np.float32)}
        result.remark("once")
        result.remark("once")
        return result


def test_results_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    (found,) = probe(build_model(SPEC), [Odd()], IDS, out=tmp_path).values()
    loaded = results.load(tmp_path / "Odd.json")
    assert loaded.scalars["a"] == 1.5 and math.isnan(loaded.scalars["b"])
    assert loaded.intervals == {"a": (1.0, 2.0), "b": None}
    assert loaded.meta["remarks"] == ["once"]
    for group in ("per_layer", "matrices", "arrays"):
        for name, array in getattr(found, group).items():
            np.testing.assert_array_equal(getattr(loaded, group)[name], array)
            assert getattr(loaded, group)[name].dtype == array.dtype
    told = json.loads((tmp_path / "Odd.json").read_text())
    assert told["matrices"] == {"small": [[0.0, 1.0], [2.0, 3.0]], "large": {"shape": [80, 80]}}
    assert told["scalars"]["b"] is None
    assert list(csv.reader((tmp_path / "Odd.csv").open())) == [["layer", "x"], ["0", "1.0"], ["1", ""]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Odd.csv", "Odd.json", "Odd.npz", "Odd.png", "Odd.svg"]


def test_two_runs_write_the_same_pictures(tmp_path: Path) -> None:
    for name in ("first", "second"):
        probe(build_model(SPEC), "similarity", IDS, out=tmp_path / name)
    for kind in ("png", "svg", "csv"):
        first, second = ((tmp_path / name / f"similarity.{kind}").read_bytes() for name in ("first", "second"))
        assert first == second
    assert b"<svg" in (tmp_path / "first" / "similarity.svg").read_bytes()


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        results.load(tmp_path / "none.json")
    assert str(error.value) == f"{tmp_path}/none.json: no such file; is {tmp_path}/none.json the result of a probe?"
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(DataError, match="is not the result of a probe, or is damaged"):
        results.load(tmp_path / "bad.json")


def test_every_field_of_every_probe_has_a_default() -> None:
    for entry in registry("probe").entries():
        cls = registry("probe").get(entry.name)
        assert issubclass(cls, Probe)
        assert issubclass(cls.Params, spec.Params)
        cls.Params()
