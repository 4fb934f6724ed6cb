"""The cache of decoded images: its list, and what `prune` removes."""

import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from ddpm_cli.config import DataConfig
from ddpm_cli.data.cache import INDEX, Outcome, list_packs, pack_lock, prune, remove_all_unfinished, unfinished_bytes
from ddpm_cli.data.pack import Pack, open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.files import lock
from processes import GUARD

CACHE = Path("cache")
DAY = 86_400


def make(images: Path, size: int = 8) -> Path:
    """Decode the images and close their pack. Returns its folder."""
    config = DataConfig(images="", size=size, channels=1)
    return open_pack(open_source(images, CACHE), config, CACHE).folder


def age(folder: Path, days: int) -> None:
    """Set the last use back by this many days."""
    then = (folder / INDEX).stat().st_mtime - days * DAY
    os.utime(folder / INDEX, (then, then))


def names(packs: dict) -> dict[str, set[str]]:
    return {outcome.value: {pack.folder.name for pack in found} for outcome, found in packs.items() if found}


def test_the_list(digits):
    old, new = make(digits, 8), make(digits, 12)
    age(old, 3)
    packs = list_packs(CACHE)
    assert [(pack.folder, pack.count, pack.shape, pack.source) for pack in packs] == [
        (new, 60, (1, 12, 12), str(digits)),
        (old, 60, (1, 8, 8), str(digits)),
    ]
    assert packs[1].bytes == 60 * 64 + (old / INDEX).stat().st_size
    assert list_packs(Path("missing")) == []


@pytest.mark.parametrize(
    "index", ['{"count": 60, "shape": [1, 8, 8]}', "[]", "{", '{"count": "x", "shape": [1]}', None]
)
def test_older_and_damaged_packs_are_listed_and_removed(digits, index):
    folder = make(digits)
    (folder / INDEX).unlink()
    if index is not None:
        (folder / INDEX).write_text(index)
    (pack,) = list_packs(CACHE)
    assert pack.source is None
    assert (pack.count, pack.shape) in ((60, (1, 8, 8)), (None, None))
    assert names(prune(CACHE, 0)) == {"removed": {folder.name}}
    assert not list((CACHE / "packs").iterdir())


def test_the_last_use_is_recorded(digits):
    folder = make(digits)
    made = (folder / INDEX).stat()
    age(folder, 40)
    config = DataConfig(images="", size=8, channels=1)
    pack = open_pack(open_source(digits, CACHE), config, CACHE)
    assert (folder / INDEX).stat().st_mtime >= made.st_mtime
    assert (folder / INDEX).stat().st_ino == made.st_ino  # it was not decoded again
    age(folder, 40)
    del pack  # a run that took 40 days has ended
    assert (folder / INDEX).stat().st_mtime >= made.st_mtime


def test_only_packs_that_were_not_used_for_long_are_removed(digits):
    packs = [make(digits, size) for size in (8, 9, 10)]
    for folder, days in zip(packs, (1, 29, 31), strict=True):
        age(folder, days)
    one, other, gone = (folder.name for folder in packs)
    assert names(prune(CACHE, 30 * DAY)) == {"recent": {one, other}, "removed": {gone}}
    assert {folder.name for folder in (CACHE / "packs").iterdir()} == {one, other}
    age(packs[0], -2)  # the clock of another machine is ahead
    assert names(prune(CACHE, 0)) == {"removed": {one, other}}
    assert make(digits) == packs[0]  # and it is made again


def test_a_pack_in_use_is_kept(digits):
    folder = make(digits)
    first, second = Pack(folder, (1, 8, 8)), Pack(folder, (1, 8, 8))
    assert names(prune(CACHE, 0)) == {"in_use": {folder.name}}
    del first
    assert names(prune(CACHE, 0)) == {"in_use": {folder.name}}
    del second
    assert names(prune(CACHE, 0)) == {"removed": {folder.name}}


def test_unfinished_packs_are_removed_unless_a_process_writes_them(digits):
    folder = make(digits)
    for other in ("0" * 32, folder.name):
        for suffix in ("partial", "old"):
            leftover = CACHE / "packs" / f".{other}.01234567.{suffix}"
            leftover.mkdir()
            (leftover / "shard-00000.u8").write_bytes(bytes(1000))
    assert unfinished_bytes(CACHE) == 4000
    with lock(pack_lock(CACHE, folder.name)):
        assert names(prune(CACHE, 0)) == {"in_use": {folder.name}}
        assert remove_all_unfinished(CACHE) == unfinished_bytes(CACHE) == 2000
    assert remove_all_unfinished(CACHE) == 2000
    assert unfinished_bytes(CACHE) == 0
    assert len(list_packs(CACHE)) == 1


def test_nothing_else_is_removed(digits, tmp_path):
    """$DDPM_CACHE_DIR may be a folder with other things in it."""
    folder = make(digits)
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    (CACHE / "packs" / ("a" * 32)).symlink_to(elsewhere)
    for name in ("mine", f".{'b' * 32}.partial", "c" * 31, "D" * 32):
        shutil.copytree(folder, CACHE / "packs" / name)
    (CACHE / "packs" / ("e" * 32)).touch()
    before = {path for path in CACHE.rglob("*") if folder not in (path, *path.parents)}
    assert names(prune(CACHE, 0)) == {"removed": {folder.name}}
    assert remove_all_unfinished(CACHE) == 0
    assert {path for path in CACHE.rglob("*") if path.parent.name != "locks"} == {
        path for path in before if path.parent.name != "locks"
    }
    assert (elsewhere / INDEX).is_file()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_pack_that_is_removed_while_a_process_opens_it_is_opened_again(digits, monkeypatch, replaced):
    """It is made again, by this process or by another one, and this process locks the new pack."""
    folder = make(digits)
    again = shutil.copytree(folder, "again")
    source = open_source(digits, CACHE)
    opened: list[Pack] = []
    waits, flock = threading.Event(), fcntl.flock

    def work() -> None:
        opened.append(open_pack(source, DataConfig(images="", size=8, channels=1), CACHE))

    def observed(handle: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH:  # of the index: it is open, and locked by the other thread
            waits.set()
        flock(handle, operation)

    with lock(pack_lock(CACHE, folder.name)), lock(folder / INDEX):
        monkeypatch.setattr("fcntl.flock", observed)
        thread = threading.Thread(target=work)
        thread.start()
        assert waits.wait(GUARD)
        shutil.rmtree(folder.rename(folder.with_name("removed")))
        if replaced:
            Path(again).rename(folder)
    thread.join()
    assert len(opened[0]) == 60
    assert (folder / INDEX).is_file()
    assert names(prune(CACHE, 0)) == {"in_use": {folder.name}}


def test_without_locks_nothing_is_removed(digits, monkeypatch):
    folder = make(digits)

    def no_locks(handle: int, operation: int) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert names(prune(CACHE, 0)) == {Outcome.STUCK.value: {folder.name}}
    assert len(Pack(folder, (1, 8, 8))) == 60
