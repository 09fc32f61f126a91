"""Where else a run's numbers and texts go: TensorBoard, Weights & Biases."""

from __future__ import annotations

import html
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from sparsekit.errors import SparsekitError
from sparsekit.files import read_object, write_json
from sparsekit.model.dtensor import is_dtensor
from sparsekit.spec.load import dump
from sparsekit.training.callbacks import Callback, Row

if TYPE_CHECKING:
    from pathlib import Path

    from sparsekit.training.trainer import Trainer

BINS = 64


class TensorBoard(Callback):
    """Every number of metrics.jsonl as a TensorBoard scalar, in the run's folder tb/; texts, and histograms on request.

    Where the disk has no room for them, training goes on without, and says so.

    ``histograms`` are of "weights", of "gradients" (before clipping), or both: of every parameter, each
    ``histograms_every`` steps, over its finite values.
    """

    class Params(Callback.Params):
        histograms: list[Literal["weights", "gradients"]] = []
        histograms_every: PositiveInt = 1000

    def on_start(self, trainer: Trainer) -> None:
        self._writer: Any = None
        self._told_by_threads = threading.excepthook
        if trainer.is_main:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._told
            after = trainer.progress.step
            self._writer = SummaryWriter(str(trainer.run.folder / "tb"), purge_step=after + 1 if after else None)

    def on_gradients(self, trainer: Trainer) -> None:
        named = trainer.model.named_parameters()
        self._draw("gradients", trainer.progress.step + 1, ((name, p.grad) for name, p in named))

    def on_step(self, trainer: Trainer) -> None:
        self._draw("weights", trainer.progress.step, trainer.model.named_parameters())

    def on_log(self, trainer: Trainer, row: Row) -> None:
        for key, value in row.items():
            if key != "step":
                self._write("add_scalar", key, value, row["step"])

    def on_text(self, trainer: Trainer, name: str, text: str) -> None:
        self._write("add_text", name, text, trainer.progress.step)

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        self._write("close")
        threading.excepthook = self._told_by_threads

    def _write(self, what: str, *arguments: Any, **more: Any) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, what)(*arguments, **more)
        except OSError as error:
            told = f"warning: {self._writer.log_dir}: cannot be written ({error.strerror}); going on without it"
            print(told, file=sys.stderr)
            self._writer = None

    def _told(self, failure: threading.ExceptHookArgs) -> None:
        """Of TensorBoard's thread, which writes: what fails there comes up in the next call here."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            self._told_by_threads(failure)

    def _draw(
        self, kind: Literal["weights", "gradients"], step: int, named: Iterable[tuple[str, Tensor | None]]
    ) -> None:
        """Histograms of tensors, if they are asked for at this step; on every rank, as sharded ones are gathered."""
        if kind not in self.params.histograms or step % self.params.histograms_every:
            return
        for name, tensor in named:
            drawn = None if tensor is None else histogram(tensor)
            if drawn is not None:
                self._write("add_histogram_raw", f"{kind}/{name}", **drawn, global_step=step)


def histogram(tensor: Tensor, bins: int = BINS) -> dict[str, Any] | None:
    """A tensor's finite values in bins of equal width, as SummaryWriter.add_histogram_raw takes them; None of none."""
    values = tensor.detach()
    values = (values.full_tensor() if is_dtensor(values) else values).flatten().float()
    values = values[values.isfinite()]
    if not values.numel():
        return None
    low, high = values.min().item(), values.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    return {
        "min": values.min().item(),
        "max": values.max().item(),
        "num": values.numel(),
        "sum": values.sum(dtype=torch.float64).item(),
        "sum_squares": values.double().square().sum().item(),
        "bucket_limits": torch.linspace(low, high, bins + 1, dtype=torch.float64)[1:].tolist(),
        "bucket_counts": values.histc(bins, low, high).tolist(),
    }


class Wandb(Callback):
    """Every number of metrics.jsonl, and texts, to Weights & Biases; ``mode`` "offline" keeps them in the run's folder.

    The run's spec is its config. A resumed run goes on as the same run there.

    Raises:
        SparsekitError: the package wandb is not installed.
    """

    class Params(Callback.Params):
        project: str = "sparsekit"
        entity: str | None = None
        name: str | None = None
        mode: Literal["online", "offline"] = "online"

    def __init__(self, params: Any):
        super().__init__(params)
        try:
            import wandb

            wandb.init  # noqa: B018  a folder of that name, as it leaves behind, can be imported too
        except (ImportError, AttributeError):
            problem = "the callback wandb needs the package wandb: pip install 'sparsekit[wandb]'"
            raise SparsekitError(f"train.callbacks: {problem}") from None
        self._wandb: Any = wandb
        self._run: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        known: Path = trainer.run.folder / "wandb.json"  # which run there this one is
        self._run = self._wandb.init(
            project=self.params.project, entity=self.params.entity, name=self.params.name or trainer.spec.name,
            mode=self.params.mode, dir=str(trainer.run.folder), config=dump(trainer.spec),
            id=read_object(known)["id"] if known.exists() else None, resume="allow",
        )  # fmt: skip
        write_json(known, {"id": self._run.id})

    def on_log(self, trainer: Trainer, row: Row) -> None:
        if self._run is not None:
            self._run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    def on_text(self, trainer: Trainer, name: str, text: str) -> None:
        if self._run is not None:
            page = self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
            self._run.log({name: page}, step=trainer.progress.step)

    def on_end(self, trainer: Trainer, finished: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if finished else 1)
