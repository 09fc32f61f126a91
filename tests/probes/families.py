"""Tiny Hugging Face models with random weights of standard deviation .2, one a family; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
HEADS = {**GROUPED, "head_dim": 8}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 4}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", HEADS),
    "olmo2": ("Olmo2Config", GROUPED),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEADS, **MIXTURE, "decoder_sparse_step": 1, "mlp_only_layers": [1]}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": (
        "Gemma3TextConfig",
        {**GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2Config", {**GPT2, **ENDS}),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48, "rotary_pct": 0.5}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48, "use_parallel_residual": False}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt_post_norm": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "phi": ("PhiConfig", {**SIZES, "intermediate_size": 48}),
    "phi3": ("Phi3Config", GROUPED),
    "stablelm": ("StableLmConfig", GROUPED),
    "falcon": ("FalconConfig", {**SIZES, "alibi": False}),
    "falcon_new": ("FalconConfig", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("FalconConfig", {**SIZES, "alibi": True, "parallel_attn": False, "multi_query": False}),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, **ENDS}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64}),
    "granite": (
        "GraniteConfig",
        {**GROUPED, "residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    ),
    "gptj": ("GPTJConfig", {**GPT2, **ENDS, "rotary_dim": 4}),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 4}),
}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    """A model of a family, in evaluation mode."""
    cls, sizes = FAMILIES[name]
    config = getattr(transformers, cls)(**sizes)
    # transformers' grouped product knows no float64
    options = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    model = AutoModelForCausalLM.from_config(config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (1.0 if p.ndim == 1 and p.mean() > 0.5 else 0.0))
    return model.to(dtype).eval()
