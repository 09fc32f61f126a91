"""Runs probes on a target, and leaves the model as it was."""

from __future__ import annotations

import importlib.metadata
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsekit.errors import DataError, PluginError
from sparsekit.model.meanwhile import evaluating
from sparsekit.probes import results
from sparsekit.probes.base import DenseProbe, Probe, ProbeResult, Tokens, dense_pass
from sparsekit.probes.layered import LayeredModel, ViewError, layered
from sparsekit.probes.targets import Subject, open_subject, tokens_of
from sparsekit.registry import registry
from sparsekit.spec.inline import chosen

SEQUENCES = 100  # of up to 512 tokens, as in arXiv 2603.15389
TOGETHER = ("sparsity",)  # several others under one name, which "every probe" leaves out

Report = Callable[[str, float], None]  # a probe's name, and the share of it that is done


def probe(
    target: Any,
    probes: Sequence[Any] | str | None = None,
    data: Any = None,
    *,
    sequences: int = SEQUENCES,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    plots: bool = True,
    report: Report | None = None,
    within: Callable[[Subject], AbstractContextManager[Any]] | None = None,
) -> dict[str, ProbeResult]:
    """What probes find on a model: ``{name: ProbeResult}``.

    Args:
        target: a spec (fresh weights), a run, a checkpoint, ``"hf:PATH_OR_NAME"``, or a model in memory, sparsekit's
            or Hugging Face's, which is left as it was.
        probes: names, ``"name:key=value,key=value"``, dicts with a ``type``, or probes; None for every one that is
            applicable.
        data: token ids [sequences, tokens], a data spec, the path of one or of a text, or the name of a source; None
            for what a run validates on, and the embedded text's held-out part for a Hugging Face model.
        sequences, seq_len: how many windows of how many tokens are taken of a text (up to 512 where not said).
        seed: of the windows that are chosen, and of what probes draw.
        batch_size: sequences at a time.
        out: a folder to write results and pictures to; by default a checkpoint's run gets them in ``probes/``, and
            other targets nothing.
        report: told of progress.
        within: what the model is looked at in, such as with a sparsifier installed.

    Raises:
        SparsekitError: a mistake of the user's, in one line; a probe that was named is not applicable.
    """
    named = choose(probes)
    subject = open_subject(target, device, dtype)
    tokens = tokens_of(subject, data, sequences, seq_len, seed, batch_size)
    with nullcontext() if within is None else within(subject):
        found = run_probes(subject.model, named, tokens, seed=seed, everything=probes is None, report=report)
    for result in found.values():
        result.meta["target"] = subject.name
        result.meta["step"] = subject.step
        for text in subject.remarks:
            result.remark(text)
    folder = Path(out) if out is not None else _own_folder(subject)
    if folder is not None:
        for name, result in found.items():
            results.save(result, folder, stem_of(name, subject.step), plots)
    return found


def stem_of(name: str, step: int | None) -> str:
    """How the files of a result are called."""
    return name if step is None else f"{name}-step-{step:08d}"


def _own_folder(subject: Subject) -> Path | None:
    return subject.folder if subject.step is not None else None


def choose(probes: Sequence[Any] | str | None) -> dict[str, Probe]:
    """Probes by name; the second of a name is called name-2.

    Raises:
        SpecError: a name or a parameter is unknown.
    """
    if probes is None:
        probes = [name for name in registry("probe").names() if name not in TOGETHER and _can_be_had(name)]
    found: dict[str, Probe] = {}
    for given in [probes] if isinstance(probes, (str, Mapping, Probe)) else probes:
        name, made = _made(given)
        number = 1 + sum(key.partition("-")[0] == name for key in found)
        found[name if number == 1 else f"{name}-{number}"] = made
    return found


def _can_be_had(name: str) -> bool:
    """Whether a probe that nobody named can be imported; what a package got wrong costs its own probes only."""
    try:
        registry("probe").get(name)
    except PluginError as error:
        print(f"{error}; left out", file=sys.stderr)
        return False
    return True


def _made(given: Any) -> tuple[str, Probe]:
    if isinstance(given, Probe):
        entry = registry("probe").entry_of(type(given))
        return type(given).__name__ if entry is None else entry.name, given
    choice = chosen("probe", given)
    made: Probe = choice.cls(choice.params)
    return choice.type, made


def run_probes(
    model: nn.Module | LayeredModel,
    probes: Mapping[str, Probe],
    tokens: Tokens,
    *,
    seed: int = 0,
    everything: bool = False,
    report: Report | None = None,
) -> dict[str, ProbeResult]:
    """Runs probes on a model in memory; those of the undisturbed model share one pass.

    Args:
        everything: what is not applicable is left out, with a word to ``report``, and not an error.

    Raises:
        ViewError: the model cannot be looked at layer by layer, or a probe is not applicable.
    """
    tell = report or (lambda name, share: None)
    found: dict[str, ProbeResult] = {}
    module = model.model if isinstance(model, LayeredModel) else model
    with undisturbed(module), torch.random.fork_rng(_cuda_devices()):
        view = layered(model)
        sharing = {name: p for name, p in probes.items() if isinstance(p, DenseProbe) and p.shares}
        for each in probes.values():
            each.seed = seed
        found |= _share(view, sharing, tokens, everything, tell)
        for name, each in probes.items():
            if name in sharing:
                continue
            _seed_all(seed)
            began = time.perf_counter()
            watched = tokens.watched(lambda share, name=name: tell(name, share))  # type: ignore[misc]
            try:
                with torch.no_grad():
                    result = each.run(view, watched)
            except (ViewError, DataError) as error:
                if not everything:
                    raise
                tell(_inapplicable(name, error), 1.0)
                continue
            found[name] = _with_meta(result, name, each, view, tokens, seed, time.perf_counter() - began)
            tell(name, 1.0)
    return {name: found[name] for name in probes if name in found}


def _share(
    view: LayeredModel, probes: Mapping[str, DenseProbe], tokens: Tokens, everything: bool, tell: Report
) -> dict[str, ProbeResult]:
    """One pass for all; the time of each is the whole's."""
    observers = {}
    for name, each in probes.items():
        try:
            observers[name] = each.observer(view, tokens)
        except (ViewError, DataError) as error:
            if not everything:
                raise
            tell(_inapplicable(name, error), 1.0)
    if not observers:
        return {}
    _seed_all(probes[next(iter(observers))].seed)
    began = time.perf_counter()
    told = ", ".join(observers)
    watched = tokens.watched(lambda share: tell(told, share))
    found = dense_pass(view, watched, list(observers.values()))
    seconds = time.perf_counter() - began
    tell(told, 1.0)
    made = zip(observers, found, strict=True)
    return {n: _with_meta(r, n, probes[n], view, tokens, probes[n].seed, seconds, list(observers)) for n, r in made}


def _inapplicable(name: str, error: Exception) -> str:
    return f"{name}: not applicable: {str(error).removeprefix(f'{name}: ')}"


def _with_meta(
    result: ProbeResult, name: str, probe: Probe, view: LayeredModel, tokens: Tokens, seed: int, seconds: float,
    together: Sequence[str] = (),
) -> ProbeResult:  # fmt: skip
    """Says what was measured, on what, by what."""
    n, length = tokens.ids_ST.shape
    result.meta = {
        "probe": name, "params": probe.params.model_dump(mode="json"), "sequences": n, "seq_len": length,
        "tokens": n * length, "data_fingerprint": tokens.fingerprint, "seed": seed,
        "dtype": str(view.dtype).removeprefix("torch."), "device": _device(view.device), "layers": view.n_layers,
        "versions": _versions(probe), "wall_seconds": round(seconds, 3), **result.meta,
    }  # fmt: skip
    if len(together) > 1:
        result.meta["shared_pass_with"] = [other for other in together if other != name]
    return result


def _versions(probe: Probe) -> dict[str, str]:
    told = {"python": platform.python_version()}
    entry = registry("probe").entry_of(type(probe))
    if entry is not None and not entry.built_in and entry.version:
        told[entry.owner] = entry.version
    for package in ("sparsekit", "torch", "numpy", "transformers"):
        try:
            told[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return told


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile; mode, gradients, what takes them, buffers and random numbers are then as before.

    Layers run eagerly meanwhile: what was compiled for training is neither used nor compiled anew.
    """
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    for p, _, _ in gradients:
        p.grad = None
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for p, gradient, takes in gradients:
            p.grad = gradient
            p.requires_grad_(takes)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        random.setstate(python)
        np.random.set_state(numpy)
