"""``describe``, ``validate`` and ``schema``: what a spec says, without running it."""

from __future__ import annotations

import json
from pathlib import Path

from .options import Json, Overrides, Target


def describe(target: Target, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006 (typer reads it)
    """Counts a model's parameters, FLOPs and memory; allocates nothing."""
    from sparsekit.model.accounting import describe as describe_spec
    from sparsekit.model.targets import resolve

    spec = resolve(target, overrides).spec
    told = describe_spec(spec)
    if as_json:
        print(json.dumps(told.as_dict(), indent=2))
        return
    rows = [
        ("layers x d_model", f"{told.n_layers} x {told.d_model}"),
        ("parameters", f"{told.parameters:,}"),
        ("active parameters", f"{told.active_parameters:,} a token"),
        ("forward FLOPs", f"{told.flops_per_token:.4g} a token at length {told.seq_len}"),
        ("training FLOPs", f"{told.training_flops_per_token:.4g} a token"),
        ("weights", _size(told.weight_bytes)),
        ("training memory", _size(told.training_bytes) + " for weights, gradients and optimizer"),
        ("activations", _size(told.activation_bytes) + " a micro-batch in float32, on top"),
        ("cache", _size(told.cache_bytes_per_token) + " a token when generating"),
    ]
    if told.tokens is not None:
        total = told.tokens * told.training_flops_per_token
        rows.append(("training", f"{told.tokens:,} tokens, {total:.3g} FLOPs"))
    for name, text in rows:
        print(f"{name:18}{text}")


def validate(target: Target, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Checks a spec; every mistake is a line."""
    from sparsekit.model.targets import resolve
    from sparsekit.spec.load import dump, fingerprint, read_json

    spec = resolve(target, overrides).spec
    if as_json:
        bare_model = Path(target).is_file() and "model" not in read_json(Path(target))
        print(json.dumps(dump(spec.model if bare_model else spec), indent=2))
    else:
        print(f"{target}: valid, fingerprint {fingerprint(spec)[:16]}")


def schema() -> None:
    """Prints the JSON Schema of specs, for editors, installed plug-ins included."""
    from sparsekit.spec.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.4g} TiB"
