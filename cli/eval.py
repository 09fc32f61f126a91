"""``eval``: lm-eval's tasks on a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Json
from .sparsify import CalibrationText, Sparsifier, under


def evaluate(
    target: Annotated[
        str,
        typer.Argument(help="A spec, a run folder, a checkpoint folder, or hf:PATH_OR_NAME.", show_default=False),
    ],
    tasks: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="Tasks, groups and tags.", show_default=False)
    ],
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of tasks of your own, such as specs/tasks.", show_default=False)
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(min=0, help="So many examples a task, or a share of them if below 1.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; by default the task's own number.",
                                 show_default=False)
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Sequences at a time, or auto; changes no result.")] = "auto",
    bos: Annotated[
        bool, typer.Option("--bos", help="Begins every context with the token that begins a document.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of few-shot examples, and of tasks that sample.")] = 1234,
    sparsifier: Sparsifier = None,
    calibration: CalibrationText = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 …")] = "float32",
    output: Annotated[
        Path | None,
        typer.Option(help="A file for the record (JSON); by default in a run's eval/.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Evaluates a model on lm-eval's tasks, or on your own."""
    from sparsekit.errors import SparsekitError

    try:
        from sparsekit.interop.lm_eval import evaluate as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sparsekit"):
            raise
        raise SparsekitError(f"eval needs the package {error.name}: pip install 'sparsekit[eval]'") from None
    from sparsekit.training.distributed import usable

    names = [name for name in (part.strip() for part in tasks.split(",")) if name]
    whole = int(limit) if limit is not None and limit >= 1 else limit
    record = run(
        target, names, include_path=include_path, limit=whole, num_fewshot=num_fewshot, batch_size=batch_size,
        device=str(usable(device, "--device")), dtype=dtype, add_bos=bos, seed=seed, output=output,
        within=under(sparsifier, calibration, target),
    )  # fmt: skip
    if as_json:
        print(json.dumps(record, indent=2))
        return
    _print_table(record)
    print(f"\nbatch size {record['batch_size']}; {record['bos']}; {record['seconds']:.1f} s")
    if "path" in record:
        print(f"written to {record['path']}")


def _print_table(record: dict[str, Any]) -> None:
    """A line for each task's metric: its value, the standard error, how many examples, and how many shots."""
    head = ("task", "metric", "", "value", "± stderr", "examples", "shots")
    lines = [head]
    for task, found in record["results"].items():
        for key, value in found.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = found.get(f"{name}_stderr,{filtered}")
            better = record["higher_is_better"].get(task, {}).get(name)
            metric = name if filtered == "none" else f"{name} ({filtered})"
            examples = record["n_samples"].get(task, {}).get("effective", "")
            lines.append((
                task, metric, {True: "↑", False: "↓"}.get(better, ""), f"{value:.4f}",
                "" if error is None else f"{error:.4f}", str(examples), str(record["n_shot"].get(task, "")),
            ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [
            f"{cell:>{w}}" if i > 2 else f"{cell:{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
