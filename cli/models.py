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
    each = f", on each of {told.processes} processes" if told.processes > 1 else ""
    rows = [
        ("layers x d_model", f"{told.n_layers} x {told.d_model}"),
        ("parameters", f"{told.parameters:,}"),
        ("active parameters", f"{told.active_parameters:,} a token"),
        ("forward FLOPs", f"{told.flops_per_token:.4g} a token at length {told.seq_len}"),
        ("training FLOPs", f"{told.training_flops_per_token:.4g} a token"),
        ("weights", _size(told.weight_bytes) + each),
        ("training memory", _size(told.training_bytes) + f" for weights, gradients and optimizer{each}"),
        ("activations", _size(told.activation_bytes) + f" a micro-batch in float32, on top{each}"),
        ("cache", _size(told.cache_bytes_per_token) + " a token when generating"),
    ]
    if spec.parallel.data == "fsdp":
        least = f"counted for {told.processes}, the fewest" if told.processes > 1 else "counted for one"
        rows.append(("processes", f"{least}; more of them hold less of weights, gradients and optimizer each (fsdp)"))
    if told.tokens is not None:
        total = told.tokens * told.training_flops_per_token
        rows.append(("training", f"{told.tokens:,} tokens, {total:.3g} FLOPs"))
    for name, text in rows:
        print(f"{name:18}{text}")


def validate(target: Target, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Checks a spec; every mistake is a line."""
    from sparsekit.model.accounting import parameters_of_a_process
    from sparsekit.model.build import build_model, demand_causal
    from sparsekit.model.targets import resolve
    from sparsekit.spec.load import dump, fingerprint, is_bare_model

    spec = resolve(target, overrides).spec
    model = build_model(spec, device="meta")  # what only the parts, once made, know of one another
    demand_causal(model)
    parameters_of_a_process(model, spec.parallel)
    if as_json:
        bare_model = Path(target).is_file() and is_bare_model(target)
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
