"""Distributed runs: the processes that torchrun starts. A single process is a world of size 1.

Gradients use the default process group (NCCL between GPUs, gloo between CPUs), inside DistributedDataParallel. Flags
and objects use a second group: gloo with a long timeout, since ranks may have to wait while one packs a data set.
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
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ddpm_cli.device import pick_device
from ddpm_cli.errors import DDPMError, ElsewhereError, LostProcessError, UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]

__all__ = ["World", "is_lost", "lost_process", "no_sync", "process_group", "restarted_in", "sign"]

_GROUP_TIMEOUT = timedelta(days=7)  # torchrun notices dead processes and ends the others
_START_TIMEOUT = timedelta(minutes=15)  # for all processes to start
_LEAVE_SECONDS = 5.0  # to leave the group after an error
_POLL = 0.05  # seconds
_Result = TypeVar("_Result")
_left: list[Any] = []  # the groups that this process has left, see `process_group`


def sign(lock: Path) -> None:
    """Write the name of this process's launcher into a lock file that this process holds."""
    with contextlib.suppress(OSError):  # a full or read-only disk is reported later
        if not lock.is_symlink():  # a link may lead to any file
            lock.write_text(_launcher())


def restarted_in(lock: Path) -> bool:
    """Whether torchrun restarted this command, and the lock file was last held under the same launcher."""
    try:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by --max-restarts
        return again and lock.read_text() == _launcher()
    except (OSError, ValueError):
        return False


def _launcher() -> str:
    """A name of this process's launcher that stays the same after a restart."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


@dataclass(frozen=True)
class World:
    """The processes of a distributed run, and the rank of this one.

    rank: in [0, size); only rank 0 writes files and prints. size: the world size. local_rank: the rank on its machine.
    Methods that communicate must be called on all ranks, in the same order. They raise LostProcessError if one is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    cpu_group: ProcessGroup | None = None  # for flags and objects

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def rows(self, count: int) -> range:
        """This rank's share of `count` items, a contiguous range."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def pick_device(self, name: str) -> torch.device:
        """`device.pick_device`; with several processes, each takes the GPU of its local rank."""
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
        """Run `work` on every rank. If some fail, the lowest of them raises its error, the others ElsewhereError."""
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
        """The exception to raise if all ranks fail with the same error: only rank 0 reports it."""
        return error if self.is_main else ElsewhereError(error.exit_code)

    def on_main(self, work: Callable[[], _Result]) -> _Result:
        """Run `work` on rank 0, and return its result (which must pickle) on all ranks."""
        result = self.on_all(lambda: work() if self.is_main else None)
        return cast(_Result, self.all_gather(result)[0])

    def all_gather(self, value: _Result) -> list[_Result]:
        """The values of all ranks, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_reported():
            torch.distributed.all_gather_object(values, value, group=self.cpu_group)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. Fast enough to call after every step."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.uint8)
        with _lost_reported():
            torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX, group=self.cpu_group)
        return tuple(bool(flag) for flag in raised.tolist())

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.any(False)

    def reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.size > 1:
            with _lost_reported():
                torch.distributed.all_reduce(values)
        return values

    def reduce_min(self, values: Tensor) -> Tensor:
        """The elementwise minimum of a tensor over all ranks, in place."""
        if self.size > 1:
            with _lost_reported():
                torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Copy the tensors of rank 0 to all ranks, in place."""
        if self.size > 1:
            with _lost_reported(), torch.no_grad():
                for tensor in tensors:
                    torch.distributed.broadcast(tensor, 0)

    def data_parallel(self, module: nn.Module, device: torch.device) -> nn.Module:
        """A network whose gradients are averaged over all ranks; the module itself if there is one process."""
        if self.size == 1:
            return module
        # Harmless: in 1x1 convolutions the strides of dimensions of size 1 may differ.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        with _lost_reported():
            devices = [device] if device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def _lost_reported() -> Iterator[None]:
    """Turn an error into LostProcessError if it means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise lost_process(error) from error


def lost_process(error: RuntimeError) -> LostProcessError:
    """The error of the processes that are left, or that cannot reach each other."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return LostProcessError(
        f"another process of this run is gone, or cannot be reached ({reason})",
        "Its last message is the reason. If there is none, it was killed, perhaps because memory ran out.",
    )


def is_lost(error: RuntimeError) -> bool:
    """Whether an operation between processes failed because one of them is gone."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def no_sync(module: nn.Module) -> Any:
    """A context without gradient synchronisation, for all but the last part of a batch."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()


@contextmanager
def process_group() -> Iterator[World]:
    """Join the other processes if torchrun started this one; else a world of size 1."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "LOCAL_RANK" not in os.environ:
        yield World()
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    both = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if both else "gloo"
    with _lost_reported():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _meet(rank, size)
            torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        else:  # another launcher, which does not restart processes
            torch.distributed.init_process_group(backend)
        cpu_group = torch.distributed.new_group(backend="gloo", timeout=_GROUP_TIMEOUT)
    # The groups stay in memory to the end. If DistributedDataParallel had the last reference to one, it would wait for
    # the group's threads with Python's lock, which these threads may need to free their last tensor.
    _left.extend((torch.distributed.group.WORLD, cpu_group))
    try:
        yield World(rank, size, local_rank, cast("ProcessGroup", cpu_group))
    except LostProcessError:
        raise
    except Exception:
        # The threads of a group that is left open may abort the process at its end, which hides the exit code.
        leaving = Thread(target=torch.distributed.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(_LEAVE_SECONDS)  # it may wait for processes that wait for this one
        raise
    torch.distributed.destroy_process_group()


def _meet(rank: int, size: int) -> Store:
    """A store for the rendezvous, without the addresses of processes from before a restart.

    torchrun keeps one store over all restarts, with the addresses of dead processes. So each process takes a new random
    name. Rank 0 calls every name that it finds in the store until all other ranks have answered.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=_START_TIMEOUT)  # type: ignore[attr-defined]
    me = secrets.token_hex(8)
    if rank > 0:
        store.set(f"ddpm/here/{rank}", me)
        store.wait([f"ddpm/call/{me}"])
        first = store.get(f"ddpm/call/{me}").decode()
        store.set(f"ddpm/answer/{first}/{rank}", me)
        return torch.distributed.PrefixStore(f"ddpm/{first}", store)  # type: ignore[attr-defined]
    deadline = time.monotonic() + _START_TIMEOUT.total_seconds()
    absent = set(range(1, size))
    while absent:
        for other in absent:
            if store.check([f"ddpm/here/{other}"]):
                store.set(f"ddpm/call/{store.get(f'ddpm/here/{other}').decode()}", me)
        absent = {other for other in absent if not store.check([f"ddpm/answer/{me}/{other}"])}
        if time.monotonic() > deadline:
            raise LostProcessError(f"{len(absent)} of {size} processes did not start", "Look at their output.")
        time.sleep(_POLL if absent else 0)
    return torch.distributed.PrefixStore(f"ddpm/{me}", store)  # type: ignore[attr-defined]
