"""Data sets on the Hub, with the real library `datasets` and a server on 127.0.0.1."""

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import hub_server
from ddpm_cli.config import DataConfig
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.errors import DataError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def hub():
    with hub_server.serve() as server:
        yield server


def pack_of(address: str):
    cache = Path("cache")
    return open_pack(open_source(address, cache), DataConfig(images=address, size=8, channels=1), cache)


def picture(gray: int) -> Image.Image:
    return Image.new("L", (8, 8), gray)


def png(gray: int) -> bytes:
    buffer = io.BytesIO()
    picture(gray).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(images: list[Image.Image | None], folder: Path) -> Path:
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    rows = datasets.Dataset.from_dict({"label": list(range(len(images))), "picture": images}, features=features)
    (folder / "data").mkdir(parents=True)
    rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def test_a_table_with_a_column_of_images(cli, hub, tmp_path):
    hub.add("datasets/org/table", parquet([picture(10), None, picture(30)], tmp_path / "table"))
    pack = pack_of("hf://org/table")
    assert pack[torch.arange(2)].float().mean((1, 2, 3)).tolist() == [10, 30]
    assert pack.left_out == [("train/1", "there is no image in this row")]
    again = pack_of("https://huggingface.co/datasets/org/table")
    assert again.fingerprint == pack.fingerprint
    made = pack.folder.stat().st_ino
    assert pack_of("hf://org/table").folder.stat().st_ino == made  # the key is the same in the next process too
    options = ("--steps", 1, "--batch-size", 2, "--preset", "tiny", "--size", 8)
    code, out, err = cli("train", "hf://org/table", *options)
    assert (code, out) == (0, "runs/table\n"), err
    assert "2 in hf://org/table, 1 left out" in err


def test_rows_that_name_files_of_this_machine(hub, tmp_path):
    """The table may contain any path: no file may block, be endless, or be too large."""
    (tmp_path / "good.png").write_bytes(png(10))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(5 * 2**30)
    paths = [*(str(tmp_path / f"{name}.png") for name in ("good", "pipe", "empty", "sparse", "gone")), "/dev/zero"]
    features = datasets.Features({"picture": datasets.Image()})
    rows = {"picture": [{"bytes": None, "path": path} for path in paths]}
    folder = tmp_path / "paths" / "data"
    folder.mkdir(parents=True)
    table = pyarrow.table(rows, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    hub.add("datasets/org/paths", tmp_path / "paths")
    pack = pack_of("hf://org/paths")
    assert pack[torch.arange(len(pack))].float().mean((1, 2, 3)).tolist() == [10]
    assert dict(pack.left_out) == {
        "train/1": "not a file but a folder, pipe or device",
        "train/2": "is empty",
        "train/3": "too large for an image (5.0 GiB)",
        "train/4": "no such file",
        "train/5": "not a file but a folder, pipe or device",
    }


def test_a_folder_of_images_and_a_revision(hub, tmp_path):
    for i in range(3):
        (tmp_path / "loose" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "loose" / "train" / f"{i}.png").write_bytes(png(10 * i))
    hub.add("datasets/org/loose", tmp_path / "loose")
    pack = pack_of("hf://org/loose@v1")
    assert sorted(pack[torch.arange(3)].float().mean((1, 2, 3)).tolist()) == [0, 10, 20]


def test_data_sets_without_images(hub, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.csv").write_text("a,b\n1,2\n")
    hub.add("datasets/org/text", tmp_path / "text")
    with pytest.raises(DataError, match=r"has no column of images \(only a, b\)"):
        open_source("hf://org/text", Path("cache"))
    with pytest.raises(DataError, match="hf://org/none: cannot be loaded"):
        open_source("hf://org/none", Path("cache"))
