"""Images in an archive: a .zip, or a .tar, compressed or not."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import shutil
import tarfile
import tempfile
import weakref
import zipfile
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import IO, Any, cast

from ddpm_cli.data.sources.source import LARGEST, Source, check_size, could_be_image
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import DataError
from ddpm_cli.text import printable

__all__ = ["Tar", "Zip", "is_tar"]


def is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # decompressors raise their own exceptions
        return False


class _Slice(io.RawIOBase):
    """A part of an open file with its own position, so that several threads can read the file."""

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
    """Files in an archive. To save memory, it stores only the name and a row of integers for each."""

    def __init__(self, path: str, where: Path) -> None:
        super().__init__(path, str(where.resolve()))
        self._where = where
        self._columns = 0
        self._numbers = array("Q")

    def _keep(self, file: IO[bytes], members: dict[str, tuple[int, ...]]) -> None:
        """Store the names and integers of the members, and keep the file open."""
        self.names = sorted(members)
        self.require_names()
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


class Zip(_Archive):
    """A .zip. It stores six integers per member, where ZipFile needs a kilobyte, and reads with ZipExtFile."""

    _FIELDS = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")

    def __init__(self, path: str, where: Path) -> None:
        super().__init__(path, where)
        try:
            with where.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = {
                    info.filename: tuple(int(getattr(info, field)) for field in self._FIELDS)
                    for info in archive.infolist()
                    if not info.is_dir() and could_be_image(info.filename)
                }
                self._keep(file, members)
        except DataError:
            raise
        except Exception as error:  # zipfile may raise any exception on a damaged file
            raise DataError(f"{path}: damaged ({error})") from None
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{self._find(name)[1:4].tolist()}\0".encode("utf-8", "surrogateescape"))
        self.key = digest.hexdigest()

    def open(self, name: str) -> IO[bytes]:
        offset, packed, size, crc, method, flags = self._find(name)
        check_size(size)
        if flags & 1:
            raise DataError("is encrypted")
        header = os.pread(self._handle, 30, offset)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise DataError("is damaged: the archive has a wrong offset for it")
        info = zipfile.ZipInfo(name)
        info.compress_type, info.compress_size, info.file_size, info.CRC = method, packed, size, crc
        start = offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        content = zipfile.ZipExtFile(self._slice(start, packed), "r", info, close_fileobj=True)
        return cast(IO[bytes], content)


class Tar(_Archive):
    """A .tar. A compressed one is first unpacked into an unnamed temporary file, which the system removes at exit.

    The key is made of the archive's path, size and time: if its images are in the cache, the archive is not read.
    """

    def __init__(self, path: str, where: Path, cache: Path) -> None:
        super().__init__(path, where)
        self._cache = cache
        status = where.stat()
        stamp = f"{self.addresses[0]}\0{status.st_size}-{status.st_mtime_ns}"
        self.key = hashlib.sha256(stamp.encode("utf-8", "surrogateescape")).hexdigest()

    def scan(self, progress: OnProgress = silent) -> None:
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
                        archive.members.clear()  # type: ignore[attr-defined]  # else it would store all of them
                        name = posixpath.normpath(member.name)
                        progress("looking for images", file.tell(), self._size(file))
                        if not could_be_image(name) or member.isdir():
                            continue
                        if member.islnk() or member.issym():
                            beside = "" if member.islnk() else posixpath.dirname(name)
                            links[name] = posixpath.normpath(posixpath.join(beside, member.linkname))
                        elif not member.isreg() or member.issparse():
                            self.left_out.append((printable(name), "not a regular file in the archive"))
                        elif plain or member.size > LARGEST:
                            members[name] = (member.offset_data, member.size)
                        else:
                            start = unpacked.seek(0, os.SEEK_END)
                            members[name] = (start, member.size)
                            if content := archive.extractfile(member):
                                shutil.copyfileobj(content, unpacked)
                    if plain and os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset).strip(b"\0"):
                        raise tarfile.ReadError("bad header")  # tarfile takes it for the end
            except OSError as error:
                if error.errno is not None:
                    raise
                self._cut_short(error)
            except Exception as error:  # decompressors raise their own exceptions
                self._cut_short(error)
            for name, target in links.items():
                if target in members:
                    members[name] = members[target]
                else:
                    self.left_out.append((printable(name), "a link to a file that is not in the archive"))
            unpacked.flush()
            self._keep(file if plain else unpacked, members)

    def _cut_short(self, error: Exception) -> None:
        self.left_out.append((printable(self._where.name), f"damaged; the rest of it is lost ({error})"))

    @staticmethod
    def _size(file: IO[bytes]) -> int:
        return os.fstat(file.fileno()).st_size

    def open(self, name: str) -> IO[bytes]:
        start, size = self._find(name)
        check_size(size)
        return self._slice(start, size)
