"""Training steps of a spec-built dense model beside a module written out by hand: same shapes, data, precision.

python benchmarks/dense.py [--shapes 400m 1.28b] [--steps 10] [--seconds 500] [--out FILE]

A step is forward, cross-entropy, backward, clipping and fused AdamW on one batch of random tokens. The module by hand
has no slots, no context and no spec, and is compiled whole with its loss. The spec-built model is compiled whole, and
layer by layer as ``train.compile`` does, with the trainer's own objective, clipping and masked update. Rounds of
steps are interleaved; medians. MFU as in PaLM: (6 N + 12 L d S) FLOPs a token, N without the input embedding, over the
device's dense bf16 peak.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import ForwardContext
from sparsekit.data.packing import Batch
from sparsekit.model.build import build_model
from sparsekit.training.distributed import World
from sparsekit.training.gradients import Gradients, clip_factor, masked_step
from sparsekit.training.hardware import peak_flops
from sparsekit.training.objectives import NextToken

VOCAB = 50304
# name: d_model, layers, heads, d_ff, sequence, batch, precision
SHAPES: dict[str, tuple[int, int, int, int, int, int, str]] = {
    "124m": (768, 12, 12, 2048, 1024, 64, "bf16"),
    "400m": (1536, 16, 12, 4608, 2048, 16, "bf16"),
    "1b": (2048, 16, 16, 8192, 2048, 8, "bf16"),
    "475m": (1536, 16, 12, 2304, 1024, 32, "fp32 weights, bf16 autocast"),
    "1.28b": (2048, 16, 16, 8192, 1024, 16, "fp32 weights, bf16 autocast"),
    "toy": (64, 2, 4, 128, 32, 2, "fp32 weights, bf16 autocast"),
}


class ByHand(nn.Module):
    """A Llama-like decoder, written out: RMSNorm, rope, causal attention, SwiGLU, untied head."""

    def __init__(self, d_model: int, n_layers: int, n_heads: int, d_ff: int, seq_len: int):
        super().__init__()
        self.n_layers, self.n_heads, self.head_dim = n_layers, n_heads, d_model // n_heads
        self.table = nn.Embedding(VOCAB, d_model)
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(d_model)) for _ in range(2 * n_layers + 1)])

        def linears(d_in: int, d_out: int) -> nn.ModuleList:
            return nn.ModuleList([nn.Linear(d_in, d_out, bias=False) for _ in range(n_layers)])

        self.q, self.k, self.v, self.o = (linears(d_model, d_model) for _ in range(4))
        self.gate, self.up, self.down = linears(d_model, d_ff), linears(d_model, d_ff), linears(d_ff, d_model)
        self.head = nn.Linear(d_model, VOCAB, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angle = torch.outer(torch.arange(seq_len).float(), frequency)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((angle.sin(), angle.sin()), -1), persistent=False)

    @torch.no_grad()
    def take(self, model: nn.Module) -> ByHand:
        """The weights of a model built from a spec, so that both must come to the same losses."""
        pairs = [(self.table.weight, model.embedding.weight), (self.head.weight, model.head.weight)]
        for i, layer in enumerate(model.layers):
            pairs += [(getattr(self, name)[i].weight, getattr(layer.attention, name).weight) for name in "qkvo"]
            pairs += [
                (getattr(self, name)[i].weight, getattr(layer.ffn, name).weight) for name in ("gate", "up", "down")
            ]
        for own, theirs in pairs:
            own.copy_(theirs)
        return self

    def forward(self, ids: Tensor) -> Tensor:
        batch, seq = ids.shape
        x = self.table(ids)
        width = (x.shape[-1],)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)

        def rotate(z: Tensor) -> Tensor:
            first, second = z.chunk(2, -1)
            return z * cos + torch.cat((-second, first), -1) * sin

        for i in range(self.n_layers):
            h = F.rms_norm(x, width, self.norms[2 * i], 1e-6)
            q, k, v = (
                w[i](h).view(batch, seq, self.n_heads, self.head_dim).transpose(1, 2) for w in (self.q, self.k, self.v)
            )
            q, k = rotate(q).to(v.dtype), rotate(k).to(v.dtype)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o[i](z.transpose(1, 2).flatten(2))
            h = F.rms_norm(x, width, self.norms[2 * i + 1], 1e-6)
            x = x + self.down[i](F.silu(self.gate[i](h)) * self.up[i](h))
        return self.head(F.rms_norm(x, width, self.norms[-1], 1e-6))


def spec_of(d_model: int, n_layers: int, n_heads: int, d_ff: int, seq_len: int) -> dict[str, Any]:
    block = {
        "norm": {"type": "rmsnorm", "eps": 1e-6},
        "attention": {"type": "mha", "n_heads": n_heads},
        "ffn": {"type": "swiglu", "d_ff": d_ff},
    }
    return {"d_model": d_model, "n_layers": n_layers, "vocab_size": VOCAB, "max_seq_len": seq_len, "block": block}


class Side:
    """One way to train, with what it needs for a step; ``compiled`` is "whole", "layers" or "no"."""

    def __init__(self, name: str, model: nn.Module, dtype: torch.dtype, autocast: bool, ours: bool, compiled: str):
        self.name, self.model, self.autocast, self.ours = name, model.to(dtype), autocast, ours
        self.loss = self._ours(compiled) if ours else self._by_hand(compiled)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
        self.gradients = Gradients(self.model, World(self.device))
        self.milliseconds: list[float] = []

    def _by_hand(self, compiled: str) -> Callable[[Batch], Tensor]:
        def loss(ids: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self.model(ids).flatten(0, 1).float(), targets.flatten())

        run = torch.compile(loss) if compiled == "whole" else loss
        return lambda batch: run(batch.ids_BT, batch.targets_BT)

    def _ours(self, compiled: str) -> Callable[[Batch], Tensor]:
        objective = NextToken(NextToken.Params())
        if compiled == "whole":
            self.model.compile()
        elif compiled == "layers":
            for layer in self.model.layers:
                layer.compile()
        if compiled != "no":
            objective.compile()
        return lambda batch: objective(self.model, batch, ForwardContext()).total / batch.n_targets

    def step(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(batch)
        loss.backward()
        if self.ours:
            norm = self.gradients.squares().sum().sqrt()
            masked_step(self.optimizer, ~(norm + loss.detach()).isfinite(), clip_factor(norm, 1.0))
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def compare(shape: str, steps: int, rounds: int, device: torch.device, show_profile: bool) -> list[dict[str, Any]]:
    d_model, n_layers, n_heads, d_ff, seq_len, batch, precision = SHAPES[shape]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    autocast = precision != "bf16"
    sizes = (d_model, n_layers, n_heads, d_ff, seq_len)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (batch, seq_len + 1), generator=generator).to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    batch_of_ids = Batch(inputs, targets, None, targets.numel())
    by_spec = [build_model(spec_of(*sizes), seed=0, device=device) for _ in range(2)]
    sides = [
        Side("by hand, whole", ByHand(*sizes).to(device).take(by_spec[0]), dtype, autocast, False, "whole"),
        Side("spec, whole", by_spec[0], dtype, autocast, True, "whole"),
        Side("spec, layers", by_spec[1], dtype, autocast, True, "layers"),
    ]
    losses = {}
    for side in sides:
        for _ in range(3):
            losses[side.name] = side.step(batch_of_ids).item()
    for _ in range(rounds):
        for side in sides:
            side.milliseconds.append(timed(lambda side=side: side.step(batch_of_ids), steps, device))
    if show_profile:
        for side in sides[:2]:
            profile(f"{shape}, {side.name}", lambda side=side: side.step(batch_of_ids), device)
    matrices = sum(p.numel() for p in sides[1].model.parameters()) - VOCAB * d_model
    flops = 6 * matrices + 12 * n_layers * d_model * seq_len
    peak = peak_flops(device, torch.bfloat16)
    rows = []
    for side in sides:
        milliseconds = median(side.milliseconds)
        speed = batch * seq_len / milliseconds * 1e3
        rows.append({
            "shape": shape, "precision": precision, "side": side.name, "ms": milliseconds, "tokens_per_second": speed,
            "mfu": speed * flops / peak if peak else None, "loss": losses[side.name],
            "against_hand": median(sides[0].milliseconds) / milliseconds, "rounds": side.milliseconds,
        })  # fmt: skip
    return rows


def timed(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Milliseconds a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps * 1e3


def profile(title: str, run: Callable[[], Any], device: torch.device) -> None:
    """The kernels of three runs by the time that they take."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    with profiled(activities=activities) as found:
        timed(run, 3, device)
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:25]
    print(f"{title}: milliseconds a run and launches, by kernel")
    for event in events:
        print(f"  {event.self_device_time_total / 3e3:8.3f} {event.count / 3:6.1f}  {event.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["400m", "1.28b", "124m", "475m", "1b"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="no shape is begun after so many")
    parser.add_argument("--profile", action="store_true", help="also the kernels of the first two sides")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}", flush=True)
    print(f"{'shape':7}{'side':25}{'ms':>9}{'tok/s':>10}{'MFU':>7}{'/ hand':>8}{'loss':>8}  precision", flush=True)
    began, rows = time.monotonic(), []
    for shape in options.shapes:
        if time.monotonic() - began > options.seconds:
            print(f"{shape}: not run, out of time")
            continue
        for row in compare(shape, options.steps, options.rounds, device, options.profile):
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.3f}"
            told = (
                f"{row['ms']:9.2f}{row['tokens_per_second']:10,.0f}{mfu:>7}{row['against_hand']:8.3f}{row['loss']:8.3f}"
            )
            print(f"{shape:7}{row['side']:25}{told}  {row['precision']}", flush=True)
            rows.append(row)
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
