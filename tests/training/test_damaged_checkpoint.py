"""Checkpoints that are damaged, edited, kept and removed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_cli.models import runs
from ddpm_cli.training import checkpoint

RUN = Path("run")
NAMES = ["raw.safetensors", "optimizer.safetensors", "diffusion_pytorch_model.safetensors", "state.json"]


@pytest.fixture(autouse=True)
def _run(quick_run):
    """A finished run, with checkpoints at steps 2 and 4, that may be damaged."""
    shutil.copytree(quick_run, RUN)


def files_of(step: int) -> dict[str, Path]:
    folder = RUN / "checkpoints" / f"step-{step:08d}"
    return {path.name: path for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "name"), [*((flip, name) for name in NAMES), (cut, NAMES[0]), (Path.unlink, NAMES[1])]
)
def test_the_checkpoint_before_a_damaged_one_is_used(cli, digits, damage, name):
    whole = files_of(4)["raw.safetensors"].read_bytes()
    damage(files_of(4)[name])
    code, _, err = cli("train", digits, "-o", RUN, "--resume", "--steps", "4", "--precision", "fp32")
    assert code == 0, err
    assert name in err
    assert "step-00000004 is damaged and was renamed; continuing from step-00000002" in err
    assert "resuming at step 2" in err
    assert (RUN / "checkpoints" / "damaged-step-00000004").is_dir()
    assert files_of(4)["raw.safetensors"].read_bytes() == whole  # the lost steps are the same again


def test_an_edited_card_is_not_damage(cli, digits):
    files_of(4)["README.md"].write_text("my own words")
    assert "damaged" not in cli("train", digits, "-o", RUN, "--resume", "--steps", "5")[2]


def test_if_all_are_damaged_nothing_is_changed(cli, digits):
    for step in (2, 4):
        flip(files_of(step)["raw.safetensors"])
    code, _, err = cli("train", digits, "-o", RUN, "--resume", "--steps", "6")
    assert code == 1
    assert "none of its checkpoints can be read" in err
    assert [path.name for path in runs.checkpoints(RUN)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("name", "parameter", "value", "message"),
    [
        ("raw", "conv_in.bias", torch.full((4,), torch.nan), "conv_in.bias hold values that are not finite"),
        ("raw", "conv_in.bias", torch.zeros(5), "conv_in.bias is (5,), not (4,)"),
        ("diffusion_pytorch_model", "conv_in.bias", None, "lacks 1 of the U-Net's"),
        ("optimizer", "exp_avg.conv_in.bias", torch.zeros(2, 2), "exp_avg.conv_in.bias is (2, 2), not (4,)"),
        ("optimizer", "exp_avg.conv_in.bias", None, "exp_avg.conv_in.bias"),
        ("optimizer", "step.conv_in.bias", torch.tensor(torch.inf), "step.conv_in.bias hold values that are not fin"),
    ],
)
def test_tensors_of_another_network_are_named(cli, digits, name, parameter, value, message):
    """Also if the hashes were made to fit."""
    path = files_of(4)[f"{name}.safetensors"]
    tensors = load_file(path) | ({} if value is None else {parameter: value})
    if value is None:
        del tensors[parameter]
    save_file(tensors, path)
    folder = RUN / "checkpoints" / "step-00000004"
    (folder / "training" / "hashes.json").write_text(json.dumps(checkpoint._hashes(folder)))
    code, _, err = cli("train", digits, "-o", RUN, "--resume", "--steps", "4", "--precision", "fp32")
    assert code == 0, err
    assert f"Note: {path}: " in err
    assert message in err
    assert "continuing from step-00000002" in err


@pytest.mark.parametrize("damage", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_a_preview_that_cannot_be_read_costs_no_checkpoint(cli, digits, damage):
    damage(RUN / "samples" / "step-00000009.png")
    (RUN / "samples" / ".ddpm-half").mkdir()
    code, _, err = cli("train", digits, "-o", RUN, "--resume", "--steps", "6", "--precision", "fp32")
    assert (code, "could not be saved" in err) == (0, False), err
    assert files_of(6)["samples.png"].read_bytes().startswith(b"\x89PNG")


def test_a_preview_that_cannot_be_written_is_no_stop(cli, digits):
    (RUN / "samples" / "step-00000005.png").mkdir()
    code, _, err = cli("train", digits, "-o", RUN, "--resume", "--steps", "5", "--precision", "fp32")
    assert (code, "step-00000005.png: cannot be written (is a folder); training continues" in err) == (0, True), err
    assert "to stop sooner" not in err


def test_every_kth_checkpoint_stays(cli, digits):
    assert cli("train", digits, "-o", RUN, "--resume", "--steps", 14, "--keep", 2, "--keep-every", 4)[0] == 0
    assert [runs.step_of(path) for path in runs.checkpoints(RUN)] == [4, 8, 12, 14]
