"""Models to be made sparse, and hand-made references of what masks should do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekit.model.build import build_model
from sparsekit.probes.base import Tokens
from sparsekit.sparsifiers.choose import make

from ..probes import families

VOCABULARY = 64


def ids(sequences: int = 8, length: int = 32, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


TOKENS = Tokens.of(ids(), 4)


def ours(ffn: Any = None, dtype: torch.dtype = torch.float32, **model: Any) -> Any:
    """A sparsekit model whose layers matter: weights of standard deviation .3."""
    block = {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": ffn or {"type": "swiglu", "d_ff": 48}}
    shape = {"d_model": 32, "n_layers": 3, "vocab_size": VOCABULARY, "max_seq_len": 32}
    spec = {**shape, "block": block, "init": {"type": "normal", "std": 0.3}, **model}
    return build_model(spec, seed=0, dtype=dtype).eval()


def theirs(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return families.make(family, dtype)


def logits(model: Any, batch_BT: Tensor | None = None) -> Tensor:
    out = model(ids() if batch_BT is None else batch_BT)
    return getattr(out, "logits", out)


def state(model: Any) -> dict[str, Any]:
    """All that an installation could leave behind: tensors, hooks, forwards, compiled calls, modes."""
    told: dict[str, Any] = {f"tensor {name}": x.detach().clone() for name, x in model.state_dict().items()}
    for name, module in model.named_modules():
        told[f"module {name}"] = (
            sorted(module.__dict__), list(module._forward_pre_hooks), list(module._forward_hooks),
            module._compiled_call_impl, module.training, module.__dict__.get("forward"),
        )  # fmt: skip
    return told


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) else x == y

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


ALL = {
    "cett": {}, "fat_eps": {}, "top_k": {}, "teal": {}, "wina": {}, "cats": {}, "chess": {},
    "teal-greedy": {"allocation": "greedy", "step": 0.5},
    "teal-global": {"allocation": "greedy_global", "step": 0.5}, "wina-turned": {"transform": "column_orthogonal"},
    "chess-attention": {"attention": "q_and_o"},
}  # fmt: skip


def made(name: str, **params: Any) -> Any:
    """A sparsifier by its name here."""
    return make({"type": name.partition("-")[0], **ALL[name], **params})
