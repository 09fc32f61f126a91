"""The families of Hugging Face models that a spec can say: the spec of a config, and a table of their tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsekit.errors import CheckpointError
from sparsekit.interop.tables import OWN, Fused, Rule, Stacked, Table, rules

Spec = dict[str, Any]
Values = Mapping[str, Any]  # a Config, which remembers what was read

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}


# --- parts that families share


def refused(what: str, known: Any) -> CheckpointError:
    return CheckpointError(f"{what} has no counterpart in sparsekit; these have: {', '.join(known)}")


def activation(c: Values, key: str = "hidden_act") -> str:
    """The name of an activation of theirs among ours."""
    if c[key] not in ACTIVATIONS:
        raise refused(f"{key} {c[key]!r}", ACTIVATIONS)
    return ACTIVATIONS[c[key]]


def gated(c: Values, d_ff: str = "intermediate_size", bias: bool = False, key: str = "hidden_act") -> Spec:
    act = activation(c, key)
    sizes: Spec = {"d_ff": c[d_ff], **({"bias": True} if bias else {})}
    if act in GATED:
        return {"type": GATED[act], **sizes}
    return {"type": "gated", "activation": act, **sizes}


def rope(c: Values, which: str | None = None, partial: bool = False) -> Spec:
    """The position of ``rope_parameters``.

    Args:
        which: the kind of layers, where they differ.
        partial: the family turns a part of the channels; others do not read how large a part.
    """
    found = c["rope_parameters"]
    found = found[which] if which else found
    spec: Spec = {"type": "rope", "theta": float(found["rope_theta"])}
    fraction = float(found.get("partial_rotary_factor") or 1.0)
    if partial and fraction != 1.0:
        spec["fraction"] = fraction
    kind = found.get("rope_type", "default")
    if kind != "default":
        spec["scaling"] = rope_scaling(kind, found)
    return spec


def rope_scaling(kind: str, found: Mapping[str, Any]) -> Spec:
    known = ("linear", "llama3", "yarn")
    if kind not in known:
        raise refused(f"rope scaling {kind!r}", known)
    original = found.get("original_max_position_embeddings")
    if kind == "llama3":
        turns = {"low_turns": float(found["low_freq_factor"]), "high_turns": float(found["high_freq_factor"])}
        return {"type": "llama3", "factor": float(found["factor"]), "original_max_seq_len": original, **turns}
    if kind == "linear":
        return {"type": "linear", "factor": float(found["factor"])}
    factor = float(found["factor"])
    usual = 0.1 * math.log(factor) + 1.0
    stretch = found.get("attention_factor")
    odd = {"mscale", "mscale_all_dim"} & {key for key, value in found.items() if value}
    odd |= {"truncate"} if found.get("truncate") is False else set()
    odd |= {"attention_factor"} if stretch is not None and not math.isclose(stretch, usual) else set()
    if odd:
        raise CheckpointError(f"rope scaling 'yarn' with {', '.join(sorted(odd))} has no counterpart in sparsekit")
    betas = {"beta_fast": float(found.get("beta_fast") or 32), "beta_slow": float(found.get("beta_slow") or 1)}
    return {"type": "yarn", "factor": factor, "original_max_seq_len": original, **betas}


def heads(c: Values, **more: Any) -> Spec:
    """An attention; ``more`` beside heads and position, where it is anything."""
    n_heads = c["num_attention_heads"]
    n_kv = c.get("num_key_value_heads") or n_heads
    kind: Spec = {"type": "mha"} if n_kv == n_heads else {"type": "mqa"} if n_kv == 1 else {"type": "gqa"}
    kind |= {"n_heads": n_heads} | ({"n_kv_heads": n_kv} if kind["type"] == "gqa" else {})
    head_dim = c.get("head_dim")
    if head_dim and head_dim * n_heads != c["hidden_size"]:
        kind["head_dim"] = head_dim
    position = more.pop("position", None) or rope(c)
    spec = {**kind, "position": position, **{key: value for key, value in more.items() if value not in (None, False)}}
    return {**spec, "kernel": "auto"} if "softcap" in spec else spec  # which sdpa cannot do


def rmsnorm(c: Values, **more: Any) -> Spec:
    return {"type": "rmsnorm", "eps": float(c["rms_norm_eps"]), **more}


def layernorm(c: Values, key: str = "layer_norm_eps") -> Spec:
    return {"type": "layernorm", "eps": float(c[key])}


def model(c: Values, blocks: Spec | list[tuple[str, Spec]], **more: Any) -> Spec:
    """A whole model.

    Args:
        blocks: one for all layers, or (name, block) of each.
    """
    sizes = {"d_model": c["hidden_size"], "n_layers": c["num_hidden_layers"], "vocab_size": c["vocab_size"]}
    sizes["max_seq_len"] = c["max_position_embeddings"]
    if c["tie_word_embeddings"]:
        more["tie_embeddings"] = True
    return {**sizes, **(layered(blocks) if isinstance(blocks, list) else {"block": blocks}), **more}


def layered(layers: list[tuple[str, Spec]]) -> Spec:
    """``block``, or ``blocks`` with the shortest pattern that repeats."""
    names = [name for name, _ in layers]
    period = next(p for p in range(1, len(names) + 1) if all(n == names[i % p] for i, n in enumerate(names)))
    if period == 1:
        return {"block": layers[0][1]}
    return {"blocks": dict(layers), "pattern": names[:period]}


def by_layer(c: Values, kinds: Mapping[str, Spec]) -> list[tuple[str, Spec]]:
    """The block of each layer by ``layer_types``."""
    found = c["layer_types"]
    odd = next((kind for kind in found if kind not in kinds), None)
    if odd is not None:
        raise refused(f"layer type {odd!r}", kinds)
    return [(kind.removesuffix("_attention"), kinds[kind]) for kind in found]


def only(c: Values, key: str, value: Any) -> None:
    """Refuses every other value."""
    if c.get(key, value) != value:
        raise CheckpointError(f"{key} {c[key]!r} has no counterpart in sparsekit")


# --- families


def llama(c: Values) -> Spec:
    block = {"norm": rmsnorm(c), "attention": heads(c, bias=c["attention_bias"]), "ffn": gated(c, bias=c["mlp_bias"])}
    return model(c, block)


def mistral(c: Values) -> Spec:
    return model(c, {"norm": rmsnorm(c), "attention": heads(c, window=c["sliding_window"]), "ffn": gated(c)})


def qwen(c: Values, **more: Any) -> Spec:
    for key in ("use_sliding_window", "max_window_layers"):
        c.get(key)  # layer_types says it already
    window = {"full_attention": None, "sliding_attention": c["sliding_window"]}
    kinds = {
        kind: {"norm": rmsnorm(c), "attention": heads(c, window=tokens, **more), "ffn": gated(c)}
        for kind, tokens in window.items()
    }
    return model(c, by_layer(c, kinds))


def qwen2(c: Values) -> Spec:
    return qwen(c, bias="qkv")


def qwen3(c: Values) -> Spec:
    return qwen(c, bias=c["attention_bias"], qk_norm=rmsnorm(c))


def olmo2(c: Values) -> Spec:
    attention = heads(c, bias=c["attention_bias"], qk_norm=rmsnorm(c), qk_norm_over="projection")
    return model(c, {"residual": "output_norm", "norm": rmsnorm(c), "attention": attention, "ffn": gated(c)})


def gemma(c: Values, sliding: Spec, full: Spec, **more: Any) -> Spec:
    if c["use_bidirectional_attention"]:
        only(c, "use_bidirectional_attention", False)
    norm = rmsnorm(c, zero_centered=True)
    scale = c["query_pre_attn_scalar"]
    more |= {
        "bias": c["attention_bias"],
        "score_scale": scale**-0.5 if scale != c["head_dim"] else None,
        "softcap": c["attn_logit_softcapping"],
    }
    kinds = {
        kind: {
            "residual": "peri_norm", "norm": norm, "attention": heads(c, **own, **more),
            "ffn": gated(c, key="hidden_activation"),
        }
        for kind, own in (("sliding_attention", sliding), ("full_attention", full))
    }  # fmt: skip
    cap = c["final_logit_softcapping"]
    embedding = {"type": "token", "scale": c["hidden_size"] ** 0.5}
    return model(c, by_layer(c, kinds), embedding=embedding, **({"logit_softcap": cap} if cap else {}))


def gemma2(c: Values) -> Spec:
    return gemma(c, {"window": c["sliding_window"]}, {})


def gemma3(c: Values) -> Spec:
    sliding, full = ({"position": rope(c, kind)} for kind in ("sliding_attention", "full_attention"))
    qk_norm = rmsnorm(c, zero_centered=True)
    return gemma(c, {"window": c["sliding_window"], **sliding}, full, qk_norm=qk_norm)


def gpt2(c: Values) -> Spec:
    only(c, "scale_attn_weights", True)
    only(c, "scale_attn_by_inverse_layer_idx", False)
    only(c, "add_cross_attention", False)
    named = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    named |= {"max_position_embeddings": "n_positions"}
    c = Renamed(c, named)
    d_ff = c["n_inner"] or 4 * c["hidden_size"]
    block = {
        "norm": layernorm(c, "layer_norm_epsilon"), "attention": heads(c, position="none", bias=True),
        "ffn": {"type": "mlp", "d_ff": d_ff, "activation": activation(c, "activation_function"), "bias": True},
    }  # fmt: skip
    return model(c, block, embedding="token_and_position")


class Renamed(Mapping[str, Any]):
    """A config under the names that most families use."""

    def __init__(self, config: Values, names: Mapping[str, str]):
        self._config, self._names = config, names

    def __getitem__(self, key: str) -> Any:
        return self._config[self._names.get(key, key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


def gpt_neox(c: Values) -> Spec:
    residual = "parallel_two_norms" if c["use_parallel_residual"] else "pre_norm"
    ffn = {"type": "mlp", "d_ff": c["intermediate_size"], "activation": activation(c), "bias": True}
    attention = heads(c, position=rope(c, partial=True), bias=c["attention_bias"])
    return model(c, {"residual": residual, "norm": layernorm(c), "attention": attention, "ffn": ffn})


def phi3(c: Values) -> Spec:
    c.get("original_max_position_embeddings")  # of longrope alone
    attention = heads(c, position=rope(c, partial=True), window=c["sliding_window"])
    return model(c, {"norm": rmsnorm(c), "attention": attention, "ffn": gated(c)})


def stablelm(c: Values) -> Spec:
    only(c, "qk_layernorm", False)
    residual = "parallel" if c["use_parallel_residual"] else "pre_norm"
    attention = heads(c, position=rope(c, partial=True), bias="qkv" if c["use_qkv_bias"] else False)
    return model(c, {"residual": residual, "norm": layernorm(c), "attention": attention, "ffn": gated(c)})


def granite(c: Values) -> Spec:
    width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    scale = float(c["attention_multiplier"])
    own = None if math.isclose(scale, width**-0.5, rel_tol=1e-12) else scale
    block: Spec = {
        "residual": {"type": "pre_norm", "scale": float(c["residual_multiplier"])}, "norm": rmsnorm(c),
        "attention": heads(c, bias=c["attention_bias"], score_scale=own), "ffn": gated(c, bias=c["mlp_bias"]),
    }  # fmt: skip
    embedding = {"type": "token", "scale": float(c["embedding_multiplier"])}
    return model(c, block, embedding=embedding, logit_scale=1.0 / float(c["logits_scaling"]))


def granite_of_minicpm(raw: Mapping[str, Any]) -> dict[str, Any]:
    """MiniCPM is Granite under other names: multipliers of embeddings, branches and logits."""
    n_layers, width = raw["num_hidden_layers"], raw["hidden_size"]
    own = {"scale_emb", "scale_depth", "dim_model_base", "auto_map", "model_type"}
    return {
        "tie_word_embeddings": True,
        **{key: value for key, value in raw.items() if key not in own},
        "embedding_multiplier": raw.get("scale_emb", 1),
        "residual_multiplier": raw.get("scale_depth", 1) / math.sqrt(n_layers),
        "logits_scaling": width / raw.get("dim_model_base", 1),
        "attention_multiplier": (width // raw["num_attention_heads"]) ** -0.5,
    }


def moe(c: Values, d_ff: str, n_experts: str, renormalize: bool, **router: Any) -> Spec:
    router = {"type": "top_k", "k": c["num_experts_per_tok"], "load_balance": c["router_aux_loss_coef"], **router}
    router |= {"z_loss": 0.0} | ({"renormalize": True} if renormalize else {})
    return {"type": "moe", "n_experts": c[n_experts], "router": router, "expert": gated(c, d_ff)}


def mixtral(c: Values) -> Spec:
    ffn = moe(c, "intermediate_size", "num_local_experts", True, jitter=float(c["router_jitter_noise"]))
    return model(c, {"norm": rmsnorm(c), "attention": heads(c, window=c["sliding_window"]), "ffn": ffn})


def olmoe(c: Values) -> Spec:
    only(c, "clip_qkv", None)
    ffn = moe(c, "intermediate_size", "num_experts", c["norm_topk_prob"])
    attention = heads(c, bias=c["attention_bias"], qk_norm=rmsnorm(c), qk_norm_over="projection")
    return model(c, {"norm": rmsnorm(c), "attention": attention, "ffn": ffn})


def qwen3_moe(c: Values) -> Spec:
    window = c["sliding_window"] if c["use_sliding_window"] else None
    attention = heads(c, bias=c["attention_bias"], qk_norm=rmsnorm(c), window=window)
    experts = moe(c, "moe_intermediate_size", "num_local_experts", c["norm_topk_prob"])
    kinds = {
        name: {"norm": rmsnorm(c), "attention": attention, "ffn": ffn}
        for name, ffn in (("dense", gated(c)), ("moe", experts))
    }
    dense, step = set(c["mlp_only_layers"] or ()), c["decoder_sparse_step"]
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(c["num_hidden_layers"])]
    return model(c, [("moe", kinds["moe"]) if one else ("dense", kinds["dense"]) for one in sparse])


# --- tables

TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
ATTENTION = {f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
QK_NORM = {f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
GATES = {f"ffn.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
BEFORE = {"residual.attention_norm": "input_layernorm", "residual.ffn_norm": "post_attention_layernorm"}
AFTER = {"residual.attention_norm": "post_attention_layernorm", "residual.ffn_norm": "post_feedforward_layernorm"}
AROUND = {
    "residual.attention_norm.0": "input_layernorm", "residual.attention_norm.1": "post_attention_layernorm",
    "residual.ffn_norm.0": "pre_feedforward_layernorm", "residual.ffn_norm.1": "post_feedforward_layernorm",
}  # fmt: skip
QKV, GATE_UP = ("attention.q", "attention.k", "attention.v"), ("ffn.gate", "ffn.up")
EXPERTS = [  # by expert, as released; then in one tensor, as transformers holds them
    *(
        Rule((f"ffn.experts.{part}",), f"mlp.experts.{{expert}}.{part}_proj", Stacked())
        for part in ("gate", "up", "down")
    ),
    Rule(("ffn.experts.gate.weight", "ffn.experts.up.weight"), "mlp.experts.gate_up_proj", Fused(), exact=True),
    Rule(("ffn.experts.down.weight",), "mlp.experts.down_proj", exact=True),
    *rules({"ffn.router.gate": "mlp.gate"}),
]  # fmt: skip
MIXTRAL = [
    *(
        Rule((f"ffn.experts.{part}",), f"block_sparse_moe.experts.{{expert}}.{name}", Stacked())
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ),
    *rules({"ffn.router.gate": "block_sparse_moe.gate"}),
]


def like_llama(*parts: dict[str, str] | list[Rule]) -> Table:
    layer = [rule for part in parts for rule in (rules(part) if isinstance(part, dict) else part)]
    return Table("model.", "model.layers.", rules(TOP), layer)


LLAMA = like_llama(ATTENTION, QK_NORM, GATES, BEFORE, {"residual.norm": "input_layernorm"})


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        spec: the model spec of a config.
        table: of its tensors.
        head_dim: it reads one, also where its config does not list it.
        stands_in: the model_type under which transformers itself runs it, and the config for that.
        defaults: of every field of its config, where it is no model of transformers.
    """

    spec: Callable[[Values], Spec]
    table: Table
    head_dim: bool = True
    stands_in: tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]] | None = None
    defaults: Mapping[str, Any] | None = None


OURS = "sparsekit"
FAMILIES: dict[str, Family] = {
    OURS: Family(lambda c: dict(c["spec"]), OWN),
    "llama": Family(llama, LLAMA),
    "mistral": Family(mistral, LLAMA),
    "qwen2": Family(qwen2, LLAMA),
    "qwen3": Family(qwen3, LLAMA),
    "phi3": Family(
        phi3,
        like_llama(
            [Rule(QKV, "self_attn.qkv_proj", Fused()), Rule(GATE_UP, "mlp.gate_up_proj", Fused())],
            {"attention.o": "self_attn.o_proj", "ffn.down": "mlp.down_proj", **BEFORE},
        ),
    ),
    "stablelm": Family(stablelm, LLAMA, head_dim=False),
    "granite": Family(granite, LLAMA),
    "minicpm": Family(granite, LLAMA, stands_in=("granite", granite_of_minicpm)),
    "olmo2": Family(olmo2, like_llama(ATTENTION, QK_NORM, GATES, AFTER)),
    "gemma2": Family(gemma2, like_llama(ATTENTION, GATES, AROUND)),
    "gemma3_text": Family(gemma3, like_llama(ATTENTION, QK_NORM, GATES, AROUND)),
    "gpt2": Family(
        gpt2,
        Table(
            "transformer.", "transformer.h.",
            [
                Rule(("embedding",), "transformer.wte"),
                Rule(("embedding.positions_SD",), "transformer.wpe.weight", exact=True),
                *rules({"norm": "transformer.ln_f", "head": "lm_head"}),
            ],
            [
                Rule(QKV, "attn.c_attn", Fused(transposed=True)),
                Rule(("attention.o",), "attn.c_proj", Fused(transposed=True)),
                Rule(("ffn.up",), "mlp.c_fc", Fused(transposed=True)),
                Rule(("ffn.down",), "mlp.c_proj", Fused(transposed=True)),
                *rules({"residual.attention_norm": "ln_1", "residual.ffn_norm": "ln_2"}),
            ],
        ),
        head_dim=False,
    ),
    "gpt_neox": Family(
        gpt_neox,
        Table(
            "gpt_neox.", "gpt_neox.layers.",
            rules({"embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out"}),
            [
                Rule(QKV, "attention.query_key_value", Fused(interleaved=True)),
                *rules({"attention.o": "attention.dense", "ffn.up": "mlp.dense_h_to_4h",
                        "ffn.down": "mlp.dense_4h_to_h", **BEFORE}),
            ],
        ),
        head_dim=False,
    ),
    "mixtral": Family(mixtral, like_llama(ATTENTION, BEFORE, MIXTRAL, EXPERTS)),
    "olmoe": Family(olmoe, like_llama(ATTENTION, QK_NORM, BEFORE, EXPERTS), head_dim=False),
    "qwen3_moe": Family(qwen3_moe, like_llama(ATTENTION, QK_NORM, BEFORE, GATES, EXPERTS)),
}  # fmt: skip
