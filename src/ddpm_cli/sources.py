"""Where training images come from: a folder, a .zip, a .tar, a list of paths, a data set of the Hugging Face Hub.

A source knows the names of its files and can open them, from several threads at a time. It keeps nothing else for each
image, so that a million of them need little memory.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import os
import posixpath
import re
import shutil
import stat
import tarfile
import tempfile
import weakref
import zipfile
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

from ddpm_cli.config import HUB_NAME
from ddpm_cli.errors import DataError
from ddpm_cli.images import IMAGE_SUFFIXES

__all__ = ["Progress", "Source", "in_threads", "open_source", "parse_address", "printable", "silent"]

_LARGEST = 2**30  # bytes of a file; those with more than Pillow's largest image are no images
_TOGETHER = 256  # files whose stamps a thread takes at once
_HUB = re.compile(rf"(?:datasets/)?(?P<name>{HUB_NAME})(?:@(?P<revision>[\w./-]+))?")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Progress = Callable[[str, int, int | None], None]  # what, done, total if that is known


def silent(what: str, done: int, total: int | None) -> None:
    """Progress that nobody watches."""


def in_threads(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`map` in threads, in order, never far ahead of the consumer. Pillow decodes outside the interpreter's lock."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[_Result]] = []
        rest = iter(items)
        try:
            while pending or (pending := [pool.submit(work, item) for item in itertools.islice(rest, 4 * workers)]):
                yield pending.pop(0).result()
                pending += [pool.submit(work, item) for item in itertools.islice(rest, 1)]
        finally:
            for future in pending:
                future.cancel()


def printable(text: str) -> str:
    """Text in one line that any file and terminal takes: names may hold line breaks, escape codes, stray bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Source:
    """Image files in a fixed order.

    path: as the user gave it. address: finds it again from anywhere. key: changes when a file does. names: of the
    files, after `scan`. left_out: (name, reason) of what could not be looked into, after `scan`.
    """

    def __init__(self, path: str, address: str) -> None:
        self.path = path
        self.address = address
        self.key = ""
        self.names: list[str] = []
        self.left_out: list[tuple[str, str]] = []

    def scan(self, progress: Progress = silent) -> None:
        """Find the names, if they are not known yet. Raises DataError if there are none."""

    def open(self, name: str) -> IO[bytes]:
        """One of the files, for reading. Raises OSError with an errno if the disk does not give it; DataError, or what
        zipfile and its kin raise, if the fault is the file's own."""
        raise NotImplementedError

    def _require_names(self) -> None:
        if not self.names:
            first = f"; {self.left_out[0][0]} {self.left_out[0][1]}" if self.left_out else ""
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{self.path}: no image files in it{first}", f"Looked for {suffixes}, in subfolders too.")


def open_source(path: str | Path, cache: Path, progress: Progress = silent) -> Source:
    """The images that a path or an address means, by what is there and not by its name.

    path: a folder, with those below it; a .zip; a .tar, compressed or not; a text file with a path a line, from its own
    folder on; or hf://org/name[@revision], a data set on the Hub. cache: a folder for what must be unpacked.
    Raises DataError if there is no such thing, or nothing in it that could be an image.
    """
    path = str(path)
    if "://" in path:
        return _HubData(path, progress)
    where = Path(path)
    try:
        if where.is_dir():
            return _folder(path, where, progress)
        if not where.exists():
            hint = "IMAGES is the folder that holds your images. A data set on the Hub is hf://org/name."
            raise DataError(f"{path}: no such folder or file", hint)
        if where.is_file():
            if _is_tar(where):
                return _Tar(path, where, cache)
            if zipfile.is_zipfile(where):
                return _Zip(path, where)
            with where.open("rb") as file:
                if b"\0" not in file.read(2**16):
                    return _list(path, where, progress)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    raise DataError(
        f"{path}: neither a folder, nor a .zip, a .tar or a list of paths", "Give the folder that holds your images."
    )


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # what it is packed with raises its own
        return False


def _could_be_image(name: str) -> bool:
    """Whether a name in an archive is one to look at: an image's, and not hidden."""
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/") if part != ".")
    return not hidden and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _check_size(size: int) -> None:
    if not size:
        raise DataError("is empty")
    if size > _LARGEST:
        raise DataError(f"too large for an image ({size / 2**30:.1f} GiB)")


class _Files(Source):
    """Files of this machine, by their paths from `root` on."""

    def __init__(self, path: str, where: Path, root: Path, names: list[str], left_out: list[tuple[str, str]]) -> None:
        super().__init__(path, str(where.resolve()))
        self.names, self.left_out = names, left_out
        self._root = root

    def stamp(self, progress: Progress) -> int:
        """Compute the key from the names, sizes and times. Returns how many of the files are there."""
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
        except (OSError, ValueError):  # a dangling link, a name that cannot be: named as left out when it is opened
            return name, "missing"

    def open(self, name: str) -> IO[bytes]:
        path = self._root / name
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would never answer, and /dev/zero never end
            raise DataError("not a file but a folder, pipe or device")
        _check_size(status.st_size)
        return path.open("rb")


def _folder(path: str, root: Path, progress: Progress) -> Source:
    """A folder and those below it, links to folders too; but nothing hidden, and no runs of `ddpm train`."""
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    visited = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        below = []
        try:
            status = (root / folder).stat()
            is_run = (root / folder / "metrics.jsonl").is_file() and (root / folder / "config.json").is_file()
            if (status.st_dev, status.st_ino) in visited or is_run:  # a run has previews in it, for `ddpm train .`
                continue
            visited.add((status.st_dev, status.st_ino))  # links may go round in circles
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "__MACOSX")):
                        continue
                    if _is_folder(entry):
                        below.append(f"{folder}{entry.name}/")
                    elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                        names.append(f"{folder}{entry.name}")
                        if len(names) % _TOGETHER == 0:
                            progress("looking for images", len(names), None)
        except OSError as error:
            left_out.append((printable(folder or "."), f"cannot be looked into ({error.strerror})"))
        folders += sorted(below, reverse=True)
    source = _Files(path, root, root, sorted(names), left_out)
    source._require_names()
    source.stamp(progress)
    return source


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _list(path: str, where: Path, progress: Progress) -> Source:
    """The files that a text file names, one a line. Lines that are empty or begin with # are for people."""
    with where.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        names = [line for line in map(str.strip, file) if line and not line.startswith("#")]
    source = _Files(path, where, where.parent, names, [])
    if not source.stamp(progress):
        example = f", for example {printable(names[0][:200])}" if names else ""
        raise DataError(
            f"{path}: none of the {len(names)} files that it lists is there{example}",
            "A list has one path a line, absolute or from the list's folder on.",
        )
    return source


class _Slice(io.RawIOBase):
    """A part of an open file, with a position of its own, so that threads may read side by side."""

    def __init__(self, handle: int, start: int, size: int) -> None:
        self._handle, self._start, self._size, self._at = handle, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._size - self._at)]
        count = os.preadv(self._handle, [room], self._start + self._at)
        self._at += count
        return count


class _Archive(Source):
    """Files in one file, found by a row of numbers for each: in memory they are as small as that."""

    def __init__(self, path: str, where: Path) -> None:
        super().__init__(path, str(where.resolve()))
        self._where = where
        self._columns = 0
        self._numbers = array("Q")

    def _keep(self, file: IO[bytes], members: dict[str, tuple[int, ...]]) -> None:
        """Remember where the members are, and hold on to the file."""
        self.names = sorted(members)
        self._require_names()
        for name in self.names:
            self._numbers.extend(members[name])
        self._columns = len(members[self.names[0]])
        self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)

    def _find(self, name: str) -> array[int]:
        at = bisect_left(self.names, name) * self._columns
        return self._numbers[at : at + self._columns]

    def _slice(self, start: int, size: int) -> IO[bytes]:
        return io.BufferedReader(_Slice(self._handle, start, size))


class _Zip(_Archive):
    """ZipFile keeps a kilobyte for each member; this keeps six numbers, and lets ZipExtFile do the work."""

    _FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")

    def __init__(self, path: str, where: Path) -> None:
        super().__init__(path, where)
        try:
            with where.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = {
                    info.filename: tuple(int(getattr(info, field)) for field in self._FIELDS)
                    for info in archive.infolist()
                    if not info.is_dir() and _could_be_image(info.filename)
                }
                self._keep(file, members)
        except DataError:
            raise
        except Exception as error:  # zipfile raises anything on a damaged file
            raise DataError(f"{path}: damaged ({error})") from None
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{self._find(name)[1:4].tolist()}\0".encode("utf-8", "surrogateescape"))
        self.key = digest.hexdigest()

    def open(self, name: str) -> IO[bytes]:
        offset, packed, size, crc, method, flags = self._find(name)
        _check_size(size)
        if flags & 1:
            raise DataError("is encrypted")
        header = os.pread(self._handle, 30, offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise DataError("is damaged: it does not begin where the archive says")
        info = zipfile.ZipInfo(name)
        info.compress_type, info.compress_size, info.file_size, info.CRC = method, packed, size, crc
        start = offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        content = zipfile.ZipExtFile(self._slice(start, packed), "r", info, close_fileobj=True)
        return cast(IO[bytes], content)


class _Tar(_Archive):
    """A .tar, read where it lies; a compressed one is unpacked first, into a file without a name.

    That file is gone with the process. The key is the archive's, so that where there is a pack already nothing is read.
    """

    def __init__(self, path: str, where: Path, cache: Path) -> None:
        super().__init__(path, where)
        self._cache = cache
        status = where.stat()
        stamp = f"{self.address}\0{status.st_size}-{status.st_mtime_ns}"
        self.key = hashlib.sha256(stamp.encode("utf-8", "surrogateescape")).hexdigest()

    def scan(self, progress: Progress = silent) -> None:
        if self.names:
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        members: dict[str, tuple[int, ...]] = {}
        links: dict[str, str] = {}
        self.left_out = []
        plain = True
        with self._where.open("rb") as file, tempfile.TemporaryFile(dir=self._cache) as unpacked:
            try:
                with tarfile.open(fileobj=file) as archive:
                    plain = archive.fileobj is file
                    while member := archive.next():
                        archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                        name = posixpath.normpath(member.name)
                        progress("looking for images", file.tell(), self._size(file))
                        if not _could_be_image(name) or member.isdir():
                            continue
                        if member.islnk() or member.issym():
                            beside = "" if member.islnk() else posixpath.dirname(name)
                            links[name] = posixpath.normpath(posixpath.join(beside, member.linkname))
                        elif not member.isreg() or member.issparse():
                            self.left_out.append((printable(name), "not an ordinary file in the archive"))
                        elif plain or member.size > _LARGEST:
                            members[name] = (member.offset_data, member.size)
                        else:
                            start = unpacked.seek(0, os.SEEK_END)
                            members[name] = (start, member.size)
                            if content := archive.extractfile(member):
                                shutil.copyfileobj(content, unpacked)
                    if plain and os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset).strip(b"\0"):
                        raise tarfile.ReadError("bad header")  # which tarfile takes for the end
            except OSError as error:
                if error.errno is not None:
                    raise
                self._cut_short(error)
            except Exception as error:  # what it is packed with raises its own
                self._cut_short(error)
            for name, target in links.items():
                if target in members:
                    members[name] = members[target]
                else:
                    self.left_out.append((printable(name), "a link to something that is not in the archive"))
            unpacked.flush()
            self._keep(file if plain else unpacked, members)

    def _cut_short(self, error: Exception) -> None:
        self.left_out.append((printable(self._where.name), f"damaged; what follows in it is lost ({error})"))

    @staticmethod
    def _size(file: IO[bytes]) -> int:
        return os.fstat(file.fileno()).st_size

    def open(self, name: str) -> IO[bytes]:
        start, size = self._find(name)
        _check_size(size)
        return self._slice(start, size)


class _HubData(Source):
    """The first column of images of a data set on the Hub, in its split `train` if it has one, else in the first.

    The library `datasets` downloads it, and keeps it in its own cache as files that are mapped into memory.
    """

    def __init__(self, address: str, progress: Progress) -> None:
        super().__init__(address, address)
        name, revision = parse_address(address)
        try:
            datasets: Any = importlib.import_module("datasets")
        except ImportError:
            raise DataError(
                f"{address}: data sets of the Hub need the library datasets", "pip install 'ddpm-cli[datasets]'"
            ) from None
        progress(f"fetching {name}", 0, None)
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        try:
            splits = datasets.load_dataset(name, revision=revision)
        except Exception as error:  # of its own, of the network, of the formats that it reads
            reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
            raise DataError(f"{address}: cannot be had ({reason})", "Is it there, and may you read it?") from None
        split = "train" if "train" in splits else next(iter(splits))
        rows = splits[split]
        column = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise DataError(f"{address}: has no column of images (but {', '.join(rows.features)})")
        self.key = f"{address} {split} {column} {rows._fingerprint}"
        self._rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self.names = [f"{split}/{i}" for i in range(len(rows))]
        self._require_names()

    def open(self, name: str) -> IO[bytes]:
        image = self._rows[int(name.rpartition("/")[2])][self._column]
        if image is None:
            raise DataError("there is no image in this row")
        if image["bytes"] is None:
            return Path(image["path"]).open("rb")
        _check_size(len(image["bytes"]))
        return io.BytesIO(image["bytes"])


def parse_address(address: str) -> tuple[str, str | None]:
    """The name and the revision in hf://org/name[@revision], or in the URL of a data set's page on the Hub."""
    parts = urlsplit(address)
    words = [unquote(word) for word in f"{parts.netloc}{parts.path}".strip("/").split("/")]
    if parts.scheme in ("http", "https") and words[1:2] == ["datasets"]:
        revision = words[5] if words[4:5] in (["tree"], ["commit"]) and len(words) > 5 else None
        words = ["/".join(words[2:4]) + (f"@{revision}" if revision else "")]
    elif parts.scheme != "hf":
        words = []
    if match := _HUB.fullmatch("/".join(words)):
        return match["name"], match["revision"]
    raise DataError(
        f"{address}: not a data set on the Hugging Face Hub",
        "Write hf://org/name, or hf://org/name@revision, or https://huggingface.co/datasets/org/name.",
    )
