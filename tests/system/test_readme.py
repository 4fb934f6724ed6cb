"""Every command of the README runs, on small images and with few steps."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import hub_server
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = "--size 8 --batch-size 2 --sample-every 1k -q"

# Options that are added to a command, so that it takes little time; the last one of a kind counts.
QUICK = {
    "train": f"--steps 2 {SMALL}",
    "sample": "--steps 2",
    "denoise-trace": "--steps 3",
    "interpolate": "--steps 3",
    "invert": "--steps 4",
    "eval": "--metrics bpd --terms 2 -n 2",
    "rate-distortion": "--steps 3",
    "push": "--yes",
}
COUNT = re.compile(r"(--n|-n) \d\d+")  # of samples


def commands(text: str) -> list[str]:
    """The lines of the indented blocks, without their comments."""
    return [line.partition("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]


def quick(command: str) -> list[str]:
    """A command with few steps and samples."""
    words = shlex.split(COUNT.sub(r"\1 2", command))[1:]
    return words + QUICK.get(words[0], "").split()


def pictures() -> None:
    Path("images").mkdir()
    for i in range(9):
        noise = Image.effect_noise((12, 12), 90).convert("RGB")
        noise.putpixel((i, i), (255, 0, 0))
        noise.save(f"images/{i}.{'png' if i % 2 else 'jpg'}")
    for name in ("a", "b", "img"):
        noise.resize((8, 8)).save(f"{name}.png")


@pytest.fixture
def _hub(color_model, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server.serve() as server:
        for name in ("google/ddpm-cifar10-32", "org/name"):
            server.add(name, color_model)
        yield


@pytest.mark.usefixtures("_hub")
def test_its_commands(cli, ddpm, pair):
    pictures()
    lines = commands(README.partition("## Train on your images")[2].partition("## Python")[0])
    assert len(lines) > 25
    for line in lines:
        if line.startswith("torchrun"):
            for process in pair(*quick(line.partition("-m ")[2])):  # as torchrun does, but faster
                process.finish()
        elif " | " in line:
            run_pipeline(ddpm, line)
        else:
            code, _, err = cli(*quick(line))
            assert code == 0, f"{line}\n{err}"
    for file in ("grid.png", "samples.npz", "exact.png", "trace.png", "trace.gif", "there-and-back.png", "back.png"):
        assert Path(file).stat().st_size > 100
    assert list(Path("runs").glob("*/report.html"))


def run_pipeline(ddpm, line: str) -> None:
    """Run its commands one after another, each with the output of the one before."""
    flowing = b""
    for command in line.split(" | "):
        match shlex.split(command):
            case ["cat", name]:
                flowing = Path(name).read_bytes()
            case ["find", folder, "-name", pattern]:
                flowing = "\n".join(map(str, Path(folder).glob(pattern))).encode()
            case ["ddpm", *_]:
                done = ddpm(*quick(command), stdin=flowing)
                assert done.returncode == 0, f"{line}\n{done.stderr.decode()}"
                flowing = done.stdout
            case _:
                raise AssertionError(line)


def test_its_first_commands():
    """They install ddpm, so only their parts are checked: that the files exist, and the commands run in other tests."""
    first, second, third = (line for line in commands(README.partition("## Train on your images")[0]) if "ddpm" in line)
    assert first.endswith(".venv/bin/pip install -c constraints.txt . && .venv/bin/ddpm sample -o grid.png")
    assert second.startswith(".venv/bin/ddpm train examples/digits.zip --preset tiny")
    assert third == ".venv/bin/ddpm train ./images && .venv/bin/ddpm sample -o new.png"


def test_its_python(small_model, monkeypatch, capsys):
    pictures()
    (block,) = re.findall("```python\n(.*?)```", README, re.S)
    assert block.count("steps=5000") == block.count("steps=50)") == block.count("sample(64") == 1
    block = block.replace("steps=5000", "steps=2, size=8, batch_size=2").replace("sample(64", "sample(2")
    exec(block.replace("steps=50)", "steps=3)"), {})
    assert len(capsys.readouterr().out.splitlines()[-3:]) == 3
