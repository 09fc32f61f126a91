"""What no family expresses goes out whole; bytes become a tokenizer that others read; the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sparsekit.cli import app
from typer.testing import CliRunner

from sparsekit.data.tokenizers import ByteTokenizer
from sparsekit.errors import CheckpointError, SparsekitError
from sparsekit.interop.exporting import export
from sparsekit.interop.importing import import_folder
from sparsekit.interop.parity import TOLERANCE, compared, logits_of
from sparsekit.model.generate import generate
from sparsekit.model.targets import load_model
from tests.interop.hf_models import folder

IDS = torch.randint(0, 257, (3, 29), generator=torch.Generator().manual_seed(3))


def spec_file(path: Path, **model: Any) -> Path:
    """A spec whose weights are large enough to make a difference."""
    path.write_text(json.dumps({"model": {"init": {"type": "normal", "std": 0.2}, **model}}))
    return path


@pytest.fixture
def odd(tiny, moe, tmp_path) -> Path:
    """Sinks, a top-k feed-forward and a shared expert: no family has any of them."""
    attention = {"type": "gqa", "n_heads": 4, "n_kv_heads": 2, "window": 9, "sinks": 2}
    layers = {"1": {"ffn": moe(shared_expert={"type": "top_k_ffn", "d_ff": 20, "k": 5})}}
    return spec_file(tmp_path / "odd.json", **tiny(vocab_size=257, attention=attention, layers=layers))


def test_what_no_family_expresses(odd, tmp_path):
    sent = export(odd, tmp_path / "out")
    assert sent.family == "sparsekit"
    assert sent.difference is not None
    assert sent.difference.relative <= TOLERANCE
    assert len(sent.remarks) == 1
    assert sent.remarks[0].startswith("no Hugging Face family expresses this model (the nearest, ")
    assert sent.remarks[0].endswith("; import sparsekit.interop.huggingface before loading it")
    mine, theirs = load_model(odd), transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(mine(IDS), theirs(IDS).logits)
    found = import_folder(str(tmp_path / "out"), tmp_path / "in")
    assert found.difference is not None
    one, two = mine.state_dict(), load_model(tmp_path / "in").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@torch.no_grad()
def test_the_wrapper_pads_generates_and_tells_a_loss(odd, tmp_path):
    export(odd, tmp_path / "out", check=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = model(IDS[:1]).logits
    mask = torch.cat((torch.zeros(1, 5), torch.ones(1, 29)), 1).long()
    left = model(torch.cat((IDS[1:2, :5], IDS[:1]), 1), attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(left, wanted, rtol=1e-4, atol=1e-5)
    labels = IDS[:1].clone()
    labels[:, :4] = -100
    losses = torch.nn.functional.cross_entropy(wanted[0, 3:-1], IDS[0, 4:])
    torch.testing.assert_close(model(IDS[:1], labels=labels).loss, losses)
    out = model.generate(IDS[:1, :8], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out[0, 8:].tolist() == list(generate(load_model(odd), IDS[0, :8].tolist(), 6, temperature=0))


@torch.no_grad()
def test_a_fresh_wrapper_is_initialised_whole(odd, tmp_path):
    export(odd, tmp_path / "out", check=False)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "out"))
    assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers()))
    assert model.model.layers[0].attention.q.weight.std() == pytest.approx(0.2, rel=0.1)
    assert model(IDS).logits.std() > 0.1


def test_bytes_as_a_tokenizer_of_others(tiny, tmp_path):
    sent = export(spec_file(tmp_path / "s.json", **tiny(vocab_size=257)), tmp_path / "out")
    assert sent.family == "llama"
    theirs, mine = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), ByteTokenizer(ByteTokenizer.Params())
    for text in ("Persuasion", "naïve 中文 \n\t two  spaces", "".join(map(chr, range(1, 300))), "<|endoftext|>"[:5]):
        assert theirs(text)["input_ids"] == mine.encode(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == mine.eos_id == 256
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["eos_token_id"], config["num_key_value_heads"]) == ("llama", 256, 2)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 256


BLOCKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mqa, geglu": ("llama", {"attention": {"type": "mqa", "n_heads": 4}, "ffn": {"type": "geglu", "d_ff": 20}}),
    "post norm of branches": ("", {"residual": "output_norm"}),
    "qk norm": ("qwen3", {"attention": {"type": "mha", "n_heads": 4, "qk_norm": "rmsnorm"}}),
    "scales": ("granite", {"residual": {"type": "pre_norm", "scale": 0.5}, "logit_scale": 0.25}),
    "window": ("mistral", {"attention": {"type": "mha", "n_heads": 4, "window": 5}}),
    "partial rope": (
        "phi3", {"attention": {"type": "mha", "n_heads": 4, "position": {"type": "rope", "fraction": 0.5}}}
    ),
    "another final norm": ("", {"final_norm": {"type": "rmsnorm", "eps": 0.1}}),
    "masked weights": ("", {"linear": "masked"}),
    "relu^2": ("llama", {"ffn": {"type": "gated", "d_ff": 20, "activation": "relu2"}}),
    "mixture": ("olmoe", {"attention": {"type": "mha", "n_heads": 4, "qk_norm": "rmsnorm",
                                        "qk_norm_over": "projection"}, "ffn": "moe"}),
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), BLOCKS.values(), ids=BLOCKS)
def test_the_family_that_says_it(family, changes, tiny, moe, tmp_path):
    changes = {**changes, **({"ffn": moe()} if changes.get("ffn") == "moe" else {})}
    path = spec_file(tmp_path / "s.json", **tiny(vocab_size=257, **changes))
    sent = export(path, tmp_path / "out")
    assert sent.family == (family or "sparsekit")
    import sparsekit.interop.huggingface  # noqa: F401 (registers the last)

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert compared(logits_of(load_model(path), IDS), logits_of(theirs, IDS), "").relative <= TOLERANCE


def test_a_family_that_is_asked_for(tiny, tmp_path):
    path = spec_file(tmp_path / "s.json", **tiny(vocab_size=257))
    assert export(path, tmp_path / "out", family="phi3").family == "phi3"
    with pytest.raises(CheckpointError) as error:
        export(path, tmp_path / "other", family="gpt_neox")
    assert str(error.value).startswith("gpt_neox does not express this model: it has ")
    with pytest.raises(SparsekitError, match=r"--family lama: no such family \(did you mean 'llama'\?\)"):
        export(path, tmp_path / "other", family="lama")
    assert not (tmp_path / "other").exists()


def test_the_command_line(tmp_path, tokenizer):
    there = folder("qwen3", tmp_path / "hf", tokenizer)
    run = CliRunner().invoke
    done = run(app, ["import", f"hf:{there}", str(tmp_path / "in")])
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    assert first == f"{tmp_path}/in: qwen3, 47,144 parameters in float32"
    assert second.startswith("logits on 128 tokens (of a novel): relative difference ")
    for command in (["describe"], ["validate"], ["generate", "--prompt", "It is", "--max-new-tokens", "3"]):
        done = run(app, [command[0], str(tmp_path / "in"), *command[1:]])
        assert done.exit_code == 0, done.output
    done = run(app, ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--no-check"])
    assert done.stdout == f"{tmp_path}/out: qwen3, 47,144 parameters in float32\n"
    kept = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in kept:
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((there / name).read_text())
