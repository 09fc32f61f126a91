"""``train`` and ``generate``: what makes a model, and what it writes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Overrides, Target


def train(
    target: Target,
    overrides: Overrides = [],  # noqa: B006 (typer reads it)
    out: Annotated[Path | None, typer.Option(help="The run folder; by default runs/NAME.", show_default=False)] = None,
    resume: Annotated[str, typer.Option(help="auto, never (start over), or a checkpoint to go on from.")] = "auto",
) -> None:
    """Trains a model from a spec; goes on where an earlier run of the same spec stopped."""
    from sparsekit.model.targets import SPEC, resolve
    from sparsekit.training.run import train as train_spec

    spec = resolve(target, overrides).spec
    if out is None and (Path(target) / SPEC).exists() and resume == "auto":
        out = Path(target)  # a run's own folder: go on with it
    train_spec(spec, out=out, resume=resume)


def generate(
    target: Target,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k likeliest tokens.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "cpu",
) -> None:
    """Writes text with a trained model."""
    from sparsekit.model.generate import generate as generate_ids
    from sparsekit.model.targets import load_model, resolve

    resolved = resolve(target)
    tokenizer = resolved.tokenizer()
    model = load_model(resolved, device=device)
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eos_id]
    written: list[int] = []
    shown = ""
    print(prompt, end="", flush=True)
    for token in generate_ids(
        model, ids, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, stop_id=tokenizer.eos_id
    ):
        written.append(token)
        text = tokenizer.decode(written)
        if not text.endswith("\ufffd"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(written)[len(shown) :])
    sys.stdout.flush()
