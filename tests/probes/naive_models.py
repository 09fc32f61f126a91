"""Whole forwards with something skipped, swapped or put in place: what the branch probes are held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from families import make
from torch import Tensor, nn

from sparsekit.model.build import build_model
from sparsekit.probes.base import Tokens

SPEC: dict[str, Any] = {
    "d_model": 16,
    "n_layers": 4,
    "vocab_size": 32,
    "max_seq_len": 16,
    "block": {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": {"type": "swiglu", "d_ff": 24}},
    "init": {"type": "normal", "std": 0.4},
}
NAMES = ("sparsekit", "llama", "gpt2", "gemma3")
# by family, where the layers are
LISTS = {"sparsekit": "layers", "llama": "model.layers", "gpt2": "transformer.h", "gemma3": "model.layers"}


def model_of(name: str, **changes: Any) -> nn.Module:
    """A tiny random model in float64."""
    if name == "sparsekit":
        return build_model({**copy.deepcopy(SPEC), **changes}, seed=3).double().eval()
    return make(name, torch.float64)


def tokens_of(sequences: int = 9, length: int = 12, batch_size: int = 4) -> Tokens:
    ids_ST = torch.randint(32, (sequences, length), generator=torch.Generator().manual_seed(5))
    return Tokens.of(ids_ST, batch_size)


def layers_of(model: nn.Module, name: str = "sparsekit") -> nn.ModuleList:
    layers = model.get_submodule(LISTS[name])
    assert isinstance(layers, nn.ModuleList)
    return layers


@torch.no_grad()
def logits_of(model: Any, ids_ST: Tensor) -> Tensor:
    out = model(ids_ST)
    return out if isinstance(out, Tensor) else out.logits


def losses_of(model: Any, ids_ST: Tensor) -> Tensor:
    """[S] mean next-token cross-entropy of each sequence."""
    logits = logits_of(model, ids_ST)
    return torch.stack([F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, ids_ST, strict=True)])


def stream_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def standing_in(layers: Sequence[nn.Module], functions: dict[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Layers whose output is a function of their input, whatever they compute."""
    with ExitStack() as undo:
        for index, function in functions.items():

            def after(module: Any, args: Any, kwargs: Any, output: Any, function: Any = function) -> Any:
                h = function(args[0] if args else kwargs["hidden_states"])
                return h if isinstance(output, Tensor) else (h, *output[1:])

            undo.callback(layers[index].register_forward_hook(after, with_kwargs=True).remove)
        yield


@torch.no_grad()
def hidden(model: Any, layers: nn.ModuleList, ids_ST: Tensor) -> list[Tensor]:
    """h_0 … h_L, h_L before the final norm."""
    states: list[Tensor] = []
    with ExitStack() as undo:

        def before(module: Any, args: Any, kwargs: Any) -> None:
            states.append((args[0] if args else kwargs["hidden_states"]).clone())

        for layer in layers:
            undo.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        last = layers[-1].register_forward_hook(lambda m, a, out: states.append(stream_of(out).clone()))
        undo.callback(last.remove)
        model(ids_ST)
    return states
