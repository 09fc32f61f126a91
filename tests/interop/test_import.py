"""Every family comes in with its own logits, goes out again and comes back bit for bit; what cannot is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sparsekit.errors import CheckpointError
from sparsekit.interop.exporting import export
from sparsekit.interop.importing import import_folder
from sparsekit.interop.parity import TOLERANCE, compared, logits_of
from sparsekit.model.targets import load_model, resolve
from tests.interop.hf_models import FAMILIES, VOCABULARY, YARN, change, folder, make

IDS = torch.randint(1, VOCABULARY, (3, 33), generator=torch.Generator().manual_seed(3))


def spec_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "spec.json").read_text())["model"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_there_and_back(name, tmp_path, tokenizer):
    there = folder(name, tmp_path / "hf", tokenizer)
    found = import_folder(f"hf:{there}", tmp_path / "in")
    assert found.difference is not None
    assert found.difference.relative <= TOLERANCE
    assert found.difference.kind == "of a novel"
    assert found.remarks == []
    mine = load_model(tmp_path / "in")
    wanted = logits_of(make(name), IDS)
    assert compared(wanted, logits_of(mine, IDS), "").relative <= TOLERANCE
    assert sum(found.parameters.values()) == sum(p.numel() for p in mine.parameters())

    mine.layers[0], mine.layers[1] = mine.layers[1], mine.layers[0]
    swapped = compared(wanted, logits_of(mine, IDS), "")
    with pytest.raises(CheckpointError, match="it is another function, and nothing was written"):
        swapped.demand("swapped")

    sent = export(tmp_path / "in", tmp_path / "out")
    assert sent.family == json.loads((there / "config.json").read_text())["model_type"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.state_dict().keys() == make(name).state_dict().keys()
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in make(name).state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 0

    import_folder(str(tmp_path / "out"), tmp_path / "again")
    one, two = (load_model(tmp_path / path).state_dict() for path in ("in", "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert spec_of(tmp_path / "in") == spec_of(tmp_path / "again")


def test_layers_swapped_in_the_files_are_noticed(tmp_path, monkeypatch):
    """The comparison looks at the folder's own model, not at what was read of it."""
    from sparsekit.interop import importing

    there = folder("llama", tmp_path / "hf")
    other = tmp_path / "swapped"
    shutil.copytree(there, other)
    tensors = load_file(other / "model.safetensors")
    swap = {"model.layers.0.": "model.layers.1.", "model.layers.1.": "model.layers.0."}
    moved = {
        next((to + k.removeprefix(at) for at, to in swap.items() if k.startswith(at)), k): t for k, t in tensors.items()
    }
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    load = importing.load_original
    monkeypatch.setattr(importing, "load_original", lambda path, config: load(other, config))
    with pytest.raises(CheckpointError, match="more than 0.0001; it is another function, and nothing was written"):
        import_folder(str(there), tmp_path / "in")
    assert not (tmp_path / "in").exists()
    assert not list(tmp_path.glob(".in*"))


def test_minicpm(tmp_path, tokenizer):
    """h = x + scale_depth / sqrt(L) F(n(x)); embeddings times scale_emb; logits over d_model / dim_model_base.

    Its formula is written here on top of Llama's modules, as the original is not part of transformers.
    """
    there = folder("llama", tmp_path / "hf", tokenizer)
    model = make("llama")
    change(there, model_type="minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=8, tie_word_embeddings=False)
    import_folder(str(there), tmp_path / "in")
    with torch.no_grad():
        x = model.model.embed_tokens(IDS) * 12
        turns = model.model.rotary_emb(x, torch.arange(IDS.shape[1])[None])
        mask = torch.full((IDS.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        for layer in model.model.layers:
            attended, _ = layer.self_attn(layer.input_layernorm(x), attention_mask=mask, position_embeddings=turns)
            x = x + 1.4 / 3**0.5 * attended
            x = x + 1.4 / 3**0.5 * layer.mlp(layer.post_attention_layernorm(x))
        wanted = model.lm_head(model.model.norm(x) / (32 / 8))
    assert compared(wanted, logits_of(load_model(tmp_path / "in"), IDS), "").relative <= TOLERANCE
    change(there, num_experts=8)
    with pytest.raises(CheckpointError, match="config key 'num_experts' is not understood"):
        import_folder(str(there), tmp_path / "other")


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_fused_on_disk(name, tmp_path):
    """As transformers holds them in memory, gate and up of all experts in one tensor."""
    there = folder(name, tmp_path / "hf")
    save_file(make(name).state_dict(), there / "model.safetensors", metadata={"format": "pt"})
    import_folder(str(there), tmp_path / "in")
    assert compared(logits_of(make(name), IDS), logits_of(load_model(tmp_path / "in"), IDS), "").relative <= TOLERANCE


def test_bfloat16_stays_as_it_is(tmp_path):
    model = make("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    found = import_folder(str(tmp_path / "hf"), tmp_path / "in")
    assert set(found.parameters) == {"bfloat16"}
    sent = export(tmp_path / "in", tmp_path / "out")
    assert set(sent.parameters) == {"bfloat16"}
    one, two = (load_file(tmp_path / path / "model.safetensors") for path in ("hf", "out"))
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in one)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_sharded_pickled_and_headless_files(tmp_path):
    there = folder("gpt2", tmp_path / "hf")
    tensors = load_file(there / "model.safetensors")
    (there / "model.safetensors").unlink()
    bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    names = sorted(bare)
    torch.save({key: bare[key] for key in names[:9]}, there / "pytorch_model-00001-of-00002.bin")
    torch.save({key: bare[key] for key in names[9:]}, there / "pytorch_model-00002-of-00002.bin")
    import_folder(str(there), tmp_path / "in", check=False)
    assert compared(logits_of(make("gpt2"), IDS), logits_of(load_model(tmp_path / "in"), IDS), "").relative <= TOLERANCE


class Harm:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = folder("llama", tmp_path / "hf")
    (there / "model.safetensors").unlink()
    (there / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Harm()}))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: "):
        import_folder(str(there), tmp_path / "in")
    torch.save({"model.norm.weight": Harm()}, there / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"pytorch_model.bin: holds more than tensors \(UnpicklingError\); not read"
    ):
        import_folder(str(there), tmp_path / "in")
    assert not Path("harmed").exists()


KNOWN = "silu, swish, gelu, gelu_new, gelu_pytorch_tanh, relu, relu2"
SCALINGS = "linear, llama3, yarn"
REFUSALS = [
    ("llama", {"rope_scaling": {"type": "foo", "factor": 2.0}},
     f"rope scaling 'foo' has no counterpart in sparsekit; these have: {SCALINGS}"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
     f"rope scaling 'dynamic' has no counterpart in sparsekit; these have: {SCALINGS}"),
    ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 2.0}},
     "rope scaling 'yarn' with mscale, mscale_all_dim has no counterpart in sparsekit"),
    ("llama", {"hidden_act": "bar"}, f"hidden_act 'bar' has no counterpart in sparsekit; these have: {KNOWN}"),
    ("gpt2", {"activation_function": "bar"},
     f"activation_function 'bar' has no counterpart in sparsekit; these have: {KNOWN}"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True},
     "scale_attn_by_inverse_layer_idx True has no counterpart in sparsekit"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 has no counterpart in sparsekit"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm True has no counterpart in sparsekit"),
    ("gemma2", {"use_bidirectional_attention": True},
     "use_bidirectional_attention True has no counterpart in sparsekit"),
    ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
     "layer type 'chunked_attention' has no counterpart in sparsekit; these have: full_attention, sliding_attention"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}},
     "weights quantised by 'gptq' are not read; give the model before that"),
    ("llama", {"num_hidden_layers": 2},
     "tensor model.layers.2.input_layernorm.weight has no counterpart in the model that its config describes"),
    ("llama", {"num_hidden_layers": 4},
     "tensor layers.3.attention.k.weight of the model has no counterpart in the weights"),
    ("llama", {"intermediate_size": 40},
     "tensor model.layers.0.mlp.gate_proj.weight is [48, 32], but its config says [40, 32]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "told"), REFUSALS, ids=[str(next(iter(c))) for _, c, _ in REFUSALS])
def test_what_cannot_be_expressed_is_refused_by_name(name, changes, told, tmp_path):
    there = change(folder(name, tmp_path / "hf"), **changes)
    with pytest.raises(CheckpointError) as error:
        import_folder(f"hf:{there}", tmp_path / "in")
    assert str(error.value) == f"hf:{there}: {told}"
    assert not (tmp_path / "in").exists()


def test_a_key_that_changes_the_function_and_is_not_understood(tmp_path, monkeypatch):
    """One that transformers reads and our table does not."""
    from sparsekit.interop import families

    there = change(folder("granite", tmp_path / "hf"))
    plain = families.FAMILIES["llama"]
    monkeypatch.setitem(families.FAMILIES, "granite", plain)
    with pytest.raises(CheckpointError, match=r"config key 'embedding_multiplier' \(3.0\) is not understood"):
        import_folder(str(there), tmp_path / "in")


def test_a_key_that_transformers_does_not_read_is_told(tmp_path):
    there = change(folder("llama", tmp_path / "hf"), n_ctx=64)
    found = import_folder(str(there), tmp_path / "in")
    assert found.remarks == [
        "config key 'n_ctx' left out: the LlamaConfig of transformers does not read it either",
        "without a tokenizer: holds no tokenizer.json",
    ]
    assert found.difference is not None
    assert found.difference.kind == "drawn at random"


def test_nothing_is_written_over(tmp_path):
    there = folder("llama", tmp_path / "hf")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/mine.txt").write_text("x")
    with pytest.raises(CheckpointError) as error:
        import_folder(str(there), tmp_path / "in")
    assert str(error.value) == f"{tmp_path}/in: exists already; give another folder, or remove it"


def test_what_is_no_folder(tmp_path):
    with pytest.raises(CheckpointError) as error:
        import_folder(f"hf:{tmp_path}/nothing", tmp_path / "in")
    assert str(error.value) == f"hf:{tmp_path}/nothing: no such folder"
    with pytest.raises(CheckpointError) as error:
        import_folder(f"hf:{tmp_path}", tmp_path / "in")
    told = "holds no config.json; give a Hugging Face folder, or the name of one"
    assert str(error.value) == f"hf:{tmp_path}: {told}"


def test_tokens_without_an_embedding_are_left_out(tmp_path, tokenizer):
    extra = {**tokenizer["added_tokens"][0], "id": VOCABULARY, "content": "<image>"}
    there = folder("llama", tmp_path / "hf", {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], extra]})
    found = import_folder(str(there), tmp_path / "in")
    assert found.remarks == ["tokens left out, as the model has no embedding for them: <image>"]
    read = resolve(tmp_path / "in").tokenizer()
    assert read.vocab_size == VOCABULARY
    assert read.eos_id == 0
    assert read.decode(read.encode("a good fortune")) == "a good fortune"
