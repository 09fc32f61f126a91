"""OLMo's training checkpoints: a config.yaml and a model.pt, as that code and forks of it write them.

Read are the dense model of allenai/OLMo, the mixtures of OLMoE (megablocks), and those of *When Does Sparsity Mitigate
the Curse of Depth in LLMs* (arXiv 2603.15389), whose names are OLMo-core's. None of them is a model of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError, SparsekitError
from sparsekit.interop.families import Family, Spec, Values, only, refused
from sparsekit.interop.tables import Fused, Rule, Shape, Table, rules
from sparsekit.spec.model import ModelSpec

CONFIG = "config.yaml"
MODEL_TYPE = "olmo_training"
# what a config means that does not say it
DEFAULTS: dict[str, Any] = {
    "d_model": 768, "n_heads": 12, "n_kv_heads": None, "multi_query_attention": None, "n_layers": 12, "mlp_ratio": 4,
    "mlp_hidden_size": None, "activation_type": "swiglu", "block_type": "sequential", "block_group_size": 1,
    "alibi": False, "alibi_bias_max": 8.0, "rope": False, "rope_theta": 10000, "clip_qkv": None,
    "attention_layer_norm": False, "attention_layer_norm_with_affine": True, "embedding_layer_norm": False,
    "layer_norm_type": "default", "layer_norm_with_affine": True, "layer_norm_eps": 1e-5, "include_bias": True,
    "bias_for_layer_norm": None, "norm_after": False, "peri_norm": False, "mix_norm_factor": None,
    "layer_norm_scaling": False, "attn_minus": False, "mindgap": False, "max_sequence_length": 1024,
    "scale_logits": False, "vocab_size": 50257, "embedding_size": 50304, "weight_tying": True, "moe_config": None,
    "moe_num_experts": 8, "moe_top_k": 2, "moe_shared_expert": False, "moe_interleave": False, "moe_dropless": True,
    "moe_normalize_expert_weights": None, "moe_expert_choice": False, "moe_loss_weight": 0.1, "moe_zloss_weight": None,
}  # fmt: skip
MOE_KEYS = tuple(key for key in DEFAULTS if key.startswith("moe_"))
# what is of training, or of how fast the same is worked out
TRAINING = {
    "rope_full_precision", "flash_attention", "attention_type", "init_device", "init_fn", "init_std",
    "init_cutoff_factor", "precision", "scale_emb_init", "emb_init_std", "moe_mlp_impl", "moe_lbl_in_fp32",
    "moe_log_expert_assignment", "moe_weight_parallelism", "moe_capacity_factor",
    "response_residual_dropout",
}  # fmt: skip
MOE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 384, "router_type": "linear", "num_experts": 32, "top_k": 1, "jitter_eps": None,
    "normalize_expert_weights": None, "uniform_expert_assignment": False, "bias_gamma": None,
    "gating_function": "softmax", "lb_loss_weight": None, "z_loss_weight": None, "shared_mlp": None,
    "moe_type": "dropless_moe",
}  # fmt: skip
MOE_TRAINING = {"capacity_factor", "scale_loss_by_num_layers", "lb_loss_granularity"}


def is_training(folder: Path) -> bool:
    """Whether it is such a folder, and not one of transformers'."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def read_config(folder: Path) -> dict[str, Any]:
    """The model's part of a folder's config.yaml, every default filled in.

    Raises:
        CheckpointError: it is damaged, or the weights lie in parts.
    """
    path = folder / CONFIG
    try:
        import yaml
    except ImportError:
        raise SparsekitError(f"{path}: needs PyYAML: pip install 'sparsekit[hf]'") from None
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: is damaged ({' '.join(str(error).split())})") from None
    model = raw.get("model", raw) if isinstance(raw, dict) else None
    if not isinstance(model, dict) or "d_model" not in model:
        raise CheckpointError(f"{path}: describes no model (it has no 'd_model')")
    if not (folder / "model.pt").exists() and any(folder.rglob("*.distcp")):
        raise CheckpointError(f"{folder}: is sharded (.distcp), and opening those runs code; unshard it to model.pt")
    return {"model_type": MODEL_TYPE, **DEFAULTS, **{key: v for key, v in model.items() if key not in TRAINING}}


def olmo(c: Values) -> Spec:
    """The model spec of a config."""
    for key in ("block_group_size", "clip_qkv", "embedding_layer_norm", "attn_minus", "mindgap"):
        only(c, key, DEFAULTS[key])
    for key in ("vocab_size", "mlp_ratio", "include_bias", "rope_theta", "alibi_bias_max", *MOE_KEYS):
        c.get(key)  # of which others may make nothing
    known = ("sequential", "llama", "moe")
    if c["block_type"] not in known:
        raise refused(f"block_type {c['block_type']!r}", known)
    d_model, n_layers = c["d_model"], c["n_layers"]
    norm = _norm(c, bool(c["layer_norm_with_affine"]))
    block = {"norm": norm, "attention": _attention(c), "ffn": _ffn(c)}
    sizes = {"d_model": d_model, "n_layers": n_layers, "vocab_size": c["embedding_size"] or c["vocab_size"]}
    spec: Spec = {**sizes, "max_seq_len": c["max_sequence_length"], "block": {"residual": _residual(c), **block}}
    n_after = int(n_layers * (c["mix_norm_factor"] or 0))
    if n_after:
        spec["layers"] = {f"0:{n_after}": {"residual": "output_norm"}}
    if not (c["rope"] or c["alibi"]):
        spec["embedding"] = "token_and_position"
    if c["weight_tying"]:
        spec["tie_embeddings"] = True
    if c["scale_logits"]:
        spec["logit_scale"] = d_model**-0.5
    return spec


def _norm(c: Values, affine: bool) -> Spec:
    kinds = {"default": "layernorm", "low_precision": "layernorm", "amd_compatible": "layernorm", "rms": "rmsnorm"}
    if c["layer_norm_type"] not in kinds:
        raise refused(f"layer_norm_type {c['layer_norm_type']!r}", kinds)
    norm = {"type": kinds[c["layer_norm_type"]], "eps": float(c["layer_norm_eps"]), "affine": affine}
    wanted = c["bias_for_layer_norm"]
    bias = affine and bool(c["include_bias"] if wanted is None else wanted)
    if norm["type"] == "layernorm":
        return {**norm, "bias": bias}
    if bias:
        raise CheckpointError("layer_norm_type 'rms' with bias_for_layer_norm has no counterpart in sparsekit")
    return norm


def _residual(c: Values) -> str:
    """Where the norms sit; as released, layer_norm_scaling of a mixture multiplies by its top_k besides."""
    schemes = {"norm_after": "output_norm", "peri_norm": "peri_norm", "layer_norm_scaling": "layernorm_scaling"}
    given = [key for key in (*schemes, "mix_norm_factor") if c[key] not in (None, False)]
    if len(given) > 1:
        raise CheckpointError(f"{' with '.join(given)} has no counterpart in sparsekit")
    if given == ["layer_norm_scaling"] and c["block_type"] == "moe":
        raise CheckpointError("layer_norm_scaling with block_type 'moe' has no counterpart in sparsekit")
    return schemes.get(given[0], "pre_norm") if given else "pre_norm"


def _attention(c: Values) -> Spec:
    n_heads = c["n_heads"]
    n_kv = c["n_kv_heads"] or (1 if c["multi_query_attention"] else n_heads)
    spec: Spec = {"type": "mha", "n_heads": n_heads} if n_kv == n_heads else {"type": "gqa", "n_heads": n_heads}
    spec |= {} if n_kv == n_heads else {"n_kv_heads": n_kv}
    if c["alibi"]:
        only(c, "alibi_bias_max", 8.0)
        if n_heads & (n_heads - 1):
            raise CheckpointError(f"alibi with n_heads {n_heads}, no power of two, has no counterpart in sparsekit")
    rope = {"type": "rope", "theta": float(c["rope_theta"])}
    spec["position"] = "alibi" if c["alibi"] else rope if c["rope"] else "none"
    affine = bool(c["attention_layer_norm_with_affine"])
    if c["attention_layer_norm"]:
        spec |= {"qk_norm": _norm(c, affine), "qk_norm_over": "projection"}
    return spec | ({"bias": True} if c["include_bias"] else {})


def _ffn(c: Values) -> Spec:
    act, bias = c["activation_type"], {"bias": True} if c["include_bias"] else {}
    hidden = c["mlp_hidden_size"] or c["mlp_ratio"] * c["d_model"]
    if act not in ("swiglu", "gelu", "relu"):
        raise refused(f"activation_type {act!r}", ("swiglu", "gelu", "relu"))
    if c["block_type"] == "moe":
        return _mixture(c) if c["moe_config"] else _megablocks(c, hidden // 2)
    if act == "swiglu":
        return {"type": "swiglu", "d_ff": hidden // 2, **bias}
    return {"type": "mlp", "d_ff": hidden, "activation": act, **bias}


def _mixture(c: Values) -> Spec:
    """Of the fork: a shared expert's output counts as much as each routed one's."""
    moe = {**MOE_DEFAULTS, **c["moe_config"]}
    odd = next((key for key in moe if key not in MOE_DEFAULTS and key not in MOE_TRAINING), None)
    if odd is not None:
        raise CheckpointError(f"config key 'moe_config.{odd}' is not understood")
    for key in ("router_type", "uniform_expert_assignment", "moe_type"):  # another type drops tokens
        only({f"moe_config.{key}": moe[key]}, f"moe_config.{key}", MOE_DEFAULTS[key])
    router = {
        "type": "top_k", "k": moe["top_k"], "score": moe["gating_function"], "jitter": moe["jitter_eps"] or 0.0,
        "load_balance": moe["lb_loss_weight"] or 0.0, "z_loss": moe["z_loss_weight"] or 0.0,
        "bias_rate": moe["bias_gamma"] or 0.0, **_renormalized(moe["normalize_expert_weights"]),
    }  # fmt: skip
    expert = {"type": "swiglu", "d_ff": moe["hidden_size"]}
    spec: Spec = {"type": "moe", "n_experts": moe["num_experts"], "router": router, "expert": expert}
    if moe["shared_mlp"]:
        shared: Spec = {"type": "swiglu", "d_ff": moe["shared_mlp"]["hidden_size"]}
        shared |= {"bias": True} if c["include_bias"] else {}
        spec |= {"shared_expert": shared, "shared_combine": "mean"}
    return spec


def _megablocks(c: Values, d_ff: int) -> Spec:
    for key, value in (("moe_interleave", False), ("moe_dropless", True), ("moe_expert_choice", False)):
        only(c, key, value)
    only(c, "activation_type", "swiglu")
    losses = {"load_balance": c["moe_loss_weight"] or 0.0, "z_loss": c["moe_zloss_weight"] or 0.0}
    router = {"type": "top_k", "k": c["moe_top_k"], **losses, **_renormalized(c["moe_normalize_expert_weights"])}
    expert: Spec = {"type": "swiglu", "d_ff": d_ff}
    spec = {"type": "moe", "n_experts": c["moe_num_experts"], "router": router, "expert": expert}
    return {**spec, **({"shared_expert": expert} if c["moe_shared_expert"] else {})}


def _renormalized(norm: Any) -> Spec:
    if norm not in (None, 1):
        raise CheckpointError(f"normalize_expert_weights {norm!r} has no counterpart in sparsekit; 1 has")
    return {"renormalize": norm is not None}


# --- tensors


class Rows:
    """Experts whose matrices lie one below the other, [experts * d_ff, d_model]."""

    def __init__(self, *, transposed: bool = False):
        self.transposed = transposed

    def ours(self, theirs: list[Tensor], shapes: list[Shape], spec: ModelSpec) -> list[Tensor]:
        whole = theirs[0].unflatten(0, (shapes[0][0], -1))
        return [whole.transpose(1, 2) if self.transposed else whole]

    def theirs(self, ours: list[Tensor], spec: ModelSpec) -> list[Tensor]:
        whole = ours[0].transpose(1, 2) if self.transposed else ours[0]
        return [whole.flatten(0, 1)]


class Flat:
    """A matrix that is kept as one row."""

    def ours(self, theirs: list[Tensor], shapes: list[Shape], spec: ModelSpec) -> list[Tensor]:
        return [theirs[0].view(torch.Size(shapes[0]))]

    def theirs(self, ours: list[Tensor], spec: ModelSpec) -> list[Tensor]:
        return [ours[0].flatten()]


def _experts(folder: str, gate: str, up: str, down: str) -> list[Rule]:
    names = {"gate": (gate, Rows()), "up": (up, Rows()), "down": (down, Rows(transposed=True))}
    return [
        Rule((f"ffn.experts.{part}.weight",), f"{folder}.{name}", way, exact=True)
        for part, (name, way) in names.items()
    ]


TABLE = Table(
    "transformer.", "transformer.blocks.",
    [
        *rules({"embedding": "transformer.wte", "norm": "transformer.ln_f", "head": "transformer.ff_out"}),
        Rule(("embedding.positions_SD",), "transformer.wpe.weight", exact=True),
    ],
    [
        Rule(("attention.q", "attention.k", "attention.v"), "att_proj", Fused()),
        Rule(("ffn.up", "ffn.gate"), "ff_proj", Fused()),  # silu is of the second half
        *rules({
            **{f"attention.{part}": f"{part}_proj" for part in "qkv"}, "attention.o": "attn_out",
            "attention.q_norm": "q_norm", "attention.k_norm": "k_norm", "ffn.up": "ff_proj", "ffn.down": "ff_out",
            "residual.attention_norm": "attn_norm", "residual.ffn_norm": "ff_norm",
            "residual.attention_norm.0": "attn_norm", "residual.attention_norm.1": "attn_norm_post",
            "residual.ffn_norm.0": "ff_norm", "residual.ffn_norm.1": "ff_norm_post",
        }),
        *_experts("ff.experts.mlp", gate="w1", up="w3", down="w2"),
        Rule(("ffn.router.gate.weight",), "ff.router.weight", Flat(), exact=True),
        Rule(("ffn.router.bias_E",), "ff.router.score_bias", exact=True),
        *rules({f"ffn.shared_expert.{part}": f"ff.shared_mlp.{w}" for part, w in
                (("gate", "w1"), ("down", "w2"), ("up", "w3"))}),
        *_experts("ffn.experts.mlp", gate="w1", up="v1", down="w2"),
        *rules({"ffn.router.gate": "ffn.router.layer"}),
        *rules({f"ffn.shared_expert.{part}": f"ffn.shared_expert.{part}_proj" for part in ("gate", "up", "down")}),
    ],
)  # fmt: skip

FAMILY = Family(olmo, TABLE, defaults=DEFAULTS)
