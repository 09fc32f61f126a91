"""What looks on while a model trains: its files, its step ranges, and that training is none the wiser."""

from __future__ import annotations

import copy
import gzip
import json
import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.model.targets import Run
from sparsekit.spec.load import dump, validate
from sparsekit.training.callbacks import Callback, Profiler, Sample
from sparsekit.training.loggers import TensorBoard, Wandb, histogram
from sparsekit.training.trainer import Trainer


def trainer_of(raw: dict[str, Any], folder: Path, *callbacks: Callback, steps: int = 4) -> Trainer:
    raw = copy.deepcopy(raw)
    raw["train"] |= {"max_steps": steps}
    raw["model"]["layers"] = {}
    trainer = Trainer(validate(raw), Run(folder))
    trainer.callbacks = list(callbacks)
    return trainer


def fitted(raw: dict[str, Any], folder: Path, *callbacks: Callback, steps: int = 4, after: Path | None = None) -> Run:
    trainer = trainer_of(raw, folder, *callbacks, steps=steps)
    if after is not None:
        trainer.restore(after)
    try:
        trainer.fit()
    finally:
        trainer.close()
    return trainer.run


def events(run: Run) -> EventAccumulator:
    read = EventAccumulator(str(run.folder / "tb"), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    read.Reload()
    return read


class Watching(Callback):
    """Copies gradients and weights when the histograms see them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.gradients: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.texts: list[tuple[int, str, str]] = []

    def on_gradients(self, trainer: Trainer) -> None:
        self.gradients[trainer.progress.step + 1] = {
            name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
        }

    def on_step(self, trainer: Trainer) -> None:
        self.weights[trainer.progress.step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def on_text(self, trainer: Trainer, name: str, text: str) -> None:
        self.texts.append((trainer.progress.step, name, text))


# --- TensorBoard


def test_tensorboard_has_every_number(raw: dict[str, Any], tmp_path: Path) -> None:
    run = fitted(raw, tmp_path / "run", TensorBoard(TensorBoard.Params()))
    read = events(run)
    for row in run.metrics:
        for key in row.keys() - {"step"}:
            (value,) = [event.value for event in read.Scalars(key) if event.step == row["step"]]
            assert value == pytest.approx(row[key], rel=1e-5)
    assert read.Tags()["histograms"] == []


def test_histograms_are_of_weights_and_gradients(raw: dict[str, Any], tmp_path: Path) -> None:
    watching = Watching()
    board = TensorBoard(TensorBoard.Params(histograms=["weights", "gradients"], histograms_every=2))
    read = events(fitted(raw, tmp_path / "run", board, watching))
    for kind, kept in (("gradients", watching.gradients), ("weights", watching.weights)):
        for name in kept[2]:
            drawn = read.Histograms(f"{kind}/{name}")
            assert [event.step for event in drawn] == [2, 4]
            for event in drawn:
                tensor = kept[event.step][name].double()
                told = event.histogram_value
                assert told.num == tensor.numel()
                assert told.sum == pytest.approx(tensor.sum().item(), abs=1e-9, rel=1e-6)
                assert (told.min, told.max) == pytest.approx((tensor.min().item(), tensor.max().item()))
                assert sum(told.bucket) == tensor.numel()


def test_histogram_by_counting() -> None:
    x = torch.randn(7, 31, generator=torch.Generator().manual_seed(0))
    told = histogram(x, bins=5)
    assert told is not None
    low = x.min().item()
    for limit, count in zip(told["bucket_limits"], told["bucket_counts"], strict=True):
        inside = [
            v for v in x.flatten().tolist() if low <= v < limit or (limit == told["bucket_limits"][-1] and v >= low)
        ]
        assert count == len(inside)
        low = limit
    assert told["sum_squares"] == pytest.approx((x.double() ** 2).sum().item())


def test_histogram_of_constants_and_of_nothing() -> None:
    told = histogram(torch.full((3, 4), 2.0))
    assert told is not None
    assert sum(told["bucket_counts"]) == 12
    assert told["bucket_limits"][-1] == 2.5
    assert histogram(torch.tensor([math.nan, math.inf])) is None
    some = histogram(torch.tensor([1.0, math.nan, 3.0]))
    assert some is not None
    assert some["num"] == 2


# --- samples


def sample(**params: Any) -> Sample:
    return Sample(Sample.Params(**{"prompt": "it is a", "max_new_tokens": 5, **params}))


def test_samples_are_written_printed_and_logged(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watching = Watching()
    board = TensorBoard(TensorBoard.Params())
    run = fitted(raw, tmp_path / "run", board, sample(every=2), watching, steps=5)
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert all(row["prompt"] == "it is a" and row["text"].startswith("it is a") for row in rows)
    assert watching.texts == [(row["step"], "sample", row["text"]) for row in rows]
    printed = capsys.readouterr().out
    assert all(row["text"] in printed for row in rows)
    told = events(run).Tensors("sample/text_summary")
    assert [(e.step, e.tensor_proto.string_val[0].decode()) for e in told] == [(r["step"], r["text"]) for r in rows]


def test_sampling_changes_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["model"]["block"]["ffn"] = {  # whose jitter draws from the generators that sampling must put back
        "type": "moe",
        "n_experts": 2,
        "router": {"type": "top_k", "k": 1, "jitter": 0.1},
        "expert": {"type": "swiglu", "d_ff": 16},
    }
    plain = fitted(raw, tmp_path / "plain", steps=4)
    sampled = fitted(raw, tmp_path / "sampled", sample(every=1), steps=4)
    machine = ("tokens_per_second", "data_wait", "memory_resident_gib")
    rows = [[{k: v for k, v in row.items() if k not in machine} for row in run.metrics] for run in (plain, sampled)]
    assert rows[0] == rows[1]
    trainer = trainer_of(raw, tmp_path / "mode")
    trainer.model.train()
    before = torch.random.get_rng_state()
    sample()._written(trainer)
    assert trainer.model.training
    assert torch.equal(before, torch.random.get_rng_state())
    trainer.close()


def test_a_resumed_run_drops_the_samples_of_steps_it_takes_again(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"]["checkpoint_every"] = 2
    run = fitted(raw, tmp_path / "run", sample(every=1), steps=4)
    with (run.folder / "samples.jsonl").open("a") as stream:
        stream.write('{"step": 1, "te')  # a kill cut it short
    fitted(raw, tmp_path / "run", sample(every=1), steps=4, after=run.checkpoints[0])
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


# --- profiler


def test_profiler_keeps_a_trace_and_a_table(raw: dict[str, Any], tmp_path: Path) -> None:
    run = fitted(raw, tmp_path / "run", Profiler(Profiler.Params(start=3, steps=2)), steps=6)
    assert sorted(path.name for path in (run.folder / "profile").iterdir()) == ["steps-3-4.json.gz", "steps-3-4.txt"]
    trace = json.loads(gzip.decompress((run.folder / "profile" / "steps-3-4.json.gz").read_bytes()))
    steps = [event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("ProfilerStep")]
    assert len(set(steps)) == 2
    counts = [event["name"] for event in trace["traceEvents"]].count("Optimizer.step#AdamW.step")
    assert counts == 2, "the steps of the range, and not the one that warms up"
    table = (run.folder / "profile" / "steps-3-4.txt").read_text()
    assert re.search(r"aten::addmm|aten::mm|aten::linear", table)


def test_profiler_of_a_run_that_ends_within_the_range(raw: dict[str, Any], tmp_path: Path) -> None:
    run = fitted(raw, tmp_path / "run", Profiler(Profiler.Params(start=3, steps=9)), steps=5)
    assert sorted(path.name for path in (run.folder / "profile").iterdir()) == ["steps-3-5.json.gz", "steps-3-5.txt"]


def test_profiler_of_a_run_that_resumes_within_the_range(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["train"] |= {"checkpoint_every": 3}
    run = fitted(raw, tmp_path / "run", steps=4)
    fitted(raw, tmp_path / "run", Profiler(Profiler.Params(start=2, steps=5)), steps=7, after=run.checkpoints[0])
    names = sorted(path.name for path in (run.folder / "profile").iterdir())
    assert names == ["steps-5-6.json.gz", "steps-5-6.txt"], "step 4 warms up"


@pytest.mark.parametrize("start", [5, 50])
def test_profiler_that_never_came_to_its_steps_says_so(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], start: int
) -> None:
    run = fitted(raw, tmp_path / "run", Profiler(Profiler.Params(start=start, steps=3)), steps=4)
    assert not (run.folder / "profile").exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"profiler: no step of {start} to {start + 2} was run; nothing to show"
    )


# --- wandb


class FakeWandb(types.ModuleType):
    """Records what is asked of it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[int] = []
        self.Html = lambda text: ("html", text)

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        return types.SimpleNamespace(
            id=options["id"] or "abc123",
            log=lambda row, step: self.logged.append((step, row)),
            finish=lambda exit_code: self.finished.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_rows_texts_and_the_spec(raw: dict[str, Any], tmp_path: Path, wandb: FakeWandb) -> None:
    logger = Wandb(Wandb.Params(mode="offline", project="depth"))
    trainer = trainer_of(raw, tmp_path / "run", logger, sample(prompt="a <b>"), steps=3)
    trainer.fit()
    trainer.close()
    (options,) = wandb.inits
    assert options["config"] == dump(trainer.spec)
    told = {key: options[key] for key in ("project", "entity", "name", "mode", "dir", "id")}
    assert told == {
        "project": "depth",
        "entity": None,
        "name": "small",
        "mode": "offline",
        "dir": str(tmp_path / "run"),
        "id": None,
    }
    rows = [(step, row) for step, row in wandb.logged if "sample" not in row]
    assert [({"step": step} | row) for step, row in rows] == trainer.run.metrics
    ((step, text),) = [(step, row["sample"]) for step, row in wandb.logged if "sample" in row]
    assert step == 3
    assert text[1].startswith("<pre>a &lt;b&gt;")
    assert wandb.finished == [0]


def test_wandb_goes_on_as_the_same_run(raw: dict[str, Any], tmp_path: Path, wandb: FakeWandb) -> None:
    raw["train"]["checkpoint_every"] = 2
    run = fitted(raw, tmp_path / "run", Wandb(Wandb.Params()), steps=3)
    fitted(raw, tmp_path / "run", Wandb(Wandb.Params()), steps=5, after=run.checkpoints[-1])
    assert [(options["id"], options["resume"]) for options in wandb.inits] == [(None, "allow"), ("abc123", "allow")]


def test_wandb_hears_that_a_run_failed(raw: dict[str, Any], tmp_path: Path, wandb: FakeWandb) -> None:
    class Failing(Callback):
        def on_step(self, trainer: Trainer) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fitted(raw, tmp_path / "run", Wandb(Wandb.Params()), Failing(None))
    assert wandb.finished == [1]


def test_wandb_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SparsekitError) as error:
        Wandb(Wandb.Params())
    assert str(error.value) == (
        "train.callbacks: the callback wandb needs the package wandb: pip install 'sparsekit[wandb]'"
    )


# --- one process writes


def test_other_ranks_write_nothing(
    raw: dict[str, Any], tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    names = ["progress", "tensorboard", "sample", "profiler", "wandb"]
    raw["train"] |= {"max_steps": 3, "callbacks": [*names[:3], {"type": "profiler", "start": 2, "steps": 1}, "wandb"]}
    trainer = Trainer(validate(raw), Run(tmp_path / "run"))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    monkeypatch.setattr(Trainer, "is_main", False)
    for callback in trainer.callbacks:
        callback.on_start(trainer)
    for _ in range(3):
        trainer.step()
        for callback in trainer.callbacks:
            callback.on_log(trainer, {"step": trainer.progress.step, "loss": 1.0, "tokens_per_second": 1.0})
            callback.on_step(trainer)
    for callback in trainer.callbacks:
        callback.on_end(trainer, True)
    trainer.close()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    assert wandb.inits == []
    assert capsys.readouterr() == ("", "")
