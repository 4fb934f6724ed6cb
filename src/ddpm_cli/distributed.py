"""Several processes that work on one thing, as torchrun starts them. One process alone is the smallest case.

Gradients travel in the default group (NCCL between GPUs, gloo between CPUs), inside DistributedDataParallel. What the
processes have to agree on travels between their CPUs in a group of its own, where one may wait for another for as long
as packing a data set takes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ddpm_cli.device import pick_device
from ddpm_cli.errors import DDPMError, ElsewhereError, LostProcessError, UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["World", "gone", "hushed", "joined", "lost", "restarted"]

_PATIENCE = timedelta(days=7)  # torchrun finds out who died, and ends the others
_Result = TypeVar("_Result")


def restarted() -> bool:
    """Whether torchrun started these processes anew after some of them died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@dataclass(frozen=True)
class World:
    """The processes that work together, and which of them this one is.

    rank: in [0, size); 0 leads: it alone writes and speaks. local_rank: the place on its machine.
    Every method must be called by all processes, in the same order. They raise LostProcessError if one is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    talk: ProcessGroup | None = None  # the group of their CPUs

    @property
    def leads(self) -> bool:
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

    def together(self, work: Callable[[], _Result]) -> _Result:
        """Do something in every process. If it fails in some, the first raises that, the others ElsewhereError."""
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as failed:
            error = failed
        code = None if error is None else error.exit_code if isinstance(error, DDPMError) else 1
        codes = self.gather(code)
        failed_first = next(((rank, code) for rank, code in enumerate(codes) if code is not None), None)
        if failed_first is None:
            return cast(_Result, result)
        rank, exit_code = failed_first
        if error is not None and rank == self.rank:
            raise error
        raise ElsewhereError(exit_code)

    def said_once(self, error: DDPMError) -> DDPMError:
        """What to raise where all processes come to the same error: the one that leads says it for all."""
        return error if self.leads else ElsewhereError(error.exit_code)

    def lead(self, work: Callable[[], _Result]) -> _Result:
        """Do something in the process that leads, and give what it returned (which must pickle) to all."""
        result = self.together(lambda: work() if self.leads else None)
        return cast(_Result, self.gather(result)[0])

    def gather(self, value: _Result) -> list[_Result]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _asking():
            torch.distributed.all_gather_object(values, value, group=self.talk)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in some process. Quick enough to ask after every step."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.uint8)
        with _asking():
            torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX, group=self.talk)
        return tuple(bool(flag) for flag in raised.tolist())

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            with _asking():
                torch.distributed.all_reduce(values)
        return values

    def smallest(self, values: Tensor) -> Tensor:
        """The smallest of each element over all processes, in place."""
        if self.size > 1:
            with _asking():
                torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give the tensors of the process that leads to all, in place."""
        if self.size > 1:
            with _asking(), torch.no_grad():
                for tensor in tensors:
                    torch.distributed.broadcast(tensor, 0)

    def parallel(self, module: nn.Module, device: torch.device) -> nn.Module:
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
        if not lost(error):
            raise
        raise LostProcessError(
            "another process of this run is gone", "What it said before that is the reason."
        ) from None


def gone() -> LostProcessError:
    """What the processes say that are left."""
    return LostProcessError("another process of this run is gone", "What it said last is the reason.")


def lost(error: RuntimeError) -> bool:
    """Whether an operation between processes failed because one of them is gone."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def hushed(module: nn.Module) -> Any:
    """A context in which gradients are kept to their process, for all but the last part of a batch."""
    return module.no_sync() if isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that torchrun started with this one, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "LOCAL_RANK" not in os.environ:
        yield World()
        return
    both = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    with _asking():
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo")
        talk = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    try:
        yield World(rank, size, local_rank, cast("ProcessGroup", talk))
    finally:
        torch.distributed.destroy_process_group()
