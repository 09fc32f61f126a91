"""The search for CETT-PPL thresholds beside two that measure CETT anew at every step, on a model trained for a minute.

python benchmarks/cett.py [--d-model 256] [--layers 6] [--activation silu] [--steps 300] [--sequences 16] [--p 0.01]

released: the loop of Sparsing Law's code (arXiv 2411.02335). For each of 20 bisected CETT values a dense forward that
keeps all activations, for each layer a halving of 65,536 candidates that masks and multiplies at each, and a forward
with the thresholds. grid: the same on our grid, ending by our rule, so that thresholds can be compared one by one.
ours: one dense pass for the curves, then nothing but forwards with thresholds.
"""

from __future__ import annotations

import argparse
import lzma
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.model.build import build_model
from sparsekit.probes import cett
from sparsekit.probes.base import Tokens, dense_pass
from sparsekit.probes.layered import layered
from sparsekit.probes.neurons import downs, sparse_losses

LENGTH, VOCAB, POINTS = 256, 256, 64


def text() -> Tensor:
    """Bytes of the novels that come with the library."""
    novels = sorted(f for f in files("sparsekit.data").joinpath("austen").iterdir() if f.name.endswith(".xz"))
    whole = b"".join(lzma.decompress(novel.read_bytes()) for novel in novels)
    return torch.from_numpy(np.frombuffer(whole, dtype=np.uint8).astype(np.int64))


def trained(options: argparse.Namespace, ids: Tensor, device: torch.device) -> Any:
    d_ff = options.d_model * 43 // 16
    ffn = {"type": "gated", "d_ff": d_ff, "activation": options.activation}
    block = {"attention": {"type": "mha", "n_heads": options.d_model // 64}, "ffn": ffn}
    shape = {"d_model": options.d_model, "n_layers": options.layers, "vocab_size": VOCAB, "max_seq_len": LENGTH}
    model = build_model({**shape, "block": block}, seed=0, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(options.steps):
        starts = torch.randint(len(ids) - LENGTH, (8,), generator=generator)
        batch = torch.stack([ids[s : s + LENGTH] for s in starts]).to(device)
        F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# --- ours


def ours(model: Any, tokens: Tokens, p: float) -> cett.Found:
    view = layered(model)
    banks, missing = downs(view)
    calibration = cett.Calibration(banks, view.n_layers, POINTS)
    dense_pass(view, tokens, [calibration])
    dense = float(np.concatenate(calibration.losses).mean())

    def ratio_with(thresholds: Sequence[float]) -> float:
        return math.exp(float(sparse_losses(view, tokens, cett.above(thresholds, banks), missing).mean()) - dense)

    return cett.search(calibration.thresholds, ratio_with, p)


# --- by passes, with hooks in the model


class Passes:
    """Whole forwards that keep every layer's activations, or drop what is below thresholds."""

    def __init__(self, model: Any, tokens: Tokens):
        self.model, self.tokens = model, tokens
        self.downs = [layer.ffn.down for layer in model.layers]

    def loss(self, hook: Callable[[int], Any]) -> float:
        handles = [down.register_forward_pre_hook(hook(layer)) for layer, down in enumerate(self.downs)]
        losses = []
        for ids_BT in self.tokens.batches():
            ids_BT = ids_BT.to(next(self.model.parameters()).device)
            losses.append(
                F.cross_entropy(self.model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()) * len(ids_BT)
            )
        for handle in handles:
            handle.remove()
        return float(sum(losses)) / len(self.tokens.ids_ST)

    def dense(self) -> tuple[float, list[Tensor]]:
        acts: list[list[Tensor]] = [[] for _ in self.downs]
        loss = self.loss(lambda layer: lambda module, inputs: acts[layer].append(inputs[0].flatten(0, -2).clone()))
        return loss, [torch.cat(parts) for parts in acts]

    def sparse(self, thresholds: Sequence[float]) -> float:
        def drop(layer: int) -> Any:
            norm_F = self.downs[layer].weight.norm(dim=0)
            return lambda module, inputs: (
                inputs[0].masked_fill(inputs[0].abs() * norm_F < thresholds[layer], 0), *inputs[1:],
            )  # fmt: skip

        return self.loss(drop)

    def threshold(self, act_NF: Tensor, weight_DF: Tensor, grid: Tensor | None, target: float) -> float:
        c_NF = act_NF.abs() * weight_DF.norm(dim=0)
        if grid is None:
            sample = c_NF.flatten()[:: max(c_NF.numel() // 65536, 1)]
            grid = torch.linspace(float(c_NF.min()), float(sample.quantile(0.99)), 65536)
        whole_N = (act_NF @ weight_DF.T).norm(dim=-1)
        left, right = 0, len(grid) - 1
        while left < right:
            middle = (left + right) // 2
            tail_ND = act_NF.masked_fill(c_NF >= float(grid[middle]), 0.0) @ weight_DF.T
            if float((tail_ND.norm(dim=-1) / whole_N).mean()) > target:
                right = middle
            else:
                left = middle + 1
        return float(grid[left - 1])

    def search(self, p: float, grids: list[Tensor] | None, enough: float) -> tuple[float, list[float], float]:
        low, high, best = 0.0, 1.0, (0.0, [0.0], 1.0)
        while high - low > 1e-6 and best[2] < enough:
            target = (low + high) / 2
            dense, acts = self.dense()
            thresholds = [
                self.threshold(act, down.weight, None if grids is None else grids[layer], target)
                for layer, (act, down) in enumerate(zip(acts, self.downs, strict=True))
            ]
            ratio = math.exp(self.sparse(thresholds) - dense)
            if ratio <= 1 + p:
                low, best = target, (target, thresholds, ratio)
            else:
                high = target
        return best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--activation", default="silu")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--p", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    ids = text()
    with torch.enable_grad():
        model = trained(options, ids[LENGTH * options.sequences :], device)
    tokens = Tokens.of(ids[: LENGTH * options.sequences].view(-1, LENGTH), 4)
    passes = Passes(model, tokens)
    view = layered(model)
    banks, _ = downs(view)
    calibration = cett.Calibration(banks, view.n_layers, POINTS)
    dense_pass(view, tokens, [calibration])
    grids = [torch.from_numpy(calibration.curves[layer].grid()[0]) for layer in range(view.n_layers)]
    enough = 1 + options.p - min(0.02 * options.p, 1e-3)
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(model, tokens, options.p),
        "grid": lambda: passes.search(options.p, grids, enough),
        "released": lambda: passes.search(options.p, None, math.inf),
    }
    clock = time.process_time if options.clock == "process" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Any] = {}
    for _ in range(options.repeats):
        for name, run in sides.items():
            began = clock()
            result = run()
            seconds[name].append(clock() - began)
            found[name] = (result.cett, result.thresholds, result.ratio) if name == "ours" else result
    kind = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{kind}, torch {torch.__version__}, {torch.get_num_threads()} threads: d {options.d_model}, "
        f"{options.layers} layers, {options.activation}, {tokens.ids_ST.numel()} tokens, p {options.p}"
    )
    print(f"{'search':10}{'seconds':>10}{'ratio':>8}{'CETT':>10}{'perplexity':>12}  thresholds off ours by at most")
    mine = np.array(found["ours"][1])
    for name, (level, thresholds, ratio) in found.items():
        off = np.max(np.abs(np.array(thresholds) / mine - 1))
        times = median(seconds[name]) / median(seconds["ours"])
        print(f"{name:10}{median(seconds[name]):10.2f}{times:8.2f}{level:10.6f}{ratio:12.6f}  {off:.2%}", flush=True)


if __name__ == "__main__":
    main()
