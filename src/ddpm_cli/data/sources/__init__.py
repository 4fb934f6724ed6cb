"""Where training images come from: a folder, a .zip, a .tar, a list of paths, a data set of the Hugging Face Hub.

A source knows the names of its files and can open them, from several threads at a time. It keeps nothing else for each
image, so that a million of them need little memory.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ddpm_cli.data.sources.archives import Tar, Zip, is_tar
from ddpm_cli.data.sources.files import in_folder, in_list
from ddpm_cli.data.sources.hub_dataset import HubDataset, parse_address
from ddpm_cli.data.sources.source import Source
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import DataError

__all__ = ["Source", "name_of", "open_source", "open_sources"]


def open_sources(paths: Sequence[str], cache: Path, progress: OnProgress = silent) -> Source:
    """The images that one or several paths or addresses mean; see `open_source`."""
    [path] = paths
    return open_source(path, cache, progress)


def name_of(paths: Sequence[str]) -> str:
    """What images are called: their folder's name, a file's without its suffix, a data set's."""
    path = paths[0]
    if "://" in path:
        return parse_address(path).name.rpartition("/")[2]
    return re.sub(r"(\.tar)?\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|txt|lst)$", "", Path(path).resolve().name, flags=re.I)


def open_source(path: str | Path, cache: Path, progress: OnProgress = silent) -> Source:
    """The images that a path or an address means, by what is there and not by its name.

    path: a folder, with those below it; a .zip; a .tar, compressed or not; a text file with a path a line, from its own
    folder on; or hf://org/name[@revision], a data set on the Hub. cache: a folder for what must be unpacked.
    Raises DataError if there is no such thing, or nothing in it that could be an image.
    """
    path = str(path)
    if "://" in path:
        return HubDataset(path, progress)
    where = Path(path)
    try:
        if where.is_dir():
            return in_folder(path, where, progress)
        if not where.exists():
            hint = "IMAGES is the folder that holds your images. A data set on the Hub is hf://org/name."
            raise DataError(f"{path}: no such folder or file", hint)
        if where.is_file():
            if is_tar(where):
                return Tar(path, where, cache)
            if zipfile.is_zipfile(where):
                return Zip(path, where)
            with where.open("rb") as file:
                if b"\0" not in file.read(2**16):
                    return in_list(path, where, progress)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    raise DataError(
        f"{path}: neither a folder, nor a .zip, a .tar or a list of paths", "Give the folder that holds your images."
    )
