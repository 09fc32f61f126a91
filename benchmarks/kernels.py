"""Every attention kernel against the eager one: the largest errors, forward and backward, and the time it takes.

python benchmarks/kernels.py [--seq 1024] [--shapes 16,4,128] [--out errors.json]

The reference is the eager kernel in float32 on the same bfloat16 inputs; errors are the largest absolute difference
over the largest absolute value of the reference. Beside each kernel stands the eager kernel run in its own dtype.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.components.contracts import ForwardContext
from sparsekit.components.kernels import Extras, Kernel, Rule
from sparsekit.registry import registry

KERNELS = ("eager", "sdpa", "flex", "varlen", "flash", "xformers")
# name, what is asked of the kernel, whether the batch holds several documents
CASES: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("causal", {}, False),
    ("window 128", {"window": 128, "features": {"window"}}, False),
    ("window 128, 4 sinks", {"window": 128, "sinks": 4, "features": {"window", "sinks"}}, False),
    ("documents", {}, True),
    ("window 128, documents", {"window": 128, "features": {"window"}}, True),
    ("softcap 20", {"softcap": 20.0, "features": {"softcap"}}, False),
    ("alibi", {"features": {"alibi"}}, False),
    ("sink logits", {"features": {"sink_logits"}}, False),
)
SHAPES = ("16,16,64", "16,4,128")  # heads, key-value heads, head_dim


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seq", type=int, nargs="+", default=[1024, 1000])
    arguments.add_argument("--shapes", nargs="+", default=SHAPES)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--kernels", nargs="+", default=KERNELS)
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{name}, torch {torch.__version__}; errors relative to the largest value of the float32 reference")
    rows = []
    shapes = [[int(size) for size in shape.split(",")] for shape in options.shapes]
    for length, (heads, groups, width), case in itertools.product(options.seq, shapes, CASES):
        torch.compiler.reset()  # more shapes than anybody's run has; dynamo would stop compiling flex
        rows += compare(options.kernels, options.batch, length, heads, groups, width, case, device)
    print(f"{'kernel':10}{'case':24}{'seq':>6}{'heads':>7}{'dim':>5}{'forward':>11}{'backward':>11}{'ms':>9}")
    for row in rows:
        shape = f"{row['seq']:6}{row['heads']:>7}{row['head_dim']:5}"
        told = row["refused"] or f"{row['forward']:11.2e}{row['backward']:11.2e}{row['ms']:9.3f}"
        print(f"{row['kernel']:10}{row['case']:24}{shape}  {told}", flush=True)
    worst = {}
    for row in rows:
        if not row["refused"]:
            old = worst.get(row["kernel"], (0.0, 0.0))
            worst[row["kernel"]] = max(old[0], row["forward"]), max(old[1], row["backward"])
    for kernel, (forward, backward) in worst.items():
        print(f"largest of {kernel:10} forward {forward:.2e}  backward {backward:.2e}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


def compare(
    kernels: list[str], n_batch: int, length: int, heads: int, groups: int, width: int,
    case: tuple[str, dict[str, Any], bool], device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each kernel."""
    label, asked, several = case
    features = frozenset(asked.get("features", ()))
    rule = Rule(asked.get("window"), asked.get("sinks", 0), asked.get("softcap"), features, width)
    generator = torch.Generator(device).manual_seed(length + width)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).bfloat16()

    inputs = [randn(n_batch, h, length, width) for h in (heads, groups, groups)]
    gradient = randn(n_batch, heads, length, width)
    slopes = (
        2.0 ** -torch.arange(1, heads + 1, device=device, dtype=torch.float32) if "alibi" in rule.features else None
    )
    sink = torch.linspace(-1, 2, heads, device=device) if "sink_logits" in rule.features else None
    extras = Extras(width**-0.5, rule.softcap, slopes, sink)
    documents = (torch.rand(n_batch, length, generator=generator, device=device) < 0.01).cumsum(1) if several else None
    context = ForwardContext(documents_BT=documents)

    def run(kernel: Kernel, dtype: torch.dtype) -> tuple[list[Tensor], float]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        mask = kernel.prepare(rule, length, device, context)

        def once() -> list[Tensor]:
            out = kernel(*leaves, mask, rule, extras)
            return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]

        results = once()
        repeats = 10 if device.type == "cuda" else 1
        if device.type == "cuda":
            once()
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return [x.detach().float() for x in results], (time.perf_counter() - began) / repeats * 1e3

    eager = registry("kernel").get("eager")(Kernel.Params(), None)
    reference, _ = run(eager, torch.float32)
    rows = []
    for name in kernels:
        cls: type[Kernel] = registry("kernel").get(name)
        wanted = rule.features | ({"document"} if several else set())
        lacking = sorted(wanted - cls.features)
        reason = f"cannot do {', '.join(lacking)}" if lacking else cls.refusal(device, torch.bfloat16, True, width)
        row: dict[str, Any] = {
            "kernel": name, "case": label, "seq": length, "heads": f"{heads}/{groups}", "head_dim": width,
            "refused": reason,
        }  # fmt: skip
        if reason is None:
            try:
                results, milliseconds = run(cls(Kernel.Params(), None), torch.bfloat16)
            except Exception as error:  # the table says what failed, and goes on
                row["refused"] = f"FAILED {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            else:
                errors = [relative_error(x, y) for x, y in zip(results, reference, strict=True)]
                row |= {"forward": errors[0], "backward": max(errors[1:]), "ms": milliseconds}
        rows.append(row)
    return rows


def relative_error(x: Tensor, y: Tensor) -> float:
    """Largest difference over largest value; NaN is infinite."""
    if not x.isfinite().all():
        return float("inf")
    return ((x - y).abs().max() / y.abs().max()).item()


if __name__ == "__main__":
    main()
