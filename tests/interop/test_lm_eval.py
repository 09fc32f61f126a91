"""lm-eval: likelihoods from the definition, whatever the batch, and scores equal to those of lm-eval's own model."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from sparsekit.cli import app

import sparsekit
from sparsekit.data.tokenizers import BPETokenizer, ByteTokenizer
from sparsekit.errors import DataError, SparsekitError, UnknownNameError
from sparsekit.interop.lm_eval import SparsekitLM, evaluate, rolling_windows
from sparsekit.model import likelihood
from sparsekit.model.build import build_model
from sparsekit.model.generate import generate
from sparsekit.model.likelihood import loglikelihoods
from sparsekit.model.targets import Run
from sparsekit.spec.load import load_spec
from sparsekit.training.run import train

TASKS = Path(__file__).parents[2] / "specs" / "tasks"
BYTE = ByteTokenizer(ByteTokenizer.Params())
EOS = BYTE.eos_id
BATCH_SIZES = [1, 3, 16, "auto"]


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture
def model(tiny):
    return build_model(tiny(vocab_size=257, init={"type": "normal", "std": 0.3}), dtype=torch.float64).eval()


@pytest.fixture
def lm(model):
    return lambda **options: SparsekitLM(model, BYTE, **options)


@torch.no_grad()
def by_hand(model, context, continuation):
    """ln p token by token, each from a forward of what stands before it."""
    total, greedy = 0.0, True
    for n, token in enumerate(continuation):
        before = [*context, *continuation[:n]][-model.spec.max_seq_len :]
        p = model(torch.tensor([before]))[0, -1].softmax(-1)
        total, greedy = total + math.log(p[token]), greedy and int(p.argmax()) == token
    return total, greedy


# --- likelihoods

PAIRS = [
    ("", "one"),
    ("one", " two"),
    ("a longer context", " and more"),
    ("a longer context ", "and more"),
    ("one", " x"),
    ("one", " y"),
    ("a context that is cut from its left, being long", " end"),
]


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_loglikelihood(lm, model, batch_size, add_bos):
    asked = [request("loglikelihood", *pair) for pair in PAIRS]
    got = lm(batch_size=batch_size, add_bos=add_bos).loglikelihood(asked, disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, got, strict=True):
        before = [EOS] if add_bos or not context else []
        # lm-eval's rule: spaces belong to the word that follows
        context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
        ids, ends = BYTE.encode(context).tolist(), BYTE.encode(continuation).tolist()
        whole = [*before, *ids, *ends]
        cut = whole[-33:-1]  # what 32 positions see when the last token is only predicted
        with torch.no_grad():
            p = model(torch.tensor([cut]))[0].log_softmax(-1)
        places = range(len(cut) - len(ends), len(cut))
        wanted = sum(float(p[place, token]) for place, token in zip(places, ends, strict=True))
        assert value == pytest.approx(wanted, rel=1e-10)
        assert greedy == all(int(p[place].argmax()) == token for place, token in zip(places, ends, strict=True))
        if len(whole) <= 32:
            assert (value, greedy) == (pytest.approx(by_hand(model, [*before, *ids], ends)[0], rel=1e-10), greedy)


def test_what_greedy_decoding_writes_is_greedy(model):
    ids = BYTE.encode("one two").tolist()
    told = list(generate(model, ids, 5, temperature=0))
    (_, yes), (_, no) = loglikelihoods(model, [(ids, told), (ids, [*told[:-1], (told[-1] + 1) % 257])])
    assert yes
    assert not no


@pytest.mark.parametrize("router", ["switch", "expert_choice"])
def test_experts_that_couple_sequences_do_not_couple_requests(tiny, moe, router):
    model = build_model(tiny(ffn=moe(router=router), init={"type": "normal", "std": 0.3}), dtype=torch.float64).eval()
    pairs = [([3, 1], [4, 1]), ([5], [9]), ([2, 6, 5, 3], [5, 8])]
    together = loglikelihoods(model, pairs, 16)
    assert together == [loglikelihoods(model, [pair])[0] for pair in pairs]


def test_a_sequence_that_requests_share_is_run_once(model, monkeypatch):
    rows = []
    monkeypatch.setattr(
        model, "forward", lambda ids, *rest, own=model.forward: rows.append(len(ids)) or own(ids, *rest)
    )
    pairs = [([1, 2, 3], [token]) for token in range(40)]
    got = loglikelihoods(model, pairs)
    assert rows == [1]
    assert sum(math.exp(value) for value, _ in got) < 1
    for pair, (value, _) in zip(pairs, got, strict=True):
        assert value == pytest.approx(by_hand(model, *pair)[0], rel=1e-10)


def test_auto_halves_a_batch_that_does_not_fit(model, monkeypatch):
    pairs = [([n, 2 * n, 3], [4, n]) for n in range(21)]
    wanted = loglikelihoods(model, pairs)
    own = likelihood._forward

    def small(model, batch, wanted):
        if len(batch) > 4:
            raise torch.OutOfMemoryError("too much")
        return own(model, batch, wanted)

    monkeypatch.setattr(likelihood, "_forward", small)
    torch.testing.assert_close(loglikelihoods(model, pairs), wanted, rtol=1e-12, atol=0)
    with pytest.raises(torch.OutOfMemoryError):
        loglikelihoods(model, pairs, 8)  # which was asked for


def test_what_no_likelihood_is_of(model, lm):
    assert loglikelihoods(model, [([1], [])]) == [(0.0, True)]
    with pytest.raises(ValueError, match="the context is empty"):
        loglikelihoods(model, [([], [1])])
    words = "a continuation of 33 tokens is longer than max_seq_len, 32; choose another task"
    with pytest.raises(DataError, match=words):
        lm().loglikelihood([request("loglikelihood", "a", "b" * 33)], disable_tqdm=True)


# --- rolling

TEXTS = ["", "a", "shorter than a window", "x" * 32, "longer than a window of thirty-two tokens", "twice as long! " * 6]


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 9))
def test_windows(ids, length):
    """Each token once, in order; after at most ``length`` tokens, and after as many as there can be in the last."""
    windows = list(rolling_windows(ids, -1, length))
    assert [token for _, predicted in windows for token in predicted] == ids
    whole, at = [-1, *ids], 0
    for context, predicted in windows:
        seen = len(context) + len(predicted) - 1
        assert context and seen <= length
        assert [*context, *predicted] == whole[at + len(predicted) - seen : at + 1 + len(predicted)]
        at += len(predicted)
        full = min(length, at)
        assert seen == full, "as much context as the model takes"


@torch.no_grad()
@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_rolling(lm, model, batch_size):
    got = lm(batch_size=batch_size).loglikelihood_rolling(
        [request("loglikelihood_rolling", text) for text in TEXTS], disable_tqdm=True
    )
    for text, value in zip(TEXTS, got, strict=True):
        whole, wanted, done = [EOS, *BYTE.encode(text).tolist()], 0.0, 1
        while done < len(whole):  # token `done` is the next that is predicted; windows of 32 positions
            end = min(done + 32, len(whole))
            p = model(torch.tensor([whole[max(0, end - 33) : end - 1]]))[0].log_softmax(-1)
            wanted += sum(float(p[n - end, whole[n]]) for n in range(done, end))
            done = end
        assert value == pytest.approx(wanted, rel=1e-10, abs=1e-12)


# --- generation


def test_generate_until(lm, model):
    contexts = ["one", "two words", "a much longer context than the model has room for", "x"]
    options = {"until": ["\n\n"], "max_gen_toks": 12}
    whole = lm().generate_until([request("generate_until", text, options) for text in contexts], disable_tqdm=True)
    for context, text in zip(contexts, whole, strict=True):
        ids = BYTE.encode(context).tolist()[-(32 - 12) :]
        assert text == BYTE.decode(list(generate(model, ids, 12, temperature=0, stop_id=EOS))).split("\n\n")[0]
    stop = whole[1][2:4]
    asked = [request("generate_until", text, {**options, "until": stop}) for text in contexts]
    for batch_size in BATCH_SIZES:
        told = lm(batch_size=batch_size).generate_until(asked, disable_tqdm=True)
        assert told == [text.split(stop)[0] for text in whole]


@pytest.mark.parametrize("sampled", [{"do_sample": True, "temperature": 1.3, "top_p": 0.9}, {"do_sample": True}])
def test_sampling_does_not_depend_on_the_batch(lm, sampled):
    asked = [request("generate_until", text, {"max_gen_toks": 8, **sampled}) for text in ("one", "two", "one", "ab")]
    asked.insert(1, request("generate_until", "greedy", {"max_gen_toks": 50}))
    told = [lm(batch_size=size, seed=3).generate_until(asked, disable_tqdm=True) for size in BATCH_SIZES]
    assert told[1:] == told[:-1]
    assert told[0][0] != told[0][3], "the same context twice, drawn twice"
    assert lm(seed=4).generate_until(asked, disable_tqdm=True) != told[0]


# --- the whole way


def test_lm_eval_knows_the_type():
    assert get_model("sparsekit") is SparsekitLM
    assert sparsekit.evaluate is evaluate


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "sparsekit.interop.lm_eval")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["eval", "spec.json", "--tasks", "a"])
    assert isinstance(done.exception, SparsekitError)
    assert str(done.exception) == "eval needs the package lm_eval: pip install 'sparsekit[eval]'"


def test_lm_eval_makes_the_model_from_arguments(run):
    """As its own command does: --model sparsekit --model_args target=…,add_bos=True --batch_size 2."""
    more = {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    lm = get_model("sparsekit").create_from_arg_string(f"target={run.folder},add_bos=True", more)
    assert (lm.batch_size, lm.add_bos, lm.max_length) == (2, True, 256)
    assert lm.tok_encode("a") == [EOS, 97]
    assert lm.tok_decode([97, EOS]) == "a"


def test_items_are_what_their_script_makes(tmp_path):
    spec = importlib.util.spec_from_file_location("items", TASKS / "items.py")
    items = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(items)
    items.make(tmp_path)
    for name in items.MAKERS:
        assert (tmp_path / name).read_bytes() == (TASKS / name).read_bytes()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a few steps."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    text = folder.parent / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 60)
    block = {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 48}}
    spec = {
        "model": {"d_model": 32, "n_layers": 2, "vocab_size": 257, "max_seq_len": 256, "block": block},
        "data": {"source": {"type": "text", "path": str(text)}, "seq_len": 64},
        "train": {"max_steps": 2, "micro_batch_size": 2, "global_batch_tokens": 128, "callbacks": []},
    }
    with contextlib.redirect_stderr(io.StringIO()):
        train(load_spec(spec), out=folder)
    return Run(folder)


def test_shipped_tasks_on_a_run(run):
    names = ["austen_arc", "austen_hellaswag", "austen_mmlu", "austen_lambada"]
    record = evaluate(run, names, include_path=TASKS, limit=20, num_fewshot=1, batch_size=16)
    results = record["results"]
    assert set(results) == {*names, "austen_mmlu_sentences", "austen_mmlu_names"}
    for name in results:
        assert 0 <= results[name]["acc,none"] <= 1
    assert 0 < results["austen_arc"]["acc,none"] < 1
    assert results["austen_lambada"]["perplexity,none"] > 1
    assert results["austen_lambada"]["acc,none"] == 0, "a model of two steps finds no last word"
    mmlu = [results[f"austen_mmlu_{part}"]["acc,none"] for part in ("sentences", "names")]
    assert results["austen_mmlu"]["acc,none"] == pytest.approx(sum(mmlu) / 2)
    assert record["n_shot"]["austen_arc"] == 1
    assert record["n_samples"]["austen_arc"] == {"original": 75, "effective": 20}
    written = run.folder / "eval" / f"step-00000002.{'+'.join(names)}.json"
    assert record["path"] == str(written)
    on_disk = json.loads(written.read_text())
    assert on_disk == {key: value for key, value in record.items() if key != "path"}
    assert on_disk["batch_size"] == 16
    assert on_disk["bos"] == "token 256, which ends documents, before empty contexts and rolling texts"
    assert set(on_disk["versions"]) == {"sparsekit", "lm_eval", "torch"}


def test_the_batch_changes_no_score(run):
    alone, *others = (
        evaluate(run, "austen_hellaswag", include_path=TASKS, limit=5, batch_size=size, dtype="float64")["results"]
        for size in (1, 3, 16)
    )
    assert all(other == alone for other in others)


def test_the_command(run, tmp_path):
    out = tmp_path / "record.json"
    arguments = ["eval", str(run.folder), "--tasks", "austen_arc, austen_mmlu_names", "--include-path", str(TASKS)]
    done = CliRunner().invoke(app, [*arguments, "--limit", "4", "--batch-size", "3", "--output", str(out), "--bos"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "±", "stderr", "examples", "shots"]
    found = json.loads(out.read_text())
    first = next(line for line in lines if line.startswith("austen_arc")).split()
    assert first == [
        "austen_arc", "acc", "↑", f"{found['results']['austen_arc']['acc,none']:.4f}",
        f"{found['results']['austen_arc']['acc_stderr,none']:.4f}", "4", "0",
    ]  # fmt: skip
    assert found["bos"] == "token 256, which ends documents, before every context and text"
    assert lines[-1] == f"written to {out}"


def test_a_task_that_is_written_by_hand(run, tmp_path):
    """generate_until and rolling, by yaml beside its data; and nothing is written for a bare spec."""
    (tmp_path / "data.py").write_text(
        "def read(**_):\n"
        "    from datasets import Dataset\n"
        "    return {'test': Dataset.from_list([{'q': 'one', 'a': 'two'}, {'q': 'three', 'a': ''}])}\n"
    )
    common = "custom_dataset: !function data.read\ntest_split: test\ndoc_to_target: '{{a}}'\n"
    (tmp_path / "say.yaml").write_text(
        common + "task: say\noutput_type: generate_until\ndoc_to_text: '{{q}}'\n"
        "generation_kwargs: {until: [' '], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "roll.yaml").write_text(
        common + "task: roll\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    (tmp_path / "roll.yaml").write_text((tmp_path / "roll.yaml").read_text().replace("'{{a}}'", "'{{q}}'"))
    spec = tmp_path / "model.json"
    spec.write_text((run.folder / "spec.json").read_text())
    record = evaluate(spec, ["say", "roll"], include_path=tmp_path)
    assert record["results"]["say"]["exact_match,none"] in (0.0, 0.5)
    assert record["results"]["roll"]["bits_per_byte,none"] == pytest.approx(math.log2(257), rel=0.05)
    assert "path" not in record


@pytest.mark.slow  # reads the names of all of lm-eval's own tasks
def test_an_unknown_task(run):
    with pytest.raises(UnknownNameError) as error:
        evaluate(run, "austen_ark", include_path=TASKS)
    assert str(error.value) == (
        f"--tasks austen_ark: no such task in {TASKS} or among lm-eval's own (did you mean 'austen_arc'?)"
    )


def test_mistakes(run, tmp_path):
    with pytest.raises(SparsekitError, match="--batch-size 0: give auto, or how many sequences run at a time"):
        evaluate(run, "austen_arc", include_path=TASKS, batch_size=0)
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.json}}\noutput_type: loglikelihood\n"
        "test_split: test\ndoc_to_text: ''\ndoc_to_target: ''\n"
    )
    with pytest.raises(DataError, match=r"--tasks lost: their data cannot be read \(Unable to find .*none.json"):
        evaluate(run, "lost", include_path=tmp_path)
    with pytest.raises(DataError, match=r"nowhere: no such folder of tasks"):
        evaluate(run, "austen_arc", include_path=tmp_path / "nowhere")
    with pytest.raises(SparsekitError, match="no tasks: name some"):
        evaluate(run, [], include_path=TASKS)


@pytest.mark.slow  # as the test of the export, without it
def test_hugging_face_scores_the_same_weights_the_same(tmp_path):
    """The same weights as transformers' Llama, evaluated by lm-eval's own ``hf``."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokenizer = BPETokenizer(BPETokenizer.Params(vocab_size=320))
    tokenizer.fit([(TASKS / "lambada.jsonl").read_text()])
    block = {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 48}}
    ours = build_model(
        {"d_model": 32, "n_layers": 2, "vocab_size": 320, "max_seq_len": 512, "block": block,
         "init": {"type": "normal", "std": 0.15}}
    )  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=512, tie_word_embeddings=False, rms_norm_eps=1e-6,
        bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    names = [
        (r"^(layers|norm)\.", r"model.\1."), (r"^embedding\.", "model.embed_tokens."), (r"^head\.", "lm_head."),
        (r"attention\.([qkvo])\.", r"self_attn.\1_proj."), (r"ffn\.(gate|up|down)\.", r"mlp.\1_proj."),
        (r"residual\.attention_norm\.", "input_layernorm."), (r"residual\.ffn_norm\.", "post_attention_layernorm."),
    ]  # fmt: skip

    def renamed(name):
        for old, new in names:
            name = re.sub(old, new, name)
        return name

    theirs.load_state_dict({renamed(name): value for name, value in ours.state_dict().items()})
    theirs.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend, eos_token=tokenizer.params.eos_token, bos_token=tokenizer.params.eos_token
    ).save_pretrained(tmp_path)
    tasks = ["austen_arc", "austen_lambada"]
    options = {"include_path": TASKS, "limit": 25, "num_fewshot": 1, "batch_size": 4}
    mine = evaluate(ours, tasks, tokenizer=tokenizer, **options)
    hf = evaluate(f"hf:{tmp_path}", tasks, **options)
    check_equal_scores(mine, hf)
    assert hf["bos"].startswith(f"token {tokenizer.eos_id} before")


def check_equal_scores(mine, hf):
    for task, found in mine["results"].items():
        for metric, value in found.items():
            if isinstance(value, float):
                assert hf["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)


def test_hugging_face_scores_our_export_the_same(run, tmp_path):
    """By lm-eval's own ``hf``, which loads what :mod:`sparsekit.interop.exporting` writes of the run."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from sparsekit.interop.exporting import export

    export(run.folder, tmp_path / "hf")
    tasks = ["austen_arc", "austen_lambada"]
    options = {"include_path": TASKS, "limit": 20, "batch_size": 4}
    mine, hf = evaluate(run, tasks, **options), evaluate(f"hf:{tmp_path / 'hf'}", tasks, **options)
    check_equal_scores(mine, hf)
    assert hf["bos"] == f"token {EOS} before empty contexts and rolling texts"
