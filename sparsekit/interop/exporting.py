"""From a model of ours to a Hugging Face folder, wherever one of the families says the same function."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.data.tokenizers import ByteTokenizer, Tokenizer
from sparsekit.errors import CheckpointError, SparsekitError, did_you_mean
from sparsekit.interop.config import transformers
from sparsekit.interop.families import ACTIVATIONS, FAMILIES, GATED, OURS
from sparsekit.interop.folders import BESIDE, GENERATION, TOKENIZER, TOKENIZER_CONFIG, save_sharded
from sparsekit.interop.importing import demand_free, load_original, spec_of
from sparsekit.interop.parity import Difference, compared, logits_of, some_ids
from sparsekit.interop.tables import plan, to_theirs
from sparsekit.model.build import as_model_spec
from sparsekit.model.targets import Target, load_model, resolve
from sparsekit.model.weights import WEIGHTS, stored
from sparsekit.spec.merge import differences
from sparsekit.spec.model import BlockSpec, ModelSpec

THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs not in ("swish", "gelu_new")}
ACTIVATION_OF = {ours: act for act, ours in GATED.items()}
# which families are tried, those that most programs read first
ORDER = [name for name, family in FAMILIES.items() if family.stands_in is None and name != OURS]


@dataclass(frozen=True)
class Exported:
    """What went out: where, as what, how many parameters by dtype, and how far the logits are from ours."""

    out: Path
    family: str
    parameters: dict[str, int]
    difference: Difference | None
    remarks: list[str] = field(default_factory=list)


def export(target: str | Path, out: str | Path, *, family: str | None = None, check: bool = True) -> Exported:
    """Writes a Hugging Face folder: config.json, weights, the tokenizer, and how to generate.

    A spec that no family expresses goes out whole, in a config.json that ``AutoModelForCausalLM`` reads once
    ``sparsekit.interop.huggingface`` is imported.

    Args:
        target: a run folder, a checkpoint folder, or a spec (fresh weights).
        out: a folder that does not exist yet.
        family: a model_type; by default the first that expresses the spec.

    Raises:
        CheckpointError: ``family`` does not express the spec, or the logits differ.
    """
    out = Path(out)
    demand_free(out)
    found = resolve(target, weights=True)
    spec = found.spec.model
    try:
        name, config = family_for(spec, family)
        remarks = []
    except CheckpointError as error:
        if family is not None:
            raise
        name, config = OURS, _own_config(spec)
        remarks = [f"{error}; import sparsekit.interop.huggingface before loading it"]
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model = load_model(found, dtype=_dtype(found))
        tensors = dict(model.state_dict())
        steps = plan(FAMILIES[name].table, spec, {key: list(t.shape) for key, t in tensors.items()})
        counts = save_sharded(to_theirs(steps, tensors.__getitem__, spec), temporary)
        tokenizer, more = _save_tokenizer(found, temporary, spec.max_seq_len)
        config.update(_marks(temporary, tokenizer))
        config.architectures = [_architecture(name)]
        config.dtype = str(_dtype(found)).removeprefix("torch.")
        config.save_pretrained(temporary)
        if not (temporary / GENERATION).exists():
            _save_generation(temporary, tokenizer)
        difference = None
        if check:
            ids, kind = some_ids(tokenizer, spec.vocab_size, spec.max_seq_len)
            ours = logits_of(model.float(), ids)
            difference = compared(ours, logits_of(load_original(temporary, config), ids), kind)
            difference.demand(str(target))
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(out, name, counts, difference, remarks + more)


def _own_config(spec: ModelSpec) -> Any:
    from sparsekit.interop.huggingface import SparsekitConfig

    return SparsekitConfig(spec=spec.model_dump(mode="json"))


def _marks(folder: Path, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of tokens that begin, end and fill: as the folder it was imported from had them, or the tokenizer's."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if (folder / GENERATION).exists():
        kept = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
        return {name: kept.get(name) for name in names}
    ends = None if tokenizer is None else tokenizer.eos_id
    return {name: ends if name == "eos_token_id" else None for name in names}


def _dtype(target: Target) -> Any:
    """Of the stored weights: the widest of them."""
    import torch

    if target.checkpoint is None:
        return torch.float32
    from sparsekit.model.weights import MODEL_PREFIX

    kinds = [dtype for name, (_, dtype) in stored(target.checkpoint / WEIGHTS).items() if name.startswith(MODEL_PREFIX)]
    widest = kinds[0]
    for dtype in kinds:
        widest = torch.promote_types(widest, dtype)
    return widest


def _architecture(model_type: str) -> str:
    if model_type == OURS:
        return "SparsekitForCausalLM"
    mapping = transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = mapping[model_type]
    return str(found if isinstance(found, str) else found[-1])


# --- which family


def family_for(spec: ModelSpec, wanted: str | None = None) -> tuple[str, Any]:
    """The first family whose config describes a spec, and that config.

    Whether it does is seen by reading the config back: it must give the same function.

    Raises:
        CheckpointError: none does; the nearest is named, and what it lacks.
    """
    if wanted is not None and wanted not in ORDER:
        near = did_you_mean(wanted, ORDER)
        raise SparsekitError(f"--family {wanted}: no such family{near}; families: {', '.join(ORDER)}")
    mine = function_of(spec)
    best: tuple[int, str, str] | None = None
    for name in [wanted] if wanted else ORDER:
        try:
            config = _config(spec, name)
            back, _ = spec_of(config, FAMILIES[name])
            gaps = differences(function_of(as_model_spec(back)), mine)
        except (SparsekitError, KeyError, TypeError) as error:
            gaps = {"": (str(error), "")}
            gaps |= {str(i): ("", "") for i in range(99)}  # further than any that can be compared
            config = None
        if not gaps:
            return name, config
        path, (theirs, ours) = next(iter(gaps.items()))
        told = f"{path} {json.dumps(theirs)} where the model has {json.dumps(ours)}" if path else str(theirs)
        if best is None or len(gaps) < best[0]:
            best = len(gaps), name, told
    assert best is not None
    _, name, told = best
    if wanted:
        raise CheckpointError(f"{name} does not express this model: it has {told}")
    raise CheckpointError(f"no Hugging Face family expresses this model (the nearest, {name}, has {told})")


def _config(spec: ModelSpec, name: str) -> Any:
    cls = transformers().models.auto.configuration_auto.CONFIG_MAPPING[name]
    try:
        known = set(cls().to_dict())
        if FAMILIES[name].head_dim:
            known.add("head_dim")
        given = {key: value for key, value in values_of(spec, name).items() if key in known}
        return cls(**given)
    except SparsekitError:
        raise
    except Exception as error:  # its validation raises several kinds
        raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from None


def function_of(spec: ModelSpec) -> dict[str, Any]:
    """What a spec computes when it does not train: two that are equal here are one function of their weights."""
    whole = spec.model_dump(mode="json", include={
        "d_model", "vocab_size", "max_seq_len", "embedding", "linear", "tie_embeddings", "logit_scale", "logit_softcap"
    })  # fmt: skip
    layers = [_function_of_block(block, spec.d_model) for block in spec.per_layer]
    norm = spec.last_norm.dump()
    return {**whole, "final_norm": norm, **{f"layers.{i}": layer for i, layer in enumerate(layers)}}


def _function_of_block(block: BlockSpec, d_model: int) -> dict[str, Any]:
    attention = block.attention.dump()
    heads = attention.get("n_heads")
    if attention["type"] in ("mha", "gqa", "mqa"):
        kv = {"mha": heads, "mqa": 1}.get(attention["type"], attention.get("n_kv_heads"))
        head_dim = attention["head_dim"] or d_model // int(heads or 1)
        scale = attention["score_scale"] or head_dim**-0.5
        attention |= {"type": "heads", "n_kv_heads": kv, "head_dim": head_dim, "score_scale": round(scale, 12)}
    attention.pop("kernel", None)
    found = {"residual": block.residual.dump(), "norm": block.norm.dump(), "attention": attention}
    return {**found, "ffn": _function_of_ffn(block.ffn.dump())}


def _function_of_ffn(ffn: dict[str, Any]) -> dict[str, Any]:
    if ffn["type"] in ACTIVATION_OF:
        return {**ffn, "type": "gated", "activation": {"type": ACTIVATION_OF[ffn["type"]]}}
    if ffn["type"] == "moe":
        trained = ("load_balance", "z_loss", "jitter")
        router = {key: value for key, value in ffn["router"].items() if key not in trained}
        expert = _function_of_ffn(ffn["expert"])
        return {**{k: v for k, v in ffn.items() if k != "dispatch"}, "router": router, "expert": expert}
    return ffn


# --- the config of a spec


def values_of(spec: ModelSpec, name: str) -> dict[str, Any]:
    """The fields of any family's config that a spec gives; those that a family does not know are left out later."""
    layers = spec.per_layer
    first = layers[0]
    attention = first.attention.dump()
    heads, width = int(attention.get("n_heads") or 1), spec.d_model
    kv = {"mha": heads, "mqa": 1}.get(first.attention.type, attention.get("n_kv_heads", heads))
    head_dim = int(attention.get("head_dim") or width // heads)
    norm, residual, embedding = first.norm.dump(), first.residual.dump(), spec.embedding.dump()
    bias = attention.get("bias", False)
    scale = attention.get("score_scale") or head_dim**-0.5
    windows = [block.attention.dump().get("window") for block in layers]
    window = next((tokens for tokens in windows if tokens), None)
    given: dict[str, Any] = {
        "vocab_size": spec.vocab_size, "hidden_size": width, "num_hidden_layers": spec.n_layers,
        "max_position_embeddings": spec.max_seq_len, "tie_word_embeddings": spec.tie_embeddings,
        "num_attention_heads": heads, "num_key_value_heads": kv,
        "rms_norm_eps": norm.get("eps"), "layer_norm_eps": norm.get("eps"), "layer_norm_epsilon": norm.get("eps"),
        "attention_bias": bias is True, "use_qkv_bias": bias == "qkv", "clip_qkv": None, "qk_layernorm": False,
        "use_parallel_residual": residual["type"] in ("parallel", "parallel_two_norms"),
        "rope_parameters": _rope(attention.get("position", {}), name),
        "sliding_window": window, "use_sliding_window": window is not None,
        "layer_types": ["sliding_attention" if tokens else "full_attention" for tokens in windows],
        "attn_logit_softcapping": attention.get("softcap"), "final_logit_softcapping": spec.logit_softcap,
        "query_pre_attn_scalar": _whole(scale**-2), "attention_multiplier": scale,
        "embedding_multiplier": embedding.get("scale", 1.0), "residual_multiplier": residual.get("scale", 1.0),
        "logits_scaling": 1.0 / spec.logit_scale,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        **_ffn(layers),
    }  # fmt: skip
    if head_dim * heads != width or name.startswith(("gemma", "qwen3")):
        given["head_dim"] = head_dim  # which is not the quotient, or these take as 256 or 128
    if name == "gemma3_text":
        kinds = {"sliding_attention": True, "full_attention": False}
        positions = {
            kind: next(
                (b.attention.dump()["position"] for b, w in zip(layers, windows, strict=True) if bool(w) is slides),
                None,
            )
            for kind, slides in kinds.items()
        }
        given["rope_parameters"] = {kind: _rope(position or {}, name) for kind, position in positions.items()}
    if name == "gpt2":
        given |= {"n_embd": width, "n_layer": spec.n_layers, "n_head": heads, "n_positions": spec.max_seq_len}
        given |= {"n_inner": given["intermediate_size"]}
        given["activation_function"] = {"gelu_pytorch_tanh": "gelu_new"}.get(given["hidden_act"], given["hidden_act"])
    return given


def _whole(number: float) -> float | int:
    """An integer, where rounding alone keeps it from being one."""
    return round(number) if abs(number - round(number)) < 1e-6 * number else number


def _rope(position: Mapping[str, Any], name: str) -> dict[str, Any]:
    if position.get("type") != "rope":
        return {"rope_type": "default", "rope_theta": 10000.0}
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": position["theta"]}
    if position["fraction"] != 1.0 or name in ("stablelm", "gpt_neox"):  # which take it as 0.25
        found["partial_rotary_factor"] = position["fraction"]
    scaling = position["scaling"]
    if scaling is None:
        return found
    found |= {"rope_type": scaling["type"], "factor": scaling["factor"]}
    if "original_max_seq_len" in scaling:
        found["original_max_position_embeddings"] = scaling["original_max_seq_len"]
    names = {"low_turns": "low_freq_factor", "high_turns": "high_freq_factor"}
    return found | {
        names.get(key, key): scaling[key]
        for key in ("low_turns", "high_turns", "beta_fast", "beta_slow")
        if key in scaling
    }


def _ffn(layers: Sequence[BlockSpec]) -> dict[str, Any]:
    """Of dense layers and mixtures."""
    found: dict[str, Any] = {"hidden_act": "silu", "intermediate_size": 1}
    dumps = [block.ffn.dump() for block in layers]
    dense = next((ffn for ffn in dumps if ffn["type"] != "moe"), None)
    mixture = next((ffn for ffn in dumps if ffn["type"] == "moe"), None)
    shown = dense or (mixture or {})["expert"]
    act = ACTIVATION_OF.get(shown["type"]) or (shown.get("activation") or {}).get("type", "silu")
    found["hidden_act"] = found["hidden_activation"] = THEIR_ACTIVATIONS.get(act, act)
    found["intermediate_size"] = shown.get("d_ff", 1)
    found["mlp_bias"] = bool(shown.get("bias", False))
    if mixture is not None:
        router = mixture["router"]
        found |= {
            "num_experts": mixture["n_experts"], "num_local_experts": mixture["n_experts"],
            "num_experts_per_tok": router.get("k", 1), "norm_topk_prob": router.get("renormalize", False),
            "moe_intermediate_size": mixture["expert"].get("d_ff", 1), "decoder_sparse_step": 1,
            "mlp_only_layers": [index for index, ffn in enumerate(dumps) if ffn["type"] != "moe"],
            "router_aux_loss_coef": router.get("load_balance", 0.0), "router_jitter_noise": router.get("jitter", 0.0),
        }  # fmt: skip
    return found


# --- the tokenizer


def _save_tokenizer(target: Target, folder: Path, length: int) -> tuple[Tokenizer | None, list[str]]:
    choice = target.spec.data.tokenizer
    if target.tokenizer_file is None and choice.type != "byte":
        return None, ["without a tokenizer: the model has none yet"]
    tokenizer: Tokenizer = target.tokenizer()
    if isinstance(tokenizer, ByteTokenizer):
        state, eos = byte_level(), END
    else:
        state = json.loads(Path(str(target.tokenizer_file)).read_text(encoding="utf-8"))
        eos = str(getattr(choice.params, "eos_token", END))
    (folder / TOKENIZER).write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    for name in BESIDE:
        if target.checkpoint is not None and (target.checkpoint / name).exists():
            shutil.copyfile(target.checkpoint / name, folder / name)
    if not (folder / TOKENIZER_CONFIG).exists():
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "model_max_length": length}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return tokenizer, []


END = "<|endoftext|>"


def byte_level() -> dict[str, Any]:
    """The byte tokenizer as a file of the library tokenizers: 256 bytes, each a token of its own, and an end."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # which the byte alphabet leaves as they are
    moved = [byte for byte in range(256) if byte not in printable]
    signs = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(moved)}
    backend = Backend(models.BPE(vocab={sign: byte for byte, sign in signs.items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    return dict(json.loads(backend.to_str()))


def _save_generation(folder: Path, tokenizer: Tokenizer | None) -> None:
    ends = {} if tokenizer is None else {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    transformers().GenerationConfig(do_sample=True, temperature=0.8, **ends).save_pretrained(folder)
