"""Optimizers against their formulas, written naively; who is in which group; what a bad step leaves; sharded runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import finished
from test_distributed import assert_close_runs
from test_resume import StopAt, assert_same_run, tensors
from torch import Tensor

from sparsekit.errors import SpecError
from sparsekit.model.build import build_model
from sparsekit.model.targets import Run
from sparsekit.registry import registry
from sparsekit.spec.load import validate
from sparsekit.training.checkpoint import tensors_of
from sparsekit.training.gradients import masked_step, written
from sparsekit.training.run import train

MODEL: dict[str, Any] = {
    "d_model": 16, "n_layers": 2, "vocab_size": 32, "max_seq_len": 8,
    "block": {
        "norm": "layernorm",
        "attention": {"type": "mha", "n_heads": 2, "bias": True, "qk_norm": "rmsnorm"},
        "ffn": {"type": "moe", "n_experts": 3, "expert": {"type": "mlp", "d_ff": 24, "bias": True}},
    },
}  # fmt: skip
HIDDEN = ("attention.q.", "attention.k.", "attention.v.", "attention.o.", "experts.up.", "experts.down.")


def optimizer_of(name: str, model: torch.nn.Module, **params: Any) -> torch.optim.Optimizer:
    cls = registry("optimizer").get(name)
    built: torch.optim.Optimizer = cls(cls.Params(**params)).build(model)
    return built


def told(model: torch.nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, Any]:
    """A setting of each parameter, by name; each stands in one group."""
    found = [(p, group[key]) for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(id(p) for p, _ in found) == sorted(names)
    return {names[id(p)]: value for p, value in found}


def give_gradients(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- against the formulas ----


def is_hidden(name: str) -> bool:
    return name.endswith("weight") and any(part in name for part in HIDDEN)


def is_matrix(name: str) -> bool:
    return is_hidden(name) or name in ("head.weight",) or "router" in name


class Reference:
    """One parameter's update in float64, from the published formula; state by name."""

    def __init__(self, name: str):
        self.name, self.state, self.t = name, {}, 0  # type: ignore[var-annotated]

    def old(self, key: str, like: Tensor) -> Tensor:
        return self.state.get(key, torch.zeros_like(like))


class NaiveAdamW(Reference):
    def __call__(self, w: Tensor, g: Tensor, lr: float, decay: float) -> Tensor:
        self.t += 1
        m = self.state["m"] = 0.9 * self.old("m", w) + 0.1 * g
        v = self.state["v"] = 0.95 * self.old("v", w) + 0.05 * g * g
        return w - lr * decay * w - lr * (m / (1 - 0.9**self.t)) / ((v / (1 - 0.95**self.t)).sqrt() + 1e-8)


class NaiveLion(Reference):
    def __call__(self, w: Tensor, g: Tensor, lr: float, decay: float) -> Tensor:
        m = self.old("m", w)
        self.state["m"] = 0.99 * m + 0.01 * g
        return w - lr * ((0.9 * m + 0.1 * g).sign() + decay * w)


class NaiveSGD(Reference):
    nesterov = False

    def __call__(self, w: Tensor, g: Tensor, lr: float, decay: float) -> Tensor:
        g = g + decay * w
        m = self.state["m"] = 0.9 * self.old("m", w) + g
        return w - lr * (g + 0.9 * m if self.nesterov else m)


class NaiveNesterov(NaiveSGD):
    nesterov = True


def naive_newton_schulz(u: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u / math.sqrt(float((u * u).sum()))
    for _ in range(5):
        s = x @ x.T
        x = a * x + b * s @ x + c * s @ s @ x
    return x


class NaiveMuon(NaiveAdamW):
    scale: Callable[[int, int], float] = staticmethod(lambda d_out, d_in: 0.2 * math.sqrt(max(d_out, d_in)))

    def __call__(self, w: Tensor, g: Tensor, lr: float, decay: float) -> Tensor:
        if not is_hidden(self.name):
            return super().__call__(w, g, 2 * lr, decay)
        m = self.state["m"] = 0.95 * self.old("m", w) + g
        u = g + 0.95 * m
        o = torch.stack([naive_newton_schulz(x) for x in u]) if u.ndim == 3 else naive_newton_schulz(u)
        return w - lr * (self.scale(*w.shape[-2:]) * o + decay * w)


class NaiveOriginalMuon(NaiveMuon):
    scale = staticmethod(lambda d_out, d_in: math.sqrt(max(1.0, d_out / d_in)))


FORMULAS: list[tuple[str, dict[str, Any], type]] = [
    ("adamw", {}, NaiveAdamW),
    ("lion", {}, NaiveLion),
    ("sgd", {}, NaiveSGD),
    ("sgd", {"nesterov": True}, NaiveNesterov),
    ("muon", {"adamw_lr": 0.02}, NaiveMuon),
    ("muon", {"adamw_lr": 0.02, "scale": "original"}, NaiveOriginalMuon),
]


@pytest.mark.parametrize(("name", "params", "naive"), FORMULAS, ids=[cls.__name__ for _, _, cls in FORMULAS])
def test_steps_are_the_formula(name: str, params: dict[str, Any], naive: type) -> None:
    model = build_model(MODEL, dtype=torch.float64)
    optimizer = optimizer_of(name, model, lr=0.01, weight_decay=0.3, **params)
    expected = {key: p.detach().clone() for key, p in model.named_parameters()}
    rules = {key: naive(key) for key in expected}
    for step in range(4):
        for group in optimizer.param_groups:  # as the trainer does
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * (step + 1) / 4
        for key, g in give_gradients(model, step).items():
            expected[key] = rules[key](expected[key], g, 0.01 * (step + 1) / 4, 0.3 if is_matrix(key) else 0.0)
        optimizer.step()
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[key], rtol=1e-10, atol=1e-12, msg=lambda m, k=key: k + m)


def test_sgd_without_momentum_keeps_nothing() -> None:
    model = build_model(MODEL, dtype=torch.float64)
    optimizer = optimizer_of("sgd", model, lr=0.5, momentum=0.0)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = give_gradients(model, 0)
    optimizer.step()
    assert all(torch.equal(p, before[key] - 0.5 * gradients[key]) for key, p in model.named_parameters())
    assert not optimizer.state


# ---- groups ----


def test_roles_reach_their_parameters() -> None:
    model = build_model(MODEL)
    roles = ["embed", "head", "norm", "bias", "router", "q", "k", "v", "o", "up", "down"]
    groups = {role: {"lr": float(i + 1)} for i, role in enumerate(roles)}
    found = told(model, optimizer_of("adamw", model, groups=groups), "lr")

    def expected(name: str) -> str:
        parts = name.split(".")
        if parts[-1] == "bias":
            return "bias"
        if "norm" in name:
            return "norm"
        if "router" in parts:
            return "router"
        return "embed" if parts[-2] == "embedding" else parts[-2]

    assert {name: roles[int(lr) - 1] for name, lr in found.items()} == {name: expected(name) for name in found}


def test_the_first_key_that_matches_counts() -> None:
    model = build_model(MODEL)
    groups = {
        "layers.0.attention.q.*": {"lr": 0.5},
        "q": {"lr_scale": 0.5},
        "layers.*": {"weight_decay": 0.7},
        "bias": {"lr": 9.0},  # only those outside layers would be left; there are such
    }
    model.norm.register_parameter("bias", torch.nn.Parameter(torch.zeros(16)))
    optimizer = optimizer_of("lion", model, lr=0.1, weight_decay=0.2, groups=groups)
    lr, decay = told(model, optimizer, "lr"), told(model, optimizer, "weight_decay")
    assert (lr["layers.0.attention.q.weight"], decay["layers.0.attention.q.weight"]) == (0.5, 0.2)
    assert (lr["layers.0.attention.q.bias"], decay["layers.0.attention.q.bias"]) == (0.5, 0.0)
    assert (lr["layers.1.attention.q.weight"], decay["layers.1.attention.q.weight"]) == (0.05, 0.2)
    assert (lr["layers.1.attention.q.bias"], decay["layers.1.attention.q.bias"]) == (0.1, 0.7)
    assert (lr["layers.1.ffn.experts.up.weight"], decay["layers.1.ffn.experts.up.weight"]) == (0.1, 0.7)
    assert (lr["norm.bias"], decay["norm.bias"]) == (9.0, 0.0)
    assert (lr["embedding.weight"], decay["embedding.weight"]) == (0.1, 0.0)
    assert (lr["head.weight"], decay["head.weight"]) == (0.1, 0.2)


MISTAKES = [
    ({"heads": {"lr": 1.0}}, "heads: matches no parameter (did you mean 'head'?); roles of this model: embed, q, "
     "bias, k, v, o, norm, router, up, down, head"),
    ({"gate": {"lr": 1.0}}, "gate: matches no parameter; roles of this model: embed, q, bias, k, v, o, norm, router, "
     "up, down, head"),
    ({"layers.0.attn.q.*": {"lr": 1.0}}, "layers.0.attn.q.*: matches no parameter (did you mean "
     "'layers.0.attention.q.bias'?); roles of this model: embed, q, bias, k, v, o, norm, router, up, down, head"),
    ({"layers.*": {"lr": 1.0}, "q": {"lr": 2.0}}, "q: all that it matches is matched before, by 'layers.*'; put it "
     "first"),
]  # fmt: skip


@pytest.mark.parametrize(("groups", "message"), MISTAKES)
@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_key_that_reaches_nothing_is_refused(name: str, groups: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        optimizer_of(name, build_model(MODEL), groups=groups)
    assert str(error.value) == f"train.optimizer.groups.{message}"


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ({"type": "adamw", "groups": {"q": {"lr": 1.0, "lr_scale": 2.0}}}, "groups.q: give lr or lr_scale, not both"),
        ({"type": "lion", "groups": {"q": {}}}, "groups.q: says nothing; give lr, lr_scale or weight_decay"),
        ({"type": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov needs a momentum above 0"),
    ],
)
def test_mistakes_in_a_spec(raw: dict[str, Any], slot: dict[str, Any], message: str) -> None:
    raw["train"]["optimizer"] = slot
    with pytest.raises(SpecError) as error:
        validate(raw)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("train.optimizer") and str(error.value).endswith(message)


# ---- what a bad step leaves, and what is kept ----

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lion": ("lion", {"lr": 0.01}),
    "muon": ("muon", {"lr": 0.01}),
    "muon without nesterov": ("muon", {"lr": 0.01, "nesterov": False, "scale": "original"}),
    "sgd": ("sgd", {"lr": 0.01}),
    "nesterov": ("sgd", {"lr": 0.01, "nesterov": True, "weight_decay": 0.1}),
    "grouped adamw": ("adamw", {"groups": {"q": {"lr": 0.3}}}),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(bad=st.lists(st.booleans(), min_size=1, max_size=5), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_bad_steps_leave_no_trace(kind: str, bad: list[bool], dtype: torch.dtype) -> None:
    """Bit for bit the weights and state of one that never saw the bad gradients, and was never asked to look."""
    name, params = KINDS[kind]
    masked, plain = (build_model(MODEL, dtype=dtype) for _ in range(2))
    optimizers = optimizer_of(name, masked, **params), optimizer_of(name, plain, **params)
    for seed, is_bad in enumerate(bad):
        give_gradients(masked, seed)
        if is_bad:
            for i, parameter in enumerate(masked.parameters()):
                parameter.grad.flatten()[i % parameter.numel()] = (math.nan, math.inf)[i % 2]  # type: ignore[union-attr]
        masked_step(optimizers[0], torch.tensor(is_bad), torch.tensor(1.0))
        if not is_bad:
            give_gradients(plain, seed)
            optimizers[1].step()
    states = [tensors_of(model, optimizer) for model, optimizer in zip((masked, plain), optimizers, strict=True)]
    for key, tensor in states[0].items():
        if all(bad) and key.startswith("optimizer."):
            assert not tensor.any(), key
        else:
            assert torch.equal(tensor, states[1][key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_all_state_is_tensors_shaped_as_weights_or_of_no_dimension(kind: str) -> None:
    name, params = KINDS[kind]
    model = build_model(MODEL)
    optimizer = optimizer_of(name, model, **params)
    give_gradients(model, 0)
    unused = model.layers[0].attention.o.weight  # type: ignore[union-attr]
    unused.grad = None
    before = unused.detach().clone()
    masked_step(optimizer, torch.tensor(False), torch.tensor(1.0))
    assert torch.equal(unused, before) and unused not in optimizer.state
    count = 0
    for parameter, state in optimizer.state.items():
        for tensor in state.values():
            assert isinstance(tensor, Tensor)
            assert tensor.shape in (parameter.shape, ())
            count += tensor.numel() if tensor.ndim else 0
    trained = {id(t) for t in written(optimizer)} & {id(p) for p in model.parameters()}
    assert len(trained) == len(list(model.parameters()))
    states = registry("optimizer").get(name).states_per_parameter
    hidden = [p for n, p in model.named_parameters() if is_hidden(n) and p is not unused]
    rest = sum(p.numel() for p in model.parameters() if p is not unused) - sum(p.numel() for p in hidden)
    assert count == states * sum(p.numel() for p in hidden) + (2 if name == "muon" else states) * rest


# ---- whole runs ----


@pytest.fixture
def stop_at() -> Any:
    registry("callback").register("stop_at")(StopAt)
    yield
    registry("callback").unregister("stop_at")


SLOTS = {
    "muon": {"type": "muon", "lr": 5e-3, "groups": {"embed": {"lr_scale": 2.0}, "layers.0.*": {"lr": 1e-3}}},
    "lion": {"type": "lion", "lr": 1e-3, "width_scaling": {"base_d_model": 8}},
    "sgd": {"type": "sgd", "lr": 0.3, "nesterov": True, "groups": {"head": {"lr": 0.1}}},
}


@pytest.mark.parametrize("name", SLOTS)
def test_stopped_equals_undisturbed(stop_at: None, raw: dict[str, Any], tmp_path: Path, name: str) -> None:
    raw["train"] |= {"max_steps": 6, "optimizer": SLOTS[name]}
    whole = train(validate(raw), out=tmp_path / "whole")
    stopped = copy.deepcopy(raw)
    stopped["train"]["callbacks"] = [{"type": "stop_at", "step": 3}]
    assert train(validate(stopped), out=tmp_path / "part").metrics[-1]["step"] == 3
    assert_same_run(whole, train(validate(raw), out=tmp_path / "part"))
    losses = [row["loss"] for row in whole.metrics]
    assert losses[-1] < losses[0]
    assert any(key.startswith("optimizer.momentum/") for key in tensors(whole.checkpoints[-1]))


@pytest.mark.parametrize("name", SLOTS)
def test_two_processes_train_as_one(raw: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Matrices cut unevenly between ranks, and experts that are split between them, three by two."""
    raw["model"]["block"]["ffn"]["d_ff"] = 21
    raw["model"]["layers"]["1"]["ffn"]["n_experts"] = 3
    raw["train"] |= {"max_steps": 6, "schedule": "constant", "optimizer": SLOTS[name]}
    one = train(validate(raw), out=tmp_path / "one")
    finished(raw, tmp_path / "two", 2)
    assert_close_runs(one, Run(tmp_path / "two"))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind: str) -> None:
    name, params = KINDS[kind]
    model = build_model(MODEL, device="cuda")
    optimizer = optimizer_of(name, model, **params)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    fine = torch.zeros((), dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for bad in (fine, ~fine, fine):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient.clone()
            masked_step(optimizer, bad, torch.ones((), device=bad.device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(tensor.isfinite().all()) for tensor in written(optimizer))
