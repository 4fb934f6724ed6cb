"""IMAGES of several kinds, and lists that come through pipes: `find … | ddpm train -`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import step_in
from ddpm_cli.data.cache import list_packs
from processes import TORCHRUN, wait_until


@pytest.fixture
def options(quick_model) -> tuple[object, ...]:
    return ("--from", quick_model, "--batch-size", 4, "--sample-every", "1M", "--precision", "fp32")


@pytest.fixture
def photos(digits) -> Path:
    """Some of the digits, with line breaks in their names."""
    folder = Path("photos")
    folder.mkdir()
    for i, path in enumerate(sorted(digits.rglob("*.png"))[:6]):
        (folder / f" {i}\n.png").write_bytes(path.read_bytes())
    return folder


def images_of(run: Path) -> object:
    return json.loads((run / "config.json").read_text())["data"]["images"]


def find(folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(["find", folder, "-name", "*.png", *more], stdout=subprocess.PIPE)


def test_find_writes_the_list(start, cli, photos, options, tmp_path):
    """Names may have any characters. The run keeps the list, so that it can continue."""
    with find(photos, "-print0") as finder:
        process = start("train", "-", *options, "--steps", 1, stdin=finder.stdout.fileno())
    err = process.finish()
    assert process.out == b"runs/list\n"
    assert "6 in stdin, 0 left out" in err
    kept = tmp_path / "runs/list/list.txt"
    assert images_of(Path("runs/list")) == str(kept)
    assert {Path(os.fsdecode(path)) for path in kept.read_bytes().split(b"\0")[:-1]} == set(photos.resolve().iterdir())
    code, _, err = cli("train", kept, *options, "--steps", 2, "-o", "runs/list", "--resume")
    assert (code, "resuming at step 1" in err) == (0, True), err
    assert len(list_packs(Path("cache"))) == 1  # nothing was decoded again
    with find(photos, "-print0") as finder:
        process = start("train", "-", *options, "--steps", 3, "--resume", stdin=finder.stdout.fileno())
    assert "resuming at step 2" in process.finish()


def test_lines_on_stdin(ddpm, digits, options, tmp_path):
    """Relative paths start at the current folder. Missing files are left out and named."""
    names = sorted(os.path.relpath(path) for path in digits.rglob("*.png"))[:5]
    lines = "\n".join(["# chosen", *names, "gone.png", "."])
    done = ddpm("train", "-", *options, "--steps", 1, "-o", "run", stdin=lines.encode())
    err = done.stderr.decode()
    assert done.returncode == 0, err
    assert "5 in stdin, 2 left out" in err
    assert f"left out {tmp_path}/gone.png: no such file" in err
    assert Path("run/list.txt").read_text() == "".join(f"{tmp_path / name}\n" for name in [*names, "gone.png", "."])


def test_a_stopped_run_prints_the_command_to_continue(start, digits, options):
    lines = "".join(f"{path}\n" for path in digits.rglob("*.png"))
    process = start(
        "train", digits, "-", *options, "--steps", "1M", "--save-every", 3, "-o", "run", stdin=lines.encode()
    )
    wait_until(lambda: step_in(Path("run")), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert f"continue with: ddpm train {digits} run/list.txt -o run --resume" in process.err


def test_a_named_pipe(start, photos, options):
    os.mkfifo("pipe")
    process = start("train", "pipe", *options, "--steps", 1)
    with Path("pipe").open("wb") as pipe:  # waits until it is read
        subprocess.run(["find", photos, "-type", "f", "-print0"], stdout=pipe, check=True)
    assert "6 in pipe, 0 left out" in process.finish()
    assert Path("runs/list/list.txt").is_file()


def test_process_substitution(photos, digits, options):
    """Two lists from bash, and a folder between them."""
    lists = ("<(find photos -name '*1*' -print0)", "<(find photos -type f -print0)")
    command = f"{sys.executable} -m ddpm_cli train {lists[0]} {digits} {lists[1]} $OPTIONS"
    env = os.environ | {
        "OPTIONS": " ".join(map(str, (*options, "--steps", 1, "-o", "run"))),
    }
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = Path("run").resolve()
    assert images_of(run) == [str(run / "list.txt"), str(digits), str(run / "list2.txt")]
    assert (run / "list.txt").read_bytes() == os.fsencode(photos.resolve()) + b"/ 1\n.png\0"
    assert (run / "list2.txt").read_bytes().count(b"\0") == 6


@pytest.mark.parametrize("stdin", [b"", b"\n# nothing\n"])
def test_an_empty_list(ddpm, stdin, tmp_path):
    done = ddpm("train", "-", stdin=stdin)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().startswith("Error: stdin: no paths in it\nHint: Did the command before the pipe fail?")
    assert not list(tmp_path.iterdir())


def test_stdin_that_is_not_a_list(ddpm, digits):
    image = next(digits.rglob("*.png")).read_bytes()
    for stdin in (b"nowhere.png\n", image):
        done = ddpm("train", "-", stdin=stdin)
        assert done.returncode == 1
        assert b"Error: stdin: none of the " in done.stderr
        assert b"Hint: A list has one path per line" in done.stderr


def test_a_terminal_is_not_a_list(in_a_terminal):
    code, seen = in_a_terminal("train", "-")
    assert code == 2
    assert "-: stdin is a terminal" in seen
    assert "| ddpm train -" in seen


def test_dry_run_of_a_list_writes_nothing(ddpm, digits, options, tmp_path):
    lines = "".join(f"{path}\n" for path in digits.rglob("*.png"))
    done = ddpm("train", "-", *options, "--steps", 4, "--dry-run", stdin=lines.encode())
    assert done.returncode == 0, done.stderr
    assert b"60 in stdin" in done.stdout
    assert not list(tmp_path.iterdir())


def test_several_images(cli, digits, options, tmp_path):
    """Image files, as the shell expands digits/*.png, and a folder."""
    Path("more").mkdir()
    names = []
    for i, path in enumerate(sorted(digits.rglob("*.png"))[:7]):
        names.append(f"more/{i}.png")
        Path(names[-1]).write_bytes(path.read_bytes())
    code, out, err = cli("train", *names, digits, *options, "--steps", 1)
    assert (code, out) == (0, "runs/more+digits\n"), err
    assert "67 in more/0.png and 7 more, 0 left out" in err
    run = Path("runs/more+digits")
    assert images_of(run) == [*(str(tmp_path / name) for name in names), str(digits)]
    assert "more+digits" in (run / "checkpoints/step-00000001/README.md").read_text()
    assert cli("train", *names, digits, *options, "--steps", 2, "--resume")[0] == 0
    code, _, err = cli("train", digits, *names, *options, "-o", run, "--steps", 3, "--resume")
    assert (code, "the images are not those" in err) == (1, True)  # they have another order


def test_one_of_two_processes_reads_the_list(pair, digits, options):
    """Both have the same stdin, and only one may read it."""
    lines = "".join(f"{path}\n" for path in digits.rglob("*.png"))
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        file.write(lines)
    processes = pair("train", "-", *options, "--steps", 2, "-o", "run", stdin=reader)
    os.close(reader)
    err = "".join(process.finish() for process in processes)
    assert "60 in stdin, 0 left out" in err
    assert step_in(Path("run")) == 2


def test_a_process_that_cannot_read_the_list_fails(start, digits, options, tmp_path):
    """It has another cache, so it would have to decode the images itself."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    lines = "".join(f"{path}\n" for path in digits.rglob("*.png"))
    processes = []
    for rank in ("0", "1"):
        env = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": "0", "DDPM_CACHE_DIR": "cache"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        Path(rank).mkdir()
        with contextlib.chdir(rank):
            command = ("train", "-", *options, "--steps", 2, "-o", tmp_path / "run")
            processes.append(start(*command, env=env, stdin=lines.encode()))
    assert [process.wait() for process in processes] == [1, 1]
    assert "Error: -: this process cannot read the list that process 0 has read" in processes[1].err
    assert not Path("run").exists()


def test_restarted_processes_use_the_list_of_the_run(start, digits, options):
    """The pipe is empty after the restart."""
    lines = "".join(f"{path}\n" for path in digits.rglob("*.png"))
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as file:
        file.write(lines)
    run = Path("run")
    command = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "-m", "ddpm_cli", "train", "-", *options)
    process = start(*command, "--save-every", 3, "--steps", "1M", "-o", run, source=TORCHRUN, stdin=reader)
    os.close(reader)
    wait_until(lambda: step_in(run), process)
    os.kill(process.children()[0], signal.SIGKILL)
    wait_until(lambda: "resuming at step" in process.err, process)
    assert images_of(run) == str(run.resolve() / "list.txt")
    process.kill()
