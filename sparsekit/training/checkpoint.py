"""A run's state on disk: safetensors and JSON, never a pickle; written whole or not at all, while training goes on.

A checkpoint's folder holds ``weights/`` (shards of the model's and the optimizer's tensors, written by all ranks and
read by any number of them), ``random.safetensors``, ``state.json``, ``spec.json``, the tokenizer, and a manifest with
the size and hash of each file. It bears a temporary name until all of that is on the disk and has been looked at again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsekit.errors import CheckpointError
from sparsekit.files import read_object, seal, write_json
from sparsekit.model.targets import CHECKPOINTS, SPEC, TOKENIZER, Run
from sparsekit.model.weights import MODEL_PREFIX, OPTIMIZER_PREFIX, WEIGHTS, alone_is_meant, load_weights, read, stored
from sparsekit.spec.load import dump, may_change
from sparsekit.spec.merge import differences
from sparsekit.spec.run import KeepSpec, RunSpec
from sparsekit.training.distributed import World, in_a_line
from sparsekit.training.gradients import local

STATE, RANDOM = "state.json", "random.safetensors"
PAST = "past-"  # before the name of a checkpoint that a run went back behind
FORMAT = 2


@dataclass(frozen=True)
class Progress:
    """Where a run stands: all of its state that is neither tensors nor random numbers nor a place in the data.

    Attributes:
        skipped: updates that were not finite and left out.
        owed: what is to be logged of the step once it is evaluated, where that had not come to its end.
    """

    step: int = 0
    tokens: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    skipped: int = 0
    owed: dict[str, Any] | None = None


class Saver:
    """Writes checkpoints of a run, one at a time, in the background.

    A save that fails is told and leaves the checkpoints before it as they are; training goes on, and the next one
    tries again.

    Args:
        run, spec: what is saved, and with which spec.
        world: who saves together.
    """

    def __init__(self, run: Run, spec: RunSpec, world: World):
        self.run, self.spec, self.world = run, spec, world
        self.begun_step: int | None = None  # the newest one's
        self.saved_step: int | None = None  # the newest whole one's
        self._under_way: tuple[int, Future[Any]] | None = None

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        data: dict[str, Any],
        place: dict[str, Any],
    ) -> None:
        """Takes a copy of everything that a resume needs and begins to write it.

        Args:
            data: identifies the text that is trained on.
            place: where this rank stands in it.

        Raises:
            CheckpointError: a weight is not finite; such a checkpoint is never written.
        """
        self.finish()
        self._demand_finite(model, progress.step)
        self.begun_step = progress.step
        folder, temporary = self._folders(progress.step)
        ranks = self.world.gather((random_state(), place))
        state = {
            "format": FORMAT,
            "progress": vars(progress),
            "data": data,
            "places": [place for _, place in ranks],
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "torch": torch.__version__,
        }
        random = {f"{name}/{rank}": tensor for rank, (states, _) in enumerate(ranks) for name, tensor in states.items()}
        failure = self.world.from_main(lambda: self._prepare(temporary, state, random))
        if failure is not None:
            writing: Future[Any] = Future()
            writing.set_exception(CheckpointError(failure))
        else:
            tensors = tensors_of(model, optimizer)
            writing = write(temporary / WEIGHTS, tensors, self.world)
            if self.world.is_main:
                writing = finishing(writing, lambda: self._finalise(temporary, folder, set(tensors), progress))
        self._under_way = progress.step, writing

    def poll(self) -> Path | None:
        """The folder of a checkpoint that has become whole since the last call."""
        return self.finish() if self._under_way is not None and self._under_way[1].done() else None

    def finish(self, demand: bool = False) -> Path | None:
        """Waits for the checkpoint under way, if any, and returns its folder.

        Args:
            demand: it must be whole; asked by all ranks together.

        Raises:
            CheckpointError: with ``demand``, it could not be written.
        """
        if self._under_way is None:
            return None
        step, future = self._under_way
        self._under_way = None
        failure = future.exception()
        folder, temporary = self._folders(step)
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # what a failure leaves; a full disk needs the room
        told = None if failure is None else self._failed(step, reason_of(failure))
        if demand:
            self.world.from_main(lambda: _demand(told))  # it has looked at what all have written
        elif told and self.world.is_main:
            print(f"warning: {told}", file=sys.stderr)
        if told:
            return None
        self.saved_step = step
        return folder

    def _folders(self, step: int) -> tuple[Path, Path]:
        """Where a step's checkpoint comes to lie, and where it is until it is whole."""
        folder = self.run.folder / CHECKPOINTS / f"step-{step:08d}"
        return folder, folder.with_name(f".{folder.name}.tmp")

    def _prepare(self, temporary: Path, state: dict[str, Any], random: dict[str, Tensor]) -> str | None:
        """Writes what is small; the reason if that fails."""
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # what an earlier, killed save left
            (temporary / WEIGHTS).mkdir(parents=True)
            save_file(random, temporary / RANDOM)
            write_json(temporary / STATE, state)
            write_json(temporary / SPEC, dump(self.spec))
            if (self.run.folder / TOKENIZER).exists():
                shutil.copyfile(self.run.folder / TOKENIZER, temporary / TOKENIZER)
        except (OSError, SafetensorError) as error:
            return reason_of(error)
        return None

    def _finalise(self, temporary: Path, folder: Path, names: set[str], progress: Progress) -> None:
        """Looks at what was written, and gives it its name; on rank 0, when all have written."""
        lacking = names - set(stored(temporary / WEIGHTS))
        if lacking:
            raise CheckpointError(f"{min(lacking)} did not reach the disk")
        seal(temporary, folder)
        prune(self.run, self.spec.train.keep, progress)

    def _demand_finite(self, model: nn.Module, step: int) -> None:
        checks = {name: local(tensor).isfinite().all() for name, tensor in model.state_dict().items()}
        bad = 1.0 - torch.stack(list(checks.values())).float()
        counts = self.world.sum(bad).tolist()
        name = next((name for name, count in zip(checks, counts, strict=True) if count), None)
        if name is not None:
            problem = f"step {step}: weight {name} is not finite, so no checkpoint is written"
            raise self.world.alike(CheckpointError(problem))

    def _failed(self, step: int, reason: str) -> str:
        kept = self.run.checkpoints
        where = f"the newest checkpoint is still {kept[-1]}" if kept else "no checkpoint was saved before"
        return f"{self.run.folder}: the checkpoint of step {step} could not be written ({reason}); {where}"


def _demand(failure: str | None) -> None:
    if failure is not None:
        raise CheckpointError(failure)


def write(folder: Path, tensors: dict[str, Tensor], world: World) -> Future[Any]:
    """Copies tensors to the host now, and writes them in the background, each rank its own shards."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    files = {name: 1 if name.startswith(MODEL_PREFIX) else 2 for name in tensors}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    alone_is_meant()
    future: Any = async_save(tensors, storage_writer=writer, process_group=world.saving, no_dist=world.size == 1)
    return future


def finishing(future: Future[Any], then: Callable[[], None]) -> Future[None]:
    """A future of ``then()``, which is called where ``future`` ends, if that succeeds."""
    outcome: Future[None] = Future()

    def go_on(done: Future[Any]) -> None:
        try:
            done.result()
            then()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    future.add_done_callback(go_on)
    return outcome


def reason_of(error: BaseException) -> str:
    """What the disk said, out of whatever it was wrapped in."""
    failures = getattr(error, "failures", None)  # of torch.distributed.checkpoint: by rank, with traces
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    return in_a_line(error)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's tensors as ``model.<name>`` and the optimizer's as ``optimizer.<state>/<parameter>``.

    Raises:
        TypeError: the optimizer keeps what is no tensor; it could not be read again.
    """
    found = {MODEL_PREFIX + name: tensor.detach() for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, states in optimizer.state.items():
        for key, value in states.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} is a {type(value).__name__}; only tensors can be saved")
            found[f"{OPTIMIZER_PREFIX}{key}/{names[id(parameter)]}"] = value.detach()
    return found


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says beside tensors: how far the run was, and each rank's place in the data."""

    progress: Progress
    places: list[dict[str, Any]]


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any], world: World
) -> Restored:
    """Puts back what :class:`Saver` wrote, random numbers included, under whatever world size.

    Args:
        folder: a checkpoint that :func:`~sparsekit.files.verify` has found whole; hashing it takes as long as reading.

    Raises:
        CheckpointError: it was trained on other text, or is of another format.
    """
    state = read_object(folder / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: has format {state.get('format')}, this version reads {FORMAT}")
    changed = differences(state["data"], data)
    if changed:
        told = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
        raise CheckpointError(f"{folder}: the text has changed since ({told}); start over with --resume never")
    load_weights(model, folder / WEIGHTS, world.control)
    _load_optimizer(model, optimizer, folder / WEIGHTS, world)
    _restore_random_state(folder / RANDOM, world)
    return Restored(Progress(**state["progress"]), state["places"])


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, world: World) -> None:
    parameters = dict(model.named_parameters())
    targets: dict[str, Tensor] = {}
    for name, (shape, dtype) in stored(folder).items():
        if not name.startswith(OPTIMIZER_PREFIX):
            continue
        key, _, owner = name.removeprefix(OPTIMIZER_PREFIX).partition("/")
        parameter = parameters[owner]
        if shape == list(parameter.shape):  # laid out as the parameter is, hence sharded as it is
            value = torch.zeros_like(parameter.detach(), dtype=dtype)
        else:  # fused optimizers keep their step count on the device
            value = torch.zeros(shape, dtype=dtype, device=parameter.device)
        targets[name] = optimizer.state[parameter][key] = value
    if targets:
        read(folder, targets, world.control)


def random_state() -> dict[str, Tensor]:
    """This process's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_state(path: Path, world: World) -> None:
    """Of a rank that there was not before nothing is known; it keeps the numbers that its seed gave it."""
    try:
        states: Mapping[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    if f"cpu/{world.rank}" in states:
        torch.set_rng_state(states[f"cpu/{world.rank}"])
    if torch.cuda.is_available() and f"cuda/{world.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda/{world.rank}"])


def demand_same_spec(folder: Path, spec: RunSpec) -> None:
    """Refuses a checkpoint of another spec; what does not touch training may differ.

    Raises:
        CheckpointError: with the differences.
    """
    changed = {
        path: values
        for path, values in differences(read_object(folder / SPEC), dump(spec)).items()
        if not may_change(path)
    }
    if changed:
        told = [f"{path} was {old}, is {new}" for path, (old, new) in changed.items()]
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        raise CheckpointError(
            f"{folder}: is a checkpoint of another spec ({'; '.join(told[:3])}{more}); "
            f"give another --out, or --resume never"
        )


def clear_unfinished(run: Run, step: int) -> None:
    """Removes what a kill left half written, and puts aside the checkpoints past the step that a run goes on from.

    Those are damaged, or of steps that will be taken again: counted among the newest, they would drive out new ones.
    They stay until :func:`prune` finds the run past them once more.
    """
    for path in (*run.folder.glob(".*.tmp"), *(run.folder / CHECKPOINTS).glob(".*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in run.checkpoints:
        if _step(folder) > step:
            aside = folder.with_name(f"{PAST}{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def prune(run: Run, keep: KeepSpec, progress: Progress) -> None:
    """Removes the checkpoints that the policy does not keep, and those put aside that the run has got past again.

    To be called when the newest checkpoint is whole, forced to the disk and named: from then on whatever is of its
    step or an earlier one is needed by nobody to go on from, and a kill between any two removals leaves that newest
    one. What it leaves of the others, under a temporary name or not yet touched, the next start or save removes.
    """
    newest = run.checkpoints[-keep.last :]
    for folder in run.checkpoints:
        step = _step(folder)
        wanted = folder in newest or (keep.every is not None and step % keep.every == 0)
        if not wanted and not (keep.best and step == progress.best_step):
            _remove(folder)
    for folder in (run.folder / CHECKPOINTS).glob(f"{PAST}step-*[0-9]"):
        if _step(folder) <= progress.step:
            _remove(folder)


def _step(folder: Path) -> int:
    """Of a checkpoint, by its name."""
    return int(folder.name.rpartition("-")[2])


def _remove(folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.tmp")  # so that a kill leaves no half of it under its name
    folder.rename(aside)
    shutil.rmtree(aside)
