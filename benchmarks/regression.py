"""Whether a change has made training slower: a few minutes on one GPU, exit code 1 if it has.

python benchmarks/regression.py [--only dense moe] [--rounds 5] [--toy]

Each figure is a ratio of two sides that run in turns, so that it says the same on another GPU, of another day: a
spec-built model to the module by hand, a mixture's layer to the dense one of equal active size, a skewed load to a
balanced one. ``FLOORS`` are what RESULTS.md has, less ``MARGIN`` for noise; a change that improves one raises its
floor here. ``--toy`` runs the small shapes on any device, to see that everything works, and judges nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import dense  # beside this file
import moe
import torch

MARGIN = 0.03
# figure: the least that it may be (ratios of speeds: more is better)
FLOORS = {
    "dense 475m, whole, to the module by hand": 0.998,
    "dense 475m, by layers, to the module by hand": 0.992,
    "moe 8x2, to dense": 0.88,
    "moe 32x4, to dense": 0.58,
    "moe 64x8, to dense": 0.60,
    "moe 32x4, skewed, to balanced": 0.88,
}


def dense_figures(shape: str, options: argparse.Namespace, device: torch.device) -> Iterable[tuple[str, float]]:
    rows = {row["side"]: row for row in dense.compare(shape, options.steps, options.rounds, device, False)}
    for side, told in (("spec, whole", "whole"), ("spec, layers", "by layers")):
        yield f"dense {shape}, {told}, to the module by hand", rows[side]["against_hand"]


def moe_figures(shape: str, options: argparse.Namespace, device: torch.device) -> Iterable[tuple[str, float]]:
    rows = {row["side"]: row for row in moe.compare_layers(shape, options, device)}
    yield f"moe {shape}, to dense", rows["mixture"]["against_dense"]
    yield f"moe {shape}, skewed, to balanced", rows["mixture"]["ms"] / rows["skewed"]["ms"]


def verdict(figure: str, found: float) -> tuple[bool, str]:
    """Whether a figure is what it was, and in words."""
    floor = FLOORS.get(figure)
    if floor is None:
        return True, "no floor"
    least = floor * (1 - MARGIN)
    return found >= least, f"{'as before' if found >= least else 'SLOWER'} (was {floor:.3f}, at least {least:.3f})"


SETS = {"dense": (dense_figures, ["475m"]), "moe": (moe_figures, ["8x2", "32x4", "64x8"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skew", type=float, default=1.5)
    parser.add_argument("--toy", action="store_true")
    parser.set_defaults(profile=False)
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.toy:
        parser.error("no CUDA device here; --toy shows that everything works, without a verdict")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", f"torch {torch.__version__}", flush=True)
    fine = True
    for name in options.only:
        figures, shapes = SETS[name]
        for shape in ["toy"] if options.toy else shapes:
            for figure, found in figures(shape, options, device):
                held, told = verdict(figure, found)
                fine &= held
                print(f"{figure:45}  {found:.3f}  {told}", flush=True)
            torch.compiler.reset()
    if not options.toy:
        print("nothing is slower than it was" if fine else "slower than it was: see above")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
