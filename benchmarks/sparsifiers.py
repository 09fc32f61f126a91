"""Perplexity against sparsity for every sparsifier, on one trained model: a table, a picture, and what they say.

python benchmarks/sparsifiers.py [RUN_OR_hf:FOLDER] [--steps 250] [--sparsities 0,0.25,0.5,0.75,0.9] [--sequences 64]
    [--seed 0] [--out sparsifiers.png] [--json FILE]

Without a target, specs/runs/tiny.json is trained for some steps first. Every other window of the validation text is
calibrated on, the rest measured. Sparsifiers of neurons mask what down projections read, a third of a gated
feed-forward's weights or, by the gate, two thirds; sparsifiers of inputs mask all projections, so that the same
sparsity means more to them: the two are compared each with their own kind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsekit.probes.activation_sparsity import perplexity_ratio
from sparsekit.probes.base import Array, Tokens, bootstrap
from sparsekit.probes.layered import LayeredModel, layered
from sparsekit.probes.targets import open_subject, tokens_of
from sparsekit.sparsifiers.base import losses
from sparsekit.sparsifiers.calibration import mean_of
from sparsekit.sparsifiers.choose import make
from sparsekit.spec.load import load_spec
from sparsekit.training.run import train

NEURONS = {name: f"{name}:sparsity={{}}" for name in ("cett", "top_k", "fat_eps", "cats", "chess")}
INPUTS = {
    "teal": "teal:sparsity={}",
    "teal, greedy": "teal:sparsity={},allocation=greedy",
    "teal, global": "teal:sparsity={},allocation=greedy_global",
    "wina": "wina:sparsity={}",
    "wina, turned": "wina:sparsity={},transform=column_orthogonal",
}
KINDS = {"neurons": NEURONS, "inputs of all projections": INPUTS}
Found = dict[str, list[dict[str, Any]]]


def trained(steps: int) -> str:
    """A run of specs/runs/tiny.json, in a folder that stays."""
    spec = Path(__file__).parents[1] / "specs" / "runs" / "tiny.json"
    folder = Path(tempfile.mkdtemp()) / "tiny"
    train(load_spec(spec, [f"train.max_steps={steps}"]), out=folder)
    print()
    return str(folder)


def measured(view: LayeredModel, ways: Mapping[str, str], shares: list[float], ours: Tokens, rest: Tokens) -> Found:
    """Of every sparsifier at every sparsity: what is realised, and the ratio of perplexities with its interval."""
    dense_S = losses(view, rest)
    found: Found = {}
    for name, share in itertools.product(ways, shares):
        began = time.perf_counter()
        calibration = make(ways[name].format(share)).calibrate(view, ours)
        seconds = time.perf_counter() - began
        with calibration.install(view) as installed:
            sparse_S = losses(view, rest)
            realised = mean_of(installed.realised(), calibration.weights)
            bases = {id(site.rule.basis_II): site.rule.basis_II for site in installed.sites.values()}
            extra = sum(basis.numel() for basis in bases.values() if basis is not None)
        pairs: Array = np.stack((sparse_S, dense_S), 1)
        row = {
            "asked": share, "calibrated": calibration.sparsity, "realised": realised, "ratio": perplexity_ratio(pairs),
            "interval": bootstrap(pairs, perplexity_ratio), "perplexity": math.exp(sparse_S.mean()),
            "extra": extra / sum(calibration.weights.values()), "seconds": seconds,
        }  # fmt: skip
        found.setdefault(name, []).append(row)
        low, high = row["interval"]
        print(
            f"{name:14}{share:7.0%}{row['calibrated']:12.1%}{realised:10.1%}{row['perplexity']:12.3f}"
            f"{row['ratio'] - 1:+10.2%}   [{low - 1:+.2%}, {high - 1:+.2%}]{seconds:9.1f} s",
            flush=True,
        )
    return found


def conclusion(kind: str, found: Found) -> list[str]:
    """Who is best at each sparsity, and by how much; what each bears at 1% and 10% perplexity."""
    lines = [f"{kind}:"]
    for index, row in enumerate(next(iter(found.values()))):
        if row["asked"] == 0:
            exact = all(abs(rows[index]["ratio"] - 1) < 1e-6 for rows in found.values())
            lines.append(f"  at 0% all are {'exactly' if exact else 'NOT'} the dense model")
            continue
        ranked = sorted(found, key=lambda name: found[name][index]["ratio"])
        told = ", ".join(f"{name} {found[name][index]['ratio'] - 1:+.1%}" for name in ranked)
        best, second = (found[name][index] for name in ranked[:2])
        clear = best["interval"][1] < second["interval"][0]
        lines.append(f"  at {row['asked']:.0%}: {told}{'' if clear else ' (the first two are not told apart)'}")
    for name, rows in found.items():
        if rows[-1]["extra"]:
            told = f"{rows[-1]['extra']:.0%} as many weights as all projections have, which no sparsity counts"
            lines.append(f"  {name} also multiplies with bases, {told}")
    for bound in (0.01, 0.1):
        bears = {name: borne(rows, bound) for name, rows in found.items()}
        last = max(row["asked"] for row in next(iter(found.values())))
        told = ", ".join(
            f"{name} {share:.0%}" if share < last - 0.01 else f"{name} {last:.0%} or more"
            for name, share in sorted(bears.items(), key=lambda item: -item[1])
        )
        lines.append(f"  perplexity +{bound:.0%} bears about: {told} (between the points, straight lines)")
    return lines


def borne(rows: list[dict[str, Any]], bound: float) -> float:
    """The sparsity at which perplexity first rises by the bound, linear in log perplexity between points."""
    points = [(0.0, 0.0), *((row["realised"], math.log(row["ratio"])) for row in rows if row["asked"] > 0)]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 > math.log1p(bound):
            return x0 + (x1 - x0) * (math.log1p(bound) - y0) / (y1 - y0)
    return points[-1][0]


def draw(found: Mapping[str, Found], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (kind, rows_of) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(1, len(found), place)
        for name, rows in rows_of.items():
            x, y = [row["realised"] for row in rows], [row["ratio"] for row in rows]
            low, high = zip(*(row["interval"] for row in rows), strict=True)
            (line,) = axes.plot(x, y, marker="o", markersize=4, linewidth=1.3, label=name)
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.axhline(1.01, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        for axis_part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_part(lambda value, _: f"{value:.3g}")
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("share of zeros, on text that was not calibrated on")
        axes.set_ylabel("perplexity / dense perplexity")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--sparsities", default="0,0.25,0.5,0.75,0.9")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("sparsifiers.png"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    target = options.target or trained(options.steps)
    subject = open_subject(target, options.device)
    tokens = tokens_of(subject, options.data, options.sequences, options.seq_len, options.seed, 8)
    ours, rest = (tokens.select(slice(i, None, 2)) for i in (0, 1))
    view = layered(subject.model)
    dense = math.exp(losses(view, rest).mean())
    kind = torch.cuda.get_device_name() if view.device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    title = f"{Path(target).name}, step {subject.step}, dense perplexity {dense:.2f}"
    print(f"{target}: {title}; {rest.ids_ST.numel()} tokens measured, as many calibrated on; {kind}")
    print(f"{'sparsifier':14}{'asked':>7}{'calibrated':>12}{'realised':>10}{'perplexity':>12}{'change':>10}   95%")
    shares = [float(x) for x in options.sparsities.split(",")]
    found = {name: measured(view, ways, shares, ours, rest) for name, ways in KINDS.items()}
    print()
    for name, rows in found.items():
        print("\n".join(conclusion(name, rows)))
    draw(found, title, options.out)
    print(f"\npicture: {options.out}")
    if options.json is not None:
        options.json.write_text(json.dumps({"target": target, "dense": dense, "found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
