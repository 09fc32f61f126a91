"""What is not finite never reaches the weights, and is told a step late with its step and place."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import assert_same_run, tensors
from torch import Tensor, nn

from sparsekit.errors import SparsekitError
from sparsekit.model.build import build_model
from sparsekit.model.targets import METRICS, Run
from sparsekit.registry import registry
from sparsekit.spec.load import validate
from sparsekit.training.callbacks import Callback
from sparsekit.training.checkpoint import STATE, tensors_of
from sparsekit.training.distributed import STOP, World
from sparsekit.training.gradients import Gradients, clip_factor, masked_after_step, masked_step, written
from sparsekit.training.run import train
from sparsekit.training.trainer import Trainer
from sparsekit.training.watch import SPIKE_AFTER, SpikeWatch, StepReport

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}
ATTENTION = "layers.0.attention.o.weight"


# Parts


def parameters_of(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), ())]


def stepped(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int, bad: bool | None) -> None:
    """One step with random gradients; where bad, one number of them is NaN. None for torch's own step."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if bad:
        parameters[1].grad[3] = math.nan  # type: ignore[index]
    if bad is None:
        optimizer.step()
    else:
        masked_step(optimizer, torch.tensor(bad), torch.tensor(1.0))


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=15, deadline=None)
@given(bad=st.lists(st.booleans(), min_size=1, max_size=6))
def test_masked_steps_are_the_steps_without_the_bad_ones(name: str, bad: list[bool]) -> None:
    """Weights and state equal those of an optimizer of torch's own that never saw the bad gradients."""
    masked, plain = parameters_of(0), parameters_of(0)
    optimizers = OPTIMIZERS[name](masked), OPTIMIZERS[name](plain)
    for seed, is_bad in enumerate(bad):
        stepped(masked, optimizers[0], seed, is_bad)
        if not is_bad:
            stepped(plain, optimizers[1], seed, None)
    if not all(bad):
        pairs = list(zip(written(optimizers[0]), written(optimizers[1]), strict=True))
        assert len(pairs) > len(masked) or name == "plain sgd"  # there is state
        assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(masked, plain, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_that_a_bad_step_makes_is_zero(name: str) -> None:
    parameters = parameters_of(0)
    optimizer = OPTIMIZERS[name](parameters)
    stepped(parameters, optimizer, 0, True)
    state = [tensor for tensor in written(optimizer) if not any(tensor is p for p in parameters)]
    assert all(not tensor.any() for tensor in state)


class Odd(nn.Module):
    """Parameters of several shapes and sizes, one of which gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        for name, parameter in zip("abc", parameters_of(1), strict=True):
            self.register_parameter(name, parameter)
        self.unused = nn.Parameter(torch.ones(7))


@pytest.mark.parametrize("fused", [True, False])
@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), limit=st.floats(1e-3, 1e3))
def test_clipping_is_torchs(fused: bool, scale: float, limit: float) -> None:
    ours, theirs = Odd().double(), Odd().double()
    for model in (ours, theirs):
        for i, parameter in enumerate([model.a, model.b, model.c]):
            parameter.grad = scale * torch.sin(torch.arange(parameter.numel()).double() + i).view(parameter.shape)
    gradients = Gradients(ours, World(torch.device("cpu")))
    assert gradients.names == ["a", "b", "c"]
    norm = gradients.squares().sum().sqrt()
    masked_step(torch.optim.SGD(ours.parameters(), 1.0, fused=fused), torch.tensor(False), clip_factor(norm, limit))
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    torch.optim.SGD(theirs.parameters(), 1.0).step()
    assert float(norm) == pytest.approx(float(expected), rel=1e-12)
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6 if fused else 1e-12, atol=1e-6 if fused else 1e-12)
    assert float(clip_factor(norm, None)) == 1.0


def test_norms_of_narrow_gradients_are_taken_in_float32() -> None:
    model = Odd().to(torch.bfloat16)
    model.a.grad = torch.full((4, 3), 1.0, dtype=torch.bfloat16)
    model.b.grad = torch.full((5,), 2.0**-7, dtype=torch.bfloat16)
    squares = Gradients(model, World(torch.device("cpu"))).squares()
    assert squares.dtype == torch.float32
    assert squares.tolist() == pytest.approx([12.0, 5 * 2.0**-14], rel=1e-6)


def test_a_report_tells_where() -> None:
    fine = StepReport(3, [1.0, 2.0], [0.5, 0.25], ["a", "b"])
    assert fine.finite and fine.loss == 3.0 and fine.bad_rank is None and fine.bad_parameter is None
    assert StepReport(3, [1.0, math.inf], [0.5], ["a"]).bad_rank == 1
    bad = StepReport(3, [1.0], [math.nan, math.inf, 1.0], ["a", "b", "c"])
    assert not bad.finite and bad.bad_parameter == "b"
    overflow = StepReport(3, [1.0], [1e308, 1e308], ["a", "b"])  # each finite, the norm not
    assert not overflow.finite


def test_a_leap_is_told_once_it_lies_six_deviations_up() -> None:
    """Against the running mean and variance worked out from their definition, a weighted sum over all that was."""
    losses = [3.0 + 0.1 * math.sin(7.0 * i) for i in range(SPIKE_AFTER)]
    weights = [0.02 * 0.98 ** (len(losses) - 1 - i) if i else 0.98 ** (len(losses) - 1) for i in range(len(losses))]
    mean = sum(w * x for w, x in zip(weights, losses, strict=True))
    deviation = math.sqrt(sum(w * (x - mean) ** 2 for w, x in zip(weights, losses, strict=True)))
    for sigmas, leaps in ((5.9, False), (6.1, True)):
        watch = SpikeWatch()
        assert [watch.see(i + 1, loss) for i, loss in enumerate(losses)] == [None] * len(losses)
        assert watch.mean == pytest.approx(mean, rel=1e-12)
        assert math.sqrt(watch.variance) == pytest.approx(deviation, rel=1e-9)
        told = watch.see(51, mean + sigmas * deviation + 1e-3)
        assert (told is not None) == leaps
        assert watch.leaps == ([51] if leaps else [])
    assert told is not None and re.fullmatch(r"step 51: the loss leapt to 3\.\d+ from about [23]\.?\d*", told)


def test_early_leaps_are_no_leaps() -> None:
    watch = SpikeWatch()
    assert [watch.see(step, loss) for step, loss in enumerate([1.0, 1.0, 1.0, 50.0])] == [None] * 4


# Runs


class Spoil(Callback):
    """Puts a NaN into a gradient, or into a weight, at a step; ``leave_out`` takes the update away instead."""

    class Params(Callback.Params):
        step: int
        leave_out: bool = False
        forward: bool = False

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.progress.step + 1 == self.params.step:
            for parameter in trainer.model.parameters() if self.params.leave_out else ():
                parameter.grad = None
            if not self.params.leave_out and not self.params.forward:
                gradient = trainer.model.get_parameter(ATTENTION).grad
                assert gradient is not None
                gradient[0, 0] = math.nan

    def on_step(self, trainer: Trainer) -> None:
        if self.params.forward and trainer.progress.step + 1 == self.params.step:
            with torch.no_grad():
                trainer.model.get_parameter(ATTENTION)[0, 0] = math.inf


class LeftOut(Trainer):
    """A trainer whose update ``leave_out`` is nothing at all: no optimizer is called."""

    leave_out = 0

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        if self.progress.step + 1 != self.leave_out:
            return super()._update(loss)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, loss


class Stop(Callback):
    class Params(Callback.Params):
        step: int

    def on_step(self, trainer: Trainer) -> None:
        if trainer.progress.step == self.params.step:
            trainer.agreement.ask(STOP)


@pytest.fixture(autouse=True)
def entries() -> Any:
    registry("callback").register("spoil")(Spoil)
    registry("callback").register("stop")(Stop)
    yield
    registry("callback").unregister("spoil")
    registry("callback").unregister("stop")


@pytest.fixture(params=["adamw", "momentum"])
def spec(request: pytest.FixtureRequest, raw: dict[str, Any]) -> Any:
    """A run whose optimizer is fused, and one whose is not and that makes its state as it goes."""
    raw["train"] |= {"max_steps": 8, "checkpoint_every": 3}
    if request.param == "momentum":

        class Momentum(registry("optimizer").get("adamw")):  # type: ignore[misc]
            def build(self, model: nn.Module) -> torch.optim.Optimizer:
                return torch.optim.SGD(model.parameters(), lr=self.params.lr, momentum=0.9)

        registry("optimizer").register("momentum")(Momentum)
        raw["train"]["optimizer"]["type"] = "momentum"
        yield raw
        registry("optimizer").unregister("momentum")
    else:
        yield raw


def spoiled(raw: dict[str, Any], step: int, on_nonfinite: str, **how: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["train"] |= {"on_nonfinite": on_nonfinite, "callbacks": [{"type": "spoil", "step": step, **how}]}
    return raw


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors_of(trainer.model, trainer.optimizer).items()}


def rows(run: Run) -> list[dict[str, Any]]:
    """What was logged, each line read by a parser that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run.folder / METRICS).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("step", [1, 4, 6, 8])  # the first; one between; one that saves; the last
def test_stop(spec: dict[str, Any], tmp_path: Path, step: int) -> None:
    run = Run(tmp_path / "run")
    bad = Trainer(validate(spoiled(spec, step, "stop")), run)
    kept = {1: "no checkpoint was saved", 4: "step-00000003)", 6: "step-00000003)", 8: "step-00000006)"}[step]
    with pytest.raises(SparsekitError) as told:
        bad.fit()
    bad.close()
    line = str(told.value)
    assert line.startswith(f"step {step}: the gradient of {ATTENTION} is not finite: training has diverged (")
    assert kept in line and line.endswith("; lower the learning rate, or set train.on_nonfinite to skip")
    assert "\n" not in line
    good = Trainer(validate(spec), Run(tmp_path / "good"))
    for _ in range(step - 1):
        good.step()
    expected, found = weights(good), weights(bad)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert all(not found[name].any() for name in found.keys() - expected.keys())  # state that the bad step made
    assert [row["step"] for row in rows(run)] == list(range(1, step))
    assert all(int(path.name[5:]) < step for path in run.checkpoints)


def test_stop_without_a_log_every_step(spec: dict[str, Any], tmp_path: Path) -> None:
    """The flag is read a step late, and nothing is changed meanwhile."""
    spec["train"] |= {"log_every": 100, "checkpoint_every": None}
    bad = Trainer(validate(spoiled(spec, 4, "stop")), Run(tmp_path / "run"))
    with pytest.raises(SparsekitError, match="^step 4: the gradient of"):
        bad.fit()
    assert bad.progress.step == 4  # in the midst of the fifth
    good = Trainer(validate(spec), Run(tmp_path / "good"))
    for _ in range(3):
        good.step()
    expected, found = weights(good), weights(bad)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_where_the_forward_is_bad_the_layer_is_named(raw: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SparsekitError, match=r"^step 5: rank 0: loss nan, first in layers\.0\.attention\.o: training"):
        train(validate(spoiled(raw, 5, "stop", forward=True)), out=tmp_path / "run")


def test_a_checkpoint_is_never_written_of_a_weight_that_is_not_finite(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"checkpoint_every": 4, "max_steps": 6}
    trainer = Trainer(validate(raw), Run(tmp_path / "run"))
    trainer.step()
    with torch.no_grad():
        trainer.model.get_parameter(ATTENTION)[0, 0] = math.inf
    with pytest.raises(
        SparsekitError, match=f"^step 1: weight {re.escape(ATTENTION)} is not finite, so no checkpoint is written$"
    ):
        trainer._save()
    assert list((tmp_path / "run").rglob("*step-*")) == []


@pytest.mark.parametrize("step", [1, 4, 6, 8])
def test_skip(spec: dict[str, Any], tmp_path: Path, step: int, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(validate(spoiled(spec, step, "skip")), out=tmp_path / "run")
    note = f"note: step {step}: the gradient of {ATTENTION} is not finite; the update was left out\n"
    assert capsys.readouterr().err == note
    found = rows(run)
    assert [row["step"] for row in found] == list(range(1, 9))
    assert [row.get("skipped_updates") for row in found] == [None] * (step - 1) + [1] * (9 - step)
    assert found[step - 1]["grad_norm"] is None and found[step - 1]["loss"] > 0
    without = LeftOut(validate(spec), Run(tmp_path / "without"))
    without.leave_out = step
    without.fit()
    without.close()
    for name in ("loss", "tokens", "val_loss"):
        assert [row.get(name) for row in found] == [row.get(name) for row in rows(without.run)]
    a, b = tensors(run.checkpoints[-1]), tensors(without.run.checkpoints[-1])
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_the_count_of_skipped_updates_is_resumed(raw: dict[str, Any], tmp_path: Path, stop: int) -> None:
    raw = spoiled(raw, 4, "skip")
    raw["train"]["max_steps"] = 8
    whole = train(validate(raw), out=tmp_path / "whole")
    stopping = copy.deepcopy(raw)
    stopping["train"]["callbacks"].append({"type": "stop", "step": stop})
    part = train(validate(stopping), out=tmp_path / "part")
    state = json.loads((part.checkpoints[-1] / STATE).read_text())
    assert (state["progress"]["step"], state["progress"]["skipped"]) == (stop, 0 if stop < 4 else 1)
    assert_same_run(whole, train(validate(raw), out=tmp_path / "part"))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw"])
def test_no_step_makes_the_host_wait(raw: dict[str, Any], tmp_path: Path, optimizer: str) -> None:
    raw["train"] |= {"device": "cuda", "max_steps": 100, "optimizer": {"type": optimizer, "lr": 1e-3}}
    raw["train"]["precision"] = "bf16"  # in which alone torch multiplies grouped experts on a GPU without a wait
    trainer = Trainer(validate(raw), Run(tmp_path / "run"))
    for _ in range(3):  # which may allocate, choose kernels, make the optimizer's state
        trainer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.close()
    assert trainer.progress.step == 6


@pytest.mark.parametrize("bad", [False, True])
def test_what_moves_by_rule_is_masked_too(bad: bool) -> None:
    model = build_model({
        "d_model": 16, "n_layers": 1, "vocab_size": 32, "max_seq_len": 8,
        "block": {"attention": {"type": "mha", "n_heads": 2}, "ffn": {
            "type": "moe", "n_experts": 4, "expert": {"type": "swiglu", "d_ff": 16},
            "router": {"type": "top_k", "k": 1, "bias_rate": 0.5},
        }},
    })  # fmt: skip
    router: Any = model.layers[0].ffn.router  # type: ignore[union-attr]
    masked_after_step(router, {"chosen_E": torch.tensor([1.0, 0.0, 0.0, 0.0])}, torch.tensor(bad))
    moved = [-0.5, 0.5, 0.5, 0.5]
    assert router.bias_E.tolist() == ([0.0] * 4 if bad else moved)
