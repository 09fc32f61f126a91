"""Tokens a second that the loader gives, beside a dataset that is read item by item; and how long a resume takes.

python benchmarks/loader.py [--tokens 200_000_000] [--resume-tokens 10_000_000_000] [--folder DIR]

The files are temporary: random uint16 tokens in a .npy file, mapped into memory (and in the page cache, as just
written), and a sparse one of 20 GB that takes no room on the disk. One thread reads.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from sparsekit.data.loader import Loader
from sparsekit.data.packing import Windows
from sparsekit.data.prefetch import Prefetched
from sparsekit.data.shards import Shard, ShardedTokens

STEP = 500_000  # tokens a second that a GPU trains on, of which reading may take a thousandth
SHAPES = ((1024, 8), (1024, 64), (2048, 16), (4096, 4), (4096, 16))
SECONDS, REPEATS = 0.5, 5


class Items(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What is written first: a window an item, inputs and targets widened, collated by torch's DataLoader."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self.tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * self.seq_len
        window = torch.from_numpy(self.tokens[begin : begin + self.seq_len + 1].astype(np.int64))
        return window[:-1], window[1:]


def best_rate(read: Callable[[], object], n_tokens: int) -> float:
    """Tokens a second, the best of several runs: others use this machine too."""
    rates = []
    for _ in range(REPEATS):
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            read()
            count += 1
        rates.append(count * n_tokens / (time.perf_counter() - began))
    return max(rates)


def shards(path: Path, n_tokens: int, starts: np.ndarray) -> ShardedTokens:
    np.save(path.with_suffix(".starts.npy"), starts.astype("<u8"))
    shard = Shard(path, np.dtype("<u2"), n_tokens, path.with_suffix(".starts.npy"), 0)
    return ShardedTokens([shard], len(starts), n_tokens, "none")


def speed(folder: Path, n_tokens: int) -> None:
    path = folder / "tokens.npy"
    random = np.random.default_rng(0)
    tokens = random.integers(1, 50_304, n_tokens, dtype=np.uint16)
    starts = np.arange(0, n_tokens, 700)
    tokens[starts[1:] - 1] = tokens[-1] = 0
    np.save(path, tokens)
    del tokens
    mapped = np.load(path, mmap_mode="r")
    ready = shards(path, n_tokens, starts)
    print(f"{n_tokens / 1e6:.0f}M tokens, G tokens/s (percent of a {STEP // 1000}k tokens/s step)")
    names = ("loader", "+ document mask", "mix of two", "+ widened", "prefetched", "item by item")
    print(f"{'T x batch':>12} " + " ".join(f"{name:>17}" for name in names))
    for seq_len, size in SHAPES:
        whole = Windows(ready, seq_len)
        plain = Loader(whole, 0, size)
        masked = Loader(Windows(ready, seq_len, document_mask=True), 0, size)
        mixed = Loader([(whole, 0.7), (whole, 0.3)], 0, size)
        ahead = Prefetched(Loader(whole, 0, size), depth=4)
        items = Items(mapped, seq_len)
        naive = iter(DataLoader(items, size, sampler=RandomSampler(items, num_samples=1 << 26)))
        reads = (plain.next, masked.next, mixed.next, lambda at=plain: at.next().to("cpu"), ahead.next, naive.__next__)
        rates = [best_rate(read, seq_len * size) for read in reads]
        ahead.close()
        told = " ".join(f"{rate / 1e9:8.3f} ({100 * STEP / rate:.3f}%)" for rate in rates)
        print(f"{f'{seq_len} x {size}':>12} {told}")


def resume(folder: Path, n_tokens: int) -> None:
    seq_len, size = 2048, 16
    path = folder / "large.npy"
    np.lib.format.open_memmap(path, "w+", np.uint16, (n_tokens,)).flush()  # sparse: nothing is written but the header
    starts = np.arange(0, n_tokens, 700)
    shards(path, n_tokens, starts)
    os.sync()  # what was written above is no business of the first read
    state = {"position": 3 * (n_tokens // seq_len) + 12_345}

    def ours() -> None:
        shard = Shard(path, np.dtype("<u2"), n_tokens, path.with_suffix(".starts.npy"), 0)
        loader = Loader(Windows(ShardedTokens([shard], len(starts), n_tokens, "none"), seq_len, True), 0, size)
        loader.restore(state)
        loader.next()

    def naive() -> None:
        items = Items(np.load(path, mmap_mode="r"), seq_len)
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(3))
        for index in order[12_345 : 12_345 + size].tolist():
            items[index]

    print(f"\nresume in the fourth epoch of {n_tokens / 1e9:.0f}G tokens, opened and first batch read, ms")
    for name, read in (("loader", ours), ("an epoch's order drawn anew (torch.randperm)", naive)):
        taken = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            read()
            taken.append(1e3 * (time.perf_counter() - began))
        print(f"{name:46} first {taken[0]:8.1f}   best {min(taken):8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--resume-tokens", type=int, default=10_000_000_000)
    parser.add_argument("--folder", type=Path, help="where the files are made; by default the system's temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        speed(Path(folder), arguments.tokens)
        resume(Path(folder), arguments.resume_tokens)


if __name__ == "__main__":
    main()
