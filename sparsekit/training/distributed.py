"""The processes that train together: which of them this is, and how they agree.

Everything here also holds for one process, without torch.distributed.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sparsekit.errors import SparsekitError, SpecError

T = TypeVar("T")
STOP, SAVE = 0, 1  # what a signal asks for
ONE_REQUEST = 2.0  # seconds: a scheduler's signal comes to a process, and once more passed on by torchrun
JOINING = timedelta(minutes=10)  # in which all processes must have come; as long as torchrun waits for its nodes


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        device: on which it trains.
        rank, size: which of how many.
        control: a CPU group to agree over, without waiting for a device; None in a world of one.
        saving: another, for a checkpoint that is written while training goes on.
        tensor: how many neighbouring processes share each batch, every one with a part of the layers.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None
    tensor: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of ``data_size`` parts of the data this process reads."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.size // self.tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(self.control)

    def from_main(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns on rank 0, on every rank; where it fails, all fail.

        Raises:
            SparsekitError: as ``make`` does, on rank 0; the others leave quietly, as one line is enough.
        """
        if self.size == 1:
            return make()
        told: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                told[0] = make()
            except BaseException as error:
                told[1], failure = f"{type(error).__name__}: {error}", error
        dist.broadcast_object_list(told, src=0, group=self.control)
        if failure is not None:
            raise failure
        if told[1] is not None:
            raise SystemExit(2)
        value: T = told[0]
        return value

    def alike(self, error: Exception) -> BaseException:
        """What to raise where every rank has come to the same: the error on rank 0; one line is enough."""
        return error if self.is_main else SystemExit(2)

    def together(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns, on each rank its own; where it fails on any, all fail.

        Raises:
            SparsekitError: as ``make`` does, on the first rank where it fails; the others leave quietly.
        """
        made: list[T] = []
        failure: BaseException = SystemExit(2)
        try:
            made.append(make())
        except SparsekitError as error:
            failure = error
        whole = self.gather(bool(made))
        if all(whole):
            return made[0]
        raise failure if whole.index(False) == self.rank else SystemExit(2)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that torchrun started this process in, or a world of its own.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" …; under torchrun each process its own GPU.

    Raises:
        SpecError: the device cannot be used.
        SystemExit: another process has ended, or has not come in time; told in a line, with exit code 1.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(usable(device))
        return
    here = usable(device)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    began = not dist.is_initialized()
    problem, mend = (
        f"the {size} processes of this run have not come together",
        "see what the others wrote, and start all again",
    )
    try:
        if began:
            _meet("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
        groups = [dist.new_group(backend="gloo") for _ in range(2)]
        problem = "another process of this run has ended or is out of reach"
        mend = "see what it wrote, and train again to go on from the newest checkpoint"
        yield World(here, dist.get_rank(), dist.get_world_size(), *groups)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print(f"error: rank {os.environ.get('RANK')}: {problem} ({in_a_line(error)}); {mend}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if began and dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    """Waits until all processes have come, and no longer than JOINING for one that may have died before.

    Raises:
        RuntimeError: they have not.
        SparsekitError: the environment does not say where to meet.
    """
    try:
        store, rank, size = next(rendezvous("env://", timeout=JOINING))
    except ValueError as error:
        names = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        raise SparsekitError(f"{in_a_line(error)}; start with torchrun, or set {names} for each process") from None
    store.set_timeout(dist.default_pg_timeout)
    # torchrun starts dead processes again over the same store, where their predecessors' addresses still stand
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def in_a_line(error: BaseException) -> str:
    """What an error of torch's says, without the place in its source and without its advice."""
    return re.sub(r"^\[\S*\] |\. This is typically .*", "", " ".join(str(error).split())) or type(error).__name__


def usable(name: str, asked: str = "train.device") -> torch.device:
    """A device by name.

    Args:
        asked: where the name stands.

    Raises:
        SpecError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SpecError([f"{asked}: {name!r} cannot be used ({str(error).splitlines()[0]})"]) from None


class Agreement:
    """What any process is asked for (to save, to stop), known to all at the same step.

    Each :meth:`poll` sends what was asked here and returns what the poll before it found to be asked anywhere, so that
    nobody waits for a message that is still under way. Every process must poll equally often.
    """

    def __init__(self, world: World):
        self.world = world
        self._asked = [0, 0]
        self._told = torch.zeros(2, dtype=torch.int32)
        self._pending: Any = None

    def ask(self, what: int) -> None:
        """Called by a signal handler: sets a flag and nothing else."""
        self._asked[what] = 1

    def poll(self) -> set[int]:
        """What of STOP and SAVE was asked; SAVE is told once, STOP from then on."""
        sent = torch.tensor(self._asked, dtype=torch.int32)
        if sent[SAVE]:
            self._asked[SAVE] = 0
        if self.world.size == 1:
            told = sent
        else:
            told = self.settle()
            self._told = sent
            self._pending = dist.all_reduce(sent, dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        return {what for what in (STOP, SAVE) if told[what]}

    def settle(self) -> Tensor:
        """Waits for the message under way, as must be done before the last of these is forgotten."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return self._told


@contextmanager
def listening(agreement: Agreement) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask for a stop (once more, seconds later, stops at once), SIGUSR1 for a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers there alone
        return
    asks = {signal.SIGINT: STOP, signal.SIGTERM: STOP, signal.SIGUSR1: SAVE}
    before: dict[int, Any] = {number: signal.getsignal(number) for number in asks}
    asked_at: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        what = asks[signal.Signals(number)]
        agreement.ask(what)
        if what == STOP:
            asked_at.append(time.monotonic())
            if asked_at[-1] > asked_at[0] + ONE_REQUEST:
                signal.signal(number, before[number])
                signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
