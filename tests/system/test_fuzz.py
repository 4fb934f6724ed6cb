"""Files of a run, a model, a folder of samples and the like, damaged in thousands of ways: every command that reads
them succeeds or ends with an error of ours, and prints no control characters. None hangs or uses up the memory.

    pytest -m long tests/system/test_fuzz.py

tries 4,000 of them in about fifteen minutes on two cores. Number N is always the same; to try it alone, put it into
AGAIN. No damage leads to a file or a device outside the test's own folder, except for a link to /dev/zero. This link
is only made by users who may not make devices, and they cannot replace /dev/zero either.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import json
import os
import random
import resource
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import torch

import mutations
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.noised_image import Noised
from foreign import Weights, pesser

PARTS, PROCESSES, EACH = 20, 2, 100  # a part is done in a minute, or in a few on a busy machine
AGAIN: list[int] = []
SECONDS = 60  # after which a command hangs: the slowest one takes two
ROOM = 3 * 2**30  # bytes that a command may take besides what the process has when it starts
CHILD = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"


def _pushed(model: str) -> None:
    """What `ddpm push` reads before it asks the Hub."""
    from ddpm_cli.models import hub, publish

    with publish.contents(hub.resolve(model), "me/model"):
        pass


def _plotted(run: str) -> None:
    """What `ddpm plot` prints at a terminal."""
    from ddpm_cli.data import plots
    from ddpm_cli.training import curves

    for chart in curves.charts(curves.read_metrics(Path(run))):
        print(plots.text(chart))


def _traced(noised: str) -> None:
    """What `ddpm denoise-trace` makes of a file. Pipes and devices are good inputs, but these here never end."""
    from ddpm_cli.cli import app

    if Path(noised).is_file():
        app.main(["denoise-trace", noised, "-m", "model", "-o", "trace.png", "--force"])


SAMPLE = ("sample", "--n", 3, "--steps", 1)
TRAIN = ("train", "images", "-o", "run", "--resume", "--precision", "fp32")
# What reads the files in each folder; functions are called, the rest goes to the command line.
READERS: dict[str, list[tuple[object, ...]]] = {
    "run": [
        (*TRAIN, "--steps", 4),  # which it has done already: it is read, and tried
        (*TRAIN, "--steps", 5),
        ("plot", "run", "--json"),
        (_plotted, "run"),
        ("report", "run"),
        ("info", "run"),
        (*SAMPLE, "-m", "run", "--weights", "raw", "-o", "run.png"),
    ],
    "model": [
        ("info", "model"),
        ("info", "model", "--json"),
        (*SAMPLE, "-m", "model", "-o", "model.png"),
        ("train", "images", "-o", "new", "--from", "model", "--dry-run"),
        (_pushed, "model"),
    ],
    "samples": [(*SAMPLE, "-m", "model", "-o", "samples/"), (*SAMPLE, "-m", "model", "-o", "samples/", "--force")],
    "foreign": [("convert", "foreign/model.ckpt", "-o", "converted")],
    "cache": [("cache",), ("cache", "--json"), (*TRAIN, "--steps", 5)],
    "noised": [(_traced, "noised/x_t.safetensors")],
}
SHARES = [6, 6, 1, 1, 2, 2]


@pytest.fixture
def base(cli, digits, quick_run, tmp_path) -> Path:
    """A run, a model with a card, a folder of samples, weights of another program, decoded images and a noised image:
    all small and undamaged."""
    base = tmp_path / "base"
    shutil.copytree(quick_run, base / "run")
    shutil.copytree(quick_run.parent / "cache", base / "cache")
    shutil.copytree(quick_run / "checkpoints" / "step-00000004", base / "model")
    shutil.rmtree(base / "model" / "training")
    sample = (*SAMPLE, "-m", base / "model", "-o", f"{base}/samples/", "-q")
    assert cli(*sample)[0] == 0
    (base / "foreign").mkdir()
    weights = Weights()
    pesser(weights, torch.zeros(1, 3, 16, 16), torch.tensor([1]), 32, (1,), 1, {16})
    torch.save(dict(weights), base / "foreign" / "model.ckpt")
    (base / "noised").mkdir()
    noised = Noised.make(torch.zeros(1, 1, 8, 8), 2, 0, ScheduleConfig(4), lambda: torch.ones(1, 1, 8, 8))
    (base / "noised" / "x_t.safetensors").write_bytes(noised.to_bytes())
    shutil.copytree(digits, base / "images")
    return base


@pytest.mark.long
@pytest.mark.parametrize("part", [0] if AGAIN else range(PARTS))
def test_damaged_files_cost_only_what_they_hold(start, base, part):
    first = part * PROCESSES * EACH
    chosen = [AGAIN] if AGAIN else [range(first + i, first + PROCESSES * EACH, PROCESSES) for i in range(PROCESSES)]
    processes = [start(base, *numbers, source=CHILD) for numbers in chosen]
    for process, numbers in zip(processes, chosen, strict=True):
        code, tried = process.wait(), process.out.decode().splitlines()
        assert code == 0, f"{tried[-1:]} ended the process:\n{process.err}"
        assert (len(tried), process.err) == (len(numbers), "")


# --- in the process that tries them ---


def _try_all(base: Path, numbers: list[int]) -> None:
    """Print each damage before it is tried, on stdout; and the problems that it caused, on stderr."""
    from ddpm_cli.training import rehearsal

    rehearsal._SECONDS = 0.0
    os.environ["DDPM_CACHE_DIR"] = "cache"
    os.fsync = lambda handle: None  # the disk is not what is tried
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    work = Path(f"work-{os.getpid()}")
    shutil.copytree(base, work)
    with contextlib.chdir(work):
        for reader in itertools.chain(*READERS.values()):
            assert not _problems(reader, may_fail=False), reader
    for number in numbers:
        shutil.rmtree(work)
        shutil.copytree(base, work)
        with contextlib.chdir(work):
            damage, readers = _damage(random.Random(number))
            print(f"{number}: {damage}", flush=True)
            for reader in readers:
                faulthandler.dump_traceback_later(SECONDS, exit=True)
                for problem in _problems(reader):
                    print(f"\n{number}: {damage}\n  {reader}\n  {problem}", file=sys.stderr, flush=True)
    faulthandler.cancel_dump_traceback_later()


def _damage(draw: random.Random) -> tuple[str, list[tuple[object, ...]]]:
    """Do it. Returns it in words, and what reads the files that it hit."""
    top = draw.choices(list(READERS), SHARES)[0]
    if top == "model" and draw.random() < 0.5:
        Path("model/ddpm.json").unlink()  # then only the card describes its training
    below = sorted(path for path in Path(top).rglob("*") if not path.is_symlink())
    folders, files = ([path for path in below if path.is_dir() == wanted] for wanted in (True, False))
    if (kind := draw.random()) < 0.15:
        folder = draw.choice([Path(top), *folders])
        damage = f"{folder}: {mutations.replace(folder, draw) if kind < 0.03 else mutations.add(folder, draw)}"
    else:
        hit = draw.sample(files, min(len(files), draw.choice([1, 1, 1, 2])))
        damage = " and ".join(f"{path}: {mutations.mutate(path, draw)}" for path in hit)
        for path in hit:
            sealed = [parent / "training" / "hashes.json" for parent in path.parents]
            for hashes in sealed:
                if hashes.is_file() and hashes not in hit and draw.random() < 0.8:
                    _reseal(hashes)
    readers = READERS[top]
    if top == "run":  # the step takes longer than all the rest
        readers = [readers[0], *readers[2:]] if draw.random() < 0.8 else readers[1:]
    return damage, readers


def _reseal(hashes: Path) -> None:
    """Make a checkpoint's hashes fit its files, as a user who edits them could."""
    from ddpm_cli.training import checkpoint

    hashes.write_text(json.dumps(checkpoint._hashes(hashes.parents[1])))


def _problems(reader: tuple[object, ...], may_fail: bool = True) -> list[str]:
    """Let something read the files. Returns what is wrong with how it ended, and with what it printed."""
    from ddpm_cli.cli import app
    from ddpm_cli.errors import DDPMError

    out, err, problems = io.StringIO(), io.StringIO(), []
    first = reader[0]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = first(*reader[1:]) if callable(first) else app.main([str(arg) for arg in reader])
        except SystemExit as ended:
            code = ended.code
        except Exception as error:  # main raises it where DDPM_DEBUG is set
            code = app._explain(error, str(first))
            if not isinstance(error, DDPMError):
                problems.append("".join(traceback.format_exception(error)))
    printed = out.getvalue() + err.getvalue()
    if odd := {c for c in printed if not c.isprintable() and c != "\n"}:
        problems.append(f"printed {odd}: {printed}")
    if "Warning" in printed or (code and not may_fail):
        problems.append(printed)
    if "--json" in reader and code == 0:
        json.loads(out.getvalue())
    return problems


if __name__ == "__main__":
    os.environ["DDPM_DEBUG"] = "1"
    _try_all(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
