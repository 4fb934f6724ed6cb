"""Several processes that work on one thing, as torchrun starts them. One process alone is the smallest case.

Gradients travel in the default group (NCCL between GPUs, gloo between CPUs), inside DistributedDataParallel. What the
processes have to agree on travels between their CPUs in a group of its own, where one may wait for another for as long
as packing a data set takes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ddpm_cli.device import pick_device
from ddpm_cli.errors import DDPMError, ElsewhereError, LostProcessError, UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

__all__ = ["World", "is_lost", "lost_process", "no_sync", "process_group", "restarted_in", "sign"]

_PATIENCE = timedelta(days=7)  # torchrun finds out who died, and ends the others
_MEETING = timedelta(minutes=15)  # for all processes to start
_POLL = 0.05  # seconds
_Result = TypeVar("_Result")


def sign(lock: Path) -> None:
    """Write into a file of `files.lock` that is held who it is that works there."""
    with contextlib.suppress(OSError):  # a disk that is full or read-only says so soon enough
        if not lock.is_symlink():  # somebody has set it, and it may lead to any file
            lock.write_text(_launcher())


def restarted_in(lock: Path) -> bool:
    """Whether torchrun started this command anew, and it was this command that worked there before."""
    try:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # after some died, with --max-restarts
        return again and lock.read_text() == _launcher()
    except (OSError, ValueError):
        return False


def _launcher() -> str:
    """What started this process, by a name that it keeps when it starts it again."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


@dataclass(frozen=True)
class World:
    """The processes that work together, and which of them this one is.

    rank: in [0, size); 0 leads: it alone writes and speaks. local_rank: the place on its machine.
    Every method must be called by all processes, in the same order. They raise LostProcessError if one is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cpu_group: ProcessGroup | None = None  # the group of their CPUs

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """This process's part of `count` things that lie in a row."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def pick_device(self, name: str) -> torch.device:
        """`device.pick_device`; with several processes each has the GPU of its place on its machine."""
        if self.size == 1:
            return pick_device(name)
        if name not in ("auto", "cpu", "cuda"):
            raise UsageError(f"--device {name} is one device for {self.size} processes", "Use cuda, or cpu.")
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        pick_device(name)
        if self.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"--device {name}: more processes than the {torch.cuda.device_count()} GPUs of this machine",
                "torchrun --nproc-per-node gpu starts one for each GPU.",
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def on_all(self, work: Callable[[], _Result]) -> _Result:
        """Do something in every process. If it fails in some, the first raises that, the others ElsewhereError."""
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as failed:
            error = failed
        code = None if error is None else error.exit_code if isinstance(error, DDPMError) else 1
        codes = self.all_gather(code)
        failed_first = next(((rank, code) for rank, code in enumerate(codes) if code is not None), None)
        if failed_first is None:
            return cast(_Result, result)
        rank, exit_code = failed_first
        if error is not None and rank == self.rank:
            raise error
        raise ElsewhereError(exit_code)

    def reported_once(self, error: DDPMError) -> DDPMError:
        """What to raise where all processes come to the same error: the one that leads says it for all."""
        return error if self.is_main else ElsewhereError(error.exit_code)

    def on_main(self, work: Callable[[], _Result]) -> _Result:
        """Do something in the process that leads, and give what it returned (which must pickle) to all."""
        result = self.on_all(lambda: work() if self.is_main else None)
        return cast(_Result, self.all_gather(result)[0])

    def all_gather(self, value: _Result) -> list[_Result]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _asking():
            torch.distributed.all_gather_object(values, value, group=self.cpu_group)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in some process. Quick enough to ask after every step."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.uint8)
        with _asking():
            torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX, group=self.cpu_group)
        return tuple(bool(flag) for flag in raised.tolist())

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            with _asking():
                torch.distributed.all_reduce(values)
        return values

    def reduce_min(self, values: Tensor) -> Tensor:
        """The smallest of each element over all processes, in place."""
        if self.size > 1:
            with _asking():
                torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors of the process that leads to all, in place."""
        if self.size > 1:
            with _asking(), torch.no_grad():
                for tensor in tensors:
                    torch.distributed.broadcast(tensor, 0)

    def data_parallel(self, module: nn.Module, device: torch.device) -> nn.Module:
        """A network whose gradients are the means over all processes: the module itself if there is one process."""
        if self.size == 1:
            return module
        # Of 1x1 convolutions: the strides of dimensions of size 1 differ, and mean nothing.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with _asking():
            devices = [device] if device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def _asking() -> Iterator[None]:
    """Say of a failure that another process is gone, if that is what it is."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise lost_process(error) from error


def lost_process(error: RuntimeError) -> LostProcessError:
    """What the processes say that are left, or that cannot reach one another."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return LostProcessError(
        f"another process of this run is gone, or cannot be reached ({reason})",
        "What it said before that is the reason. If it said nothing it was killed: for want of memory, perhaps.",
    )


def is_lost(error: RuntimeError) -> bool:
    """Whether an operation between processes failed because one of them is gone."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def no_sync(module: nn.Module) -> Any:
    """A context in which gradients are kept to their process, for all but the last part of a batch."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()


@contextmanager
def process_group() -> Iterator[World]:
    """Join the processes that torchrun started with this one, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "LOCAL_RANK" not in os.environ:
        yield World()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    both = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if both else "gloo"
    with _asking():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _meet(rank, size)
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        else:  # another launcher, which does not start processes again
            torch.distributed.init_process_group(backend)
        cpu_group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    yield World(rank, size, local_rank, cast("ProcessGroup", cpu_group))
    torch.distributed.destroy_process_group()  # not after an error: it might wait for processes that wait for this one


def _meet(rank: int, size: int) -> Store:
    """A place to exchange addresses in which no process of an earlier try has left its own.

    torchrun has one store for all its tries, where the addresses of the dead still stand. So each process is given a
    new name; the first one keeps calling whoever stands there, by name, until all that are alive have answered.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=_MEETING)  # type: ignore[attr-defined]
    me = secrets.token_hex(8)
    if rank > 0:
        store.set(f"ddpm/here/{rank}", me)
        store.wait([f"ddpm/call/{me}"])
        first = store.get(f"ddpm/call/{me}").decode()
        store.set(f"ddpm/answer/{first}/{rank}", me)
        return torch.distributed.PrefixStore(f"ddpm/{first}", store)  # type: ignore[attr-defined]
    deadline = time.monotonic() + _MEETING.total_seconds()
    absent = set(range(1, size))
    while absent:
        for other in absent:
            if store.check([f"ddpm/here/{other}"]):
                store.set(f"ddpm/call/{store.get(f'ddpm/here/{other}').decode()}", me)
        absent = {other for other in absent if not store.check([f"ddpm/answer/{me}/{other}"])}
        if time.monotonic() > deadline:
            raise LostProcessError(f"{len(absent)} of {size} processes did not come", "Look at what they said.")
        time.sleep(_POLL if absent else 0)
    return torch.distributed.PrefixStore(f"ddpm/{me}", store)  # type: ignore[attr-defined]
