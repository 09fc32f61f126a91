"""Tokens a second from text files to files of tokens, beside a loop over documents; and how fast a large set opens.

python benchmarks/tokenization.py --text FILE [--separator LINE] [--vocab-size N] [--tokenizer FILE] [--workers N]

Both sides read the same file through the same source and encode with the same tokenizer; the loop encodes a document
at a time, as tokenization scripts do, and the ids of both are compared at the end. The large set is one sparse file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.data.shards import npy_header, open_shards
from sparsekit.data.sources import SPLITS, TextFiles
from sparsekit.data.tokenize import tokenize
from sparsekit.spec.slot import Slot

LARGE = 10_000_000_000  # tokens
POSITIONS = 50


def loop(source: Any, tokenizer_path: Path, out: Path) -> dict[str, np.ndarray]:
    """One ``encode`` a document, appended to a list, written at the end."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_path))
    backend.encode_special_tokens = True
    end = backend.token_to_id("<|endoftext|>")
    tokens: dict[str, list[int]] = {split: [] for split in SPLITS}
    for split, text in TextFiles(source.params).placed():
        tokens[split] += backend.encode(text, add_special_tokens=False).ids
        tokens[split].append(end)
    arrays = {}
    for split, ids in tokens.items():
        arrays[split] = np.array(ids, dtype=np.uint16 if backend.get_vocab_size() <= 2**16 else np.uint32)
        np.save(out / f"{split}.npy", arrays[split])
    return arrays


def speed(text: str, separator: str, tokenizer_path: Path, workers: int, folder: Path) -> None:
    source = Slot("source").validate({"type": "text", "path": text, "separator": separator})
    tokenizer = Slot("tokenizer").validate({"type": "bpe", "path": str(tokenizer_path)})
    began, used = time.perf_counter(), cpu_seconds()
    tokenize(source, tokenizer, folder / "shards", workers=workers)
    ours, our_cpu = time.perf_counter() - began, cpu_seconds() - used
    began, used = time.perf_counter(), cpu_seconds()
    wanted = loop(source, tokenizer_path, folder)
    theirs, their_cpu = time.perf_counter() - began, cpu_seconds() - used
    n_tokens = 0
    for split, expected in wanted.items():
        stream = open_shards(folder / "shards", split)
        assert np.array_equal(stream.rows(np.array([0]), len(stream))[0], expected), f"{split}: other ids"
        n_tokens += len(stream)
    print(f"{n_tokens:,} tokens, the ids of both equal; load average {os.getloadavg()[0]:.1f} at the end")
    sides = {"loop over documents": (theirs, their_cpu), f"sparsekit tokenize, {workers} workers": (ours, our_cpu)}
    for name, (wall, cpu) in sides.items():
        speeds = f"{n_tokens / wall:12,.0f} tokens/s {theirs / wall:6.2f}x"
        print(f"{name:30}{wall:7.1f} s {speeds}   {cpu:7.1f} s of processors {their_cpu / cpu:6.2f}x")


def cpu_seconds() -> float:
    """Of this process and of those it waited for: what counts where others use the cores too."""
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def opening(folder: Path) -> None:
    """Writes a set of 10 billion tokens without its blocks, and times opening it and reading one window."""
    header = npy_header(np.dtype("<u2"), LARGE)
    n_documents = LARGE // 1000
    starts = npy_header(np.dtype("<u8"), n_documents)
    sizes = {"train-00000.npy": (header, LARGE * 2), "train-00000.starts.npy": (starts, n_documents * 8)}
    files = []
    for name, (head, n_bytes) in sizes.items():
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + n_bytes)
        files.append({"name": name, "bytes": len(head) + n_bytes, "sha256": "0" * 64})
    counts = {"n_tokens": LARGE, "n_documents": n_documents, "n_bytes": LARGE * 4}
    told = {"format": 1, "layout": "npy", "dtype": "uint16", "eos_id": 0}
    splits = {"train": {**counts, "shards": [{**counts, "files": files}]}}
    (folder / "manifest.json").write_text(json.dumps({**told, "splits": splits}))
    places = np.random.default_rng(0).integers(0, LARGE - 4097, POSITIONS)
    with (folder / "train-00000.npy").open("r+b") as file:
        for number, place in enumerate(places):
            file.seek(len(header) + 2 * int(place))
            file.write(np.uint16(number + 1).astype("<u2").tobytes())
    seconds = []
    for number, place in enumerate(places):
        began = time.perf_counter()
        row = open_shards(folder, "train").rows(np.array([place]), 4097)
        seconds.append(time.perf_counter() - began)
        assert row[0, 0] == number + 1
    middle, worst = 1000 * statistics.median(seconds), 1000 * max(seconds)
    print(f"open {LARGE:,} tokens and read 4,097 anywhere: median {middle:.2f} ms, worst {worst:.2f} ms of {POSITIONS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--separator", default="\x1e")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizers file; one is trained on the text unless given")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = given.tokenizer
        if path is None:
            path = folder / "bpe.json"
            slot = Slot("tokenizer").validate({"type": "bpe", "vocab_size": given.vocab_size})
            learnt = slot.cls(slot.params)
            learnt.fit(TextFiles(TextFiles.Params(path=given.text, separator=given.separator)).documents("train"))
            learnt.save(path)
        (folder / "speed").mkdir()
        speed(given.text, given.separator, path, given.workers, folder / "speed")
        (folder / "large").mkdir()
        opening(folder / "large")


if __name__ == "__main__":
    main()
