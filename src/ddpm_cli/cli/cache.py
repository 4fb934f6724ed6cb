"""`ddpm cache`: decoded images, their features, and networks that were downloaded."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console, columns
from ddpm_cli.text import in_bytes, printable

if TYPE_CHECKING:
    from ddpm_cli.data.cache import CachedFile, CachedPack

__all__ = ["EXAMPLES", "cache"]

EXAMPLES = """
Examples:
  ddpm cache
  ddpm cache --prune
  ddpm cache --prune --older-than 0d
"""

_DAY = 86_400
_LONG = 30 * _DAY  # seconds without use, the default of --prune


def cache(
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove what was not used for 30 days, and unfinished images."),
    ] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            parser=options.parse_age,
            metavar="AGE",
            help="List or remove only what was not used for this time: 12h, 30d or 8w.",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List or remove the decoded images that ddpm keeps, their statistics, and downloaded extractors.

    A command that needs what was removed makes it again.
    Images that a running process uses are never removed.
    """
    console = Console("cache", as_json, quiet)
    if prune:
        _prune(console, _LONG if older_than is None else older_than)
    else:
        _list(console, older_than or 0)


def _list(console: Console, unused: float) -> None:
    from ddpm_cli.data.cache import cache_folder, list_files, list_packs, unfinished_bytes

    folder, now = cache_folder(), datetime.now(UTC).timestamp()
    packs = [pack for pack in list_packs(folder) if pack.unused(now) >= unused]
    files = [file for file in list_files(folder) if file.unused(now) >= unused]
    unfinished = unfinished_bytes(folder)
    total = unfinished + sum(pack.bytes for pack in packs) + sum(file.bytes for file in files)
    rows = [("size", "images", "pixels", "last use", "source"), *map(_row, packs), *map(_file_row, files)]
    if unfinished:
        rows.append((in_bytes(unfinished), "", "", "", "unfinished: a process is decoding them, or was killed"))
    lines = columns(rows) if len(rows) > 1 else []
    lines.append(f"{in_bytes(total)} in {folder}")
    facts = [_fields(pack) for pack in packs]
    console.result(
        "\n".join(lines),
        folder=str(folder),
        bytes=total,
        unfinished_bytes=unfinished,
        packs=facts,
        files=[_file_fields(file) for file in files],
    )


def _prune(console: Console, unused: float) -> None:
    from ddpm_cli.data.cache import Outcome, cache_folder, prune, prune_files, remove_all_unfinished

    folder = cache_folder()
    with console.trial("removing decoded images"):
        packs = prune(folder, unused)
        unfinished = remove_all_unfinished(folder)
        files = prune_files(folder, unused)
    for file in files:
        console.note(f"removed {in_bytes(file.bytes)} of {_file_row(file)[-1]}")
    for pack in packs[Outcome.REMOVED]:
        console.note(f"removed {_named(pack)}")
    for pack in packs[Outcome.IN_USE]:
        console.note(f"kept {_named(pack)}, which a process uses")
    for pack in packs[Outcome.STUCK]:
        console.warn(f"kept {_named(pack)}: {pack.folder} cannot be locked or removed")
    if recent := sum(pack.bytes for pack in packs[Outcome.RECENT]):
        console.note(f"kept {in_bytes(recent)} that were used more recently; --prune --older-than 0d removes them too")
    freed = unfinished + sum(pack.bytes for pack in packs[Outcome.REMOVED]) + sum(file.bytes for file in files)
    outcomes = {outcome.value: [_fields(pack) for pack in packs[outcome]] for outcome in Outcome}
    removed_files = [_file_fields(file) for file in files]
    console.result(
        f"freed {in_bytes(freed)}", folder=str(folder), freed_bytes=freed, **outcomes, removed_files=removed_files
    )


def _row(pack: CachedPack) -> tuple[str, ...]:
    count = "?" if pack.count is None else str(pack.count)
    return in_bytes(pack.bytes), count, _pixels(pack), _day(pack.last_use), printable(pack.source or "?")


def _file_row(file: CachedFile) -> tuple[str, ...]:
    return in_bytes(file.bytes), "", "", _day(file.last_use), printable(f"{file.path.parent.name}/{file.path.name}")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d")


def _pixels(pack: CachedPack) -> str:
    if pack.shape is None:
        return "?"
    channels, height, width = pack.shape
    return f"{width}x{height} {'gray' if channels == 1 else 'RGB'}"


def _named(pack: CachedPack) -> str:
    return f"{in_bytes(pack.bytes)} of {printable(pack.source or 'unknown images')} ({_pixels(pack)})"


def _file_fields(file: CachedFile) -> dict[str, Any]:
    return {"file": str(file.path), "bytes": file.bytes, "last_use": _iso(file.last_use)}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _fields(pack: CachedPack) -> dict[str, Any]:
    return {
        "folder": str(pack.folder),
        "source": pack.source,
        "images": pack.count,
        "shape": pack.shape,
        "bytes": pack.bytes,
        "last_use": _iso(pack.last_use),
    }
