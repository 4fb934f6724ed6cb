"""Files and folders: writes are atomic, nothing is lost, and no file makes a command hang."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddpm_cli import files
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.distributed import sign
from ddpm_cli.errors import DataError, LockedError, ModelError


def put(path: Path, text: str) -> None:
    """Replace a folder by one with this text in it."""
    with files.new_directory(path) as partial:
        (partial / "file").write_text(text)


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["exchanged", "renamed"])
def way(request, monkeypatch) -> str:
    """Both ways to replace a folder: in one step, and in two where the system has no such step."""
    if request.param == "renamed":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def test_a_folder_appears_whole_or_not_at_all(tmp_path, way):
    with pytest.raises(OSError, match="No such file"), files.new_directory(tmp_path / "model") as partial:
        (partial / "half").rename(partial / "whole")
    assert list(tmp_path.iterdir()) == []
    for text in ("old", "new"):
        put(tmp_path / "model", text)
        assert tree(tmp_path) == {"model/file": text}


def test_two_folders_are_exchanged_in_one_step_here(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "file").touch()
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot do that")
    assert (tmp_path / "b" / "file").exists()
    assert not files._exchange(tmp_path / "a", tmp_path / "none")


def test_a_block_that_fails_leaves_the_old_folder(tmp_path, way):
    put(tmp_path / "model", "old")
    with pytest.raises(RuntimeError), files.new_directory(tmp_path / "model"):
        raise RuntimeError
    assert tree(tmp_path) == {"model/file": "old"}


def failing_renames(monkeypatch, *endings: str) -> None:
    """Make renaming fail for names with these endings."""
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(endings):
            raise OSError(28, "No space left on device", str(self))
        return rename(self, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing)


def test_a_failed_rename_loses_nothing(tmp_path, monkeypatch):
    put(tmp_path / "model", "old")
    failing_renames(monkeypatch, ".partial")
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "model", "new")
    assert tree(tmp_path) == {"model/file": "old"}


def test_both_folders_stay_if_no_rename_works(tmp_path, monkeypatch):
    put(tmp_path / "model", "old")
    failing_renames(monkeypatch, ".partial", ".old")
    with pytest.raises(DataError) as caught:
        put(tmp_path / "model", "new")
    kept = tree(tmp_path)
    assert sorted(kept.values()) == ["new", "old"]
    assert all(str((tmp_path / name).parent) in caught.value.message for name in kept)


def test_a_link_stays_and_its_target_is_replaced(tmp_path, way):
    put(tmp_path / "there" / "model", "old")
    (tmp_path / "link").symlink_to("there/model")
    put(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "there") == {"model/file": "new"}


@pytest.mark.parametrize("name", ["pipe", "folder", "itself"])
def test_only_files_are_replaced(tmp_path, name):
    """Whoever may write there would also replace /dev/null, if a link led to it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "link").symlink_to(name)
    before = (tmp_path / name).lstat()
    for path in (tmp_path / name, tmp_path / "link"):
        with pytest.raises(DataError, match="cannot be written"):
            files.write_file(path, b"new")
    assert os.path.samestat((tmp_path / name).lstat(), before)


def test_a_lock_is_no_link(tmp_path):
    """It would be made, and written to, wherever the link leads."""
    (tmp_path / "precious").write_text("mine")
    for target in ("precious", "none"):
        (tmp_path / "lock").symlink_to(target)
        with files.lock(tmp_path / "lock") as held:
            sign(tmp_path / "lock")
        (tmp_path / "lock").unlink()
        assert not held
    assert tree(tmp_path) == {"precious": "mine"}


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="the folder you are in"):
        put(Path(), "new")


def test_files_are_flushed_only_on_request(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(os, "fsync", waits.append)
    files.write_file(tmp_path / "a.png", b"1", sync=False)
    assert waits == []
    files.write_file(tmp_path / "config.json", b"2")
    assert len(waits) == 2  # the file, and its name
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"1", "config.json": b"2"}


def test_an_unchanged_file_is_not_written(tmp_path):
    path = tmp_path / "file"
    files.renew_file(path, b"1")
    before = path.stat()
    files.renew_file(path, b"1")
    assert path.stat().st_ino == before.st_ino
    files.renew_file(path, b"2")
    assert path.read_bytes() == b"2"


def test_only_one_process_holds_a_lock(tmp_path, monkeypatch):
    with files.lock(tmp_path / "lock") as held, pytest.raises(LockedError), files.lock(tmp_path / "lock", wait=False):
        pass
    assert held

    def flock(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with files.lock(tmp_path / "lock") as held:
        assert not held


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[]", "not a JSON object"),
        (b"1" * 5000, "cannot be read"),
        (b"null", "not a JSON object"),
    ],
)
def test_invalid_json_is_named(tmp_path, content, expected):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        files.read_json(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert expected in caught.value.message


def test_tensors_are_read_from_a_file_of_any_name(tmp_path):
    for name in (b"a.safetensors", b"\xc3\xa9.safetensors", b"\xe9\n.safetensors"):
        path = tmp_path / os.fsdecode(name)
        save_file({"a": torch.ones(2)}, path)
        assert files.load_tensors(path)["a"].tolist() == [1, 1]


def read_schedule(path: Path) -> ScheduleConfig:
    return files.read_config(ScheduleConfig, path)


@pytest.mark.parametrize("read", [files.read_json, files.load_tensors, read_schedule])
def test_only_regular_files_are_read(tmp_path, read):
    """A pipe would wait for a writer, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "itself").symlink_to("itself")
    for name, expected in [
        ("pipe", "is a pipe or a device"),
        ("zero", "is a pipe or a device"),
        ("folder", "is a folder"),
        ("itself", "symbolic link"),
        ("none", ""),
    ]:
        with pytest.raises(ModelError) as caught:
            read(tmp_path / name)
        assert caught.value.message.startswith(f"{tmp_path / name}: ")
        assert expected in caught.value.message
