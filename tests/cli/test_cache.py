"""`ddpm cache`: the list, and pruning."""

import json
import os
import re
from pathlib import Path

import pytest

from ddpm_cli.data.cache import INDEX
from processes import wait_until

OPTIONS = ("--batch-size", 4, "--sample-every", "1M", "-q")


@pytest.fixture
def pack(cli, digits, quick_model) -> Path:
    """Decoded images in the cache, which no process uses."""
    assert cli("train", digits, "--from", quick_model, "--steps", 1, "-o", "one", *OPTIONS)[0] == 0
    (folder,) = Path("cache/packs").iterdir()
    return folder


def test_an_empty_cache(cli, tmp_path):
    for more in ((), ("--prune",), ("--older-than", "3d")):
        code, out, _ = cli("cache", *more)
        assert (code, out.splitlines()[-1]) == (
            0,
            "freed 0.0 kB" if "--prune" in more else f"0.0 kB in {tmp_path}/cache",
        )
    assert not Path("cache").exists()


def test_the_list(cli, digits, pack):
    code, out, err = cli("cache")
    assert (code, err) == (0, "")
    head, row, total = out.splitlines()
    assert re.split("  +", head) == ["size", "images", "pixels", "last use", "source"]
    size, images, pixels, day, source = re.split("  +", row)
    assert (images, pixels, source) == ("60", "8x8 gray", str(digits))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
    assert total.startswith(f"{size} in ")
    found = json.loads(cli("cache", "--json")[1])
    (listed,) = found["packs"]
    assert (listed["folder"], listed["source"], listed["images"]) == (str(pack.resolve()), str(digits), 60)
    assert listed["shape"] == [1, 8, 8]
    assert found["bytes"] == listed["bytes"] > 60 * 64
    assert len(cli("cache", "--older-than", "1h")[1].splitlines()) == 1


def test_pruning(cli, pack):
    code, out, err = cli("cache", "--prune")
    assert (code, out) == (0, "freed 0.0 kB\n")
    assert "--older-than 0d removes them too" in err
    os.utime(pack / INDEX, (0, 0))
    code, out, err = cli("cache", "--prune", "--json")
    found = json.loads(out)
    assert (code, found["removed"][0]["folder"], found["in_use"]) == (0, str(pack.resolve()), [])
    assert found["freed_bytes"] == found["removed"][0]["bytes"]
    assert not pack.exists()
    assert "removed " in err


def test_images_that_a_running_process_uses_are_not_removed(cli, start, digits, pack, quick_model):
    run = Path("runs/long")
    process = start("train", digits, "--from", quick_model, "--steps", "1M", "--save-every", 5, "-o", run, *OPTIONS)
    wait_until(lambda: list(run.glob("checkpoints/step-*")), process)
    code, out, err = cli("cache", "--prune", "--older-than", "0d")
    assert (code, out) == (0, "freed 0.0 kB\n")
    assert f"of {digits} (8x8 gray), which a process uses" in err
    assert pack.is_dir()
    process.kill()
    assert cli("cache", "--prune", "--older-than", "0d", "-q")[1] != "freed 0.0 kB\n"
    assert not pack.exists()


@pytest.mark.parametrize("age", [" ", "30", "d", "-1d", "1.5d", "3 months", "²d"])
def test_an_invalid_age(cli, age):
    code, _, err = cli("cache", "--older-than", age)
    assert code == 2
    assert "--older-than" in err
    assert "30d" in err


def test_train_prints_a_note_about_a_large_cache(cli, digits, quick_model):
    options = ("--from", quick_model, "--steps", 1, *OPTIONS[:-1])
    other = Path("cache/packs") / ("0" * 32)
    other.mkdir(parents=True)
    with (other / "shard-00000.u8").open("wb") as file:
        file.truncate(4_900_000_000)
    assert "ddpm cache" not in cli("train", digits, "-o", "one", *options)[2]
    with (other / "shard-00001.u8").open("wb") as file:
        file.truncate(1_300_000_000)
    err = cli("train", digits, "-o", "two", *options)[2]
    assert "Note: the cache has 6.2 GB of other decoded images; ddpm cache lists and removes them" in err


def test_statistics_and_extractors_are_listed_and_pruned(cli):
    now, old = ("statistics/new.npz", "extractors/.a.pth.partial"), ("statistics/old.npz", "extractors/b.pth")
    for name in (*now, *old):
        Path("cache", name).parent.mkdir(parents=True, exist_ok=True)
        Path("cache", name).write_bytes(bytes(150_000))
    Path("cache/extractors/.b.pth.lock").touch()
    for name in old:
        os.utime(Path("cache", name), (0, 0))
    listed = cli("cache")[1].splitlines()
    assert {re.split("  +", row)[-1] for row in listed[1:-1]} == {*now, *old}
    assert listed[-1].startswith("0.6 MB in")
    assert len(json.loads(cli("cache", "--json", "--older-than", "1h")[1])["files"]) == 2
    code, out, err = cli("cache", "--prune")
    assert (code, out) == (0, "freed 0.3 MB\n")
    assert "removed 0.1 MB of statistics/old.npz" in err
    assert [Path("cache", name).exists() for name in (*now, *old)] == [True, True, False, False]
    found = json.loads(cli("cache", "--prune", "--older-than", "0d", "--json")[1])
    assert [Path(file["file"]).name for file in found["removed_files"]] == ["new.npz"]
    assert Path("cache", now[1]).exists()  # a process may be downloading it
