"""The training loop: from a run spec to a run folder."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sparsekit.components.contracts import Component, ForwardContext, counters
from sparsekit.data.dataset import load_text
from sparsekit.data.loader import Loader, validation_batches
from sparsekit.data.packing import Batch, Windows
from sparsekit.data.token_set import TokenSet
from sparsekit.errors import CheckpointError, SparsekitError, SpecError
from sparsekit.files import write_json
from sparsekit.model.build import build_model
from sparsekit.model.targets import SPEC, TOKENIZER, Run
from sparsekit.spec.load import dump, with_packages
from sparsekit.spec.run import RunSpec
from sparsekit.training import checkpoint
from sparsekit.training.checkpoint import Progress
from sparsekit.training.metrics import MetricsLog

NATS_PER_BIT = math.log(2)


def train(spec: RunSpec, *, out: str | Path | None = None, resume: str = "auto") -> Run:
    """Trains a model from a spec into a run folder.

    Args:
        spec: what to train.
        out: the run folder; by default ``runs/<name>``.
        resume: "auto" goes on from the folder's newest whole checkpoint if there is one; "never" starts over, and
            moves an earlier run aside; a path goes on from that checkpoint.

    Raises:
        SparsekitError: a mistake of the user's, in one line.
    """
    run = Run(Path(out) if out is not None else Path("runs") / spec.name)
    start = _starting_point(run, spec, resume)
    if start is None:
        (run.folder / TOKENIZER).unlink(missing_ok=True)  # of a run that never came to save anything
    trainer = Trainer(spec, run)
    if start is not None:
        trainer.restore(start)
    if trainer.progress.step >= trainer.total_steps:
        print(
            f"{run.folder}: already finished, at step {trainer.progress.step}; "
            f"raise train.max_steps to go on, or start over with --resume never",
            file=sys.stderr,
        )
        return run
    trainer.fit()
    return run


def _starting_point(run: Run, spec: RunSpec, resume: str) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start in a folder that holds no other run."""
    if resume not in ("auto", "never"):
        path = Path(resume)
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint; give a checkpoint's folder, a run's, auto or never")
        if path.name.startswith("step-"):
            found: Path | None = path
        else:
            found, damaged = checkpoint.newest_whole(Run(path))
            if found is None:
                raise CheckpointError(damaged[0] if damaged else f"{path}: holds no checkpoint")
    elif resume == "never":
        if (run.folder / SPEC).exists():
            _move_aside(run.folder)
        return None
    else:
        found, damaged = checkpoint.newest_whole(run)
        if found is None and damaged:
            raise CheckpointError(damaged[0])
        for line in damaged:
            print(f"{line}; going on from {found}", file=sys.stderr)
    if found is not None:
        checkpoint.demand_same_spec(found, spec)
    return found


def _move_aside(folder: Path) -> None:
    number = next(n for n in range(1, 10**6) if not folder.with_name(f"{folder.name}.old-{n}").exists())
    aside = folder.with_name(f"{folder.name}.old-{number}")
    folder.rename(aside)
    print(f"{folder}: an earlier run was moved to {aside}", file=sys.stderr)


class Trainer:
    """Everything a run is made of while it runs.

    Attributes:
        spec, run: what is trained, and into which folder.
        model, optimizer, tokenizer: built from the spec.
        progress: how far it is.
        total_steps: how far it goes.
    """

    def __init__(self, spec: RunSpec, run: Run):
        settings = spec.train
        self.spec, self.run = with_packages(spec), run
        self.device = _device(settings.device)
        run.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer, train_set, validation_set = load_text(
            spec.data.source, spec.data.tokenizer, run.folder / TOKENIZER
        )
        self.validation_set = validation_set
        self.windows = Windows(train_set, spec.seq_len, spec.data.document_mask)
        self.validation_windows = Windows(validation_set, spec.seq_len, spec.data.document_mask)
        self.loader = Loader(self.windows, settings.seed)
        self.data_identity = {"train": _identity(train_set), "validation": _identity(validation_set)}
        torch.manual_seed(settings.seed)
        self.model = build_model(spec.model, seed=settings.seed, device=self.device)
        _demand_causal(self.model, spec.model.allow_leak)
        components = [module for module in self.model.modules() if isinstance(module, Component)]
        self.moved_by_rule = [m for m in components if type(m).after_step is not Component.after_step]
        if settings.compile:
            for layer in self.model.layers:
                layer.compile()
        self.objective = settings.objective.cls(settings.objective.params)
        self.optimizer: torch.optim.Optimizer = settings.optimizer.cls(settings.optimizer.params).build(self.model)
        for group in self.optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        self.schedule = settings.schedule.cls(settings.schedule.params)
        self.callbacks = [choice.cls(choice.params) for choice in settings.callbacks]
        self.sequences_per_step = spec.global_batch_tokens // spec.seq_len
        self.total_steps = self._count_steps()
        self.progress = Progress()
        self.signal: int | None = None
        self._saved_step = 0

    def _count_steps(self) -> int:
        settings = self.spec.train
        if settings.max_steps is not None:
            return settings.max_steps
        if settings.max_tokens is not None:
            return math.ceil(settings.max_tokens / self.spec.global_batch_tokens)
        epochs = settings.max_epochs or 1.0
        return max(1, math.ceil(epochs * len(self.windows) / self.sequences_per_step))

    def restore(self, folder: Path) -> None:
        """Goes back to a checkpoint."""
        self.progress = checkpoint.load(folder, self.model, self.optimizer, self.data_identity)
        self._saved_step = self.progress.step

    def fit(self) -> None:
        """Trains to the end, or until a signal asks to stop; either way the last step is saved."""
        settings = self.spec.train
        write_json(self.run.folder / SPEC, dump(self.spec))
        checkpoint.clear_unfinished(self.run)
        finished = False
        with MetricsLog(self.run.folder, self.progress.step) as log, self._signals():
            started: list[Any] = []
            try:
                for callback in self.callbacks:
                    started.append(callback)
                    callback.on_start(self)
                self._clock, self._clock_tokens = time.monotonic(), self.progress.tokens
                while self.progress.step < self.total_steps and self.signal is None:
                    step = self.progress.step + 1
                    last = step == self.total_steps
                    due_eval = last or _due(step, settings.eval_every)
                    due_log = due_eval or step == 1 or _due(step, settings.log_every)
                    told = self.step(collect=due_log)
                    if due_log:
                        self._log(log, told, due_eval)
                    improved = settings.keep.best and due_eval and self.progress.best_step == step
                    if last or improved or _due(step, settings.checkpoint_every):
                        self._save()
                    for callback in self.callbacks:
                        callback.on_step(self)
                if self._saved_step != self.progress.step:  # asked to stop between checkpoints
                    self._save()
                finished = self.progress.step >= self.total_steps
            finally:
                for callback in started:
                    callback.on_end(self, finished)
        if not finished:
            print(f"{self.run.folder}: stopped and saved at step {self.progress.step}", file=sys.stderr)

    def step(self, collect: bool = False) -> dict[str, Tensor | float]:
        """One update: its loss (mean nats a target), gradient norm before clipping and learning rate.

        With ``collect`` also what components counted (auxiliary losses and the like), averaged over layers and, by
        targets, over micro-batches. Everything stays on the device: nobody waits for a number that is not logged.
        """
        settings = self.spec.train
        self.model.train()
        batches = list(self._micro_batches())
        n_targets = max(1, sum(batch.n_targets for batch in batches))  # a document mask can leave none
        losses: list[Tensor] = []
        counted: dict[str, Tensor] = {}
        by_rule: dict[Component, dict[str, Tensor]] = {module: {} for module in self.moved_by_rule}
        for batch in batches:
            context = self._context(batch, n_targets)
            with self._autocast():
                loss = self.objective(self.model, batch, context)
            (loss / n_targets).backward()
            losses.append(loss.detach())
            share = batch.n_targets / n_targets
            if collect:
                for name, value in self._counters().items():
                    counted[name] = counted.get(name, 0) + value * share
            for module, sums in by_rule.items():
                for name in module.counters:
                    sums[name] = sums.get(name, 0) + getattr(module, name) * share
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = settings.max_grad_norm if settings.max_grad_norm is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        factor = self.schedule.factor(self.progress.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for module, sums in by_rule.items():
            module.after_step(sums)
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            sequences=self.progress.sequences + self.sequences_per_step,
            tokens=self.progress.tokens + self.spec.global_batch_tokens,
        )
        loss = torch.stack(losses).sum() / n_targets
        return {"loss": loss, "lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm, **counted}

    def _micro_batches(self) -> Iterator[Batch]:
        size = self.spec.train.micro_batch_size
        for offset in range(0, self.sequences_per_step, size):
            yield self.loader.batch(self.progress.sequences + offset, size).to(self.device)

    def _context(self, batch: Batch, n_targets: int) -> ForwardContext:
        # tensors, not numbers: a compiled block would be compiled again for every new number
        return ForwardContext(
            documents_BT=batch.documents_BT,
            progress=torch.tensor(self.progress.step / self.total_steps, device=self.device),
            loss_scale=torch.tensor(batch.n_targets / n_targets, device=self.device),
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.spec.train.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss over the validation text in nats a token, and in bits a byte of it."""
        settings = self.spec.train
        limit = settings.eval_tokens and max(1, settings.eval_tokens // self.spec.seq_len)
        self.model.eval()
        total, n_targets = torch.zeros((), dtype=torch.float64), 0
        for batch in validation_batches(self.validation_windows, settings.micro_batch_size, limit):
            batch = batch.to(self.device)
            with self._autocast():
                loss = self.objective(self.model, batch, ForwardContext(documents_BT=batch.documents_BT))
            total += loss.double().cpu()
            n_targets += batch.n_targets
        self.model.train()
        loss_per_token = total.item() / max(1, n_targets)
        bytes_per_token = self.validation_set.n_bytes / len(self.validation_set)
        return {"val_loss": loss_per_token, "val_bits_per_byte": loss_per_token / NATS_PER_BIT / bytes_per_token}

    def _log(self, log: MetricsLog, told: dict[str, Tensor | float], evaluate: bool) -> None:
        progress = self.progress
        row: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        row.update({name: float(value) for name, value in told.items()})
        now = time.monotonic()
        row["tokens_per_second"] = (progress.tokens - self._clock_tokens) / max(1e-9, now - self._clock)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            kept = self.run.checkpoints
            where = f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint was saved"
            raise SparsekitError(
                f"step {progress.step}: loss {row['loss']}, gradient norm {row['grad_norm']}: training has diverged "
                f"({where}); lower the learning rate"
            )
        if evaluate:
            row.update(self.evaluate())
            if progress.best_val_loss is None or row["val_loss"] < progress.best_val_loss:
                self.progress = replace(progress, best_val_loss=row["val_loss"], best_step=progress.step)
        log.write(row)
        for callback in self.callbacks:
            callback.on_log(self, row)
        self._clock, self._clock_tokens = time.monotonic(), progress.tokens

    def _counters(self) -> dict[str, Tensor]:
        """Scalar counters of the last forward, averaged over layers."""
        found: dict[str, list[Tensor]] = {}
        for _, name, value in counters(self.model):
            if value.ndim == 0:
                found.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def _save(self) -> None:
        folder = checkpoint.save(self.run, self.spec, self.model, self.optimizer, self.progress, self.data_identity)
        self._saved_step = self.progress.step
        checkpoint.prune(self.run, self.spec.train.keep, self.progress)
        for callback in self.callbacks:
            callback.on_checkpoint(self, folder)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a stop after the step; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: FrameType | None) -> None:
            self.signal = number
            signal.signal(number, before[number])

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError([f"train.device: {name!r} cannot be used ({str(error).splitlines()[0]})"]) from None


def _identity(tokens: TokenSet) -> dict[str, Any]:
    return {"tokens": len(tokens), "documents": tokens.n_documents, "fingerprint": tokens.fingerprint}


def _demand_causal(model: torch.nn.Module, allow_leak: bool) -> None:
    """Refuses to train a language model that sees what it is to predict."""
    leaks = [name for name, m in model.named_modules() if isinstance(m, Component) and not m.causal]
    if leaks and not allow_leak:
        problem = f"{leaks[0]} is not causal, so the loss would mean nothing; set it to true to train anyway"
        raise SpecError([f"model.allow_leak: {problem}"])
