"""What is kept in which precision: weights, gradients, optimizer state, buffers, softmax, norms, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import finished
from test_resume import assert_same_run, rows, tensors
from torch import Tensor

from sparsekit.catalogue import BUILT_IN
from sparsekit.components.contracts import ForwardContext
from sparsekit.data.packing import Batch
from sparsekit.errors import CheckpointError
from sparsekit.model.accounting import describe
from sparsekit.model.build import build_model
from sparsekit.model.targets import Run, load_model
from sparsekit.spec.load import validate
from sparsekit.training.objectives import NextToken
from sparsekit.training.run import train
from sparsekit.training.trainer import Trainer

Make = Callable[..., dict[str, Any]]
BF16 = torch.bfloat16


def with_precision(raw: dict[str, Any], precision: str) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["train"]["precision"] = precision
    return raw


def biased(raw: dict[str, Any]) -> dict[str, Any]:
    """With a router whose bias moves by a thousandth a step, which a bfloat16 number above 1/4 would not feel."""
    raw = copy.deepcopy(raw)
    raw["model"]["layers"]["1"]["ffn"]["router"] = {"type": "top_k", "k": 1, "bias_rate": 0.001}
    return raw


@pytest.fixture
def trained(raw: dict[str, Any], tmp_path: Path) -> Any:
    """``trained(precision)``: a trainer after two steps."""
    made: list[Trainer] = []

    def make(precision: str) -> Trainer:
        trainer = Trainer(validate(with_precision(biased(raw), precision)), Run(tmp_path / precision))
        made.append(trainer)
        for _ in range(2):
            trainer.step()
        return trainer

    yield make
    for trainer in made:
        trainer.close()


def test_what_is_kept_in_which_dtype(trained: Any) -> None:
    stored = {"fp32": torch.float32, "bf16": torch.float32, "pure_bf16": BF16}
    for precision, dtype in stored.items():
        trainer = trained(precision)
        parameters = list(trainer.model.parameters())
        assert {p.dtype for p in parameters} == {dtype}
        moments = [s for p in parameters for name, s in trainer.optimizer.state[p].items() if name != "step"]
        assert len(moments) == 2 * len(parameters) and {s.dtype for s in moments} == {dtype}
        buffers = {b.dtype for b in trainer.model.buffers() if b.is_floating_point()}
        assert buffers == {torch.float32}, "counters, the router's bias, rope's tables"
        gradients: set[torch.dtype] = set()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p, found=gradients: found.add(p.grad.dtype))
        trainer.step()
        assert gradients == {dtype}


def test_memory_is_told_by_precision(trained: Any) -> None:
    """Of each precision what describe() says is what is there, but for the optimizer's count of steps."""
    for precision in ("fp32", "bf16", "pure_bf16"):
        trainer = trained(precision)
        told = describe(trainer.spec)
        parameters = list(trainer.model.parameters())
        moments = [s for p in parameters for s in trainer.optimizer.state[p].values() if s.ndim]
        assert told.weight_bytes == told.gradient_bytes == sum(p.nbytes for p in parameters)
        assert told.optimizer_bytes == sum(s.nbytes for s in moments)
        assert told.training_bytes == told.weight_bytes + told.gradient_bytes + told.optimizer_bytes


def test_losses_are_near_those_of_float32(raw: dict[str, Any], tmp_path: Path) -> None:
    told = {}
    for precision in ("fp32", "bf16", "pure_bf16"):
        run = train(validate(with_precision(raw, precision)), out=tmp_path / precision)
        told[precision] = [row["loss"] for row in run.metrics] + [run.metrics[-1]["val_loss"]]
    assert told["bf16"] != told["fp32"] != told["pure_bf16"] != told["bf16"]
    assert told["pure_bf16"] == pytest.approx(told["fp32"], rel=0.03)
    assert told["pure_bf16"][-1] < 0.9 * told["pure_bf16"][0]


def test_pure_bf16_with_all_that_a_run_may_do(raw: dict[str, Any], tmp_path: Path) -> None:
    """Statistics, a document mask, chunks and z-loss, samples."""
    raw["data"]["document_mask"] = True
    raw["train"] |= {
        "statistics": {"every": 3},
        "objective": {"type": "next_token", "z_loss": 1e-3, "chunk_tokens": 24},
        "callbacks": [{"type": "sample", "every": 6}],
    }
    told = {}
    for precision in ("fp32", "pure_bf16"):
        told[precision] = train(validate(with_precision(raw, precision)), out=tmp_path / precision).metrics
    for wide, narrow in zip(told["fp32"], told["pure_bf16"], strict=True):
        assert wide.keys() == narrow.keys()
        for name in ("loss", "z_loss_logits", "param_norm"):
            assert narrow[name] == pytest.approx(wide[name], rel=0.05)
    variances = [[row["variance/resid/layer_1"] for row in rows if row["step"] == 3] for rows in told.values()]
    assert variances[1] == pytest.approx(variances[0], rel=0.1)


# ---- what must not be bfloat16 ----


def test_weights_are_drawn_in_float32_and_rounded(tiny: Make) -> None:
    """Drawn in bfloat16, a truncated normal would take a few hundred values and repeat them."""
    spec = tiny(init={"type": "trunc_normal", "std": 0.02}, layers={"0": {"norm": "layernorm"}})
    wide, narrow = build_model(spec, seed=3), build_model(spec, seed=3, dtype=BF16)
    for (name, a), b in zip(wide.named_parameters(), narrow.parameters(), strict=True):
        assert b.dtype == BF16, name
        assert torch.equal(a.to(BF16), b), name
    table = narrow.embedding.weight
    assert isinstance(table, Tensor) and len(table.unique()) > 800
    meta = build_model(spec, device="meta", dtype=BF16)
    assert {p.dtype for p in meta.parameters()} == {BF16}


def test_a_routers_bias_feels_every_step(tiny: Make, moe: Make) -> None:
    """1000 steps of 0.001 are 1; bfloat16 would stop at 0.25 or 0.5, where a thousandth is below half its spacing."""
    model = build_model(tiny(ffn=moe(router={"type": "top_k", "k": 1, "bias_rate": 0.001})), dtype=BF16)
    router: Any = next(module for module in model.modules() if hasattr(module, "bias_E"))
    stuck = torch.zeros(4, dtype=BF16)
    chosen_E = torch.tensor([1.0, 0.0, 0.0, 0.0])  # all tokens go to the first
    for _ in range(1000):
        router.after_step({"chosen_E": chosen_E})
        stuck += 0.001 * torch.sign(chosen_E.mean() - chosen_E)
    torch.testing.assert_close(router.bias_E, torch.tensor([-1.0, 1.0, 1.0, 1.0]), rtol=1e-4, atol=0)
    assert stuck.abs().max() <= 0.5


@pytest.mark.parametrize("name", sorted({*BUILT_IN["norm"]} - {"dynamic_tanh"}))  # which has none
def test_norms_take_their_statistics_in_float32(tiny: Make, name: str) -> None:
    """Within the rounding of what comes in and goes out, also where squares would not fit bfloat16's eight bits."""
    norm = build_model(tiny(norm=name), dtype=BF16).norm
    x = (torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 10).to(BF16)
    wide = copy.deepcopy(norm).double()(x.double())
    y = norm(x)
    assert y.dtype == BF16
    torch.testing.assert_close(y.double(), wide, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_softmax_and_loss_are_float32(tiny: Make, chunk_tokens: int | None) -> None:
    """Of a bfloat16 model's logits the loss is that in float64 to a part in a million, summed over 240 tokens."""
    model = build_model({"init": {"type": "normal", "std": 0.2}, **tiny()}, dtype=BF16)
    ids = torch.randint(64, (8, 31), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, 240)
    logits = model(batch.ids_BT).detach()
    assert logits.dtype == BF16
    exact = -logits.double().log_softmax(-1).gather(-1, batch.targets_BT[..., None]).sum()
    exact_z = logits.double().logsumexp(-1).square().sum()
    objective = NextToken(NextToken.Params(z_loss=1.0, chunk_tokens=chunk_tokens))
    loss = objective(model, batch, ForwardContext())
    assert loss.reported.dtype == torch.float32
    assert float(loss.reported) == pytest.approx(float(exact), rel=1e-6)
    assert float(loss.further["z_loss_logits"]) == pytest.approx(float(exact_z), rel=1e-6)


# ---- checkpoints ----


def test_a_checkpoint_keeps_the_dtype_and_a_resumed_run_goes_on_as_it_was(raw: dict[str, Any], tmp_path: Path) -> None:
    raw = with_precision(biased(raw), "pure_bf16")
    raw["train"] |= {"schedule": "constant", "eval_every": 5}
    whole = train(validate(raw), out=tmp_path / "whole")
    for until in (5, 12):
        raw["train"]["max_steps"] = until
        part = train(validate(raw), out=tmp_path / "part")
    assert_same_run(whole, part)
    kept = {name: t for name, t in tensors(part.checkpoints[-1]).items() if name.startswith(("model.", "optimizer."))}
    assert len(kept) > 60
    for name, tensor in kept.items():
        wide = name.endswith("bias_E") or name.startswith("optimizer.step/")
        assert tensor.dtype == (torch.float32 if wide else BF16), name


def test_a_run_is_loaded_in_float32_unless_asked(raw: dict[str, Any], tmp_path: Path) -> None:
    """The same numbers either way: a float32 holds every bfloat16."""
    run = train(validate(with_precision(biased(raw), "pure_bf16")), out=tmp_path / "run")
    wide, narrow = load_model(run), load_model(run, dtype=BF16)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in narrow.parameters()} == {BF16}
    kept = tensors(run.checkpoints[-1])
    for name, tensor in wide.state_dict().items():
        assert torch.equal(tensor, kept[f"model.{name}"].float()), name
        assert torch.equal(tensor.to(narrow.state_dict()[name].dtype), narrow.state_dict()[name]), name
    ids = torch.arange(16)[None]
    assert wide(ids).dtype == torch.float32
    torch.testing.assert_close(narrow(ids).float(), wide(ids), rtol=0.05, atol=0.05)


def test_another_precision_is_another_run(raw: dict[str, Any], tmp_path: Path) -> None:
    train(validate(with_precision(raw, "bf16")), out=tmp_path / "run")
    raw["train"]["max_steps"] = 14
    with pytest.raises(CheckpointError, match=r"train\.precision was bf16, is pure_bf16"):
        train(validate(with_precision(raw, "pure_bf16")), out=tmp_path / "run")


def test_two_processes_in_pure_bf16(raw: dict[str, Any], tmp_path: Path) -> None:
    """Near one process, but not equal: gradients are rounded where ranks' are averaged."""
    raw = with_precision(biased(raw), "pure_bf16")
    raw["train"]["max_steps"] = 6
    one, two = train(validate(raw), out=tmp_path / "one"), Run(tmp_path / "two")
    finished(raw, two.folder, 2)
    for name, tolerance in (("loss", 1e-2), ("param_norm", 1e-2), ("grad_norm", 5e-2)):
        assert [row[name] for row in rows(two)] == pytest.approx([row[name] for row in rows(one)], rel=tolerance)
    kept = [tensors(run.checkpoints[-1]) for run in (one, two)]
    mine, theirs = ({name: t.dtype for name, t in found.items() if not name.startswith("cpu/")} for found in kept)
    assert mine == theirs and BF16 in mine.values()
