"""Sources of training images: folders, .zip and .tar archives, lists of paths, image files, data sets on the Hub.

A source has the names of its files and opens them, from several threads at a time. It stores little else per image, so
a million images need little memory.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from ddpm_cli.data import images
from ddpm_cli.data.sources.archives import Tar, Zip, is_tar
from ddpm_cli.data.sources.combined import Combined
from ddpm_cli.data.sources.files import in_folder, in_list, in_stream, of_files
from ddpm_cli.data.sources.hub_dataset import HubDataset, parse_address
from ddpm_cli.data.sources.lists import Listed, could_be_list, is_stream, list_bytes, read_stream, read_streams
from ddpm_cli.data.sources.source import Source, has_image_suffix
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import DataError
from ddpm_cli.hub_address import parse_name

__all__ = [
    "Listed",
    "Source",
    "is_stream",
    "list_bytes",
    "name_of",
    "open_source",
    "open_sources",
    "read_stream",
    "read_streams",
]

_FEW = 3  # the most names that `name_of` joins


def open_sources(paths: Sequence[str | Listed], cache: Path, progress: OnProgress = silent) -> Source:
    """Open one or several paths or addresses as one source, in their order; see `open_source`."""
    sources: list[Source] = []
    for are_images, group in groupby(paths, _is_image_file):
        if are_images:
            sources.append(of_files([str(path) for path in group], progress))
        else:
            sources += [open_source(path, cache, progress) for path in group]
    return sources[0] if len(sources) == 1 else Combined(sources)


def name_of(paths: Sequence[str]) -> str:
    """A name for images: of their folder, of the file without its suffix, or of the data set; several are joined.

    No file is read, so the images may be missing.
    """
    if len(paths) == 1 and _has_image_suffix(paths[0]):
        return Path(paths[0]).stem
    names = list(dict.fromkeys(map(_name_of, paths)))
    return "+".join(names) if len(names) <= _FEW else f"{names[0]}+{len(names) - 1}"


def _name_of(path: str) -> str:
    if is_stream(path):
        return "list"
    if "://" in path:
        return parse_address(path).name.rpartition("/")[2]
    where = Path(path).resolve()
    if _has_image_suffix(path):
        return where.parent.name
    return re.sub(r"(\.tar)?\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|txt|lst)$", "", where.name, flags=re.I)


def _is_image_file(path: str | Listed) -> bool:
    """Whether a path is one image, by its suffix: there may be thousands of them, so none is opened."""
    return isinstance(path, str) and _has_image_suffix(path) and Path(path).is_file()


def _has_image_suffix(path: str) -> bool:
    return "://" not in path and has_image_suffix(path)


def open_source(path: str | Path | Listed, cache: Path, progress: OnProgress = silent) -> Source:
    """Open the images at a path or an address. The type is detected from the content, not from the name.

    path: a folder, with its subfolders; a .zip; a .tar, compressed or not; a list of paths, relative to its folder; an
    image file; a list that was already read; or hf://org/name[@revision], a data set on the Hub. cache: a folder for
    unpacked archives. Raises DataError if the path does not exist or contains no image files.
    """
    if isinstance(path, Listed):
        return in_stream(path, progress)
    if not path:
        raise DataError("the name of the images is empty", "Is a variable not set? The current folder is .")
    path = str(path)
    if "://" in path:
        return HubDataset(path, progress)
    where = Path(path)
    try:
        if where.is_dir():
            return in_folder(path, where, progress)
        if not where.exists():
            raise DataError(f"{path}: no such folder or file", _where_to_look(path))
        if where.is_file():
            if is_tar(where):
                return Tar(path, where, cache)
            if zipfile.is_zipfile(where):
                return Zip(path, where)
            if _has_image_suffix(path) or _begins_as_image(where):
                return of_files([path], progress)
            if could_be_list(where):
                return in_list(path, where, progress)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    raise DataError(
        f"{path}: not a folder, a .zip, a .tar, an image or a list of paths",
        "Give the folder that holds your images.",
    )


def _where_to_look(path: str) -> str:
    if parse_name(path) and not has_image_suffix(path):
        return f"The data set of this name on the Hugging Face Hub is hf://{path}"
    return "Give the folder that holds your images. A data set on the Hub is hf://org/name."


def _begins_as_image(path: Path) -> bool:
    try:
        with images.open_image(path):
            return True
    except Exception:  # Pillow's plugins may raise any exception if it is not an image
        return False
