"""What a run's model costs, counted from its spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Costs:
    """Parameters, those that one token passes through, and the FLOPs of training on a token (forward and backward)."""

    parameters: int
    active_parameters: int
    training_flops_per_token: float


def costs_of(spec: dict[str, Any]) -> Costs | None:
    """As :func:`sparsekit.describe` counts them; None where the spec's parts are not installed here."""
    from sparsekit.errors import SparsekitError
    from sparsekit.model.build import build_model
    from sparsekit.spec.load import load_spec

    if "model" not in spec:
        return None
    try:
        run = load_spec(spec)
        model = build_model(run.model, device="meta")
    except SparsekitError:
        return None
    parameters = sum(p.numel() for p in model.parameters())
    return Costs(parameters, model.active_parameters(), 3 * model.flops_per_token(run.seq_len))
