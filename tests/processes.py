"""Real processes that run the command line, in a tenth of the time that `python -m ddpm_cli` takes to start.

Importing PyTorch takes seconds. So one server imports it, and forks a child for each process that a test asks for. The
server has one thread and has computed nothing, so a child is as good as a new process: it has its own signals, exit
code, folder, environment and limits. `tests/system/test_entry_point.py` starts `ddpm` without the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

DDPM = "from ddpm_cli.cli.app import main; main()"
TORCHRUN = "from torch.distributed.run import main; main()"
GUARD = 300  # seconds; a test that waits for longer fails
_INT = 4  # bytes of a number on the way from the server


class Process:
    """A process that runs `source` with `args`, in the current folder, while the test goes on.

    Its streams are files, so it never waits for a reader, and its output can be read at any time.
    """

    def __init__(
        self,
        server: socket.socket,
        source: str,
        args: tuple[object, ...],
        env: Mapping[str, str] | None = None,
        stdin: bytes | int = b"",
        stderr: int | None = None,
        terminal: int | None = None,
    ) -> None:
        """stdin: what is in it, or a file descriptor. stderr: a file descriptor to use instead. terminal: one for all
        three streams."""
        self.returncode: int | None = None
        self._out, self._err, given = (tempfile.TemporaryFile() for _ in range(3))  # noqa: SIM115
        if isinstance(stdin, bytes):
            given.write(stdin)
            given.seek(0)
        streams = [
            given.fileno() if isinstance(stdin, bytes) else stdin,
            self._out.fileno(),
            self._err.fileno() if stderr is None else stderr,
        ]
        if terminal is not None:
            streams = [terminal] * 3
        self._report, report = os.pipe()
        command = {"source": source, "args": [str(arg) for arg in args], "cwd": str(Path.cwd())}
        request = json.dumps(command | {"env": dict(os.environ | (env or {}))}).encode()
        socket.send_fds(server, [request], [*streams, report])
        os.close(report)
        given.close()
        self.pid = self._next_report()

    def _next_report(self) -> int:
        """The server sends the process's id, and then its exit code."""
        assert _is_readable(self._report, GUARD), f"the process does not end. It wrote:\n{self.err}"
        return int.from_bytes(os.read(self._report, _INT), "little", signed=True)

    @property
    def out(self) -> bytes:
        """What it has written to stdout so far."""
        return _content(self._out)

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        return _content(self._err).decode()

    def is_running(self) -> bool:
        if self.returncode is None and _is_readable(self._report, 0):
            self.wait()
        return self.returncode is None

    def wait(self) -> int:
        """Wait until it ends. Returns its exit code, or minus the number of the signal that killed it."""
        if self.returncode is None:
            self.returncode = self._next_report()
            os.close(self._report)
        return self.returncode

    def finish(self) -> str:
        """Wait until it ends, with exit code 0. Returns what it wrote to stderr."""
        assert self.wait() == 0, self.err
        return self.err

    def send_signal(self, number: int) -> None:
        if self.is_running():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, also for the processes that torchrun started, as if the machine crashed."""
        for pid in [self.pid, *self.children()] if self.is_running() else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Kill it if it is still there, and forget its output."""
        self.kill()
        self._out.close()
        self._err.close()

    def children(self) -> list[int]:
        """The processes that it started, such as torchrun's workers."""
        found = subprocess.run(["pgrep", "-P", str(self.pid)], capture_output=True, text=True)
        return sorted(map(int, found.stdout.split()))


def kill_together(*processes: Process) -> None:
    """SIGKILL for all at the same time. One that is left over would notice the loss and end by itself."""
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()


def _is_readable(handle: int, seconds: float) -> bool:
    """Wait for data or the end of a pipe. Unlike select, poll takes handles above 1023: long trials have many."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _content(file: BinaryIO) -> bytes:
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def wait_until(happened: Callable[[], object], *processes: Process) -> None:
    """Wait until something is observed. Fails if a process ends before."""
    deadline = time.monotonic() + GUARD
    while not happened():
        for process in processes:
            assert process.is_running() or happened(), f"exit code {process.returncode}. It wrote:\n{process.err}"
        assert time.monotonic() < deadline, [process.err for process in processes]
        time.sleep(0.01)


@contextlib.contextmanager
def server() -> Iterator[socket.socket]:
    """The server, for as long as the block lasts."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno())]
    # One thread is fast on a busy machine too, and the server must have only one thread to fork.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env, start_new_session=True):
        theirs.close()
        with ours:  # closing it ends the server
            yield ours


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Fork a child for each request. Returns in each child, with the request, once its streams are in place."""
    while True:
        request, files, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not request:
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:  # a parent that waits for the child and reports its exit code
            *streams, report = files
            child = os.fork()
            if child == 0:
                for place, stream in enumerate(streams):
                    os.dup2(stream, place)
                for file in (*files, requests.detach()):
                    os.close(file)
                return json.loads(request)
            for file in (*streams, requests.detach(), 0, 1, 2):
                os.close(file)
            os.write(report, child.to_bytes(_INT, "little"))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # the tests are over
                os.write(report, status.to_bytes(_INT, "little", signed=True))
            os._exit(0)
        for file in files:
            os.close(file)


if __name__ == "__main__":
    import torch._dynamo  # the first step of Adam imports it
    import torch.distributed.run  # noqa: F401

    import ddpm_cli.cli.app
    import ddpm_cli.cli.follow
    import ddpm_cli.models.sample_folder
    import ddpm_cli.training.run  # noqa: F401

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "forking a process with threads is not safe"
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    # As in a new process, even if the caller of the tests ignores signals.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv[1:] = asked["args"]
    exec(asked["source"])
