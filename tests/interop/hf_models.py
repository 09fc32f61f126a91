"""Tiny Hugging Face folders with random weights of standard deviation .2, one a family; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 300  # all bytes, an end of text, and merges of the most frequent pairs
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
HEADS = {**GROUPED, "head_dim": 12}  # 4 x 12 is not 32
GEMMA = {**HEADS, "query_pre_attn_scalar": 5, "sliding_window": 7}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "eos_token_id": 0}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 100.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
GRANITE = {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama_biased": ("LlamaConfig", {**HEADS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_3": ("LlamaConfig", {**GROUPED, "rope_parameters": LLAMA3}),
    "llama_yarn": ("LlamaConfig", {**GROUPED, "num_key_value_heads": 1, "rope_parameters": YARN}),
    "llama_linear": ("LlamaConfig", {**GROUPED, "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                                    "rope_theta": 100.0}}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2_sliding": (
        "Qwen2Config", {**GROUPED, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
    ),
    "qwen3": ("Qwen3Config", HEADS),
    "olmo2": ("Olmo2Config", GROUPED),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "layer_types": SLIDING, "final_logit_softcapping": 3.0}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48, "rotary_pct": 0.5}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {**SIZES, "intermediate_size": 48, "use_parallel_residual": False}),
    "phi3": ("Phi3Config", {**GROUPED, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLmConfig", GROUPED),
    "stablelm_parallel": ("StableLmConfig", {**GROUPED, "use_parallel_residual": True, "use_qkv_bias": True}),
    "granite": ("GraniteConfig", {**GROUPED, **GRANITE}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {**GROUPED, **MIXTURE}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**HEADS, **MIXTURE, "moe_intermediate_size": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
}  # fmt: skip


def make(name: str, seed: int = 1) -> Any:
    """A model of a family, in evaluation mode."""
    cls, sizes = FAMILIES[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, cls)(**sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (1.0 if p.ndim == 1 and p.mean() > 0.5 else 0.0))
    return model.eval()


def folder(name: str, path: Path, tokenizer: dict[str, Any] | None = None) -> Path:
    """A family's model, saved as transformers saves it, with a tokenizer if one is given."""
    make(name).save_pretrained(path)
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (path / "tokenizer_config.json").write_text(json.dumps(told))
    return path


def change(path: Path, **values: Any) -> Path:
    """Other values in a folder's config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))
    return path
