"""Head and loss, whole against in chunks: time and peak memory of forward and backward, interleaved, medians.

python benchmarks/objective.py [--size small|400m|1b] [--chunks 1024 4096] [--precision fp32|bf16] [--z-loss 1e-4]

The sides: ``whole`` (all logits at once), ``chunked`` (as train.objective.chunk_tokens has it), ``recomputed`` (as it
is for a head that is no plain product) and, where torch has it and there is no z-loss, ``torch``, its own
F.linear_cross_entropy in chunks of about as many tokens. Weights are float32, under "bf16" with autocast. Memory is
the most that is held at any time beyond inputs and weight; the weight's gradient is part of it, and its size is told.
Beside each side stands how far its gradients lie from those of ``whole`` in float32, over the latter's norm.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.components.contracts import compute_dtype
from sparsekit.model.decoder import Unembedding
from sparsekit.training.objectives import chunked_terms, terms

SIZES = {  # tokens of a micro-batch, d_model, vocabulary
    "small": (2048, 256, 8192),
    "400m": (16 * 1024, 1536, 50304),
    "1b": (16 * 1024, 2048, 128256),
}
WARM_UP = 3

Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--size", choices=SIZES, default="small")
    arguments.add_argument("--chunks", type=int, nargs="+", default=[512, 2048])
    arguments.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    arguments.add_argument("--z-loss", type=float, default=0.0)
    arguments.add_argument("--repeats", type=int, default=10)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = arguments.parse_args()
    device = torch.device(options.device)
    n_tokens, width, vocabulary = SIZES[options.size]
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(n_tokens, width, generator=generator).to(device).requires_grad_()
    weight_VD = (0.02 * torch.randn(vocabulary, width, generator=generator)).to(device).requires_grad_()
    targets_N = torch.randint(vocabulary, (n_tokens,), generator=generator).to(device)
    inputs = x_ND, weight_VD, targets_N
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    told = f"{n_tokens} tokens, d_model {width}, vocabulary {vocabulary}, {options.precision}"
    print(f"{name}, torch {torch.__version__}; {told}, z-loss {options.z_loss}")
    print(f"the weight's gradient: {weight_VD.nbytes / 2**20:.0f} MiB")

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if options.precision == "bf16" else nullcontext()

    exact = run(whole(options.z_loss), inputs, nullcontext())
    made = sides(options.z_loss, options.chunks, n_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(options.repeats + WARM_UP):
        for name, side in made.items():
            began = time.perf_counter()
            run(side, inputs, autocast())
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    print(f"{'side':18}{'time':>12}{'':>8}{'memory':>14}{'d x off':>11}{'d W off':>11}")
    first = median(seconds["whole"])
    for name, side in made.items():
        middle = median(seconds[name])
        memory = peak(lambda side=side: run(side, inputs, autocast()), device)  # type: ignore[misc]
        off = [f"{distance(a, b):11.1e}" for a, b in zip(run(side, inputs, autocast()), exact, strict=True)]
        print(f"{name:18}{middle * 1e3:9.1f} ms{first / middle:7.2f}x{memory / 2**20:10.0f} MiB{''.join(off)}")


def sides(z_loss: float, chunks: list[int], n_tokens: int) -> dict[str, Side]:
    made = {"whole": whole(z_loss)}
    for chunk in chunks:
        made[f"chunked {chunk}"] = chunked(z_loss, chunk, as_product=True)
        made[f"recomputed {chunk}"] = chunked(z_loss, chunk, as_product=False)
        if hasattr(F, "linear_cross_entropy") and not z_loss:
            made[f"torch {chunk}"] = torchs(chunk)
    return made


def whole(z_loss: float) -> Side:
    return lambda x_ND, weight_VD, targets_N: terms(F.linear(x_ND, weight_VD), targets_N, z_loss)[0]


def chunked(z_loss: float, chunk: int, as_product: bool) -> Side:
    def side(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        head = Unembedding(lambda x: F.linear(x, weight_VD), weight_VD if as_product else None)
        return chunked_terms(x_ND, head, targets_N, z_loss, chunk)[0]

    return side


def torchs(chunk: int) -> Side:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def side(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        dtype = compute_dtype(x_ND.device, x_ND.dtype)  # autocast does not know the function
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
        return F.linear_cross_entropy(x_ND, weight_VD, targets_N, reduction="sum", options=options)

    return side


def run(side: Side, inputs: tuple[Tensor, Tensor, Tensor], autocast: AbstractContextManager[Any]) -> list[Tensor]:
    """Forward and backward of a mean loss; the gradients of inputs and weight."""
    x_ND, weight_VD, targets_N = inputs
    with autocast:
        loss = side(x_ND, weight_VD, targets_N)
    return list(torch.autograd.grad(loss / len(targets_N), (x_ND, weight_VD)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def peak(act: Callable[[], object], device: torch.device) -> float:
    """The most bytes that are held at any time beyond what is held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        act()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


if __name__ == "__main__":
    main()
