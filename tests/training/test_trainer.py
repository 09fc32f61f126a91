"""The loop itself: what a step computes, what is evaluated, what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparsekit.components.contracts import ForwardContext
from sparsekit.data.packing import IGNORE, Batch
from sparsekit.errors import SparsekitError, SpecError
from sparsekit.model.targets import Run, load_model
from sparsekit.spec.load import validate
from sparsekit.training.run import train
from sparsekit.training.trainer import Trainer


def batch_of(trainer: Trainer, position: int, count: int) -> Batch:
    """Windows of the training order, whatever was read already."""
    loader: Any = trainer.data.loader(trainer.spec.seq_len, trainer.spec.train.seed, count)
    return loader.batch(position, count).to("cpu")


def trainer_of(raw: dict[str, Any], folder: Path) -> Trainer:
    return Trainer(validate(raw), Run(folder))


def dense(raw: dict[str, Any]) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    raw["model"]["layers"] = {}
    return raw


def test_accumulation_equals_one_large_batch(raw: dict[str, Any], tmp_path: Path) -> None:
    raw = dense(raw)
    trainers = []
    for name, size in (("one", 8), ("four", 2)):
        raw["train"]["micro_batch_size"] = size
        trainer = trainer_of(raw, tmp_path / name)
        trainer.model.double()
        told = [trainer.step() for _ in range(3)][-1]
        trainers.append((trainer, told))
    (one, one_told), (four, four_told) = trainers
    for name in ("loss", "grad_norm"):
        assert float(one_told[name]) == pytest.approx(float(four_told[name]), rel=1e-10)
    for (name, a), (_, b) in zip(one.model.named_parameters(), four.model.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), name


def test_counters_are_averaged_over_micro_batches(raw: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(raw, tmp_path / "run")
    router = trainer.model.layers[1].ffn.router  # type: ignore[attr-defined]
    values = []
    with torch.no_grad():
        for offset in (0, 4):
            trainer.model(batch_of(trainer, offset, 4).ids_BT)
            values.append(router.load_balance_loss.item())
    assert values[0] != values[1]
    told = trainer.step(collect=True)
    assert float(told["load_balance_loss"]) == pytest.approx(sum(values) / 2, rel=1e-6)


def test_a_step_is_adamw_by_the_formula(raw: dict[str, Any], tmp_path: Path) -> None:
    """Two steps in float64 against the published update, clipping and schedule included."""
    raw = dense(raw)
    raw["train"] |= {"max_grad_norm": 0.05, "micro_batch_size": 8}
    trainer = trainer_of(raw, tmp_path / "run")
    model = trainer.model.double()
    reference = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in reference.items()}
    for step in range(2):
        batch = batch_of(trainer, step * 8, 8)
        logits = torch.func.functional_call(model, reference := {k: v.requires_grad_() for k, v in reference.items()},
                                            (batch.ids_BT,))  # fmt: skip
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE)
        gradients = dict(zip(reference, torch.autograd.grad(loss, list(reference.values())), strict=True))
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        told = trainer.step()
        assert float(told["loss"]) == pytest.approx(loss.item(), rel=1e-12)
        assert float(told["grad_norm"]) == pytest.approx(norm, rel=1e-9)
        lr = told["lr"]
        assert lr == pytest.approx(1e-2 * (step + 1) / 3)
        with torch.no_grad():
            for name, g in gradients.items():
                g = g * min(1.0, 0.05 / (norm + 1e-6))
                m, v = moments[name]
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.95).add_(0.05 * g * g)
                decay = 0.1 if reference[name].ndim == 2 and "embedding" not in name else 0.0
                update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                reference[name] = reference[name] - lr * decay * reference[name] - lr * update
        for name, p in model.named_parameters():
            assert torch.allclose(p, reference[name], rtol=1e-7, atol=1e-10), name


def test_validation_loss_and_bits_per_byte(raw: dict[str, Any], tmp_path: Path, text: Path) -> None:
    trainer = trainer_of(raw, tmp_path / "run")
    told = trainer.evaluate()
    stream = [*(text / "validation.txt").read_bytes(), trainer.tokenizer.eos_id]
    total, count, scored = 0.0, 0, set()
    trainer.model.eval()
    starts = [*range(0, len(stream) - 17, 16), len(stream) - 17]
    for start in starts:
        with torch.no_grad():
            logits = trainer.model(torch.tensor([stream[start : start + 16]]))[0].double().log_softmax(-1)
        for i in range(16):
            if start + i + 1 not in scored:
                scored.add(start + i + 1)
                total -= logits[i, stream[start + i + 1]].item()
                count += 1
    assert count == len(stream) - 1
    assert told["val_loss"] == pytest.approx(total / count, rel=1e-5)
    n_bytes = (text / "validation.txt").stat().st_size
    assert told["val_bits_per_byte"] == pytest.approx(total / count * len(stream) / n_bytes / math.log(2), rel=1e-5)


def test_learns(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"max_steps": 80, "global_batch_tokens": 256}
    rows = train(validate(raw), out=tmp_path / "run").metrics
    assert rows[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert rows[-1]["val_loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["load_balance_loss"] == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize(("field", "value", "steps"), [("max_tokens", 1000, 8), ("max_epochs", 0.5, None)])
def test_length(raw: dict[str, Any], tmp_path: Path, field: str, value: float, steps: int | None) -> None:
    del raw["train"]["max_steps"]
    raw["train"][field] = value
    trainer = trainer_of(raw, tmp_path / "run")
    expected = steps or math.ceil(0.5 * trainer.loader.n_windows / 8)
    assert trainer.total_steps == expected


def test_checkpoints_kept_by_policy(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"checkpoint_every": 1, "keep": {"last": 2, "every": 5, "best": False}}
    run = train(validate(raw), out=tmp_path / "run")
    assert [int(path.name[5:]) for path in run.checkpoints] == [5, 10, 11, 12]


@pytest.mark.parametrize(("n", "saved"), [(12, [2, 4, 6, 8, 10, 12]), (25, [*range(3, 25, 3), 25]), (3, [1, 2, 3])])
def test_unless_told_otherwise_a_kill_costs_a_tenth(
    raw: dict[str, Any], tmp_path: Path, n: int, saved: list[int]
) -> None:
    raw["train"] |= {"max_steps": n, "keep": {"last": 99}}
    run = train(validate(raw), out=tmp_path / "run")
    assert [int(path.name[5:]) for path in run.checkpoints] == saved
    raw["train"]["checkpoint_every"] = None
    assert [path.name for path in train(validate(raw), out=tmp_path / "end").checkpoints] == [f"step-{n:08d}"]


def test_best_checkpoint_is_kept(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"eval_every": 2, "keep": {"last": 1}, "max_steps": 24, "schedule": "constant"}
    raw["train"]["optimizer"]["lr"] = 0.2  # far too high, so that the loss goes up and down
    run = train(validate(raw), out=tmp_path / "run")
    losses = {row["step"]: row["val_loss"] for row in run.metrics if "val_loss" in row}
    best = min(losses, key=lambda step: losses[step])
    assert best != 24
    assert [int(path.name[5:]) for path in run.checkpoints] == [best, 24]


def test_bf16(raw: dict[str, Any], tmp_path: Path) -> None:
    told = {}
    for precision in ("fp32", "bf16"):
        raw["train"]["precision"] = precision
        run = train(validate(raw), out=tmp_path / precision)
        told[precision] = [row["loss"] for row in run.metrics]
        assert next(load_model(run).parameters()).dtype == torch.float32
    assert told["bf16"] != told["fp32"]
    assert told["bf16"] == pytest.approx(told["fp32"], rel=0.02)


def test_document_mask_reaches_the_model(raw: dict[str, Any], tmp_path: Path, text: Path) -> None:
    (text / "train.txt").write_text("".join(f"document {i} of some length\n\u001e\n" for i in range(60)))
    raw["data"]["source"] |= {"separator": "\u001e"}
    raw["data"]["document_mask"] = True
    trainer = trainer_of(raw, tmp_path / "run")
    batch = batch_of(trainer, 0, 4)
    assert batch.documents_BT is not None
    masked = trainer.model(batch.ids_BT, ForwardContext(documents_BT=batch.documents_BT))
    assert not torch.allclose(masked, trainer.model(batch.ids_BT))
    assert math.isfinite(trainer.step()["loss"])


def test_divergence_stops_with_a_line(raw: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(raw, tmp_path / "run")
    with torch.no_grad():
        trainer.model.layers[0].attention.o.weight[0, 0] = math.nan  # type: ignore[union-attr]
    with pytest.raises(
        SparsekitError,
        match=r"^step 1: rank 0: loss nan, first in layers.0.attention.o: training has diverged \(no checkpoint",
    ):
        trainer.fit()
    assert Run(tmp_path / "run").checkpoints == []


def test_unknown_device(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"]["device"] = "quantum"
    with pytest.raises(SpecError, match="train.device: 'quantum' cannot be used"):
        trainer_of(raw, tmp_path / "run")


@pytest.mark.slow
def test_compiled_training_follows_eager(raw: dict[str, Any], tmp_path: Path) -> None:
    losses = []
    for compile in (False, True):
        raw["train"]["compile"] = compile
        run = train(validate(raw), out=tmp_path / str(compile))
        losses.append([row["loss"] for row in run.metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
