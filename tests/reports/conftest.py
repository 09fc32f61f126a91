"""Runs' folders, made up: a spec, logged rows with statistics of layers, results of probes, an evaluation, samples."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekit.probes import results
from sparsekit.probes.base import ProbeResult
from sparsekit.spec.load import dump, load_spec

SPEC = {
    "model": {
        "d_model": 16, "vocab_size": 257, "max_seq_len": 32,
        "block": {"residual": "pre_norm", "norm": "rmsnorm", "attention": {"type": "mha", "n_heads": 2},
                  "ffn": {"type": "swiglu", "d_ff": 32}},
    },
    "data": {"source": "embedded", "tokenizer": "byte", "seq_len": 32},
    "train": {"max_steps": 50, "global_batch_tokens": 128, "micro_batch_size": 4},
}  # fmt: skip
ENDED = 1_760_000_000  # 2025-10-09 08:53:20 UTC

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a run's folder under a name; keywords choose what is in it."""

    def make(
        name: str = "first", *, layers: int = 3, seed: int = 0, rows: int = 50, statistics: bool = True,
        probes: Sequence[str] = ("variance", "causal"), overrides: Sequence[str] = (), **more: Any,
    ) -> Path:  # fmt: skip
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        told = [f"model.n_layers={layers}", f"train.seed={seed}", *overrides]
        spec = dump(load_spec({"name": "made-up", **SPEC, **more}, told))
        (folder / "spec.json").write_text(json.dumps(spec))
        random = np.random.default_rng(seed + layers)
        with (folder / "metrics.jsonl").open("w") as log:
            for step in range(1, rows + 1):
                log.write(json.dumps(row_of(random, step, layers, statistics)) + "\n")
        for probe in probes:
            results.save(result_of(random, probe, layers), folder / "probes", f"{probe}-step-{rows:08d}", plots=False)
        os.utime(folder / "metrics.jsonl", (ENDED, ENDED))
        return folder

    return make


def row_of(random: np.random.Generator, step: int, layers: int, statistics: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "tokens": 128 * step, "loss": 3 + 2 / step + random.normal(0, 0.1), "lr": 1e-3}
    row |= {"grad_norm": random.lognormal(), "tokens_per_second": 1000.0 + step}
    if statistics and step % 5 == 0:
        row |= {f"variance/resid/layer_{layer}": float(step * 2**layer) for layer in range(layers)}
        row |= {f"density/layer_{layer}": 0.5 for layer in range(layers)}
        row |= {"val_loss": row["loss"] + 0.01, "val_bits_per_byte": row["loss"] / 2}
    return row


def result_of(random: np.random.Generator, probe: str, layers: int) -> ProbeResult:
    meta = {"probe": probe, "sequences": 4, "seq_len": 32, "layers": layers, "dtype": "float32", "device": "cpu",
            "data_fingerprint": "same", "versions": {"torch": "2.13.0"}}  # fmt: skip
    per_layer = random.lognormal(size=layers)
    if probe == "causal":
        effect = np.triu(random.random((layers, layers)), 1)
        effect[np.tril_indices(layers)] = np.nan
        meta["axes"] = {"effect": ["skipped", "measured"]}
        return ProbeResult(
            {"causal": 0.25}, {"effect": per_layer}, {"effect": effect}, {"causal": (0.2, 0.3)}, meta=meta
        )
    scalar = float(per_layer[-1])
    meta["remarks"] = [f"what should be known of {probe}"]
    return ProbeResult(
        {"resid_last": scalar}, {"resid": per_layer}, {}, {"resid_last": (scalar * 0.9, scalar * 1.1)}, meta=meta
    )
