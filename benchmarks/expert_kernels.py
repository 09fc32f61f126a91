"""The fused products of experts, plan by plan, beside torch's grouped_mm: teraFLOPs a second on a GPU; and its passes.

python benchmarks/expert_kernels.py [--shapes 8x2 32x4 64x8] [--jobs 12] [--out FILE]

Balanced random routing of 32,768 tokens, bfloat16. grouped_mm gets its rows gathered already and computes the products
alone; the fused ones gather, and compute silu(g) u and its gradient besides. Each product is held against grouped_mm's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dense import timed  # beside this file
from moe import SHAPES
from torch import Tensor

from sparsekit.components import expert_kernels as kernels
from sparsekit.components.expert_kernels import Plan

PRODUCTS = [Plan(128, 64, 4, 3), Plan(128, 64, 4, 4), Plan(128, 64, 8, 4), Plan(256, 64, 8, 3), Plan(256, 64, 8, 4)]


class Case:
    """Rows of a shape, its weights, and what the products are given."""

    def __init__(self, shape: str, device: torch.device, n_tokens: int | None = None):
        d_model, n_experts, k, d_ff, n = SHAPES[shape]
        n = n_tokens or n
        torch.manual_seed(0)
        self.expert_M = torch.rand(n, n_experts, device=device).topk(k).indices.flatten()
        self.order_M, row_M, self.offsets_E, self.tiles_4T = kernels.sort(self.expert_M, n_experts)
        self.row_NS, self.token_M = row_M.view(n, k), self.order_M // k
        self.weight_NS = torch.rand(n, k, device=device)

        def drawn(*sides: int) -> Tensor:
            return (torch.randn(*sides, device=device) * sides[-1] ** -0.5).bfloat16()

        self.x_ND = drawn(n, d_model) * d_model**0.5
        self.gate_EFD, self.up_EFD = drawn(n_experts, d_ff, d_model), drawn(n_experts, d_ff, d_model)
        self.x_MD = self.x_ND[self.token_M]
        self.g_MF, self.u_MF = (self.grouped(self.x_MD, w) for w in (self.gate_EFD, self.up_EFD))
        self.dh_MF = torch.randn_like(self.g_MF)
        self.down_EDF = drawn(n_experts, d_model, d_ff)
        self.flops = 2.0 * n * k * d_model * d_ff

    def grouped(self, a_MK: Tensor, weight_EOK: Tensor) -> Tensor:
        return F.grouped_mm(a_MK, weight_EOK.transpose(-2, -1), offs=self.offsets_E)

    def products(self) -> Iterator[tuple[str, float, Callable[[Plan], Any], Callable[[], Any]]]:
        """(name, FLOPs, fused by a plan, by grouped_mm)."""
        c = self
        yield (
            "up", 2 * c.flops,
            lambda plan: kernels.up(c.x_ND, c.weight_NS, c.order_M, c.tiles_4T, c.gate_EFD, c.up_EFD, plan)[:2],
            lambda: (c.grouped(c.x_MD, c.gate_EFD), c.grouped(c.x_MD, c.up_EFD)),
        )  # fmt: skip
        yield (
            "down", c.flops,
            lambda plan: (kernels.down(c.g_MF, c.tiles_4T, c.down_EDF, plan),),
            lambda: (c.grouped(c.g_MF, c.down_EDF),),
        )  # fmt: skip
        yield (
            "up_back", 2 * c.flops,
            lambda plan: (kernels.up_back(c.g_MF, c.u_MF, c.tiles_4T, c.gate_EFD, c.up_EFD, plan),),
            lambda: (F.grouped_mm(c.g_MF, c.gate_EFD, offs=c.offsets_E)
                     + F.grouped_mm(c.u_MF, c.up_EFD, offs=c.offsets_E),),
        )  # fmt: skip

    def passes(self) -> Iterator[tuple[str, float, Callable[[], Any]]]:
        """(name, bytes, run)."""
        c = self
        yield "spread", 2.0 * (c.x_ND.numel() + c.x_MD.numel()), lambda: kernels.spread(c.x_ND, c.row_NS)
        yield "spread, torch", 2.0 * (c.x_ND.numel() + c.x_MD.numel()), lambda: c.x_ND[c.token_M]
        yield (
            "act_back", 10.0 * c.g_MF.numel(),
            lambda: kernels.act_back(c.dh_MF, c.weight_NS, c.order_M, c.g_MF, c.u_MF),
        )  # fmt: skip
        n_experts = len(c.offsets_E)
        yield "sort", 24.0 * len(c.order_M), lambda: kernels.sort(c.expert_M, n_experts)
        narrow_M = c.expert_M.to(torch.int16)
        yield "sort, torch", 24.0 * len(c.order_M), lambda: narrow_M.sort(stable=True)


def milliseconds(run: Callable[[], Any], steps: int) -> float:
    run()  # compiles, and is the first to touch what it reads
    return timed(run, steps, torch.device("cuda"))


def compiled(job: tuple[str, str, int]) -> None:
    """Leaves a kernel in Triton's cache."""
    shape, wanted, index = job
    case = Case(shape, torch.device("cuda"), 1024)
    for name, _, fused, _ in case.products():
        if name == wanted:
            try:
                fused(PRODUCTS[index])
            except Exception as error:
                print(f"{shape} {name} {tuple(PRODUCTS[index])}: {type(error).__name__} {str(error)[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["32x4", "64x8", "8x2"])
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = ("up", "down", "up_back")
    jobs = [(shape, name, i) for shape in options.shapes for name in names for i in range(len(PRODUCTS))]
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        pool.map(compiled, jobs, chunksize=4)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    found: dict[str, Any] = {}
    for shape in options.shapes:
        case = Case(shape, torch.device("cuda"))
        for name, flops, fused, grouped in case.products():
            told = [f"grouped_mm {flops / milliseconds(grouped, options.steps) / 1e9:4.0f}"]
            wanted = grouped()
            for plan in PRODUCTS:
                try:
                    rate = flops / milliseconds(lambda f=fused, p=plan: f(p), options.steps) / 1e9
                    pairs = zip(fused(plan), wanted, strict=True)
                    error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
                    wrong = "" if error < 1e-2 else f" WRONG {error:.1e}"
                except Exception as problem:  # more shared memory than there is
                    rate, wrong = 0.0, f" {type(problem).__name__}"
                told.append(f"{tuple(plan)} {rate:4.0f}{wrong}")
                found[f"{shape} {name} {tuple(plan)}"] = rate
            print(f"{shape:5}{name:18}{'; '.join(told)}", flush=True)
        for name, n_bytes, run in case.passes():
            ms = milliseconds(run, options.steps)
            print(f"{shape:5}{name:18}{ms:.4f} ms, {n_bytes / ms / 1e9:.2f} TB/s", flush=True)
        del case
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
