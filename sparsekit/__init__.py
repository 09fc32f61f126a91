"""sparsekit: a transformer as a JSON file of named, interchangeable parts.

>>> from sparsekit import load_spec, describe, train
>>> spec = load_spec("specs/runs/tiny.json", overrides=["train.max_steps=200"])
>>> run = train(spec)

Everything here is imported on first use; ``import sparsekit`` alone imports neither torch nor any plug-in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekit.errors import SparsekitError
    from sparsekit.interop.lm_eval import evaluate
    from sparsekit.model.accounting import describe
    from sparsekit.model.build import build_model
    from sparsekit.model.generate import generate
    from sparsekit.model.targets import Run, load_model
    from sparsekit.model.text import generate_text
    from sparsekit.probes.runner import probe
    from sparsekit.registry import register
    from sparsekit.reports.build import report
    from sparsekit.spec.load import fingerprint, load_spec
    from sparsekit.spec.model import ModelSpec
    from sparsekit.spec.run import RunSpec
    from sparsekit.spec.schema import json_schema
    from sparsekit.spec.slot import Choice, Params, Slot, pick
    from sparsekit.training.run import train

_HOMES = {
    "SparsekitError": "errors",
    "describe": "model.accounting",
    "build_model": "model.build",
    "evaluate": "interop.lm_eval",
    "generate": "model.generate",
    "generate_text": "model.text",
    "Run": "model.targets",
    "load_model": "model.targets",
    "probe": "probes.runner",
    "register": "registry",
    "report": "reports.build",
    "fingerprint": "spec.load",
    "load_spec": "spec.load",
    "ModelSpec": "spec.model",
    "RunSpec": "spec.run",
    "json_schema": "spec.schema",
    "Choice": "spec.slot",
    "Params": "spec.slot",
    "Slot": "spec.slot",
    "pick": "spec.slot",
    "train": "training.run",
}

__all__ = [
    "Choice", "ModelSpec", "Params", "Run", "RunSpec", "Slot", "SparsekitError", "build_model", "describe",
    "evaluate", "fingerprint", "generate", "generate_text", "json_schema", "load_model", "load_spec", "pick", "probe",
    "register", "report", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sparsekit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
