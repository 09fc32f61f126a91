"""``describe``, ``validate`` and ``schema``: what a spec says, without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, Overrides, Target


def describe(target: Target, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006 (typer reads it)
    """Counts a model's parameters, FLOPs and memory; allocates nothing."""
    from sparsekit.model.accounting import describe as describe_spec

    told = describe_spec(_spec(target, overrides))
    print(json.dumps(told.as_dict(), indent=2) if as_json else told)


def validate(target: Target, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Checks a spec; every mistake is a line."""
    from sparsekit.model.accounting import parameters_of_a_process
    from sparsekit.model.build import build_model, demand_causal
    from sparsekit.spec.load import dump, fingerprint, is_bare_model

    spec = _spec(target, overrides)
    model = build_model(spec, device="meta")  # what only the parts, once made, know of one another
    demand_causal(model)
    parameters_of_a_process(model, spec.parallel)
    if as_json:
        bare_model = Path(target).is_file() and is_bare_model(target)
        print(json.dumps(dump(spec.model if bare_model else spec), indent=2))
    else:
        print(f"{target}: valid, fingerprint {fingerprint(spec)[:16]}")


def _spec(target: str, overrides: list[str]) -> Any:
    """The spec of a target; of a Hugging Face folder, what its config describes."""
    from sparsekit.spec.load import dump, load_spec

    if target.startswith("hf:"):
        from sparsekit.interop.importing import read_spec

        return load_spec(dump(read_spec(target)), overrides)
    from sparsekit.model.targets import resolve

    return resolve(target, overrides).spec


def schema(study: Annotated[bool, typer.Option("--study", help="Of a study's file.")] = False) -> None:
    """Prints the JSON Schema of specs, for editors, installed plug-ins included."""
    from sparsekit.spec.schema import json_schema
    from sparsekit.studies.schema import study_schema

    print(json.dumps(study_schema() if study else json_schema(), indent=2))
