"""A mixture's feed-forward layer, and a whole training step of one, beside dense ones of equal active size.

python benchmarks/moe.py [--shapes 8x2 32x4 64x8] [--whole 400m-2b] [--rounds 7] [--profile] [--out FILE]

The layer: forward and backward of 32,768 tokens in bfloat16, router, auxiliary losses and counters included, compiled;
beside it SwiGLU with d_ff = k d_ff(expert), which multiplies as much. "skewed" is the same mixture, its router biased
so that the busiest expert gets several times its share ("load": times the mean). Rounds are interleaved; medians.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dense import profile, timed  # beside this file
from torch import Tensor, nn

from sparsekit.components.contracts import ForwardContext
from sparsekit.data.packing import Batch
from sparsekit.model.build import build_model
from sparsekit.training.distributed import World
from sparsekit.training.gradients import Gradients, clip_factor, masked_step
from sparsekit.training.objectives import NextToken

# name: d_model, experts, k, d_ff of an expert, tokens
SHAPES = {
    "8x2": (1536, 8, 2, 2304, 32768),
    "32x4": (768, 32, 4, 512, 32768),
    "64x8": (1536, 64, 8, 576, 32768),
    "toy": (64, 8, 2, 96, 512),
}
GOALS = {"8x2": 0.88, "32x4": 0.70, "64x8": 0.65}
# name: d_model, layers, heads, experts, k, d_ff of an expert and of the shared one, vocabulary, sequence, batch
WHOLE = {
    "400m-2b": (768, 16, 12, 32, 4, 1536, 50304, 2048, 16),
    "toy": (64, 2, 4, 8, 2, 96, 512, 64, 4),
}


def layer_of(ffn: dict[str, Any], d_model: int, device: torch.device) -> nn.Module:
    """The feed-forward layer that a spec describes, as training compiles it (inside its block it is part of more)."""
    block = {"attention": {"type": "mha", "n_heads": 1}, "ffn": ffn}
    spec = {"d_model": d_model, "n_layers": 1, "vocab_size": 16, "max_seq_len": 16, "block": block}
    layer: nn.Module = build_model(spec, device=device, dtype=torch.bfloat16).layers[0].ffn
    layer.train()
    layer.compile()
    return layer


def skew(layer: nn.Module, strength: float) -> None:
    """Biases a router by the first channel, which is 1 in every token, from -strength to strength over experts."""
    weight = layer.router.gate.weight.data
    weight[:, 0] = torch.linspace(-strength, strength, weight.shape[0], device=weight.device)


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    context = ForwardContext(loss_scale=torch.ones((), device=x.device))

    def run() -> None:
        layer(x, context).backward(dy)
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return run


def compare_layers(shape: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    d_model, n_experts, k, d_ff, n_tokens = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(1, n_tokens, d_model, device=device, dtype=torch.bfloat16)
    x[..., 0] = 1.0
    x.requires_grad_()
    dy = torch.randn_like(x)
    router = {"type": "top_k", "k": k}
    mixture = {"type": "moe", "n_experts": n_experts, "router": router, "expert": {"type": "swiglu", "d_ff": d_ff}}
    layers = {
        "dense": layer_of({"type": "swiglu", "d_ff": k * d_ff}, d_model, device),
        "mixture": layer_of(mixture, d_model, device),
        "skewed": layer_of(mixture, d_model, device),
    }
    skew(layers["skewed"], options.skew)
    runs = {name: forward_backward(layer, x, dy) for name, layer in layers.items()}
    for _ in range(3):
        for run in runs.values():
            run()
    times = interleaved(runs, options, device)
    if options.profile:
        profile(shape, runs["mixture"], device)
    rows = []
    for name in runs:
        load = float(layers[name].load_max) if name != "dense" else None
        ms = median(times[name])
        rows.append({"shape": shape, "side": name, "ms": ms, "load": load, "rounds": times[name],
                     "against_dense": median(times["dense"]) / ms, "goal": GOALS.get(shape)})  # fmt: skip
    return rows


def interleaved(
    runs: dict[str, Callable[[], Any]], options: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each side, round after round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(timed(run, options.steps, device))
    return times


def compare_whole(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    d_model, n_layers, n_heads, n_experts, k, d_ff, vocab, seq_len, batch = WHOLE[name]
    expert = {"type": "swiglu", "d_ff": d_ff}
    mixture = {"type": "moe", "n_experts": n_experts, "router": {"type": "top_k", "k": k}, "expert": expert,
               "shared_expert": expert}  # fmt: skip
    ids = torch.randint(0, vocab, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0)).to(device)
    text = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, batch * seq_len)
    steps = {}
    for side, ffn in (("dense", {"type": "swiglu", "d_ff": (k + 1) * d_ff}), ("mixture", mixture)):
        block = {"attention": {"type": "mha", "n_heads": n_heads}, "ffn": ffn}
        spec = {"d_model": d_model, "n_layers": n_layers, "vocab_size": vocab, "max_seq_len": seq_len, "block": block}
        steps[side] = training_step(build_model(spec, device=device), text)
        for _ in range(3):
            steps[side]()
    times = interleaved(steps, options, device)
    if options.profile:
        profile(name, steps["mixture"], device)
    rows = []
    for side in steps:
        ms = median(times[side])
        speed = batch * seq_len / ms * 1e3
        rows.append({"shape": name, "side": side, "ms": ms, "load": None, "rounds": times[side], "goal": None,
                     "against_dense": median(times["dense"]) / ms, "tokens_per_second": speed})  # fmt: skip
    return rows


def training_step(model: nn.Module, text: Batch) -> Callable[[], None]:
    """As the trainer takes one, precision bf16, compiled by layers."""
    model.train()
    for layer in model.layers:
        layer.compile()
    device = text.ids_BT.device
    objective = NextToken(NextToken.Params())
    objective.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    gradients = Gradients(model, World(device))
    context = ForwardContext(loss_scale=torch.ones((), device=device))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(model, text, context).total / text.n_targets
        loss.backward()
        norm = gradients.squares().sum().sqrt()
        masked_step(optimizer, ~(norm + loss.detach()).isfinite(), clip_factor(norm, 1.0))
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["8x2", "32x4", "64x8"])
    parser.add_argument("--whole", nargs="*", choices=WHOLE, default=["400m-2b"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skew", type=float, default=1.5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}", flush=True)
    rows: list[dict[str, Any]] = []
    for kind, shapes in ((compare_layers, options.shapes), (compare_whole, options.whole)):
        for shape in shapes:
            found = kind(shape, options, device)
            for row in found:
                load = "" if row["load"] is None else f"  load {row['load']:.2f}"
                goal = "" if row["goal"] is None or row["side"] != "mixture" else f"  goal {row['goal']}"
                print(f"{shape:9}{row['side']:9}{row['ms']:9.3f} ms  {row['against_dense']:.3f} of dense{goal}{load}",
                      flush=True)  # fmt: skip
            rows += found
            torch.compiler.reset()
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
