"""The training loop: batches in, updates, and what is logged, evaluated and saved on the way."""

from __future__ import annotations

import contextlib
import math
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.components.attention import KernelAttention
from sparsekit.components.contracts import Component, ForwardContext, counters
from sparsekit.data.dataset import OWN, load_data
from sparsekit.data.packing import Batch, HostBatch
from sparsekit.data.prefetch import Prefetched
from sparsekit.errors import SparsekitError, SpecError
from sparsekit.files import write_json
from sparsekit.model.build import build_model, demand_causal
from sparsekit.model.targets import SPEC, TOKENIZER, Run
from sparsekit.model.weights import WEIGHTS, load_weights
from sparsekit.spec.load import dump, with_packages
from sparsekit.spec.run import RunSpec
from sparsekit.training import checkpoint
from sparsekit.training.checkpoint import Progress, Saver
from sparsekit.training.distributed import SAVE, STOP, Agreement, World, usable
from sparsekit.training.evaluation import Evaluation
from sparsekit.training.gradients import Gradients, clip_factor, masked_after_step, masked_step
from sparsekit.training.hardware import Meter, peak_flops
from sparsekit.training.metrics import MetricsLog
from sparsekit.training.parallel import check_sizes, group_by_mesh, last_micro_batch, parallelise
from sparsekit.training.schedules import BatchRamp, Place
from sparsekit.training.side_probes import SideProbes
from sparsekit.training.statistics import LayerStatistics
from sparsekit.training.watch import Late, SpikeWatch, StepReport, first_not_finite


class Trainer:
    """Everything a run is made of while it runs, on one of the processes that train it.

    Attributes:
        spec, run: what is trained, and into which folder.
        world: which process of how many this is.
        agreement: through which any of them asks all to save or to stop.
        model, optimizer, tokenizer: built from the spec.
        loader: this rank's batches.
        progress: how far it is.
        total_steps: how far it goes.
        checkpoint_every: after how many steps it saves; None for at the end only.
    """

    def __init__(self, spec: RunSpec, run: Run, world: World | None = None, agreement: Agreement | None = None):
        settings = spec.train
        self.spec, self.run = with_packages(spec), run
        self.world = replace(world or World(usable(settings.device)), tensor=spec.parallel.tensor)
        self.agreement = agreement or Agreement(self.world)
        self.device = self.world.device
        run.folder.mkdir(parents=True, exist_ok=True)
        self.world.together(lambda: check_sizes(spec.parallel, self.world.size))
        n_readers = self.world.data_size
        unit = spec.micro_batch_tokens * n_readers
        self.ramp = self.world.together(lambda: BatchRamp(settings.batch_ramp, spec.global_batch_tokens, unit))
        self.world.from_main(self._read_data)  # which may train a tokenizer, once
        if self.world.size > 1:
            self.world.together(lambda: None if self.is_main else self._read_data())
        self.tokenizer = self.data.tokenizer
        self.loader = Prefetched(
            self.data.loader(spec.seq_len, settings.seed, settings.micro_batch_size, self.world.data_rank, n_readers),
            pin=self.device.type == "cuda",
        )
        self.evaluation = Evaluation(
            self.data.validation, spec.seq_len, spec.data.document_mask, settings.micro_batch_size,
            settings.eval_tokens and max(1, settings.eval_tokens // spec.seq_len), self.world, self._asked_to_stop,
        )  # fmt: skip
        torch.manual_seed(settings.seed + 1_000_003 * self.world.data_rank)  # of what is drawn in training
        dtype = torch.bfloat16 if settings.precision == "pure_bf16" else torch.float32
        self.model = build_model(spec.model, device="meta", dtype=dtype)
        demand_causal(self.model)
        self.world.together(self._demand_kernels)
        self.world.together(lambda: parallelise(self.model, spec, self.world))
        components = [module for module in self.model.modules() if isinstance(module, Component)]
        self.moved_by_rule = [m for m in components if type(m).after_step is not Component.after_step]
        self.objective = settings.objective.cls(settings.objective.params)
        if settings.compile:
            self.objective.compile()
        self.optimizer: torch.optim.Optimizer = settings.optimizer.cls(settings.optimizer.params).build(self.model)
        group_by_mesh(self.optimizer)
        for group in self.optimizer.param_groups:
            group["peak_lr"] = group["lr"]
        self.gradients = Gradients(self.model, self.world)
        self.schedule = settings.schedule.cls(settings.schedule.params)
        self.callbacks = [choice.cls(choice.params) for choice in settings.callbacks]
        self.callbacks += [SideProbes(spec.probes)] if spec.probes else []
        self.total_steps = self._count_steps()
        every = settings.checkpoint_every
        self.checkpoint_every = math.ceil(self.total_steps / 10) if every == "auto" else every
        self.progress = Progress()
        self.saver = Saver(run, self.spec, self.world)
        self.stopping = False
        self._late, self._spikes = Late(self.device), SpikeWatch()
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)  # an update was not finite
        self._recent: deque[tuple[int, list[HostBatch]]] = deque(maxlen=2)  # the last steps' batches, to find a cause

    def _read_data(self) -> None:
        self.data = load_data(self.spec.data, self.run.folder / TOKENIZER)

    def _demand_kernels(self) -> None:
        """Refuses a kernel that cannot train here before the first step, and in words of the spec's."""
        dtype = torch.float32 if self.spec.train.precision == "fp32" else torch.bfloat16
        for module in self.model.modules():
            if isinstance(module, KernelAttention):
                module.kernel.demand(module.asked, self.device, dtype, gradients=True)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken, and the last one was evaluated."""
        return self.progress.step >= self.total_steps and self.progress.owed is None

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.world.is_main

    def _count_steps(self) -> int:
        settings = self.spec.train
        if settings.max_steps is not None:
            return settings.max_steps
        if settings.max_tokens is not None:
            return self.ramp.steps(settings.max_tokens)
        if self.spec.data.streaming is not None:
            raise SpecError(["train.max_steps: a stream has no known length; give max_steps or max_tokens"])
        epochs = settings.max_epochs or 1.0
        return max(1, self.ramp.steps(math.ceil(epochs * self.loader.n_windows) * self.spec.seq_len))

    def restore(self, folder: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            CheckpointError: it is damaged, or of other text.
            DataError: a stream that was read by another number of processes.
        """
        restored = checkpoint.load(folder, self.model, self.optimizer, self.data.identity, self.world)
        self.progress = restored.progress
        places = restored.places  # a stream refuses another rank's, or that of another number of ranks
        self.world.together(lambda: self.loader.restore(places[min(self.world.rank, len(places) - 1)]))
        self.saver.saved_step = self.progress.step
        if self.progress.owed is not None:
            logged = self.world.from_main(lambda: self.run.metrics)
            for row in logged:  # it was made up for, or came to its end, after the checkpoint
                if row["step"] == self.progress.step and row.get(f"{OWN}_loss") is not None:
                    self._count_evaluation(row)

    def begin_with(self, folder: Path) -> None:
        """Takes a checkpoint's weights, and nothing else of it.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        load_weights(self.model, folder / WEIGHTS, self.world.control)

    def close(self) -> None:
        """Ends what runs in the background; a checkpoint under way is finished first."""
        self.saver.finish()
        self.loader.close()

    def fit(self) -> None:
        """Trains to the end, or until a signal asks to stop; either way the last step is saved."""
        settings = self.spec.train
        if self.is_main:
            write_json(self.run.folder / SPEC, dump(self.spec))
            checkpoint.clear_unfinished(self.run, self.progress.step)
        finished = False
        owed = self.progress.owed
        after = self.progress.step - (owed is not None)  # that row is written anew
        with MetricsLog(self.run.folder, after) if self.is_main else contextlib.nullcontext() as log:
            started: list[Any] = []
            try:
                for callback in self.callbacks:
                    started.append(callback)
                    callback.on_start(self)
                meter = self._meter()
                if owed is not None:
                    self._finish_row(log, dict(owed), evaluate=True)
                while self.progress.step < self.total_steps:
                    asked = self.agreement.poll()
                    if self.stopping or STOP in asked:
                        break
                    step = self.progress.step + 1
                    last = step == self.total_steps
                    due_eval = last or _due(step, settings.eval_every)
                    statistics = None
                    if settings.statistics is not None and _due(step, settings.statistics.every):
                        statistics = LayerStatistics(self.model, settings.statistics.moments, self.world.tensor)
                    due_log = due_eval or step == 1 or _due(step, settings.log_every) or statistics is not None
                    told = self.step(due_log, statistics)
                    if last:
                        self._look_at(self._late.take())
                    if due_log:
                        speed = meter.read(self.progress.tokens, self.loader.wait_seconds)
                        layers = {} if statistics is None else statistics.rows(self.world.sum(statistics.stacked))
                        self._log(log, {**told, **speed, **layers}, due_eval)
                    improved = settings.keep.best and due_eval and self.progress.best_step == step
                    due_save = improved or SAVE in asked or _due(step, self.checkpoint_every)
                    if due_save and self.saver.begun_step != step:  # as it may have in evaluation
                        self._save()
                    self._tell_saved(self.saver.poll())
                    for callback in self.callbacks:
                        callback.on_step(self)
                self.agreement.settle()
                self._look_at(self._late.take())
                self._tell_saved(self.saver.finish())
                unsaved = self.saver.saved_step != self.progress.step and self.progress.step > 0
                if self.world.from_main(lambda: unsaved):  # it has looked at what all have written
                    self._save()
                    self._tell_saved(self.saver.finish(demand=True))
                finished = self.finished
            finally:
                for callback in started:
                    callback.on_end(self, finished)
        if not finished and self.is_main:
            where = f"and saved at step {self.progress.step}" if self.progress.step else "before the first step"
            print(f"{self.run.folder}: stopped {where}", file=sys.stderr)

    def step(self, collect: bool = False, statistics: LayerStatistics | None = None) -> dict[str, Tensor | float]:
        """One update: its loss (mean nats a target), gradient norm before clipping and learning rate.

        With ``collect`` also the norm of all parameters, further parts of the objective, and what components counted
        (auxiliary losses and the like), averaged over layers and, by targets, over micro-batches and ranks;
        ``statistics`` collects its own. Everything stays on the device: nobody waits for a number that is not logged.
        An update that is not finite is left out.
        """
        self.model.train()
        batch_tokens = self.ramp.batch_tokens(self.progress.tokens)
        batches = [self.loader.next() for _ in range(batch_tokens // self.ramp.unit)]
        self._recent.append((self.progress.step + 1, batches))
        n_targets = self._all_targets(batches)  # a document mask can leave none
        loss_sum = torch.zeros((), device=self.device)
        counted: dict[str, Tensor] = {}
        by_rule: dict[Component, dict[str, Tensor]] = {module: {} for module in self.moved_by_rule}
        for number, host_batch in enumerate(batches):
            batch = host_batch.to(self.device, non_blocking=True)
            last_micro_batch(self.model, self.spec.parallel, number == len(batches) - 1)
            share = batch.n_targets / n_targets / self.world.tensor  # which all hold the same
            context = self._context(batch, share * self.world.size)
            with statistics.collecting(share) if statistics is not None else contextlib.nullcontext():
                with self._autocast():
                    loss = self.objective(self.model, batch, context)
                (loss.total * (self.world.data_size / n_targets)).backward()  # ranks' gradients are averaged
            loss_sum = loss_sum + loss.reported.detach()
            if collect:
                for name, value in loss.further.items():
                    counted[name] = counted.get(name, 0) + value.detach() / n_targets / self.world.tensor
                for name, value in self._counters().items():
                    counted[name] = counted.get(name, 0) + value * share
            for module, sums in by_rule.items():
                for name in module.counters:
                    sums[name] = sums.get(name, 0) + getattr(module, name) * share
        for callback in self.callbacks:
            callback.on_gradients(self)
        if statistics is not None:
            statistics.norms()
        if collect:
            counted["param_norm"] = self.gradients.parameter_squares()
        lr = self._set_learning_rate()
        loss, norm = self._update(loss_sum / n_targets / self.world.tensor)
        self._sum_over_ranks([counted, *by_rule.values()])
        if collect:
            counted["param_norm"] = counted["param_norm"].sqrt()
        for module, sums in by_rule.items():
            masked_after_step(module, sums, self._bad)
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + batch_tokens,
        )
        return {"loss": loss, "lr": lr, "grad_norm": norm, **counted}

    def _sum_over_ranks(self, counted: list[dict[str, Tensor]]) -> None:
        """Replaces each number by its sum over ranks, in one message."""
        values = [value for numbers in counted for value in numbers.values()]
        if self.world.size == 1 or not values:
            return
        summed = self.world.sum(torch.cat([value.flatten() for value in values])).split([v.numel() for v in values])
        parts = iter([part.view_as(value) for part, value in zip(summed, values, strict=True)])
        for numbers in counted:
            numbers.update({name: next(parts) for name in numbers})

    def _all_targets(self, batches: list[HostBatch]) -> Any:
        """How many targets a step has, on all ranks; of several ranks only the device knows."""
        mine = max(1, sum(batch.n_targets for batch in batches))
        if self.world.size == 1:
            return mine
        return self.world.sum(torch.full((), mine / self.world.tensor, device=self.device))

    def _set_learning_rate(self) -> float:
        """Of this step: the optimizer's own, of which groups may have others."""
        step, tokens = self.progress.step, self.progress.tokens
        total_tokens = self.ramp.tokens(self.total_steps)
        place = Place(step, self.total_steps, tokens, self.ramp.batch_tokens(tokens), total_tokens)
        factor = self.schedule.factor(place)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return float(self.optimizer.defaults["lr"] * factor)

    def _update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clips and applies the gradients: (loss of all ranks, gradient norm)."""
        settings, world = self.spec.train, self.world
        losses = torch.zeros(world.size, dtype=loss.dtype, device=self.device)
        losses[world.rank] = loss
        names = self.gradients.names
        told = world.sum(torch.cat((losses, self.gradients.squares())))  # once a step, all that ranks must agree on
        loss, norm = told[: world.size].sum(), told[world.size :].sum().sqrt()
        bad = ~(loss + norm).isfinite()
        # asked to stop, nothing is changed any more from the first bad update on until the host hears of it
        self._bad = self._bad | bad if settings.on_nonfinite == "stop" else bad
        masked_step(self.optimizer, self._bad, clip_factor(norm, settings.max_grad_norm))
        self.optimizer.zero_grad(set_to_none=True)
        self._look_at(self._late.put(self.progress.step + 1, told, world.size, names))
        return loss, norm

    def _look_at(self, report: StepReport | None) -> None:
        """Hears, a step late, whether an update was finite.

        Raises:
            SparsekitError: it was not, and the spec says to stop then.
        """
        if report is None:
            return
        if report.finite:
            leap = self._spikes.see(report.step, report.loss)
            if leap is not None and self.is_main:
                print(f"note: {leap}", file=sys.stderr)
            return
        if self.spec.train.on_nonfinite == "skip":
            self.progress = replace(self.progress, skipped=self.progress.skipped + 1)
            if self.is_main:
                print(f"note: step {report.step}: {self._cause(report)}; the update was left out", file=sys.stderr)
            return
        self._tell_saved(self.saver.finish())
        kept = self.run.checkpoints
        where = f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint was saved"
        problem = f"step {report.step}: {self._cause(report)}: training has diverged ({where})"
        mend = "lower the learning rate, or set train.on_nonfinite to skip"
        raise self.world.alike(SparsekitError(f"{problem}; {mend}"))

    def _cause(self, report: StepReport) -> str:
        """What was not finite, on which rank, and in which layer that began."""
        if report.bad_rank is None:
            return f"the gradient of {report.bad_parameter} is not finite"
        told = f"rank {report.bad_rank}: loss {report.losses[report.bad_rank]}"
        if self.spec.train.on_nonfinite == "skip":
            return told

        def again() -> None:  # the weights are those that the step had
            for host_batch in dict(self._recent)[report.step]:
                batch = host_batch.to(self.device)
                with self._autocast():
                    self.objective(self.model, batch, self._context(batch, 1.0))

        found = [name for name in self.world.gather(first_not_finite(self.model, again)) if name is not None]
        return f"{told}, first in {found[0]}" if found else told

    def _context(self, batch: Batch, loss_scale: float | Tensor) -> ForwardContext:
        # Tensors, not numbers: a compiled block would be compiled again for every new number. Filled where they are,
        # as a number that is copied to a GPU makes the host wait.
        if not isinstance(loss_scale, Tensor):
            loss_scale = torch.full((), loss_scale, device=self.device)
        progress = torch.full((), self.progress.step / self.total_steps, device=self.device)
        return ForwardContext(documents_BT=batch.documents_BT, progress=progress, loss_scale=loss_scale)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.spec.train.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def evaluate(self) -> dict[str, float] | None:
        """The loss on each validation text; None where a signal asked to stop meanwhile."""
        return self.evaluation(self.model, self.objective, self._autocast)

    def _asked_to_stop(self) -> bool:
        asked = self.agreement.poll()
        if SAVE in asked:
            self._save()
        self.stopping = self.stopping or STOP in asked
        return self.stopping

    def _meter(self) -> Meter:
        peak = self.spec.train.peak_flops
        if peak is None:
            peak = peak_flops(self.device, torch.float32 if self.spec.train.precision == "fp32" else torch.bfloat16)
        flops = 3 * self.model.flops_per_token(self.spec.seq_len)
        whole = None if peak is None else peak * self.world.size
        return Meter(self.device, flops, whole, self.progress.tokens, self.loader.wait_seconds)

    def _log(self, log: MetricsLog | None, told: dict[str, Tensor | float], evaluate: bool) -> None:
        progress = self.progress
        row: dict[str, Any] = {"step": progress.step, "tokens": progress.tokens}
        row.update({name: float(value) for name, value in told.items()})
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            self._look_at(self._late.take())
        if self.progress.skipped:
            row["skipped_updates"] = self.progress.skipped
        self._finish_row(log, row, evaluate)

    def _finish_row(self, log: MetricsLog | None, row: dict[str, Any], evaluate: bool) -> None:
        """Evaluates if that is due, and logs; of an evaluation that is given up a resumed run makes up for."""
        if evaluate:
            self.progress = replace(self.progress, owed=dict(row))  # for what is saved until it ends
            losses = self.evaluate()
            if losses is not None:
                row.update(losses)
                self._count_evaluation(row)
        if log is not None:
            log.write(row)
        for callback in self.callbacks:
            callback.on_log(self, row)

    def _count_evaluation(self, row: dict[str, Any]) -> None:
        own, best = row[f"{OWN}_loss"], self.progress.best_val_loss
        if best is None or own < best:
            self.progress = replace(self.progress, best_val_loss=own, best_step=row["step"])
        self.progress = replace(self.progress, owed=None)

    def _counters(self) -> dict[str, Tensor]:
        """Scalar counters of the last forward, averaged over layers."""
        found: dict[str, list[Tensor]] = {}
        for _, name, value in counters(self.model):
            if value.ndim == 0:
                found.setdefault(name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def _save(self) -> None:
        self._look_at(self._late.take())  # saving waits for the device in any case
        self._tell_saved(self.saver.finish())
        self.saver.start(self.model, self.optimizer, self.progress, self.data.identity, self.loader.state())

    def _tell_saved(self, folder: Path | None) -> None:
        if folder is not None:
            for callback in self.callbacks:
                callback.on_checkpoint(self, folder)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
