"""``sparsify``: what can be skipped in a model; and the option by which other verbs run under a sparsifier."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Batch, Device, DType, Json, Plots, SeqLen

Sparsifier = Annotated[
    str | None,
    typer.Option(
        "--sparsifier", metavar="NAME[:key=value,…]|PATH", show_default=False,
        help="Runs under a sparsifier (sparsekit list sparsifier), or a calibration saved by sparsekit sparsify.",
    ),
]  # fmt: skip
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="TEXT", show_default=False,
        help="What a sparsifier is calibrated on: a text, a data spec (.json) or a source's name; "
        "by default what the run validates on.",
    ),
]  # fmt: skip


def under(
    given: str | None, text: str | None, target: str, *, kernels: bool = False
) -> Callable[[Any], AbstractContextManager[dict[str, Any]]] | None:
    """What makes a target's loaded model a sparse one meanwhile, and says how; None where no sparsifier is given."""
    from sparsekit.errors import SparsekitError

    if given is None:
        if text is not None:
            raise SparsekitError("--calibration: is for a --sparsifier; give one")
        return None
    from sparsekit.sparsifiers.calibration import Calibration
    from sparsekit.sparsifiers.choose import calibrated, make, saved

    path = saved(given)
    _ = make(given) if path is None else Calibration.load(path)  # a mistake is told before a model is loaded

    @contextmanager
    def installed(model: Any) -> Iterator[dict[str, Any]]:
        calibration, view = calibrated(given, model, target, text)
        name, share = calibration.sparsifier, calibration.sparsity
        print(f"{name}: {share:.1%} of what is masked is 0 on the calibration text", file=sys.stderr)
        for remark in calibration.meta.get("remarks", []):
            print(f"note: {remark}", file=sys.stderr)
        with calibration.install(view, kernels=kernels, count=False):
            yield {"name": name, "params": dict(calibration.params), "sparsity": share}

    return installed


def sparsify(
    target: Annotated[
        str, typer.Argument(help="A run folder, a checkpoint folder, a spec, or hf:PATH_OR_NAME.", show_default=False)
    ],
    sparsifier: Annotated[
        str, typer.Option(metavar="NAME[:key=value,…]|PATH", help="Which, or a calibration to measure again.")
    ] = "cett:ppl=0.01",
    data: Annotated[
        str | None,
        typer.Option(help="A text, a data spec (.json) or a source's name; by default what the run validates on. "
                     "Half of it is calibrated on, the other half measured.", show_default=False),
    ] = None,
    calibration: CalibrationText = None,
    sequences: Annotated[int, typer.Option(min=2, help="How many windows of the text.")] = 64,
    seq_len: SeqLen = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the windows, and of what is drawn.")] = 0,
    batch: Batch = 8,
    device: Device = "cpu",
    dtype: DType = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where calibration, thresholds, results and heat map go; by default a run's own folder, "
                     "or sparsify/NAME.", show_default=False),
    ] = None,
    plots: Plots = True,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Tells how much of a model can be skipped, and what that costs and saves."""
    from sparsekit.model.targets import dtype_of
    from sparsekit.sparsifiers.report import sparsify as run
    from sparsekit.sparsifiers.report import told
    from sparsekit.training.distributed import usable

    folder = out or _folder(target, sparsifier)
    report = run(
        target, sparsifier, data, calibration=calibration, sequences=sequences, seq_len=seq_len, seed=seed,
        batch_size=batch, device=usable(device, "--device"), dtype=None if dtype is None else dtype_of(dtype),
        out=folder, plots=plots,
    )  # fmt: skip
    if as_json:
        print(json.dumps({"sparsifier": report.calibration.sparsifier, **report.result.scalars}, indent=2))
    else:
        print(told(report))
    print(f"written to {folder}; used again with --sparsifier {folder}", file=sys.stderr)


def _folder(target: str, sparsifier: str) -> Path:
    name = Path(sparsifier.partition(":")[0]).name
    if not target.startswith("hf:") and Path(target).is_dir():
        path = Path(target)
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        return run / "sparsify" / name
    return Path("sparsify") / (Path(target.removeprefix("hf:")).stem or "model") / name
