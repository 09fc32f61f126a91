"""``train`` and ``generate``: what makes a model, and what it writes."""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .interop import taken_in
from .options import Device, Overrides, Target
from .sparsify import CalibrationText, Sparsifier, under

PROMPTS_AT_A_TIME = 16


def train(
    target: Target,
    overrides: Overrides = [],  # noqa: B006 (typer reads it)
    out: Annotated[Path | None, typer.Option(help="The run folder; by default runs/NAME.", show_default=False)] = None,
    resume: Annotated[str, typer.Option(help="auto, never (start over), or a checkpoint to go on from.")] = "auto",
) -> None:
    """Trains a model from a spec, or on from a checkpoint or an imported model; goes on with a run that stopped."""
    from sparsekit.errors import SparsekitError
    from sparsekit.model.targets import SPEC, resolve
    from sparsekit.model.weights import WEIGHTS
    from sparsekit.training.run import train as train_spec

    if target.startswith("hf:"):
        raise SparsekitError(f"{target}: bring it in first: sparsekit import {target} FOLDER; then train FOLDER")
    begins = (Path(target) / WEIGHTS).is_dir()  # a run of its own, which begins with these weights
    spec = resolve(target, [*([f"init_from={target}"] if begins else []), *overrides]).spec
    if not Path(target).is_dir() and os.environ.get("RANK", "0") == "0":
        _tell_defaults(target, spec)
    if out is None and not begins and (Path(target) / SPEC).exists() and resume == "auto":
        out = Path(target)  # a run's own folder: go on with it
    train_spec(spec, out=out, resume=resume)


def _tell_defaults(target: str, spec: Any) -> None:
    """Says what is trained on where a file holds a model alone."""
    from sparsekit.spec.load import is_bare_model

    if not is_bare_model(target):
        return
    given = ((name, getattr(spec.train, name)) for name in ("max_steps", "max_tokens", "max_epochs"))
    length = next((f"{name} {value}" for name, value in given if value is not None), "one epoch")
    told = f"source {spec.data.source.type}, tokenizer {spec.data.tokenizer.type}, {length}"
    mend = "--set data.source=…, data.tokenizer=… or train.max_steps=… changes that"
    print(f"{target}: holds a model alone, to be trained with {told}; {mend}", file=sys.stderr)


def generate(
    target: Target,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Many at once: a prompt a line, or a JSON list of strings.", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Only the fewest tokens of this probability together.", show_default=False),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Only tokens this times as likely as the likeliest.", show_default=False),
    ] = None,
    stop: Annotated[
        list[str], typer.Option(metavar="TEXT", help="Ends before this text; repeats.", show_default=False)
    ] = [],  # noqa: B006 (typer reads it)
    seed: Annotated[int, typer.Option(min=0)] = 0,
    sparsifier: Sparsifier = None,
    calibration: CalibrationText = None,
    device: Device = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compiles the step that decodes a token: for many tokens on a GPU.")
    ] = False,
) -> None:
    """Writes text with a trained model."""
    from sparsekit.errors import CheckpointError, SparsekitError
    from sparsekit.model.sampling import Sampling
    from sparsekit.model.targets import load_model, resolve
    from sparsekit.model.text import generate_text
    from sparsekit.training.distributed import usable

    if prompts is not None and prompt:
        raise SparsekitError("--prompt and --prompts: give one of them")
    try:
        Sampling(temperature, top_k, top_p, min_p)
    except ValueError as error:
        raise SparsekitError(str(error)) from None
    begun = [prompt] if prompts is None else _prompts(prompts)
    here = usable(device, "--device")
    with taken_in(target) as path:
        within = under(sparsifier, calibration, path, kernels=True)
        resolved = resolve(path, weights=True)
        if resolved.checkpoint is None:
            raise CheckpointError(f"{target}: a spec has no weights; train it first, or give a run's folder")
        tokenizer = resolved.tokenizer()
        model = load_model(resolved, device=here)
        one = len(begun) == 1

        def show(index: int, text: str) -> None:
            if one:
                print(text, end="", flush=True)

        show(0, begun[0])
        with nullcontext() if within is None else within(model):
            texts = generate_text(
                model, tokenizer, begun, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                seed=seed, stop=stop, batch_size=PROMPTS_AT_A_TIME, compile=compiled, on_text=show,
            )  # fmt: skip
        if one:
            print(flush=True)
            return
        for number, (start, text) in enumerate(zip(begun, texts, strict=True), start=1):
            print(f"--- {number}\n{start}{text}")


def _prompts(path: Path) -> list[str]:
    """A prompt a line, blank lines left out; or, of a .json, its strings."""
    from sparsekit.errors import DataError

    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: cannot be read as prompts ({reason}); give a text file, a prompt a line") from None
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        wanted = "a JSON list of strings" if path.suffix == ".json" else "a line of text"
        raise DataError(f"{path}: holds no prompts; give {wanted}")
    return found
