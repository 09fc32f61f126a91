"""The protocol: what is laid over the small studies that are shipped, and nothing else is; and the text they read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.data.shards import MANIFEST, ShardWriter, open_shards, read_manifest
from sparsekit.errors import DataError
from sparsekit.files import write_json

SPECS = Path(__file__).resolve().parents[2] / "specs" / "studies"

RELEASED = {"type": "usefulness", "compat": "released"}
DEPTH = ["variance", "usefulness", RELEASED, "causal", "permutation"]
CLOSED = {"type": "jacobian", "precision": "tf32", "token_directions": 8}  # exact up to rounding: pre-norm, dense
ESTIMATE = {"type": "jacobian", "method": "estimate", "directions": 16, "iterations": 2, "token_directions": 8}
SPARSITY = {"type": "activation_sparsity", "metric": "cett_ppl", "p": 0.01, "pictured": 0}
SPARSITIES = [SPARSITY, {**SPARSITY, "compat": "released"}]
ACTIVE = ["activation_sparsity", "activation_sparsity-2"]  # what the two are called in tables
BATCH = 8192  # tokens

EVERY: dict[str, Any] = {
    "seeds": [0, 1, 2],
    "probe_on": {"sequences": 32, "batch_size": 16},
    "base.train.max_steps": 500,
    "base.train.global_batch_tokens": BATCH,
    "base.train.micro_batch_size": BATCH // 512,
    "base.train.objective": {"type": "next_token", "chunk_tokens": 4096},
    "base.train.statistics.every": 50,
    "base.train.log_every": 50,
    "base.train.callbacks": [],
}
STUDIES: dict[str, dict[str, Any]] = {
    "depth": {"probes": [*DEPTH, CLOSED], "probe_on": {"sequences": 16, "batch_size": 16}},
    "weight_decay": {"probes": [*DEPTH, CLOSED, {"type": "weight_sparsity", "ranks": False}]},
    "sequence_length": {
        "probes": [*DEPTH, CLOSED, "attention_sparsity"],
        "probe_on": {"sequences": 64, "batch_size": 16},
        "axes.length": {
            str(n): {"model.max_seq_len": n, "train.micro_batch_size": BATCH // n} for n in (128, 256, 512, 1024, 2048)
        },
    },
    "gqa_group": {"probes": [*DEPTH, CLOSED]},
    "moe_vs_dense": {"probes": [*DEPTH, ESTIMATE, "expert_load"]},
    "residuals": {"probes": [*DEPTH, ESTIMATE], "probe_on": {"sequences": 16, "batch_size": 16}},
    "activation": {
        "axes.train.max_steps": [500, 1000],
        "probes": [*SPARSITIES, *DEPTH, ESTIMATE],
        "base.probes": [{**SPARSITY, "every": 50, "sequences": 16}],
        "figures": [
            {
                "type": "by_axis",
                "measures": [f"{label}/activation_ratio" for label in ACTIVE],
                "axis": "train.max_steps",
            },
            {"type": "along_training", "metric": "activation_sparsity/activation_ratio"},
            {"type": "along_training", "metric": "variance/resid", "layer": -1},
            {"type": "per_layer", "measures": ["activation_sparsity/activation_ratio", "variance/resid"]},
        ],
    },
}


QUESTIONS = {
    "depth": "Do the later layers of a deeper pre-norm model do less? Width 256, 4 to 32 layers.",
    "weight_decay": "Does weight decay damp variance and make more layers useful, and where is too much?",
    "sequence_length": "Does training on longer sequences sparsify attention and make more layers useful?",
    "gqa_group": "Does sharing keys and values damp variance, and do deep layers then do more? 8 query heads.",
    "moe_vs_dense": "Does a mixture of experts use its depth better than a dense model of as many active parameters?",
    "residuals": "Do other residual schemes than pre-norm keep variance from growing, and do deep layers then do more?",
    "activation": "Does the share of active neurons at 1% of perplexity fall with tokens for ReLU, rise for SiLU?",
}


def question(name: str) -> str:
    """What a study asks here; what is shipped asks it of another text."""
    steps = STUDIES[name].get("axes.train.max_steps", [EVERY["base.train.max_steps"]])
    millions = " or ".join(f"{n * BATCH / 1e6:.1f}" for n in steps)
    told = f"{millions} million tokens of documentation a run, none of them twice"
    return f"{QUESTIONS[name]} {told}; the protocol is benchmarks/REPRODUCTION.md."


def overrides(name: str, text: Path) -> list[str]:
    """The protocol of a study, as ``sparsekit study --set`` takes it."""
    shards = {"type": "shards", "path": str(text)}
    tokenizer = {"type": "bpe", "vocab_size": None, "path": str(text / "tokenizer.json")}
    ours = {
        **EVERY,
        "question": question(name),
        "base.data": {"source": shards, "tokenizer": tokenizer},
        "base.model.vocab_size": read_manifest(text)["vocab_size"],
        **STUDIES[name],
    }
    return [f"{path}={json.dumps(value)}" for path, value in ours.items()]


def prepare(train: Path, validation: Path, text: Path, tokens: int, vocabulary: int, separator: str) -> None:
    """Token shards of both texts, by the library's own command.

    Raises:
        CalledProcessError: it ended with an error, which it told.
    """
    began = time.perf_counter()
    command = [
        sys.executable, "-m", "sparsekit.cli", "tokenize", str(train), "--validation", str(validation),
        "--train-bpe", str(vocabulary), "--max-tokens", str(tokens), "--separator", separator, "--out", str(text),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    size = sum(path.stat().st_size for path in text.iterdir())
    print(f"{text}: {size / 2**20:.0f} MiB in {time.perf_counter() - began:.0f} s")
    if read_manifest(text)["splits"]["train"]["n_documents"] == 1:
        print(
            f"all of {train} is one document: no line of it is {separator!r}; --separator says what divides documents"
        )


def in_pieces(text: Path, pieces: Path, length: int, seed: int) -> None:
    """The training text again, cut into pieces of so many tokens that are shuffled; validation as it is.

    Not of the protocol: it tells what longer sequences do from what fewer documents in a batch do, as a batch of long
    sequences of this text is as varied as one of short ones.

    Raises:
        DataError: there is something at ``pieces``.
    """
    if pieces.exists():
        raise DataError(f"{pieces}: is there already; remove it, or give another folder")
    shutil.copytree(text, pieces, ignore=shutil.ignore_patterns("train-*", MANIFEST))
    manifest = read_manifest(text)
    whole = open_shards(text, "train")
    stream = np.concatenate([shard.tokens for shard in whole.shards])
    cut = stream[: len(stream) // length * length].reshape(-1, length)
    stream = np.random.default_rng(seed).permutation(cut).ravel()
    writer = ShardWriter(pieces, "train", "npy", stream.dtype, manifest["eos_id"], len(stream) + 1)
    bytes_a_token = manifest["splits"]["train"]["n_bytes"] / manifest["splits"]["train"]["n_tokens"]
    for document in np.split(stream, np.flatnonzero(stream == manifest["eos_id"]) + 1):
        if len(document) > 1:  # what is left of it in front of an end of text, which the writer sets
            ids = document[: -1 if document[-1] == manifest["eos_id"] else None]
            writer.add(ids.tobytes(), round(len(document) * bytes_a_token))
    writer.close()
    manifest["splits"]["train"] = writer.totals()
    write_json(pieces / MANIFEST, manifest)
