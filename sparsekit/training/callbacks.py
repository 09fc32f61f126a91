"""What looks on while a model trains."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeFloat, PositiveInt

from sparsekit import spec
from sparsekit.model.generate import generate

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from sparsekit.training.trainer import Trainer

Row = dict[str, Any]


class Callback:
    """Hooks into training; each gets the trainer, whose model, step, spec and folder it may read."""

    class Params(spec.Params):
        pass

    def __init__(self, params: Any):
        self.params = params

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, or the first after a resume."""

    def on_step(self, trainer: Trainer) -> None:
        """After every step. Do not read a tensor here: it would make the host wait for the device."""

    def on_log(self, trainer: Trainer, row: Row) -> None:
        """After a step that is logged or evaluated, with its row of metrics.jsonl."""

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint is whole on disk."""

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        """At the end, also after an interruption (``finished`` is False) or an error."""


class Progress(Callback):
    """A progress line with loss, tokens a second and time left; plain lines where there is no terminal."""

    def on_start(self, trainer: Trainer) -> None:
        self._live: RichProgress | None = None
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

    def on_log(self, trainer: Trainer, row: Row) -> None:
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


class TensorBoard(Callback):
    """Every number of metrics.jsonl as a TensorBoard scalar, in the run's folder tb/."""

    def on_start(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        after = trainer.progress.step
        self._writer = SummaryWriter(str(trainer.run.folder / "tb"), purge_step=after + 1 if after else None)

    def on_log(self, trainer: Trainer, row: Row) -> None:
        for key, value in row.items():
            if key != "step":
                self._writer.add_scalar(key, value, row["step"])

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        self._writer.close()


class Sample(Callback):
    """Prints text that the trained model writes, at the end."""

    class Params(Callback.Params):
        prompt: str = "It is a truth universally acknowledged, that"
        max_new_tokens: PositiveInt = 120
        temperature: NonNegativeFloat = 0.8
        top_k: PositiveInt | None = 40

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if not finished:
            return
        tokenizer, params = trainer.tokenizer, self.params
        prompt = [int(i) for i in tokenizer.encode(params.prompt)] or [tokenizer.eos_id]
        ids = generate(
            trainer.model, prompt, params.max_new_tokens, temperature=params.temperature, top_k=params.top_k,
            seed=trainer.spec.train.seed, stop_id=tokenizer.eos_id,
        )  # fmt: skip
        print(f"\n{params.prompt}{tokenizer.decode(list(ids))}\n")
