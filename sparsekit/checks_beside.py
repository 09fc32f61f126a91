"""What the contract kit checks of what stands beside a model: how it is fed, trained, looked at and made sparse.

As in :mod:`sparsekit.checks` each check yields a sentence for every way in which a component breaks its contract; the
table at the end says which kind is held to which.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.checks import LENGTH, VOCABULARY, Check, Subject
from sparsekit.components.contracts import ForwardContext
from sparsekit.data.packing import IGNORE, Batch
from sparsekit.data.sources import SPLITS
from sparsekit.data.tokenizers import Tokenizer
from sparsekit.errors import DataError, SparsekitError
from sparsekit.examples import EXAMPLES, PATHS
from sparsekit.model.build import build_model
from sparsekit.model.decoder import Decoder
from sparsekit.model.targets import load_model
from sparsekit.probes import results
from sparsekit.probes.base import Probe, ProbeResult, Tokens
from sparsekit.probes.layered import ViewError, layered
from sparsekit.probes.runner import run_probes
from sparsekit.sparsifiers.calibration import Calibration
from sparsekit.spec.load import load_spec
from sparsekit.spec.slot import Slot
from sparsekit.training.run import train

DENSE = {"type": "swiglu", "d_ff": 24}
MIXTURE = {"type": "moe", "n_experts": 4, "router": EXAMPLES["router"], "expert": DENSE}
LAYERS, SEQUENCES, STEPS, DOCUMENTS = 3, 24, 4, 1000
TEXTS = ("one two  three\n\ttwo one\r\n", "naïve café — 数 🙂", "<|endoftext|> </s> [EOS] \x00", " ", "3.14")


def _model(ffn: dict[str, Any] = DENSE, seed: int = 0) -> Decoder:
    """Layers that matter: weights of standard deviation 0.3."""
    block = {"attention": {"type": "gqa", "n_heads": 4, "n_kv_heads": 2}, "ffn": ffn}
    shape = {"d_model": 32, "n_layers": LAYERS, "vocab_size": VOCABULARY, "max_seq_len": LENGTH}
    return build_model({**shape, "block": block, "init": {"type": "normal", "std": 0.3}}, seed=seed).eval()


def _ids(seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(seed))


def _made(subject: Subject) -> Any:
    return subject.cls(Slot(subject.kind).validate(subject.slot).params)


def _lacking(subject: Subject) -> bool:
    """Whether it reads a file that only stands for one."""
    return any(subject.slot.get(name, ()) == EXAMPLES[name] for name in PATHS)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]


def documents(subject: Subject) -> Iterator[str]:
    """Texts, none of them empty, the same ones each time, none in both splits."""
    if _lacking(subject):
        return
    source, seen = _made(subject), {}
    for split in SPLITS:
        first, again = (list(itertools.islice(source.documents(split), DOCUMENTS)) for _ in range(2))
        if not first:
            yield f"documents({split!r}) gives none"
        wrong = next((i for i, text in enumerate(first) if not isinstance(text, str)), None)
        if wrong is not None:
            yield f"document {wrong} of {split!r} is of type {type(first[wrong]).__name__}, not str"
            return
        if "" in first:
            yield f"document {first.index('')} of {split!r} is empty"
        if first != again:
            yield f"documents({split!r}) gives other documents the second time"
        seen[split] = set(first)
    both = seen["train"] & seen["validation"]
    if both:
        yield f"a document is in both splits: {min(both)[:40]!r}"
    try:
        next(iter(source.documents("no_such_split")), None)
    except ValueError:
        return
    yield "documents('no_such_split') raises no ValueError"


def round_trip(subject: Subject) -> Iterator[str]:
    """What is encoded decodes to itself, by ids below vocab_size of which none is eos_id."""
    if _lacking(subject):
        return
    tokenizer: Tokenizer = _made(subject)
    tokenizer.fit([" ".join(TEXTS)] * 20)
    encoded = tokenizer.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, encoded, strict=True):
        if len(ids) and (int(max(ids)) >= tokenizer.vocab_size or int(min(ids)) < 0):
            yield f"the ids of {text!r} reach {int(max(ids))}, but vocab_size is {tokenizer.vocab_size}"
        elif tokenizer.eos_id in ids:
            yield f"{text!r} encodes to eos_id, which stands for no text"
        elif tokenizer.decode(ids) != text:
            yield f"{text!r} decodes to {tokenizer.decode(ids)!r}"
        elif tokenizer.decode([*ids, tokenizer.eos_id]) != text:
            yield "eos_id decodes to text"
        if not np.array_equal(tokenizer.encode(text), ids):
            yield f"encode({text!r}) is not what encode_batch gives"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        loaded = type(tokenizer).load(tokenizer.params, path)
    if loaded.fingerprint != tokenizer.fingerprint:
        yield "saved and loaded it has another fingerprint"
    if any(not np.array_equal(a, b) for a, b in zip(encoded, loaded.encode_batch(TEXTS), strict=True)):
        yield "saved and loaded it encodes to other ids"


def loss(subject: Subject) -> Iterator[str]:
    """A sum over targets, finite, with a gradient for every parameter; what is ignored does not count."""
    objective, model, ids = _made(subject), _model().train(), _ids()
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE

    def of(begin: int, end: int) -> Any:
        batch = Batch(ids[begin:end], targets[begin:end], None, (end - begin) * (LENGTH - 1))
        return objective(model, batch, ForwardContext())

    whole, parts = of(0, SEQUENCES), (of(0, 3), of(3, SEQUENCES))
    if whole.total.ndim or not whole.total.isfinite() or not whole.reported.isfinite():
        yield f"the total of a batch is {whole.total.detach()}, not a finite number"
        return
    for name in ("total", "reported"):
        got, *shares = (float(getattr(part, name).detach()) for part in (whole, *parts))
        wanted = sum(shares)
        if not math.isclose(got, wanted, rel_tol=1e-4):
            yield f"the {name} of a batch is {got:.6g}, of its halves together {wanted:.6g}: it is a sum over targets"
    if whole.reported.requires_grad:
        yield "reported carries a gradient; detach it"
    whole.total.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            yield f"parameter `{name}` receives no finite gradient"


def updates(subject: Subject) -> Iterator[str]:
    """Every parameter is in one group, the loss comes down, and a saved state goes on as if nothing had happened."""

    def step(model: Decoder, optimizer: torch.optim.Optimizer) -> float:
        ids = _ids()
        value = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(value.detach())

    model = _model()
    optimizer: torch.optim.Optimizer = _made(subject).build(model)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in model.named_parameters():
        if held.count(id(parameter)) != 1:
            yield f"parameter `{name}` is in {held.count(id(parameter))} groups, not in one"
    losses = [step(model, optimizer) for _ in range(20)]
    if not losses[-1] < losses[0]:
        yield f"after 20 steps on one batch the loss is {losses[-1]:.4f}, from {losses[0]:.4f}"
    for held_by, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or (value.ndim and value.shape != held_by.shape):
                yield f"state {name!r} is neither laid out as its parameter nor a tensor of no dimension"
    other = _model()
    other.load_state_dict(_state(model))
    restored: torch.optim.Optimizer = _made(subject).build(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer)
        step(other, restored)
    if changed := _changed(other, _state(model)):
        yield f"from a saved state it goes on otherwise: parameter `{changed[0]}` differs"


def factors(subject: Subject) -> Iterator[str]:
    """A factor in [0, 1] for each step, the same whenever it is asked for."""
    schedule, total = _made(subject), 200
    found = [float(schedule.factor(step, total)) for step in range(total)]
    wrong = next((step for step, factor in enumerate(found) if not 0 <= factor <= 1), None)
    if wrong is not None:
        yield f"the factor of step {wrong} of {total} is {found[wrong]}, not in [0, 1]"
    if not any(found):
        yield "every factor is 0"
    backwards = [float(schedule.factor(step, total)) for step in reversed(range(total))]
    if found != backwards[::-1]:
        yield "the factor of a step depends on what was asked for before, which a resumed run does not know"


def looks_on(subject: Subject) -> Iterator[str]:
    """Training goes on as if it were not there, also where the run is broken off and resumed."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as told:
        text = Path(folder) / "text.txt"
        text.write_text("What is it that you would tell me, and why not before now?\n" * 40)

        def weights(name: str, steps: int, callbacks: list[Any]) -> dict[str, Tensor]:
            model = {"d_model": 16, "n_layers": 2, "vocab_size": 257, "max_seq_len": LENGTH}
            settings = {"max_steps": steps, "micro_batch_size": 2, "log_every": 1, "eval_tokens": 64, "device": "cpu"}
            settings |= {"schedule": "constant", "callbacks": callbacks, "checkpoint_every": None}
            block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": DENSE}
            data = {"source": {"type": "text", "path": str(text)}}
            raw = {"name": "run", "model": {**model, "block": block}, "data": data, "train": settings}
            with contextlib.redirect_stderr(told):
                return _state(load_model(train(load_spec(raw), out=Path(folder) / name)))

        alone = weights("alone", STEPS, [])
        try:
            weights("watched", STEPS // 2, [subject.slot])
            watched = weights("watched", STEPS, [subject.slot])
        except SparsekitError as error:
            if "pip install" in str(error):
                return  # it says what it lacks here
            raise
    moved = [name for name, tensor in alone.items() if not torch.equal(tensor, watched[name])]
    if moved:
        why = "it changes what it looks at, or draws from torch's generator"
        yield f"with it a run ends with other weights, such as `{moved[0]}`: {why}"


def measures(subject: Subject) -> Iterator[str]:
    """Finite numbers by layer and for the model, the same each time, of a model that stays as it was."""
    tokens = Tokens.of(_ids(), 4)
    try:
        model = _model()
        result = _probed(subject, model, tokens)
    except (ViewError, DataError):  # it looks at experts, maybe
        model = _model(MIXTURE)
        result = _probed(subject, model, tokens)
    before = _state(model)
    again = _probed(subject, model, tokens)
    if changed := _changed(model, before):
        yield f"the model is another after it: `{changed[0]}` has changed"
    if not isinstance(result, ProbeResult):
        yield f"run gives a {type(result).__name__}, not a ProbeResult"
        return
    if not (result.scalars or result.per_layer or result.matrices or result.arrays):
        yield "the result is empty"
    for name, value in result.scalars.items():
        if not isinstance(value, float) or math.isinf(value):
            yield f"scalar {name!r} is {value!r}, not a finite float"
    for name, values in result.per_layer.items():
        if len(values) > LAYERS:
            yield f"per_layer {name!r} has {len(values)} values for {LAYERS} layers"
    for name, pair in result.intervals.items():
        if name not in result.scalars:
            yield f"the interval {name!r} is of no scalar"
        elif pair is not None and not pair[0] <= pair[1]:
            yield f"the interval {name!r} is {pair}"
    told = {key: value for key, value in results.as_json(result).items() if key != "meta"}
    if told != {key: value for key, value in results.as_json(again).items() if key != "meta"}:
        yield "a second run with the same seed finds other numbers; draw from generators seeded by self.seed"
    with tempfile.TemporaryDirectory() as folder:
        results.save(result, Path(folder), "result", plots=False)
        loaded = results.as_json(results.load(Path(folder) / "result.json"))
    if any(loaded[key] != value for key, value in told.items()):
        yield "saved and loaded the result is another"


def _probed(subject: Subject, model: nn.Module, tokens: Tokens) -> ProbeResult:
    made: Probe = _made(subject)
    return run_probes(model, {subject.name: made}, tokens)[subject.name]


def masks(subject: Subject) -> Iterator[str]:
    """What it finds masks a model, is the same each time and on disk, and leaves no trace once it is removed."""
    model, tokens = _model(), Tokens.of(_ids(), 4)
    before, ids = _state(model), _ids()

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids)
        return found

    dense = logits()
    found, again = (_made(subject).calibrate(layered(model), tokens) for _ in range(2))
    if not found.limits:
        yield "calibrate finds no limit"
    if not 0 <= found.sparsity <= 1:
        yield f"the sparsity of the calibration is {found.sparsity}, not in [0, 1]"
    if not torch.equal(dense, logits()):
        yield "calibrate changes the model"
    with found.install(model):
        sparse = logits()
    if not sparse.isfinite().all():
        yield "under it the logits are not finite"
    if found.sparsity > 0 and torch.equal(sparse, dense):
        yield f"its sparsity is {found.sparsity:.2f}, but no logit changes"
    if not torch.equal(dense, logits()) or _changed(model, before):
        yield "removed it leaves the model another"
    with again.install(model):
        if not torch.equal(sparse, logits()):
            yield "a second calibration with the same seed finds other limits"
    with tempfile.TemporaryDirectory() as folder:
        found.save(folder)
        loaded = Calibration.load(folder)
    with loaded.install(model):
        if not torch.allclose(sparse, logits(), rtol=1e-4, atol=1e-4):
            yield "saved and loaded it masks otherwise"


CHECKS: dict[str, tuple[Check, ...]] = {
    "source": (documents,),
    "tokenizer": (round_trip,),
    "objective": (loss,),
    "optimizer": (updates,),
    "schedule": (factors,),
    "callback": (looks_on,),
    "probe": (measures,),
    "sparsifier": (masks,),
}
