"""Probes beside what a straightforward script does for the same numbers: full forwards, one for each thing looked at.

python benchmarks/probes.py [--size toy|small|400m] [--probes causal …] [--repeats 3] [--compile] [--float32]

The naive side is written from the paper's definitions (arXiv 2603.15389): hooks that skip a layer or stand in for it,
layers that change places in the model, one fit after the other, each with whole forwards. Same weights, tokens and
precision; the two sides alternate, medians. "limit" is by how much fewer FLOPs the probe can do with at best, and "of
limit" how much of that the clock shows; what it ran is told in layer applications, beside the fewest. Memory is the
peak beyond model and tokens (on a GPU). With ``--float32`` a float32 run's scalars stand beside those of a bf16 one.
Where others use the CPU too, ``--clock process`` counts the processor's seconds and not the wall's.

A probe is a function below that returns its two sides, and a line in PROBES.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import flops_per_token
from sparsekit.model.build import build_model
from sparsekit.probes.base import Tokens
from sparsekit.probes.layered import layered

Scalars = dict[str, float]

# d_model, layers, heads, d_ff, vocabulary, sequences, tokens, batch, dtype
SIZES: dict[str, tuple[int, int, int, int, int, int, int, int, torch.dtype]] = {
    "toy": (32, 4, 4, 64, 256, 24, 32, 4, torch.float32),
    "small": (256, 12, 4, 768, 8000, 16, 256, 4, torch.float32),
    "400m": (1536, 16, 12, 2304, 50304, 100, 512, 4, torch.bfloat16),
}


@dataclass
class Bench:
    """A model and the tokens it is measured on."""

    model: Any
    ids_ST: Tensor  # on the model's device
    batch: int
    compile: bool

    @classmethod
    def of(cls, size: str, device: torch.device, compile: bool, dtype: torch.dtype | None = None) -> Bench:
        d_model, n_layers, n_heads, d_ff, vocab, sequences, length, batch, own = SIZES[size]
        block = {"attention": {"type": "mha", "n_heads": n_heads}, "ffn": {"type": "swiglu", "d_ff": d_ff}}
        shape = {"d_model": d_model, "n_layers": n_layers, "vocab_size": vocab, "max_seq_len": length}
        # weights larger than usual, such that layers matter although nothing was trained
        model = build_model({**shape, "block": block, "init": {"type": "normal", "std": 0.05}}, seed=0, device=device)
        ids_ST = torch.randint(vocab, (sequences, length), generator=torch.Generator().manual_seed(0))
        return cls(model.to(dtype or own).eval(), ids_ST.to(device), batch, compile)

    def ours(self, probe: type, **params: Any) -> Any:
        tokens = Tokens.of(self.ids_ST, self.batch)
        return probe(probe.Params(compile=self.compile, **params)).run(layered(self.model), tokens)

    def batches(self, ids_ST: Tensor | None = None) -> Iterator[Tensor]:
        yield from (self.ids_ST if ids_ST is None else ids_ST).split(self.batch)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def n(self) -> int:
        return len(self.layers)

    def flops(self, layers: float, heads: float) -> float:
        """Of a token that goes through so many layers and heads."""
        length = self.ids_ST.shape[1]
        head = 2.0 * self.model.spec.d_model * self.model.spec.vocab_size
        return layers * flops_per_token(self.layers[0], length) + heads * head


@dataclass
class Sides:
    """What is compared.

    Attributes:
        ours, naive: each returns the scalars; ours also what it says of itself.
        limit: FLOPs of the naive side over the fewest.
    """

    ours: Callable[[], Any]
    naive: Callable[[], Scalars]
    limit: float


# --- the naive sides


def loss_of(model: Any, ids_BT: Tensor) -> Tensor:
    """Summed over sequences, mean over tokens."""
    logits = model(ids_BT)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids_BT), -1).mean(1).sum()


@contextmanager
def standing_in(layer: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The layer's output is a function of its input."""
    handle = layer.register_forward_hook(lambda module, inputs, output: (function(inputs[0]), output[1]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def hidden_states(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Filled with the input of each layer and the output of the last."""
    states: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0])) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda module, inputs, output: states.append(output[0])))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def contributions(bench: Bench, ids_BT: Tensor) -> list[Tensor]:
    with hidden_states(bench.layers) as states:
        bench.model(ids_BT)
    return [after.float() - before.float() for before, after in pairwise(states)]


def causal(bench: Bench) -> Sides:
    from sparsekit.probes.causal import Causal

    n = bench.n

    def naive() -> Scalars:
        moved = torch.zeros(n, n, device=bench.ids_ST.device)
        size = torch.zeros(n, device=bench.ids_ST.device)
        for ids_BT in bench.batches():
            dense = contributions(bench, ids_BT)
            size += torch.stack([f.norm(dim=-1).sum() for f in dense])
            for s in range(n):
                with standing_in(bench.layers[s], lambda x: x):
                    skipped = contributions(bench, ids_BT)
                for m in range(s + 1, n):
                    moved[s, m] += (skipped[m] - dense[m]).norm(dim=-1).sum()
        effect = moved / size
        return {"causal": sum(effect[s, s + 1 :].mean().item() for s in range(n - 1)) / (n - 1)}

    limit = bench.flops(n * (n + 1), n + 1) / bench.flops(n * (n + 1) / 2, 0)
    return Sides(lambda: bench.ours(Causal), naive, limit)


def permutation(bench: Bench, exact: bool = False) -> Sides:
    from sparsekit.probes.permutation import Permutation

    n = bench.n
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]

    def naive() -> Scalars:
        dense = sum(loss_of(bench.model, ids_BT) for ids_BT in bench.batches())
        scores = []
        for i, j in pairs:
            first, second = bench.layers[i], bench.layers[j]
            bench.layers[i], bench.layers[j] = second, first
            loss = sum(loss_of(bench.model, ids_BT) for ids_BT in bench.batches())
            bench.layers[i], bench.layers[j] = first, second
            scores.append(((loss - dense).abs() / dense).item())
        return {"permutation": sum(scores) / len(scores)}

    heads = 1 + len(pairs)
    fewest = n + sum(n - i for i, _ in pairs)
    limit = bench.flops(n * heads, heads) / bench.flops(fewest, heads)
    return Sides(lambda: bench.ours(Permutation, exact=exact), naive, limit)


def permutation_exact(bench: Bench) -> Sides:
    return permutation(bench, exact=True)


def usefulness(bench: Bench) -> Sides:
    from sparsekit.probes.usefulness import Usefulness

    n, d_model = bench.n, bench.model.spec.d_model
    fit_ids, test_ids = bench.ids_ST[0::2], bench.ids_ST[1::2]

    def fitted(layer: int) -> Tensor:
        before, after = [], []
        for ids_BT in bench.batches(fit_ids):
            with hidden_states(bench.layers) as states:
                bench.model(ids_BT)
            before.append(states[layer].float().flatten(0, 1))
            after.append(states[layer + 1].float().flatten(0, 1))
        x = torch.cat(before)
        return torch.linalg.lstsq(torch.cat((x, torch.ones_like(x[:, :1])), 1), torch.cat(after)).solution

    def test_loss() -> Tensor:
        return sum(loss_of(bench.model, ids_BT) for ids_BT in bench.batches(test_ids))

    def naive() -> Scalars:
        dense = test_loss()
        ratios = []
        for layer in range(n):
            w = fitted(layer)
            with standing_in(bench.layers[layer], lambda x, w=w: (x.float() @ w[:-1] + w[-1]).to(x.dtype)):
                ratios.append((test_loss() / dense).item())
        share = sum(r > 1.1 for r in ratios) / n
        return {"usefulness": share, "mean_log_loss_ratio": sum(math.log(r) for r in ratios) / n}

    # of a pair of tokens, one to fit and one to evaluate; the fit itself is counted on neither side but in its float64
    sums = n * 4.0 * d_model**2
    limit = bench.flops(n * n + (n + 1) * n, n + n + 1) / (bench.flops(n + n * (n + 1) / 2, n + 1) + sums)
    return Sides(lambda: bench.ours(Usefulness), naive, limit)


PROBES: dict[str, Callable[[Bench], Sides]] = {
    "causal": causal,
    "permutation": permutation,
    "permutation_exact": permutation_exact,
    "usefulness": usefulness,
}


# --- the comparison


def timed(run: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> tuple[Any, float, float]:
    """(what it returns, seconds, GB that it took at its peak beyond what was there)."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = clock()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - began
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if device.type == "cuda" else math.nan
    return result, seconds, peak


@torch.no_grad()
def compare(name: str, bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    sides = PROBES[name](bench)
    device = bench.ids_ST.device
    clock = time.process_time if options.clock == "process" else time.perf_counter
    if not options.no_warm_up:
        sides.ours()
    ours: list[float] = []
    naive: list[float] = []
    told: Any = None
    scalars: Scalars = {}
    peaks = [math.nan, math.nan]
    for repeat in range(options.repeats):
        told, seconds, peaks[0] = timed(sides.ours, device, clock)
        ours.append(seconds)
        if repeat < options.naive_repeats:
            scalars, seconds, peaks[1] = timed(sides.naive, device, clock)
            naive.append(seconds)
    ratio = median(naive) / median(ours) if naive else math.nan
    return {
        "probe": name, "seconds": median(ours), "naive_seconds": median(naive) if naive else math.nan, "ratio": ratio,
        "limit": sides.limit, "of_limit": ratio / sides.limit, "memory_gb": peaks[0], "naive_memory_gb": peaks[1],
        "applications": told.meta.get("layer_applications"), "fewest": told.meta.get("layer_applications_floor"),
        "scalars": told.scalars, "naive_scalars": scalars, "rounds": ours, "naive_rounds": naive,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--naive-repeats", type=int, default=100, help="no more rounds of the naive side than these")
    parser.add_argument("--no-warm-up", action="store_true")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--float32", action="store_true", help="a float32 run's scalars, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    kind = str(SIZES[options.size][-1]).removeprefix("torch.")
    print(f"{name}{threads}, torch {torch.__version__}, {options.size}, {kind}", flush=True)
    print(
        f"{'probe':18}{'ours s':>9}{'naive s':>9}{'ratio':>8}{'limit':>8}{'of limit':>9}{'GB':>6}{'naive':>6}"
        f"{'applied':>9}{'fewest':>9}  scalars: ours, naive{', float32' if options.float32 else ''}"
    )
    rows = []
    for probe in options.probes:
        bench = Bench.of(options.size, device, options.compile)
        row = compare(probe, bench, options)
        if options.float32:
            row["float32_scalars"] = PROBES[probe](Bench.of(options.size, device, False, torch.float32)).ours().scalars
        kinds = [k for k in ("scalars", "naive_scalars", "float32_scalars") if k in row]
        told = [f"{key} " + " ".join(f"{row[k].get(key, math.nan):.5g}" for k in kinds) for key in row["scalars"]]
        print(
            f"{probe:18}{row['seconds']:9.3f}{row['naive_seconds']:9.3f}{row['ratio']:8.2f}{row['limit']:8.2f}"
            f"{row['of_limit']:9.3f}{row['memory_gb']:6.2f}{row['naive_memory_gb']:6.2f}{row['applications'] or 0:9}"
            f"{row['fewest'] or 0:9}  {', '.join(told)}",
            flush=True,
        )
        rows.append(row)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
