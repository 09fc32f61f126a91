"""What per-layer statistics cost: steps with them against steps without, interleaved, medians.

python benchmarks/layer_statistics.py [--every 100] [--repeats 15] [--size small|400m] [--compile] [--without-moments]

A step is forward, backward and AdamW on random tokens; of the MoE model every layer is a mixture. "share" is what is
added to a mean step when every ``--every``-th collects: (with - without) / (every without). On a GPU the peak memory of
either kind of step stands beside it. With ``--compile`` the steps without are compiled; those with run their layers
eagerly, and the time of such a step without any statistics ("eager") tells how much of the cost that is.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.model.build import build_model
from sparsekit.training.statistics import LayerStatistics

SIZES: dict[str, dict[str, Any]] = {
    "small": {"d_model": 256, "n_layers": 4, "heads": 4, "d_ff": 768, "vocab": 4096, "length": 256, "batch": 4},
    "400m": {"d_model": 1536, "n_layers": 16, "heads": 12, "d_ff": 2304, "vocab": 50304, "length": 1024, "batch": 16},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--every", type=int, default=100)
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--size", choices=SIZES, default="small")
    arguments.add_argument("--models", nargs="+", default=["dense", "moe"])
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--compile", action="store_true")
    arguments.add_argument("--without-moments", action="store_true")
    options = arguments.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    told = "variance only" if options.without_moments else "with moments"
    print(f"{name}, torch {torch.__version__}, {options.size}, {told}, {'compiled' if options.compile else 'eager'}")
    print(f"{'model':8}{'without':>11}{'eager':>11}{'with':>11}{'share':>9}{'memory without':>16}{'with':>7} GiB")
    for kind in options.models:
        print(row(kind, SIZES[options.size], device, options), flush=True)


def row(kind: str, size: dict[str, Any], device: torch.device, options: argparse.Namespace) -> str:
    model = build_model(spec(kind, size), seed=0, device=device)
    if options.compile:
        for layer in model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    shape = (size["batch"], size["length"] + 1)
    ids = torch.randint(size["vocab"], shape, generator=torch.Generator().manual_seed(0)).to(device)
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()

    def loss() -> Tensor:
        with autocast:
            logits_BTV = model(ids[:, :-1])
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids[:, 1:].flatten())

    def without() -> None:
        loss().backward()

    def eager() -> None:
        kept = [layer._compiled_call_impl for layer in model.layers]
        for layer in model.layers:
            layer._compiled_call_impl = None
        loss().backward()
        for layer, compiled in zip(model.layers, kept, strict=True):
            layer._compiled_call_impl = compiled

    def collecting() -> None:
        statistics = LayerStatistics(model, moments=not options.without_moments)
        with statistics.collecting(1.0):
            loss().backward()
        statistics.norms()
        statistics.rows()

    kinds: dict[str, Callable[[], None]] = {"without": without, "eager": eager, "with": collecting}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    peaks: dict[str, float] = {}
    for repeat in range(options.repeats + 3):  # three to warm up
        for name, forward_backward in kinds.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            forward_backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: median(values) for name, values in seconds.items()}
    share = (medians["with"] - medians["without"]) / (options.every * medians["without"])
    times = "".join(f"{medians[name] * 1e3:8.1f} ms" for name in kinds)
    memory = f"{peaks['without']:16.1f}{peaks['with']:7.1f}" if peaks else f"{'-':>16}{'-':>7}"
    return f"{kind:8}{times}{share:9.3%}{memory}"


def spec(kind: str, size: dict[str, Any]) -> dict[str, Any]:
    ffn: dict[str, Any] = {"type": "swiglu", "d_ff": size["d_ff"]}
    if kind == "moe":
        expert = {"type": "swiglu", "d_ff": size["d_ff"] // 2}
        ffn = {"type": "moe", "n_experts": 8, "router": {"type": "top_k", "k": 2}, "expert": expert}
    return {
        "d_model": size["d_model"],
        "n_layers": size["n_layers"],
        "vocab_size": size["vocab"],
        "max_seq_len": size["length"],
        "block": {"attention": {"type": "mha", "n_heads": size["heads"]}, "ffn": ffn},
    }


if __name__ == "__main__":
    main()
