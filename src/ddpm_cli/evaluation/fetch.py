"""Downloads a published file once, and believes it only by its hash."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import ModelError, reason
from ddpm_cli.files import lock

__all__ = ["Published", "fetch", "sha256_of"]

_BLOCK = 2**20  # bytes at once
_TIMEOUT = 30.0  # seconds without an answer


class Published(NamedTuple):
    """A file that never changes. bytes: its size. sha256: its hash, in hexadecimal."""

    url: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def fetch(file: Published, folder: Path, instead: str, progress: OnProgress = silent) -> Path:
    """The path of a published file in a folder, where it is downloaded if it is missing.

    A download that was interrupted continues; a complete one is renamed once its hash is right. If several processes
    need the file, one downloads it and the others wait. instead: advice for machines that cannot download it.
    Raises ModelError.
    """
    path = folder / file.name
    try:
        with lock(path.with_name(f".{file.name}.lock")):
            if not path.exists():
                _download(file, path, progress)
        with contextlib.suppress(OSError):
            os.utime(path)  # its last use
        return path
    except (OSError, http.client.HTTPException) as error:  # URLError, of the network, is an OSError
        # A URLError wraps the error of the network.
        cause = error.reason if isinstance(error, URLError) and isinstance(error.reason, Exception) else error
        why = reason(cause) or type(cause).__name__
        raise ModelError(f"{file.url}: cannot be downloaded to {folder} ({why})", instead) from None


def _download(file: Published, path: Path, progress: OnProgress) -> None:
    partial = path.with_name(f".{file.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    there = partial.stat().st_size if partial.exists() else 0
    if there < file.bytes:
        request = Request(file.url, headers={"Range": f"bytes={there}-"} if there else {})
        try:
            answer = urlopen(request, timeout=_TIMEOUT)
        except HTTPError as error:
            with error:  # it is an answer as well, and holds a connection
                raise OSError(f"the server answered {error.code}") from None
        with answer:
            there = there if answer.status == 206 else 0  # 200: the server sends all of it
            with partial.open("ab" if there else "wb") as out:
                while there <= file.bytes and (block := answer.read(_BLOCK)):
                    out.write(block)
                    there += len(block)
                    progress(f"downloading {file.name}", there, file.bytes)
    if there < file.bytes:
        raise OSError(f"the connection was lost after {there} of {file.bytes} bytes")
    found = sha256_of(partial)
    if found != file.sha256:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ModelError(
            f"{file.url}: has the SHA-256 {found[:12]}…, and should have {file.sha256[:12]}…",
            "The download was damaged or replaced on its way, and has been removed. Try again.",
        )
    partial.replace(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
