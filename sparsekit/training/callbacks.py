"""What looks on while a model trains."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt

from sparsekit import spec
from sparsekit.files import written_whole
from sparsekit.model.generate import generate
from sparsekit.model.targets import read_rows

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from sparsekit.training.trainer import Trainer

Row = dict[str, Any]


class Callback:
    """Hooks into training; each gets the trainer, whose model, step, spec and folder it may read.

    Every process of a run calls them all; what must be there once (a file, a line on the screen) is for the one where
    ``trainer.is_main`` holds.
    """

    class Params(spec.Params):
        pass

    def __init__(self, params: Any):
        self.params = params

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, or the first after a resume."""

    def on_gradients(self, trainer: Trainer) -> None:
        """After a step's last backward and before its update; ``trainer.progress`` still tells the step before."""

    def on_step(self, trainer: Trainer) -> None:
        """After every step. Do not read a tensor here: it would make the host wait for the device."""

    def on_log(self, trainer: Trainer, row: Row) -> None:
        """After a step that is logged or evaluated, with its row of metrics.jsonl."""

    def on_text(self, trainer: Trainer, name: str, text: str) -> None:
        """Text that another callback has to show, at this step: for loggers that can keep it."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint is whole on disk."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        """At the end, also after an interruption (``finished`` is False) or an error."""


class Progress(Callback):
    """A progress line with loss, tokens a second and time left; plain lines where there is no terminal."""

    def on_start(self, trainer: Trainer) -> None:
        self._live: RichProgress | None = None
        if not trainer.is_main:
            return
        self._began, self._from = time.monotonic(), trainer.progress.step
        run = trainer.run.folder
        print(f"{run}: {trainer.total_steps} steps of {trainer.spec.global_batch_tokens:,} tokens", file=sys.stderr)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._live = RichProgress(
                TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[told]}"),
                TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self._live.start()
            self._task = self._live.add_task("", total=trainer.total_steps, completed=self._from, told="")

    def on_step(self, trainer: Trainer) -> None:
        if self._live is not None:
            self._live.update(self._task, completed=trainer.progress.step)
            if trainer.progress.step == trainer.total_steps:
                self._live.stop()  # what others print at the end is not for its console

    def on_log(self, trainer: Trainer, row: Row) -> None:
        if not trainer.is_main:
            return
        told = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
        if "val_loss" in row:
            told += f"  val {row['val_loss']:.3f} ({row['val_bits_per_byte']:.3f} bits/byte)"
        if self._live is None:
            done = trainer.progress.step - self._from
            left = (time.monotonic() - self._began) / max(1, done) * (trainer.total_steps - trainer.progress.step)
            print(f"step {row['step']}/{trainer.total_steps}  {told}  left {left:.0f} s", file=sys.stderr)
        else:
            self._live.update(self._task, told=told)
            if "val_loss" in row:
                self._live.console.print(f"step {row['step']}  {told}")

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if self._live is not None:
            self._live.stop()


class Sample(Callback):
    """Text that the model writes: printed, and kept in samples.jsonl and by the loggers.

    At the end of the run, and every ``every`` steps if given. Training goes on as if nothing had been written.
    """

    class Params(Callback.Params):
        prompt: str = "It is a truth universally acknowledged, that"
        max_new_tokens: PositiveInt = 120
        temperature: NonNegativeFloat = 0.8
        top_k: PositiveInt | None = 40
        every: PositiveInt | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._path = trainer.run.folder / "samples.jsonl"
        if trainer.is_main and self._path.exists():  # those of steps that a resumed run takes again are dropped
            kept = [row for row in read_rows(self._path) if row["step"] <= trainer.progress.step]
            with written_whole(self._path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_step(self, trainer: Trainer) -> None:
        step, every = trainer.progress.step, self.params.every
        if step != trainer.total_steps and (every is None or step % every):
            return
        text = self.params.prompt + self._written(trainer)
        if trainer.is_main:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, "prompt": self.params.prompt, "text": text}) + "\n")
            print(f"\n{text}\n", flush=True)
        for callback in trainer.callbacks:
            callback.on_text(trainer, "sample", text)

    def _written(self, trainer: Trainer) -> str:
        """What comes after the prompt; every rank runs the model equally often, as a sharded one demands."""
        tokenizer, params = trainer.tokenizer, self.params
        prompt = [int(i) for i in tokenizer.encode(params.prompt)] or [tokenizer.eos_id]
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        # eagerly, since every length would be compiled anew
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            written = generate(
                trainer.model, prompt, params.max_new_tokens, temperature=params.temperature, top_k=params.top_k,
                seed=trainer.spec.train.seed,
            )  # fmt: skip
            ids = list(written)
        end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
        return str(tokenizer.decode(ids[:end]))


class Profiler(Callback):
    """torch's profiler over a range of steps: a trace for chrome://tracing or Perfetto, and the costliest operators.

    Steps ``start`` to ``start + steps - 1``, of the first process, go to profile/ in the run's folder. The step before
    warms the profiler up. A run that ends earlier keeps what there was, and one that never comes there says so.
    """

    class Params(Callback.Params):
        start: Annotated[int, Field(ge=2)] = 10
        steps: PositiveInt = 5
        memory: bool = False
        operators: PositiveInt = 40

    def on_start(self, trainer: Trainer) -> None:
        self._profile: Any = None
        self._first = 0
        self._written = False
        self._maybe_begin(trainer)

    def on_step(self, trainer: Trainer) -> None:
        step = trainer.progress.step
        if self._profile is not None:
            if step == self.params.start + self.params.steps - 1:
                self._finish(trainer)
            else:
                self._profile.step()
        self._maybe_begin(trainer)

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if self._profile is not None:
            self._finish(trainer)
        if trainer.is_main and not self._written:
            last = self.params.start + self.params.steps - 1
            print(f"profiler: no step of {self.params.start} to {last} was run; nothing to show", file=sys.stderr)

    def _maybe_begin(self, trainer: Trainer) -> None:
        """Begins if the next step is the one before the range, or lies in it, as it may after a resume."""
        following = trainer.progress.step + 1
        start, last = self.params.start, self.params.start + self.params.steps - 1
        if self._profile is not None or not trainer.is_main or not start - 1 <= following < last:
            return
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._first = following + 1
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=last - following),
            profile_memory=self.params.memory,
        )
        self._profile.start()

    def _finish(self, trainer: Trainer) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        last = trainer.progress.step
        if last < self._first:
            return  # stopped while it was warming up
        name = trainer.run.folder / "profile" / f"steps-{self._first}-{last}"
        key = "self_device_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
        with written_whole(name.with_suffix(".txt")) as temporary:
            table = profile.key_averages().table(sort_by=key, row_limit=self.params.operators)
            temporary.write_text(table + "\n", encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, written_whole(name.with_suffix(".json.gz")) as temporary:
            plain = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)
        self._written = True
