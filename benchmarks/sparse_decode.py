"""Sparse decoding beside dense: single products, a gated feed-forward, and a whole decoding step.

python benchmarks/sparse_decode.py [--parts kernels ffn model] [--toy] [--out FILE]
python benchmarks/sparse_decode.py --break-even | --tune

kernels: rows_matvec (input-sparse) and columns_matvec (output-sparse) beside F.linear. Tokens of a batch are active
independently of each other, so that 8 of them at 90% read 57% of the rows.
ffn: y = W_down (silu(W_gate x) * (W_up x)), where what is inactive is seen from the gate, known beforehand (as from a
predictor: the most that masking neurons can give; a neuron's rows of gate and up stand side by side, to be read as
one), or a share of each product's inputs.
model: a spec-built model with random weights and inputs of every projection but the head's masked by magnitude, one
token without a past. "joined" is dense with q, k, v and gate, up each in one product, as the sparse one has them.

On a GPU in CUDA graphs, layers compiled; on a CPU as called, products and feed-forward only (--toy: all of it, small).
Weights rotate, so that no cache holds them. Sides are interleaved; medians, on a CPU least times too, since others
may run beside it. --break-even: without falling back to dense products. --tune: how products may be cut up on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.components.contracts import Linear
from sparsekit.model.build import build_model
from sparsekit.sparsifiers.kernels import columns_matvec, gather_columns, gather_rows, rows_matvec

MATRICES = ((14336, 4096), (4096, 14336))  # in, out
FFNS = ((4096, 14336), (2048, 8192))  # d_model, d_ff
# name: d_model, layers, heads, key-value heads, d_ff, vocabulary; goal at 50%
MODELS = {"8b": (4096, 32, 32, 8, 14336, 128256, 1.6), "1b": (2048, 16, 32, 8, 8192, 128256, 1.4)}
SPARSITIES = (0.0, 0.5, 0.75, 0.9)
GOALS = {0.0: 0.97, 0.5: 1.7, 0.75: 3.0, 0.9: 5.0}
Run = Callable[[], Any]


def measured(sides: dict[str, Sequence[Run]], options: argparse.Namespace) -> dict[str, float]:
    """Microseconds a call of each side, whose calls are run in turn."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    if options.device.type == "cuda":
        graphs = {side: captured(calls) for side, calls in sides.items()}
        for _ in range(options.rounds):
            for side, graph in graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                times[side].append(begin.elapsed_time(end) * 1e3 / len(sides[side]))
        return {side: median(found) for side, found in times.items()}
    for turn in range(options.rounds):
        for side, calls in sides.items():
            began = time.perf_counter()
            calls[turn % len(calls)]()
            times[side].append((time.perf_counter() - began) * 1e6)
    return {side: min(found) for side, found in times.items()} | {
        f"{side}, median": median(found) for side, found in times.items()
    }


def captured(calls: Sequence[Run]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what is compiled
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def turns(call: Callable[..., Any], *given: Sequence[Any], options: argparse.Namespace) -> list[Run]:
    """A call for each turn's tensors; on a GPU several times over, so that starting a graph costs little."""
    calls = [partial(call, *tensors) for tensors in zip(*given, strict=True)]
    return calls * (8 if options.device.type == "cuda" else 1)


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def row(part: str, shape: str, batch: int, sparsity: float, sides: dict[str, float], dtype: Any, **more: Any) -> dict:
    return {"part": part, "shape": shape, "dtype": str(dtype)[6:], "batch": batch, "sparsity": sparsity, "us": sides,
            "ratio": sides["dense"] / sides["sparse"], **more}  # fmt: skip


def show(found: dict[str, Any]) -> None:
    sides = "  ".join(f"{side} {us:.1f}" for side, us in found["us"].items() if "median" not in side)
    medians = found["us"]
    beside = (
        f" (medians {medians['dense, median'] / medians['sparse, median']:.2f}x)" if "dense, median" in medians else ""
    )
    goal = f"  goal {found['goal']}x" if found.get("goal") else ""
    error = f"  error {found['error']:.1e}" if "error" in found else ""
    print(f"{found['part']:22}{found['shape']:15}{found['dtype']:9} batch {found['batch']} {found['sparsity']:4.0%}"
          f"  us: {sides}  {found['ratio']:.2f}x{beside}{goal}{error}", flush=True)  # fmt: skip


# --- single products


class Matrices:
    """Copies of a matrix, both ways round, with inputs and masks for each."""

    def __init__(self, d_in: int, d_out: int, batch: int, dtype: torch.dtype, options: argparse.Namespace):
        self.options, self.shape = options, (batch, d_in, d_out)
        generator = torch.Generator(options.device).manual_seed(0)
        self.draw = partial(torch.randn, generator=generator, device=options.device)
        self.share = partial(torch.rand, generator=generator, device=options.device)
        self.dtype = dtype
        self.weights_OI = [self.draw(d_out, d_in).to(dtype) for _ in range(2)]
        self.weights_IO = [weight.T.contiguous() for weight in self.weights_OI]

    def sides(
        self, kind: str, sparsity: float, sparse: Callable[..., Tensor]
    ) -> tuple[dict[str, Sequence[Run]], float]:
        """Calls of both sides, and the sparse one's error."""
        batch, d_in, d_out = self.shape
        turn = partial(turns, options=self.options)
        xs = [self.draw(batch, d_in).to(self.dtype) for _ in self.weights_OI]
        if kind == "rows":
            xs = [x * (self.share(batch, d_in) >= sparsity) for x in xs]
            error = relative_error(sparse(xs[0], self.weights_IO[0]), xs[0].double() @ self.weights_IO[0].double())
            return {"dense": turn(F.linear, xs, self.weights_OI), "sparse": turn(sparse, xs, self.weights_IO)}, error
        keeps = [self.share(batch, d_out) >= sparsity for _ in xs]
        exact = (xs[0].double() @ self.weights_OI[0].double().T) * keeps[0]
        error = relative_error(sparse(xs[0], self.weights_OI[0], keeps[0]), exact)
        return {"dense": turn(F.linear, xs, self.weights_OI), "sparse": turn(sparse, xs, self.weights_OI, keeps)}, error


def compare_kernels(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for dtype, (d_in, d_out), batch in itertools.product(options.dtypes, options.matrices, options.batches):
        matrices = Matrices(d_in, d_out, batch, dtype, options)
        for kind, sparsity in itertools.product(("rows", "columns"), SPARSITIES):
            told = {"rows": rows_matvec, "columns": columns_matvec}[kind]
            sides, error = matrices.sides(kind, sparsity, partial(told, sparsity=sparsity))
            goal = GOALS[sparsity] if batch == 1 and options.device.type == "cuda" else None
            rows.append(row(kind, f"{d_in} x {d_out}", batch, sparsity, measured(sides, options), dtype, error=error,
                            goal=goal))  # fmt: skip
            show(rows[-1])
    return rows


def break_even(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Never falling back: where does a ratio pass 1?"""
    if options.device.type == "cuda":
        from sparsekit.sparsifiers import triton_kernels

        forced = {"rows": triton_kernels.rows_matvec, "columns": triton_kernels.columns_matvec}
    else:
        forced = {"rows": gather_rows, "columns": gather_columns}
    rows = []
    for dtype, batch in itertools.product(options.dtypes, (1, 2, 4, 8)):
        d_in, d_out = options.matrices[0]
        matrices = Matrices(d_in, d_out, batch, dtype, options)
        for kind, sparsity in itertools.product(forced, (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)):
            sides, error = matrices.sides(kind, sparsity, forced[kind])
            if kind == "rows":  # what the fallback does with this layout
                sides["fallback"] = [partial(torch.matmul, *call.args) for call in sides["sparse"]]
            rows.append(row(f"{kind}, forced", f"{d_in} x {d_out}", batch, sparsity, measured(sides, options), dtype,
                            error=error))  # fmt: skip
            show(rows[-1])
    return rows


def tune(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way to cut up a product that could be good: the best three of each, and the best of all together."""
    from sparsekit.sparsifiers import triton_kernels
    from sparsekit.sparsifiers.triton_kernels import Plan

    kernels = {"rows": triton_kernels.rows_matvec, "columns": triton_kernels.columns_matvec}
    rows_tiles = ((16, 128), (16, 256), (16, 512), (32, 128), (32, 256))
    rows_plans = [
        Plan(stretch, *tile, warps, stages)
        for stretch, tile, warps, stages in itertools.product((128, 256, 512), rows_tiles, (1, 2), (4, 5, 8))
    ]
    plans = {
        ("rows", 1): rows_plans,
        ("columns", 1): [Plan(0, *tile) for tile in itertools.product((1, 2, 4), (1024, 2048, 4096), (2, 4, 8))],
        ("rows", 8): rows_plans,
        ("columns", 8): [Plan(0, *tile)
                         for tile in itertools.product((16, 32), (64, 128, 256, 512), (1, 2, 4), (3, 5))],
    }  # fmt: skip
    with ProcessPoolExecutor(max(os.cpu_count() or 2, 2) - 1, multiprocessing.get_context("spawn")) as pool:
        every = [(*which, plan) for which, some in plans.items() for plan in some]
        fits = dict(zip(every, pool.map(compile_plan, *zip(*every, strict=True)), strict=True))
    rows = []
    for (kind, batch), some in plans.items():
        together = {plan: 1.0 for plan in some if fits[kind, batch, plan]}
        for d_in, d_out in options.matrices:
            matrices = Matrices(d_in, d_out, batch, torch.bfloat16, options)
            for sparsity in (0.5, 0.75, 0.9) if batch == 1 else (0.75, 0.9):
                found = []
                for plan in together:
                    sides, error = matrices.sides(kind, sparsity, partial(kernels[kind], plan=plan))
                    found.append(row(kind, f"{d_in} x {d_out}", batch, sparsity, measured(sides, options),
                                     torch.bfloat16, error=error, plan=plan))  # fmt: skip
                    together[plan] *= found[-1]["us"]["sparse"]
                for best in sorted(found, key=lambda one: one["us"]["sparse"])[:3]:
                    show(best)
                    print(f"    {best['plan']}")
                rows += found
        print(f"{kind}, batch {batch}, all together: {min(together, key=lambda plan: together[plan])}", flush=True)
    return rows


def compile_plan(kind: str, batch: int, plan: Sequence[int]) -> bool:
    """In a process of its own, into Triton's cache on disk; whether the device has room for it."""
    from triton.runtime.errors import OutOfResources

    from sparsekit.sparsifiers import triton_kernels

    x, weight = (torch.zeros(shape, device="cuda", dtype=torch.bfloat16) for shape in ((batch, 4096), (4096, 4096)))
    try:
        if kind == "rows":
            triton_kernels.rows_matvec(x, weight, triton_kernels.Plan(*plan))
        else:
            triton_kernels.columns_matvec(x, weight, x != 0, triton_kernels.Plan(*plan))
    except OutOfResources:
        return False
    return True


# --- a feed-forward


def threshold(x: Tensor, sparsity: float) -> Tensor:
    """What a share of |x| does not pass."""
    if sparsity == 0:
        return x.new_tensor(-1.0)
    return x.abs().float().flatten().kthvalue(max(round(sparsity * x.numel()), 1)).values.to(x.dtype)


def masked(x: Tensor, least: Tensor) -> Tensor:
    return torch.where(x.abs() > least, x, 0)


def ffn_dense(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    return F.linear(F.silu(F.linear(x, w["gate"])) * F.linear(x, w["up"]), w["down"])


def ffn_by_gate(x: Tensor, w: dict[str, Tensor], sparsity: float | None = None) -> Tensor:
    gate = F.silu(F.linear(x, w["gate"]))
    keep = gate.abs() > w["least gate"]
    up = columns_matvec(x, w["up"], keep, sparsity)
    return rows_matvec(torch.where(keep, gate * up, 0), w["down_IO"], sparsity)


def ffn_known(x: Tensor, w: dict[str, Tensor], sparsity: float | None = None) -> Tensor:
    keep = w["keep"].repeat_interleave(2, -1)
    gate, up = columns_matvec(x, w["gate_up_by_neuron"], keep, sparsity).unflatten(-1, (-1, 2)).unbind(-1)
    return rows_matvec(F.silu(gate) * up, w["down_IO"], sparsity)


def ffn_inputs(x: Tensor, w: dict[str, Tensor], sparsity: float | None = None) -> Tensor:
    gate, up = rows_matvec(masked(x, w["least x"]), w["gate_up_IO"], sparsity).chunk(2, dim=-1)
    return rows_matvec(masked(F.silu(gate) * up, w["least hidden"]), w["down_IO"], sparsity)


def compare_ffn(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    generator = torch.Generator(options.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=options.device)
    for dtype, (d_model, d_ff), batch in itertools.product(options.dtypes, options.ffns, options.batches[:1]):
        weights: list[dict[str, Tensor]] = []
        for _ in range(2):
            scales = {"gate": (d_ff, d_model), "up": (d_ff, d_model), "down": (d_model, d_ff)}
            w = {name: (draw(*shape) * shape[1] ** -0.5).to(dtype) for name, shape in scales.items()}
            w["down_IO"] = w["down"].T.contiguous()
            w["gate_up_IO"] = torch.cat([w["gate"], w["up"]]).T.contiguous()
            w["gate_up_by_neuron"] = torch.stack([w["gate"], w["up"]], 1).flatten(0, 1)
            weights.append(w)
        xs = [draw(batch, d_model).to(dtype) for _ in weights]
        gpu = options.device.type == "cuda"
        forwards = {"gate": ffn_by_gate, "known": ffn_known, "inputs": ffn_inputs}
        dense = torch.compile(ffn_dense, dynamic=False) if gpu else ffn_dense
        for sparsity in SPARSITIES[1:] if gpu else SPARSITIES:
            for x, w in zip(xs, weights, strict=True):
                gate = F.silu(F.linear(x, w["gate"]))
                w["least gate"], w["least x"] = threshold(gate, sparsity), threshold(x, sparsity)
                w["keep"] = gate.abs() > w["least gate"]
                gate, up = (masked(x, w["least x"]) @ w["gate_up_IO"]).chunk(2, dim=-1)
                w["least hidden"] = threshold(F.silu(gate) * up, sparsity)
            for name, sparse in forwards.items():
                # not told how sparse on a GPU, for which it would be compiled anew
                forward = torch.compile(sparse, dynamic=False) if gpu else partial(sparse, sparsity=sparsity)
                calls = {"dense": turns(dense, xs, weights, options=options),
                         "sparse": turns(forward, xs, weights, options=options)}  # fmt: skip
                goal = 4.0 if sparsity == 0.9 and not gpu else None
                rows.append(row(f"ffn, {name}", f"{d_model} x {d_ff}", batch, sparsity, measured(calls, options), dtype,
                                goal=goal))  # fmt: skip
                show(rows[-1])
    return rows


# --- a whole step


class Joined(nn.Module):
    """In place of some projections of one input: one product, of which each takes its part."""

    def __init__(self, linears: Sequence[nn.Module], sparse: bool):
        super().__init__()
        weight_OI = torch.cat([linear.weight.detach() for linear in linears])
        self.weight, self.sparse = weight_OI.T.contiguous() if sparse else weight_OI, sparse
        self.least, self.calibrate, self.y = weight_OI.new_tensor(-1.0), None, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.sparse:
            return F.linear(x, self.weight)
        x_BI = x.flatten(0, -2)
        if self.calibrate is not None:
            self.least.copy_(threshold(x_BI, self.calibrate))
        return rows_matvec(masked(x_BI, self.least), self.weight).unflatten(0, x.shape[:-1])


class Part(nn.Module):
    """The first that is called has the product made, the last lets it go."""

    beside = Linear.beside

    def __init__(self, joined: Joined, start: int, size: int, last: bool):
        super().__init__()
        self.joined, self.start, self.size, self.last = joined, start, size, last

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        if self.start == 0:
            self.joined.y = self.joined(x)
        y = self.joined.y.narrow(-1, self.start, self.size)
        if self.last:
            self.joined.y = None
        return y


def join(model: nn.Module, sparse: bool) -> list[Joined]:
    """Puts joined projections into a model; the head stays."""
    made = []
    for layer in model.layers:
        for owner, names in ((layer.attention, "qkv"), (layer.attention, "o"), (layer.ffn, ("gate", "up")),
                             (layer.ffn, ("down",))):  # fmt: skip
            linears = [getattr(owner, name) for name in names]
            made.append(Joined(linears, sparse))
            start = 0
            for name, linear in zip(names, linears, strict=True):
                setattr(owner, name, Part(made[-1], start, linear.d_out, name == names[-1]))
                start += linear.d_out
    return made


def compare_models(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    dtype, batch, device = torch.bfloat16, 1, options.device
    for name, (d_model, n_layers, n_heads, n_kv_heads, d_ff, vocab, goal) in options.models.items():
        block = {"attention": {"type": "gqa", "n_heads": n_heads, "n_kv_heads": n_kv_heads, "position": "rope"},
                 "ffn": {"type": "swiglu", "d_ff": d_ff}}  # fmt: skip
        spec = {"d_model": d_model, "n_layers": n_layers, "vocab_size": vocab, "max_seq_len": 64, "block": block}
        ids = torch.arange(batch, device=device)[:, None]

        def side(kind: str, spec: dict = spec) -> tuple[nn.Module, list[Joined]]:
            model = build_model(spec, seed=0, device=device, dtype=dtype).eval()
            return model, [] if kind == "dense" else join(model, sparse=kind == "sparse")

        models = {kind: side(kind) for kind in ("dense", "joined", "sparse")}
        sparse, parts = models["sparse"]
        least: dict[float, list[Tensor]] = {}
        for sparsity in SPARSITIES[1:]:
            for part in parts:
                part.calibrate = sparsity
            sparse(ids)
            least[sparsity] = [part.least.clone() for part in parts]
        for part in parts:
            part.calibrate = None
        if device.type == "cuda":
            torch.compiler.reset()
            for model, _ in models.values():
                for layer in model.layers:
                    layer.compile(dynamic=False)
        for sparsity, values in least.items():
            for part, value in zip(parts, values, strict=True):
                part.least.copy_(value)
            sides = {kind: [partial(model, ids)] for kind, (model, _) in models.items()}
            aim = goal if sparsity == 0.5 else None
            us = measured(sides, options)
            rows.append(row(f"model {name}", f"{d_model} x {n_layers}", batch, sparsity, us, dtype, goal=aim))
            show(rows[-1])
        del models, sparse, parts
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=("kernels", "ffn", "model"))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="*")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--break-even", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = options.device.type == "cuda"
    dtypes = options.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    options.dtypes = [getattr(torch, dtype) for dtype in dtypes]
    options.matrices, options.ffns, options.models = MATRICES, FFNS, MODELS
    if options.toy:
        options.matrices, options.ffns = ((192, 64), (64, 192)), ((64, 192),)
        options.models = {"toy": (64, 2, 4, 2, 192, 256, None)}
    name = torch.cuda.get_device_name() if gpu else f"{platform.processor()}, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}", flush=True)
    whole = {"kernels": compare_kernels, "ffn": compare_ffn, "model": compare_models}
    if options.break_even or options.tune:
        chosen = [break_even] * options.break_even + [tune] * options.tune
    else:
        chosen = [whole[part] for part in options.parts or (whole if gpu or options.toy else ("kernels", "ffn"))]
    rows: list[dict[str, Any]] = []
    for compare in chosen:
        rows += compare(options)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
