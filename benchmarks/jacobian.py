"""The mean Jacobian of every layer: row by row, exact in batches, and structured, beside each other.

python benchmarks/jacobian.py [--size toy|small|400m] [--device cpu|cuda] [--dtype float32|bfloat16] [--layers N]
    [--sequences N] [--rows N] [--exact-sequences N] [--repeats N] [--precision float32|tf32|bf16]

"row by row" is one backward pass a row of the Jacobian through the whole layer, as the published script does it: a
gradient of zeros and ones is made for each row, and the mean is fetched row after row. It and "exact" take long, so
they may be timed on some of the rows and sequences, whose time is then multiplied to all of them ("x 16" beside it; of
few rows the forward pass counts too often); scalars are of what was run. Times are medians of interleaved repeats
after a warm-up.
"TFLOP/s" counts the structured form's largest product alone, 8 d_ff head_dim d_model a token and layer.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from sparsekit.model.build import build_model
from sparsekit.probes.base import ProbeResult, Tokens
from sparsekit.probes.jacobian import METRICS, Jacobian
from sparsekit.probes.layered import LayeredModel, layered

SIZES: dict[str, dict[str, int]] = {
    "toy": {"d_model": 64, "n_layers": 4, "heads": 4, "d_ff": 192, "vocab": 256, "length": 64, "sequences": 8},
    "small": {"d_model": 768, "n_layers": 2, "heads": 12, "d_ff": 2048, "vocab": 4096, "length": 256, "sequences": 4},
    "400m": {
        "d_model": 1536,
        "n_layers": 16,
        "heads": 12,
        "d_ff": 2304,
        "vocab": 50304,
        "length": 512,
        "sequences": 50,
    },
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", choices=SIZES, default="small")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments.add_argument("--layers", type=int)
    arguments.add_argument("--sequences", type=int)
    arguments.add_argument("--rows", type=int, help="of the row-by-row loop; all of them otherwise")
    arguments.add_argument("--exact-sequences", type=int, help="on which exact is timed; all of them otherwise")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--precision", choices=["float32", "tf32", "bf16"])
    options = arguments.parse_args()
    size = SIZES[options.size]
    layers, sequences = options.layers or size["n_layers"], options.sequences or size["sequences"]
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.dtype}, {options.size}:")
    print(f"{layers} layers, {sequences} x {size['length']} tokens, {size}")

    view = model(size, layers, device, getattr(torch, options.dtype))
    ids = torch.randint(size["vocab"], (sequences, size["length"]), generator=torch.Generator().manual_seed(0))
    some = min(sequences, options.exact_sequences or sequences)
    rows = min(size["d_model"], options.rows or size["d_model"])
    runs: dict[str, tuple[Callable[[], Any], float]] = {
        "row by row": (lambda: row_by_row(view, ids[:some], rows), size["d_model"] / rows * sequences / some),
        "exact": (lambda: probe(view, ids[:some], method="exact"), sequences / some),
        "structured": (lambda: probe(view, ids, method="structured", precision=options.precision), 1.0),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, float] = {}
    results: dict[str, Any] = {}
    row_by_row(view, ids[:1], 2)
    probe(view, ids[:1], method="structured", precision=options.precision)
    for _ in range(options.repeats):
        for name, (run, _) in runs.items():
            times[name].append(timed(run, device, results, memory, name))

    print(f"{'':12}{'seconds':>11}{'':>10}{'ratio':>8}{'memory GB':>11}" + "".join(f"{m[:12]:>14}" for m in METRICS))
    slowest = median(times["row by row"]) * runs["row by row"][1]
    for name, (_, factor) in runs.items():
        seconds, found = median(times[name]) * factor, results[name]
        told = f"(x {factor:.4g})" if factor != 1 else ""
        scalars = [f"{found.scalars[m]:14.6g}" if isinstance(found, ProbeResult) else f"{'':14}" for m in METRICS]
        print(f"{name:12}{seconds:11.2f}{told:>10}{slowest / seconds:8.1f}{memory[name]:11.2f}" + "".join(scalars))
    tokens = layers * sequences * size["length"]
    flops = 8 * size["d_ff"] * (size["d_model"] // size["heads"]) * size["d_model"] * tokens
    print(f"structured: {flops / median(times['structured']) / 1e12:.3g} TFLOP/s")
    if some == sequences and rows == size["d_model"]:
        off = (results["row by row"] - mean(results["structured"])).norm() / results["row by row"].norm()
        print(f"structured differs from row by row by {off:.1e} (relative, all layers)")


def model(size: dict[str, int], layers: int, device: torch.device, dtype: torch.dtype) -> LayeredModel:
    block = {"attention": {"type": "mha", "n_heads": size["heads"]}, "ffn": {"type": "swiglu", "d_ff": size["d_ff"]}}
    spec = {
        "d_model": size["d_model"], "n_layers": layers, "vocab_size": size["vocab"], "max_seq_len": size["length"],
        "block": block,
    }  # fmt: skip
    return layered(build_model(spec, seed=0, device=device).to(dtype).eval())


def timed(
    run: Callable[[], Any], device: torch.device, results: dict[str, Any], memory: dict[str, float], name: str
) -> float:
    """Seconds that a run takes; its result, and on a GPU the memory that it took beside what was held, in GB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    results[name] = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    memory[name] = (torch.cuda.max_memory_allocated() - held) / 1e9 if device.type == "cuda" else float("nan")
    return seconds


def probe(view: LayeredModel, ids: torch.Tensor, **params: Any) -> ProbeResult:
    return Jacobian(Jacobian.Params(mean_jacobian=True, **params)).run(view, Tokens.of(ids, 8))


def mean(result: ProbeResult) -> torch.Tensor:
    return torch.from_numpy(result.matrices["mean_jacobian"])


def row_by_row(view: LayeredModel, ids: torch.Tensor, rows: int) -> torch.Tensor:
    """[L, D, D], the first rows of it: a backward pass each, batches of eight."""
    d_model = view.d_model
    total = torch.zeros(view.n_layers, d_model, d_model)
    for batch_ids in ids.split(8):
        batch = view.start(batch_ids)
        h = batch.h_0.detach()
        for layer in range(view.n_layers):
            h = h.detach().requires_grad_()
            out = batch.layer(layer, h)
            for row in range(rows):
                cotangent = torch.zeros_like(out)
                cotangent[..., row] = 1
                (gradient,) = torch.autograd.grad(out, h, cotangent, retain_graph=True)
                total[layer, row] += gradient.float().mean((0, 1)).cpu() * (len(batch_ids) / len(ids))
            h = out
    return total


if __name__ == "__main__":
    main()
