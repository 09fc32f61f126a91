"""Greedy decoding beside Hugging Face ``generate`` of the same weights, exported: same device, dtype, prompts, tokens.

python benchmarks/decode.py [--shapes 256 512 768] [--batches 1 8] [--device cuda --dtype bfloat16 --compile]

A prompt of 32 random tokens and 128 new ones, none of which ends it. On a CPU Hugging Face keeps its growing cache, the
faster one there; with ``--compile`` both sides have a cache of a fixed length and compile the step that decodes a token
(theirs is ``cache_implementation="static"``, which compiles by itself on a GPU). Rounds are interleaved after one of
each to warm up; medians of tokens a second, and of the ratio within a round, which a busy machine moves less. Where
rounding decides between two tokens the sides may part; how many first tokens are equal is told.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsekit.interop.exporting import export
from sparsekit.model.generate import generate_batch
from sparsekit.model.sampling import Sampling
from sparsekit.model.targets import load_model

PROMPT, NEW, VOCAB = 32, 128, 8192
# d_model: layers, heads, key-value heads, d_ff
SHAPES = {256: (8, 4, 4, 688), 512: (8, 8, 8, 1376), 768: (12, 12, 12, 2048), 2048: (16, 16, 16, 5632)}


def spec_of(d_model: int) -> dict[str, Any]:
    """A Llama-like model, in whose random weights no two tokens are as likely as one another."""
    n_layers, n_heads, n_kv_heads, d_ff = SHAPES[d_model]
    attention = {"type": "gqa", "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    block = {"norm": "rmsnorm", "attention": attention, "ffn": {"type": "swiglu", "d_ff": d_ff}}
    sizes = {"d_model": d_model, "n_layers": n_layers, "vocab_size": VOCAB, "max_seq_len": 512}
    return {**sizes, "block": block, "init": {"type": "normal", "std": 0.05}}


def measure(d_model: int, batches: list[int], rounds: int, device: str, dtype: torch.dtype, compiled: bool) -> None:
    """Prints a line for each batch size."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.json").write_text(json.dumps(spec_of(d_model)))
        export(Path(folder) / "model.json", Path(folder) / "out", family="llama", check=False)
        theirs: Any = AutoModelForCausalLM.from_pretrained(Path(folder) / "out", dtype=dtype)
        theirs = theirs.to(device).eval()
        # drawn where the exported ones were: a GPU draws others
        ours = load_model(Path(folder) / "model.json", dtype=dtype).to(device)
    for batch in batches:
        ids = torch.randint(0, VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
        options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}

        def run_theirs(ids: torch.Tensor = ids, options: dict[str, Any] = options) -> list[list[int]]:
            there = ids.to(device)
            out = theirs.generate(
                there, attention_mask=torch.ones_like(there), max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                pad_token_id=0, **options,
            )  # fmt: skip
            return [row[PROMPT:].tolist() for row in out]

        def run_ours(ids: torch.Tensor = ids, batch: int = batch) -> list[list[int]]:
            found: list[list[int]] = [[] for _ in range(batch)]
            more: dict[str, Any] = {"compile": True} if compiled else {}
            for row, token in generate_batch(ours, ids.tolist(), NEW, sampling=Sampling(temperature=0.0), **more):
                found[row].append(token)
            return found

        seconds, tokens = interleaved({"theirs": run_theirs, "ours": run_ours}, rounds, device)
        equal = sum(_common(a, b) for a, b in zip(tokens["ours"], tokens["theirs"], strict=True))
        speed = {name: batch * NEW / median(each) for name, each in seconds.items()}
        ratio = median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        told = f"{speed['ours']:8.1f} tok/s  {speed['theirs']:8.1f} tok/s  {ratio:5.2f}x"
        print(f"{d_model:5}  {batch:5}  {told}  {equal} of {batch * NEW} tokens equal", flush=True)


def interleaved(
    sides: dict[str, Callable[[], list[list[int]]]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """The seconds of each side by round, and what it wrote."""
    tokens = {name: run() for name, run in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            if device != "cpu":
                torch.cuda.synchronize()
            started = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds, tokens


def _common(a: list[int], b: list[int]) -> int:
    """How many first tokens are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs="+", default=[256, 512, 768], choices=SHAPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    print(f"{name}, {args.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads, compile {args.compile}")
    print("    d  batch          sparsekit     Hugging Face")
    for d_model in args.shapes:
        measure(d_model, args.batches, args.rounds, args.device, getattr(torch, args.dtype), args.compile)


if __name__ == "__main__":
    main()
