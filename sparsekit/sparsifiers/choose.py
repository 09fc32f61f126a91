"""From what a user types to a sparsifier at work: ``name:key=value``, or the path of a saved calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsekit.model.targets import Target, resolve
from sparsekit.probes.layered import LayeredModel, layered
from sparsekit.probes.targets import Subject, tokens_of
from sparsekit.sparsifiers.base import Sparsifier
from sparsekit.sparsifiers.calibration import JSON, Calibration
from sparsekit.spec.inline import chosen
from sparsekit.spec.load import HUGGING_FACE

SEQUENCES = 32  # of up to 512 tokens that are calibrated on, where nothing is said


def make(given: Any) -> Sparsifier:
    """A sparsifier from ``"name:key=value,key=value"``, a dict with a ``type``, or itself.

    Raises:
        SpecError: a name or a parameter is unknown.
    """
    if isinstance(given, Sparsifier):
        return given
    choice = chosen("sparsifier", given)
    made: Sparsifier = choice.cls(choice.params)
    return made


def saved(given: Any) -> Path | None:
    """The calibration that is meant where a path is; None where a sparsifier is."""
    if isinstance(given, Path):
        return given
    if not isinstance(given, str) or ":" in given:
        return None
    path = Path(given)
    return path if path.suffix == ".json" or (path / JSON).is_file() or "/" in given else None


def calibrated(
    given: Any,
    model: Any,
    target: Any,
    data: Any = None,
    *,
    sequences: int = SEQUENCES,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> tuple[Calibration, LayeredModel]:
    """A calibration for a model that was loaded from a target, and the view that it was found by.

    Args:
        given: a sparsifier, however told, or the path of a saved calibration, which is read.
        target: where the model is from: its own data is calibrated on unless ``data`` is given.
        data: as :func:`sparsekit.probe` takes it.

    Raises:
        SparsekitError: a mistake of the user's, in one line.
    """
    view = layered(model)
    path = saved(given)
    if path is not None:
        return Calibration.load(path), view
    sparsifier = make(given)
    sparsifier.seed = seed
    subject = subject_of(model, target)
    tokens = tokens_of(subject, data, sequences, seq_len, seed, batch_size)
    calibration = sparsifier.calibrate(view, tokens)
    calibration.meta["remarks"] = subject.remarks
    return calibration, view


def subject_of(model: Any, target: Any) -> Subject:
    """A loaded model with what is known of its text."""
    if isinstance(target, Subject):
        return target
    config = getattr(model, "config", None) or getattr(model, "spec", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if isinstance(target, str) and target.startswith(HUGGING_FACE):
        return Subject(model, target, path=target.removeprefix(HUGGING_FACE), most=most)
    resolved = target if isinstance(target, Target) else resolve(target)
    return Subject(model, str(target), target=resolved, most=most)
