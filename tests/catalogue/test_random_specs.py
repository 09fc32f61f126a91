"""Whatever the catalogue allows: refused with a reason, or it builds, keeps what it declares, and trains."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from sparsekit.checks import MODEL_KINDS, elsewhere
from sparsekit.components.contracts import Component, ForwardContext
from sparsekit.components.kernels import Kernel
from sparsekit.components.routers import NoisyTopK
from sparsekit.errors import SparsekitError, SpecError
from sparsekit.model.accounting import describe
from sparsekit.model.build import build_model
from sparsekit.model.decoder import Decoder
from sparsekit.model.targets import Run
from sparsekit.registry import registry
from sparsekit.spec.facts import walk
from sparsekit.spec.load import dump, validate, validate_model
from sparsekit.training.trainer import Trainer

from .strategies import LENGTH, VOCABULARY, models

BATCH = 3


class Tally:
    """What became of the specs drawn, for the figures that the tests hold and print."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.trained: set[tuple[str, str]] = set()
        self.checked: Counter[str] = Counter()

    def refuse(self, outcome: str, lines: list[str]) -> None:
        self.outcomes[outcome] += 1
        for line in lines:
            assert_is_a_reason(line)
            message = line if line.startswith("kernel ") else line.partition(": ")[2]
            self.reasons[re.sub(r"\d[\d.]*", "#", message)] += 1

    def report(self) -> str:
        drawn = sum(self.outcomes.values())
        lines = [f"{drawn} specs drawn: {dict(self.outcomes)}; held to {dict(self.checked)}"]
        lines += [f"{n:5d} {reason}" for reason, n in self.reasons.most_common()]
        return "\n".join(lines)


def assert_is_a_reason(line: str) -> None:
    """One line that says where, what and how it is mended, in words and not as Python prints things."""
    assert "\n" not in line
    assert len(line) < 250, line
    assert re.match(r"[a-z_]+[\w.:-]*: \w.* .*\w", line) or line.startswith("kernel "), line
    assert not re.search(r"Traceback|Error\b|<class|object at|\bNone\b|frozenset", line), line


def components(model: Decoder) -> list[Component]:
    return [module for module in model.modules() if isinstance(module, Component)]


def noisy(model: Decoder, dtype: torch.dtype) -> Decoder:
    """The model with noise upon its weights, so that what starts at zero shows too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def draws_among_rows_of_experts(model: Decoder) -> bool:
    """Noise inside experts is drawn for as many rows as they were sent, so that nothing can be compared."""
    for name, module in model.named_modules():
        jitter = getattr(getattr(module, "params", None), "jitter", 0.0)
        if ".experts." in name and (jitter or isinstance(module, NoisyTopK)):
            return True
    return False


def leaks(model: Decoder, tolerance: float, tally: Tally) -> Iterator[str]:
    """Every way in which outputs depend on what the components declare they do not."""
    causal = all(module.causal for module in components(model))
    coupled = any(module.batch_coupled for module in components(model))
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    halves = ForwardContext(documents_BT=(torch.arange(LENGTH) >= LENGTH // 2).long().expand(BATCH, -1))

    def logits(ids: Tensor, context: ForwardContext | None = None) -> Tensor:
        torch.manual_seed(2)
        with torch.no_grad():
            return model(ids, context)

    def other(row: int, columns: slice | int) -> Tensor:
        changed = ids.clone()
        changed[row, columns] = (changed[row, columns] + 1) % VOCABULARY
        return changed

    for training in (False, True) if not draws_among_rows_of_experts(model) else (False,):
        model.train(training)
        before = logits(ids)
        assert before.isfinite().all()
        limit = tolerance * before.abs().max()
        if causal:
            tally.checked["causality"] += 1
            for at in (LENGTH - 1, LENGTH // 2):
                if not (logits(other(0, at))[0, :at] - before[0, :at]).abs().max() <= limit:
                    yield f"an output before token {at} depends on it (training {training})"
        if not coupled:
            tally.checked["independence of sequences"] += 1
            if not (logits(other(1, slice(None)))[0] - before[0]).abs().max() <= limit:
                yield f"sequence 0 depends on sequence 1 (training {training})"
        if causal and not coupled:
            tally.checked["independence of documents"] += 1
            first, second = (logits(x, halves) for x in (ids, other(0, slice(LENGTH // 2))))
            if not (first - second)[:, LENGTH // 2 :].abs().max() <= limit:
                yield f"a document depends on the one before (training {training})"


def names_in(raw: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of every slot that a validated model fills."""
    spec = validate_model(raw)
    for part in (spec, *spec.per_layer):
        yield from ((choice.kind, choice.type) for _, choice in walk(part))


def examine(raw: dict[str, Any], run_of: Callable[..., dict[str, Any]], folder: Path, tally: Tally) -> None:
    """One spec, from its text to three steps of training."""
    given = copy.deepcopy(raw)
    try:
        spec = validate_model(raw)
    except SpecError as error:
        tally.refuse("refused", error.problems)
        return
    assert raw == given, "validation changed its argument"
    dumped = json.loads(json.dumps(dump(spec)))
    assert validate_model(dumped) == spec
    assert dump(validate_model(dumped)) == dumped

    description = describe(spec)
    model = build_model(spec)
    assert description.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < description.active_parameters <= description.parameters
    assert description.flops_per_token > 0
    assert description.activation_bytes > 0

    kernels: list[Kernel] = [layer.attention.kernel for layer in model.layers]  # type: ignore[attr-defined]
    exact = all(torch.float64 in kernel.dtypes for kernel in kernels)
    dtype, tolerance = (torch.float64, 1e-9) if exact else (torch.float32, 1e-4)
    cpu = torch.device("cpu")
    if all(kernel.refusal(cpu, dtype, gradients=False) is None for kernel in kernels):
        found = list(leaks(noisy(build_model(spec), dtype), tolerance, tally))
        assert not found, found

    trainable = all(kernel.refusal(cpu, torch.float32, gradients=True) is None for kernel in kernels)
    if not all(module.causal for module in components(model)):
        with pytest.raises(SpecError, match=r"^model\.allow_leak: ") as refused:
            Trainer(validate(run_of(raw, max_steps=3)), Run(folder))
        assert_is_a_reason(str(refused.value))
        raw = {**raw, "allow_leak": True}
        tally.checked["allow_leak"] += 1
    if not trainable:
        with pytest.raises(SparsekitError) as refused:
            Trainer(validate(run_of(raw, max_steps=3)), Run(folder))
        tally.refuse("refused by a kernel", [str(refused.value)])
        return
    trainer = Trainer(validate(run_of(raw, max_steps=3)), Run(folder))
    reached = {}
    for name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: reached.__setitem__(name, bool(p.grad.isfinite().all()))  # type: ignore[misc]
        )
    for told in [trainer.step(collect=True) for _ in range(3)]:
        for name, value in told.items():
            assert math.isfinite(value), name
    assert all(reached.values())
    missed = {name for name, _ in trainer.model.named_parameters()} - reached.keys()
    assert not missed, "no gradient, not even of zeros"
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    tally.outcomes["trained"] += 1
    tally.trained.update(names_in(raw))


def test_capacity_inside_an_expert_is_known_to_leak() -> None:
    """How many rows an expert is sent, and so the capacity in it, depends on later tokens."""
    inner = {"type": "moe", "n_experts": 2, "router": {"type": "switch", "capacity_factor": 0.5},
             "expert": {"type": "swiglu", "d_ff": 8}}  # fmt: skip
    ffn = {"type": "moe", "n_experts": 2, "router": "hash", "expert": inner}
    block = {"attention": {"type": "mha", "n_heads": 2}, "ffn": ffn}
    spec = {"d_model": 12, "n_layers": 1, "vocab_size": VOCABULARY, "max_seq_len": 16, "block": block}
    moved = 0.0
    for seed in range(8):
        model = noisy(build_model(spec, seed=seed), torch.float64).eval()
        ids = torch.randint(VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(seed))
        other = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % VOCABULARY), dim=1)
        with torch.no_grad():
            moved = max(moved, float((model(ids) - model(other))[0, :-1].abs().max()))
    assert moved > 1e-3
    assert not model.layers[0].ffn.causal
    block["ffn"] = inner
    assert build_model(spec).layers[0].ffn.causal


def explore(
    n_examples: int, run_of: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, **options: Any
) -> Tally:
    tally = Tally()

    @settings(max_examples=n_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    @given(models())
    def each(raw: dict[str, Any]) -> None:
        examine(raw, run_of, tmp_path_factory.mktemp("run"), tally)

    each()
    print(tally.report())
    refused = sum(tally.outcomes.values()) - tally.outcomes["trained"]
    assert refused < 0.4 * sum(tally.outcomes.values())
    return tally


def test_random_specs(run_of: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    explore(100, run_of, tmp_path_factory, derandomize=True)


@pytest.mark.slow
def test_many_random_specs(run_of: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """New ones at each run; together they train what can be trained here, but for what chance leaves out."""
    tally = explore(500, run_of, tmp_path_factory)
    here = {
        (kind, name)
        for kind in MODEL_KINDS
        for name in registry(kind).names()
        if elsewhere(registry(kind).get(name)) is None
    }
    assert len(here - tally.trained) <= 3, here - tally.trained
