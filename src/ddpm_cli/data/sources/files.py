"""Image files on this machine: in a folder, in a list, or named one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from ddpm_cli.data.sources.lists import Listed, parse_list
from ddpm_cli.data.sources.source import Source, has_image_suffix, is_hidden, open_file
from ddpm_cli.data.work import OnProgress, in_threads, silent
from ddpm_cli.errors import DataError
from ddpm_cli.run_folder import is_run
from ddpm_cli.text import and_more, printable

__all__ = ["in_folder", "in_list", "in_stream", "of_files"]

_TOGETHER = 256  # files that a thread checks at once


class Files(Source):
    """Files on this machine, by their paths relative to `root`."""

    def __init__(
        self,
        path: str,
        addresses: Sequence[str],
        root: Path,
        names: list[str],
        left_out: Sequence[tuple[str, str]] = (),
        progress: OnProgress = silent,
    ) -> None:
        super().__init__(path, *addresses)
        self.names, self.left_out = names, list(left_out)
        self._root = root
        self.there = self._stamp_all(progress)  # how many of the files exist

    def _stamp_all(self, progress: OnProgress) -> int:
        """Compute the key from names, sizes and modification times. Returns how many of the files exist."""
        digest = hashlib.sha256(repr(self.left_out).encode())
        there = done = 0
        parts = (self.names[i : i + _TOGETHER] for i in range(0, len(self.names), _TOGETHER))
        for stamps in in_threads(lambda names: [self._stamp(name) for name in names], parts):
            digest.update("".join(f"{name}\0{stamp}\0" for name, stamp in stamps).encode("utf-8", "surrogateescape"))
            there += sum(stamp != "missing" for _, stamp in stamps)
            done += len(stamps)
            progress("looking for changes", done, len(self.names))
        self.key = digest.hexdigest()
        return there

    def _stamp(self, name: str) -> tuple[str, str]:
        try:
            status = (self._root / name).stat()
            return name, f"{status.st_size}-{status.st_mtime_ns}"
        except (OSError, ValueError):  # a dangling link or an invalid name: left out when it is opened
            return name, "missing"

    def open(self, name: str) -> IO[bytes]:
        return open_file(self._root / name)


class _Named(Files):
    """Files that the user named one by one: of these, only the name of the file itself is certain to stay."""

    def own_names(self) -> Iterable[str]:
        return (Path(name).name for name in self.names)


def in_folder(path: str, root: Path, progress: OnProgress) -> Source:
    """A folder, its subfolders and linked folders, without hidden files and runs of `ddpm train`."""
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    visited = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        below = []
        try:
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in visited or is_run(
                root / folder
            ):  # a run contains previews, see `ddpm train .`
                continue
            visited.add((status.st_dev, status.st_ino))  # links may form a cycle
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        continue
                    if _is_folder(entry):
                        below.append(f"{folder}{entry.name}/")
                    elif has_image_suffix(entry.name):
                        names.append(f"{folder}{entry.name}")
                        if len(names) % _TOGETHER == 0:
                            progress("looking for images", len(names), None)
        except OSError as error:
            if not folder:
                raise
            left_out.append((printable(folder), f"cannot be read ({error.strerror})"))
        folders += sorted(below, reverse=True)
    source = Files(path, [str(root.resolve())], root, sorted(names), left_out, progress)
    source.require_names()
    return source


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def in_list(path: str, where: Path, progress: OnProgress) -> Source:
    """The files in a list. Relative paths start at the folder of the list."""
    names = parse_list(where.read_bytes())
    return _require_some(Files(path, [str(where.resolve())], where.parent, names, progress=progress))


def in_stream(listed: Listed, progress: OnProgress) -> Source:
    """The files in a list that can be read only once."""
    source = _require_some(Files(listed.path, [listed.address], Path("/"), listed.names, progress=progress))
    source.prefix = ""
    return source


def of_files(paths: Sequence[str], progress: OnProgress) -> Source:
    """Files that the user named one by one."""
    addresses = [str(Path(path).resolve()) for path in paths]
    source = _Named(and_more(paths), addresses, Path(), list(paths), progress=progress)
    source.prefix = ""
    return source


def _require_some(source: Files) -> Files:
    """Raises DataError if none of the files exists: it is not a list, or its paths start at another folder."""
    if not source.there:
        example = f", for example {printable(source.names[0][:200])}" if source.names else ""
        raise DataError(
            f"{source.path}: none of the {len(source.names)} files that it lists exists{example}",
            "A list has one path per line. Relative paths start at its folder, or in a pipe at the current folder.",
        )
    return source
