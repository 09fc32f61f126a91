"""From a trained model to what can be skipped in it: perplexity, sparsity, active neurons, the speed of decoding."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.components.contracts import ForwardContext
from sparsekit.errors import DataError
from sparsekit.files import writable, written_whole
from sparsekit.model.decoder import Decoder
from sparsekit.probes import results
from sparsekit.probes.activation_sparsity import perplexity_ratio
from sparsekit.probes.activity import spread
from sparsekit.probes.base import Array, ProbeResult, Tokens, bootstrap
from sparsekit.probes.cett import write_thresholds
from sparsekit.probes.layered import LayeredModel, layered, watch_input
from sparsekit.probes.neurons import acts_of
from sparsekit.probes.runner import undisturbed
from sparsekit.probes.targets import open_subject, tokens_of
from sparsekit.sparsifiers.base import losses
from sparsekit.sparsifiers.calibration import THRESHOLDS, Calibration, mean_of
from sparsekit.sparsifiers.choose import SEQUENCES, make, saved
from sparsekit.sparsifiers.installed import Installed
from sparsekit.sparsifiers.sites import DOWN, EXPERTS, SHARED, feed_forward

ROUNDS, DECODED = 7, 16  # of timing, and tokens of each
REPORT = "report"


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        result: scalars, values by layer, and the heat map; what :func:`sparsify` writes.
        d_model: of the model.
        folder: where, or None.
    """

    calibration: Calibration
    result: ProbeResult
    d_model: int
    folder: Path | None = None


def sparsify(
    target: Any,
    sparsifier: Any = "cett:ppl=0.01",
    data: Any = None,
    *,
    calibration: Any = None,
    sequences: int = 2 * SEQUENCES,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    plots: bool = True,
) -> Report:
    """Calibrates a sparsifier on a model, and measures what becomes of the model with it.

    Of the text every other window is calibrated on and the rest measured, unless a ``calibration`` text is given.

    Args:
        target: as :func:`sparsekit.probe` takes it: a run, a checkpoint, ``"hf:PATH_OR_NAME"``, a model in memory.
        sparsifier: ``"name:key=value"``, or the path of a saved calibration.
        data, sequences, seq_len, seed, batch_size: the text, as :func:`sparsekit.probe` takes it.
        calibration: another text to calibrate on.
        out: a folder for the calibration, its thresholds, the results and the heat map; nothing is written without.

    Raises:
        SparsekitError: a mistake of the user's, in one line.
    """
    path = saved(sparsifier)
    made = make(sparsifier) if path is None else None
    read = None if path is None else Calibration.load(path)
    subject = open_subject(target, device, dtype)
    tokens = tokens_of(subject, data, sequences, seq_len, seed, batch_size)
    ours = measured = tokens
    if calibration is not None:
        ours = tokens_of(subject, calibration, sequences, seq_len, seed, batch_size)
    elif made is not None:
        if len(tokens.ids_ST) < 2:
            raise DataError("data: one sequence cannot be calibrated on and measured; give more text or --calibration")
        ours, measured = (tokens.select(slice(i, None, 2)) for i in (0, 1))
    with undisturbed(subject.model):
        view = layered(subject.model)
        if made is not None:
            made.seed = seed
            read = made.calibrate(view, ours)
        assert read is not None, "calibrated or loaded"
        result = measure(view, read, measured, seed)
    result.meta = {"probe": read.sparsifier, "target": subject.name, "step": subject.step, **result.meta}
    for remark in subject.remarks:
        result.remark(remark)
    folder = None if out is None else Path(out)
    if folder is not None:
        with writable(folder):
            read.save(folder)
            thresholds = read.thresholds(view.n_layers)
            if thresholds is not None and read.sparsifier == "cett":  # another's are no thresholds of CETT
                with written_whole(folder / THRESHOLDS) as temporary:
                    temporary.write_text(write_thresholds(thresholds) + "\n", encoding="utf-8")
            results.save(result, folder, REPORT, plots)
    return Report(read, result, view.d_model, folder)


@torch.no_grad()
def measure(view: LayeredModel, calibration: Calibration, tokens: Tokens, seed: int = 0) -> ProbeResult:
    """Perplexity with and without, realised sparsity by layer and site, active neurons, and the speed of decoding."""
    n, length = tokens.ids_ST.shape
    result = ProbeResult(meta={
        "params": dict(calibration.params), "sequences": n, "seq_len": length, "seed": seed,
        "data_fingerprint": tokens.fingerprint, "dtype": str(view.dtype).removeprefix("torch."),
        "calibration": calibration.meta,
    })  # fmt: skip
    dense_S = losses(view, tokens)
    with calibration.install(view) as installed:
        pairs = np.stack((losses(view, tokens), dense_S), 1)
        realised = installed.realised()
        heat_map = active_neurons(view, tokens)
    result.scalars = {
        "perplexity": math.exp(pairs[:, 0].mean()),
        "perplexity_dense": math.exp(pairs[:, 1].mean()),
        "perplexity_ratio": perplexity_ratio(pairs),
        "sparsity": mean_of(realised, calibration.weights),
    }
    result.intervals["perplexity_ratio"] = bootstrap(pairs, perplexity_ratio, seed)
    names = list(dict.fromkeys(name for _, name in realised))
    for name in names:
        of_layer = {layer: share for (layer, other), share in realised.items() if other == name}
        result.per_layer[f"sparsity_{name}"] = spread(view.n_layers, of_layer)
    if heat_map is not None:
        result.matrices["active_neurons"] = heat_map
        result.meta["axes"] = {"active_neurons": ("layer", "token")}
    for layer, reason in calibration.meta.get("missing", {}).items():
        result.remark(f"layer {layer}: not masked: {reason}")
    try:
        times = decoding(view, calibration, tokens)
    except DataError as error:
        result.remark(f"no speed: {error}")
    else:
        result.scalars |= times
        result.meta["machine"] = _machine(view.device)
    return result


def active_neurons(view: LayeredModel, tokens: Tokens) -> Array | None:
    """[L, T] the share of neurons that are not 0, of each layer and token of the first sequence; nan where unseen."""
    batch = view.start(tokens.ids_ST[:1])
    rows: dict[int, Array] = {}
    h = batch.h_0
    for layer in range(view.n_layers):
        if view.anatomy(layer).experts is None and view.sites(layer)["ffn_act"] is None:
            h, seen = batch.observe(layer, h, ["ffn_act"])
            rows[layer] = (acts_of(seen["ffn_act"]) != 0).float().mean(-1).cpu().numpy()
        else:
            h = batch.layer(layer, h)
    return spread(view.n_layers, rows, tokens.ids_ST.shape[1]) if rows else None


# --- speed


def decoding(view: LayeredModel, calibration: Calibration, tokens: Tokens) -> dict[str, float]:
    """Time of all dense feed-forwards for one token after the other, dense and skipping, on what they read in the text.

    Medians of rounds in which both take turns; microseconds a token, over all layers.

    Raises:
        DataError: no feed-forward is a module that can be called alone.
    """
    read = _inputs(view, tokens)
    if not read:
        raise DataError("no layer's feed-forward is a module of its own")
    rest = (ForwardContext(),) if isinstance(view.model, Decoder) else ()

    def once() -> float:
        _wait(view.device)
        began = time.perf_counter()
        for token in range(DECODED):
            for ffn, x_N1D in read:
                ffn(x_N1D[token % len(x_N1D)][None], *rest)
        _wait(view.device)
        return (time.perf_counter() - began) / DECODED * 1e6

    targets = calibration.made().targets(view, calibration.limits)
    dense, sparse = [], []
    for _ in range(ROUNDS):
        once()
        dense.append(once())
        with Installed(view, targets, kernels=True, expected=calibration.realised):
            once()  # the first finds nothing in the cache
            sparse.append(once())
    times = {"ffn_us_dense": statistics.median(dense), "ffn_us_sparse": statistics.median(sparse)}
    return {**times, "ffn_speedup": times["ffn_us_dense"] / times["ffn_us_sparse"]}


def _inputs(view: LayeredModel, tokens: Tokens) -> list[tuple[nn.Module, Tensor]]:
    """Feed-forwards with what they read, [N, 1, D]."""
    batch = view.start(tokens.ids_ST[:1, : 2 * DECODED])
    found: list[tuple[nn.Module, Tensor]] = []
    h = batch.h_0
    for layer in range(view.n_layers):
        parts = feed_forward(view, layer)
        with ExitStack() as undo:
            if not isinstance(parts, str) and parts.module is not None:
                seen: dict[str, Any] = {}
                undo.callback(watch_input(parts.module, "ffn_in", h.shape[:2], {}, seen))
                h = batch.layer(layer, h)
                found.append((parts.module, seen["ffn_in"].flatten(0, 1)[-DECODED:, None].clone()))
            else:
                h = batch.layer(layer, h)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


# --- in words


def told(report: Report) -> str:
    """The table and what it says."""
    result, calibration = report.result, report.calibration
    scalars, percent = result.scalars, "{:.1%}".format
    names = list(result.per_layer)
    heads = ["layer", *(name.replace("sparsity_", "zeros at ") for name in names)]
    n_layers = len(next(iter(result.per_layer.values())))
    lines = [heads]
    for layer in range(n_layers):
        values = (result.per_layer[name][layer] for name in names)
        lines.append([str(layer), *("" if v != v else percent(v) for v in values)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    table = ["  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines]
    what = "the masked projections' inputs"
    if {name for _, name in calibration.limits} <= {DOWN, EXPERTS, SHARED}:
        of_layer: Counter[int] = Counter()
        for layer, name in calibration.limits:
            of_layer[layer] += calibration.weights[layer, name] // report.d_model
        width = max(of_layer.values())
        count = f" ({scalars['sparsity'] * width:.0f} of {width} a layer)" if len({*of_layer.values()}) == 1 else ""
        mixed = any(name == EXPERTS for _, name in calibration.limits)
        what = f"{'visited ' if mixed else ''}neurons{count}"
    low, high = result.intervals["perplexity_ratio"] or (math.nan, math.nan)
    said = [
        *table, "",
        f"{calibration.sparsifier}: {percent(scalars['sparsity'])} of {what} can be skipped at "
        f"{scalars['perplexity_ratio'] - 1:+.2%} perplexity ({scalars['perplexity_dense']:.4g} -> "
        f"{scalars['perplexity']:.4g}; 95% [{low - 1:+.2%}, {high - 1:+.2%}])",
    ]  # fmt: skip
    status = calibration.meta.get("status")
    if status is not None:
        ratio = calibration.meta["perplexity_ratio"] - 1
        said.append(f"searched on other text, where it costs {ratio:+.2%}: {STATUS[status]}")
    if "ffn_speedup" in scalars:
        dense, sparse = scalars["ffn_us_dense"], scalars["ffn_us_sparse"]
        said.append(
            f"decoding, one token through all feed-forwards: {dense:.0f} us dense, {sparse:.0f} us sparse "
            f"({scalars['ffn_speedup']:.2f}x) on {result.meta['machine']}"
        )
    said += [f"note: {remark}" for remark in result.meta.get("remarks", [])]
    return "\n".join(said)


STATUS: Mapping[str, str] = {
    "ok": "the largest CETT that this perplexity bears",
    "saturated": "even a CETT of 1 is borne, so that this text says little of the neurons",
    "step": "a little more would cost more than that at once",
}
