"""The command line as people and shells use it."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load

from conftest import heed_signals, in_a_terminal
from ddpm_cli.data.images import from_pil, to_float
from ddpm_cli.diffusion.schedule import NoiseSchedule, ScheduleConfig
from ddpm_cli.models import runs
from ddpm_cli.training import checkpoint

PNG = b"\x89PNG"
TRAIN = ("--preset", "tiny", "--size", 8, "--batch-size", 4, "--precision", "fp32")


def picture(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


# --- help, usage ---


def test_help_is_quick_and_whole(ddpm):
    result = ddpm("--help")
    assert result.returncode == 0
    for command in ("train", "sample", "noise", "denoise-trace"):
        assert command in result.stdout.decode()
    assert ddpm("-V").stdout == b"ddpm 0.1.0\n"


@pytest.mark.parametrize("command", [(), ("train",), ("sample",), ("noise",), ("denoise-trace",)])
def test_help_does_not_import_torch(command):
    code = (
        "import sys\nfrom ddpm_cli.cli.app import main\n"
        f"try: main([*{command!r}, '-h'])\nfinally: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("paint",), "paint"),
        (("sample", "--frobnicate"), "--frobnicate"),
        (("sample", "--n", "many"), "--n"),
        (("sample", "--n", "1.5"), "1.5"),
        (("sample", "-o", "a.bmp9"), ".bmp9"),
        (("sample", "--json", "-o", "-"), "--json"),
        (("sample", "--weights", "best"), "--weights best"),
        (("train",), "images"),
        (("train", ".", "--fit", "fold"), "--fit fold"),
        (("train", ".", "--lr", "-1"), "--lr"),
        (("train", ".", "--lr", "nan"), "--lr"),
        (("train", ".", "--steps", "inf"), "--steps"),
        (("train", ".", "--steps", "5kk"), "--steps"),
        (("noise", "a.png", "-o", "a.safetensors"), "--format safetensors"),
        (("train", ".", "--channels", "2"), "--channels"),
        (("noise", "a.png", "--t", "1001"), "--t 1001"),
        (("noise", "a.png", "--t", "ten"), "--t ten"),
        (("noise", "a.png", "--format", "gif"), "--format gif"),
        (("noise", "a.png", "--format", "safetensors", "--t", "1,2"), "--t"),
        (("denoise-trace", "--show", "all"), "--show all"),
        (("denoise-trace", "--frames", "1"), "--frames"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_flag(cli, args, names):
    code, out, err = cli(*args)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert names in err


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("sample",), "no trained run"),
        (("sample", "-m", "nowhere"), "nowhere"),
        (("train", "nowhere"), "nowhere"),
        (("train", "nowhere", "--resume"), "nowhere"),
        (("noise", "none.png"), "none.png"),
        (("noise", "."), "."),
        (("denoise-trace", "none.png"), "none.png"),
    ],
)
def test_failures_exit_1_and_leave_nothing(cli, tmp_path, args, names):
    code, out, err = (
        cli(*args, "-o", "result.png" if args[0] != "train" else "run") if names != "runs/nowhere" else cli(*args)
    )
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert names in err
    assert not (tmp_path / "result.png").exists()
    assert not (tmp_path / "run").exists()


def test_a_bug_shows_a_traceback_only_on_request(ddpm, digits, tmp_path):
    (tmp_path / "cache").write_text("not a folder")  # so that making it fails in a way nobody foresaw
    quiet = ddpm("train", digits)
    assert quiet.returncode == 1
    assert quiet.stderr.startswith(b"Error: ")
    assert b"Traceback" not in quiet.stderr
    assert b"Traceback" in ddpm("train", digits, env={"DDPM_DEBUG": "1"}).stderr


# --- noise ---


def test_noise_is_equation_4(ddpm, emoji, tmp_path):
    result = ddpm("noise", emoji, "--t", 300, "--seed", 4, "--format", "safetensors")
    x_t = load(result.stdout)["x_t"].double()
    image = picture(emoji)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    x_0 = to_float(from_pil(image))[None].double()
    abar = NoiseSchedule.from_config(ScheduleConfig()).alphas_cumprod[299]  # the paper's t=300
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    assert abs(eps.mean()) < 0.05
    assert eps.std().item() == pytest.approx(1, abs=0.05)
    header = json.loads(result.stdout[8 : 8 + int.from_bytes(result.stdout[:8], "little")])
    about = json.loads(header["__metadata__"]["ddpm"])
    assert (about["t"], about["seed"], about["schedule"]["beta_end"]) == (300, 4, 0.02)
    assert ddpm("noise", emoji, "--t", 300, "--seed", 4, "--format", "safetensors").stdout == result.stdout
    assert ddpm("noise", emoji, "--t", 300, "--seed", 5, "--format", "safetensors").stdout != result.stdout


def test_noise_keeps_the_size_and_t_0_is_the_image(cli, photo, digits):
    assert cli("noise", photo, "--t", 0, "-o", "same.png")[0] == 0
    assert picture("same.png").tobytes() == picture(photo).tobytes()
    digit = next(digits.rglob("*.png"))
    code, out, _ = cli("noise", digit, "-o", "gray.png")
    assert (code, out) == (0, "gray.png\n")
    assert (picture("gray.png").mode, picture("gray.png").size) == ("L", (28, 28))


def test_several_t_make_a_strip(cli, emoji):
    code, out, err = cli("noise", emoji, "--t", "0,250,1000", "-o", "strip.png", "--json")
    assert json.loads(out) == {
        "schema": 1,
        "command": "noise",
        "output": "strip.png",
        "t": [0, 250, 1000],
        "seed": 0,
        "size": [32, 32],
        "format": "png",
    }
    assert (code, err) == (0, "")
    assert picture("strip.png").size == (3 * 66 + 2, 16 + 66 + 2)


def test_a_gif_as_high_as_a_brace_is_an_image(cli, color_model):
    """Byte 8 of a GIF is its height's low byte; 123 is `{`, which is also how safetensors goes on."""
    Image.new("L", (50, 123), 90).save("tall.gif")
    assert cli("denoise-trace", "tall.gif", "-m", color_model, "--t", 5, "-o", "trace.png")[0] == 0


@pytest.mark.parametrize("output", ["/proc/x.png", "file/x.png"])
def test_an_output_that_cannot_be_is_named(cli, emoji, output):
    Path("file").touch()
    code, _, err = cli("noise", emoji, "-o", output)
    assert code == 1
    assert err.startswith((f"Error: {output}: ", f"Error: -o {output}: "))


def test_a_link_is_written_through(cli, emoji):
    Path("link.png").symlink_to("target.png")
    assert cli("noise", emoji, "-o", "link.png")[0] == 0
    assert Path("link.png").is_symlink()
    assert Path("target.png").read_bytes().startswith(PNG)


# --- sample ---


def test_sample_to_every_kind_of_place(cli, ddpm, small_model, tmp_path):
    common = ("-m", small_model, "--n", 5, "--seed", 3)
    assert cli("sample", *common, "-o", "grid.png")[1] == "grid.png\n"
    assert cli("sample", *common, "-o", "images/")[1] == "images\n"
    assert cli("sample", *common, "-o", "x.npz")[1] == "x.npz\n"
    piped = ddpm("sample", *common).stdout
    assert piped == Path("grid.png").read_bytes()
    array = np.load("x.npz")["arr_0"]
    assert array.shape == (5, 8, 8, 1)
    for i in range(5):
        assert np.array_equal(np.asarray(picture(f"images/{i:06d}.png")), array[i, :, :, 0])
    grid = np.asarray(picture("grid.png"))
    assert np.array_equal(grid[2:10, 12:20], array[1, :, :, 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "images", "x.npz"]


def test_nothing_is_overwritten_unless_forced(cli, small_model):
    Path("grid.png").write_text("precious")
    Path("images").mkdir()
    Path("images/000000.png").write_text("precious")
    for output in ("grid.png", "images/"):
        code, _, err = cli("sample", "-m", small_model, "--n", 1, "-o", output)
        assert code == 1
        assert "--force" in err
    assert Path("grid.png").read_text() == Path("images/000000.png").read_text() == "precious"
    assert cli("sample", "-m", small_model, "--n", 1, "-o", "grid.png", "--force")[0] == 0
    assert Path("grid.png").read_bytes().startswith(PNG)


def test_sample_options(cli, small_model):
    code, out, err = cli(
        "sample", "-m", small_model, "--n", 3, "--steps", 5, "--json", "-o", "a.png", "--batch-size", 2
    )
    result = json.loads(out)
    assert code == 0
    assert (result["n"], result["steps"], result["seed"], result["output"]) == (3, 5, 0, "a.png")
    assert str(small_model) in err  # what was chosen is said
    assert cli("sample", "-m", small_model, "--n", 1, "-q", "-o", "b.png") == (0, "b.png\n", "")
    code, _, err = cli("sample", "-m", small_model, "--steps", 21, "-o", "c.png")
    assert code == 2
    assert "--steps 21" in err


def test_the_model_may_come_from_the_environment(ddpm, small_model):
    assert ddpm("sample", "--n", 1, env={"DDPM_MODEL": str(small_model)}).stdout.startswith(PNG)


def test_at_a_terminal(small_model):
    """No bytes of an image, a file with a name instead; and a bar that leaves."""
    code, seen = in_a_terminal("sample", "-m", small_model, "--n", 2)
    assert code == 0
    assert "samples.png" in seen
    assert "PNG" not in seen.replace("samples.png", "")
    assert "sampling" in seen
    assert picture("samples.png").size == (22, 12)
    code, seen = in_a_terminal("sample", "-m", small_model, "-o", "-")
    assert code == 2
    assert "terminal" in seen
    assert in_a_terminal("noise", "-")[0] == 2


# --- denoise-trace, pipelines ---


def test_trace_from_noise_ends_in_the_sample(cli, color_model):
    assert cli("denoise-trace", "-m", color_model, "--steps", 20, "-o", "frames/", "--frames", 4)[0] == 0
    names = sorted(path.name for path in Path("frames").iterdir())
    assert names == [f"{i:03d}-t{t:04d}-{row}.png" for i, t in enumerate((1000, 632, 316, 0)) for row in ("x0", "xt")]
    assert cli("sample", "-m", color_model, "--steps", 20, "--n", 1, "-o", "one/")[0] == 0
    assert picture("frames/003-t0000-xt.png").tobytes() == picture("one/000000.png").tobytes()


@pytest.mark.parametrize(("show", "rows"), [("both", 2), ("xt", 1), ("x0", 1)])
def test_trace_strips(cli, color_model, emoji, show, rows):
    code, out, _ = cli(
        "denoise-trace", emoji, "-m", color_model, "--t", 12, "--frames", 5, "--show", show, "-o", "t.png", "--json"
    )
    assert code == 0
    assert json.loads(out)["t"] == [12, 9, 6, 3, 0]
    assert picture("t.png").size == (24 + 5 * 66 + 2, 16 + rows * 66 + 2)


@pytest.mark.parametrize("name", ["t.gif", "t.webp"])
def test_trace_animations(cli, color_model, emoji, name):
    assert cli("denoise-trace", emoji, "-m", color_model, "--t", 30, "-o", name, "--frames", 7)[0] == 0
    with Image.open(name) as animation:
        assert (animation.n_frames, animation.size) == (7, (2 * 66 + 2, 16 + 66 + 2))


@pytest.mark.parametrize("picture", ["photo", "emoji"])
def test_a_pipeline_is_what_files_are(ddpm, cli, color_model, picture, request):
    """cat a.jpg | ddpm noise - | ddpm denoise-trace - : the same bytes as by files, whatever the image's size."""
    path = request.getfixturevalue(picture)
    noised = ddpm("noise", "-", "--t", 30, "--format", "safetensors", stdin=path.read_bytes())
    assert noised.stderr == b""
    traced = ddpm("denoise-trace", "-", "-m", color_model, "-o", "-", stdin=noised.stdout)
    assert traced.returncode == 0, traced.stderr
    assert cli("noise", path, "--t", 30, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    assert Path("n.safetensors").read_bytes() == noised.stdout
    assert cli("denoise-trace", "n.safetensors", "-m", color_model, "-o", "trace.png")[0] == 0
    assert Path("trace.png").read_bytes() == traced.stdout


def test_an_image_of_the_models_size_needs_no_file_between(cli, color_model, emoji):
    """denoise-trace IMG --t N is noise IMG --t N and denoise-trace in one."""
    picture(emoji).resize((8, 8)).save("small.png")
    assert cli("denoise-trace", "small.png", "-m", color_model, "--t", 30, "-o", "one.png")[0] == 0
    assert cli("noise", "small.png", "--t", 30, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    assert cli("denoise-trace", "n.safetensors", "-m", color_model, "-o", "two.png")[0] == 0
    assert Path("one.png").read_bytes() == Path("two.png").read_bytes()


def test_what_cannot_be_traced_is_refused(ddpm, cli, small_model, color_model, digits, emoji):
    digit = next(digits.rglob("*.png"))
    noised = ddpm("noise", digit, "--t", 30, "--format", "safetensors").stdout
    Path("n.safetensors").write_bytes(noised)
    Path("cut.safetensors").write_bytes(noised[:-5])
    common = ("-o", "t.png", "-m", color_model)
    for args, expected, names in [
        (("n.safetensors", *common), 1, "gray"),
        (("cut.safetensors", *common), 1, "cut.safetensors"),
        (("n.safetensors", *common, "--t", 40), 2, "t=30"),
        (("n.safetensors", "-o", "t.png", "-m", small_model), 2, "another schedule"),
        ((emoji, *common, "--t", 1001), 2, "--t 1001"),
        (("--t", 10, *common), 2, "pure noise"),
        ((emoji, *common, "--t", 10, "--steps", 11), 2, "--steps 11"),
    ]:
        code, _, err = cli("denoise-trace", *args)
        assert (code, "Error: " in err) == (expected, True), err
        assert names in err
    empty = ddpm("denoise-trace", "-", *common, stdin=b"")
    assert (empty.returncode, b"stdin" in empty.stderr) == (1, True)
    assert not Path("t.png").exists()


# --- train ---


def test_train_then_everything_else(cli, ddpm, digits):
    code, out, err = cli("train", digits, "--steps", 8, *TRAIN, "--no-flip")
    assert (code, out) == (0, "runs/digits\n")
    for said in ("60 in ", "8x8 gray", "never mirrored", "tiny", "8 steps of 4", "cpu", "fp32"):
        assert said in err
    run = Path("runs/digits")
    assert json.loads((run / "config.json").read_text())["train"]["batch_size"] == 4
    assert picture(run / "samples" / "step-00000008.png").size == (42, 42)
    assert cli("sample", "--n", 1, "--steps", 3, "-o", "a.png")[0] == 0  # the newest run is the default
    assert cli("sample", "-m", run / "checkpoints" / "step-00000008", "--n", 1, "--steps", 3, "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert cli("sample", "--weights", "raw", "--n", 1, "--steps", 3, "-o", "c.png")[0] == 0

    # A run that exists is continued or left alone.
    code, _, err = cli("train", digits, "--steps", 8, *TRAIN)
    assert (code, "--resume" in err) == (1, True)
    code, _, err = cli("train", digits, "--resume", "--batch-size", 5, "--flip", "--seed", 1)
    assert code == 2
    for named in ("--batch-size 5 (the run has 4)", "--flip", "--seed 1 (the run has 0)"):
        assert named in err
    shutil.copytree(digits, "others")
    next(Path("others").rglob("*.png")).unlink()
    code, _, err = cli("train", "others", "-o", run, "--resume", "--steps", 10)
    assert (code, "images are not those" in err) == (1, True)
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 8  # a refusal changes nothing
    code, out, err = cli("train", digits, "--resume", "--steps", 12, "--json", "--precision", "fp32")
    result = json.loads(out)
    assert (code, result["run"], result["steps"]) == (0, "runs/digits", 12)
    assert "resuming at step 8" in err
    code, _, err = cli("train", digits, "--resume", "--steps", 11)
    assert (code, "--steps 11: the run has done 12" in err) == (2, True)
    assert cli("train", digits, "--steps", 2, *TRAIN, "--force", "-q") == (0, "runs/digits\n", "")
    assert (Path("runs/digits.old-1") / "checkpoints" / "step-00000012").is_dir()


def test_what_train_left_out_is_named(cli, digits, tmp_path):
    shutil.copytree(digits, "mixed")
    Path("mixed/bad.png").write_bytes(b"x")
    code, _, err = cli("train", "mixed", "--steps", 1, *TRAIN)
    assert code == 0
    assert "1 left out" in err
    assert "bad.png" in err
    assert "few images (60)" in err


def test_unfit_requests_are_refused_before_anything_is_made(cli, digits):
    code, _, err = cli("train", digits, "--size", 30, "--preset", "tiny")
    assert (code, "--size 30" in err, "Hint: Try --size 32." in err) == (2, True, True)
    Path("folder").mkdir()
    Path("folder/file").touch()
    assert cli("train", digits, "-o", "folder")[0] == 1
    assert not Path("runs").exists()


def test_the_same_line_starts_a_run_and_goes_on_with_it(cli, digits):
    for steps, said in ((2, "training, run"), (4, "resuming at step 2"), (4, "resuming at step 4")):
        code, _, err = cli("train", digits, "--resume", "--steps", steps, *TRAIN)
        assert (code, said in err) == (0, True), err


def test_a_second_signal_stops_at_once(monkeypatch):
    """But one that comes with the first is the same: launchers and batch systems send it to all."""
    from ddpm_cli.cli import follow
    from ddpm_cli.cli.follow import _stop_signals

    before = signal.getsignal(signal.SIGTERM)
    with _stop_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        monkeypatch.setattr(follow, "_ONE_SIGNAL", 0.0)
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_is_safe_and_goes_on(ddpm, digits, number):
    """Ctrl-C: exit 130 after a checkpoint, and no message of a crash; SIGTERM: 143; a terminal that is closed: 129."""
    command = [sys.executable, "-m", "ddpm_cli", "train", str(digits), "--steps", "1M", *map(str, TRAIN)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=heed_signals)
    metrics = Path("runs/digits/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, b"")
    assert b"--resume" in err
    assert b"Traceback" not in err
    [path] = runs.checkpoints(Path("runs/digits"))
    step = checkpoint.load_training(path).step
    assert step > 0
    result = ddpm("train", digits, "--resume", "--steps", step + 2)
    assert result.returncode == 0, result.stderr
    assert f"resuming at step {step}".encode() in result.stderr


def test_a_killed_run_goes_on_from_its_last_checkpoint(ddpm, digits):
    command = [
        sys.executable,
        "-m",
        "ddpm_cli",
        "train",
        str(digits),
        "--steps",
        "1M",
        "--save-every",
        "3",
        *map(str, TRAIN),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = Path("runs/digits")
    deadline = time.monotonic() + 60
    while len(runs.checkpoints(run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    newest = runs.checkpoints(run)[-1]
    step = checkpoint.load_training(newest).step
    result = ddpm("train", digits, "--resume", "--steps", step + 3)
    assert result.returncode == 0, result.stderr
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert [path.name for path in run.rglob(".*")] == [".lock"]  # nothing half-written is left


def test_a_reader_of_stderr_that_goes_away_costs_nothing(digits):
    """Ctrl-C in `ddpm train … 2>&1 | tee log` ends tee as well."""
    command = [sys.executable, "-m", "ddpm_cli", "train", str(digits), "--steps", "1M", *map(str, TRAIN)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr
    metrics = Path("runs/digits/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert len(runs.checkpoints(Path("runs/digits"))) == 1


def test_a_log_on_a_full_disk_costs_nothing(digits):
    command = [sys.executable, "-m", "ddpm_cli", "train", str(digits), "--steps", "4", *map(str, TRAIN)]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(command, stderr=full, stdout=subprocess.PIPE, timeout=60)
    assert (process.returncode, process.stdout) == (0, b"runs/digits\n")


def test_a_terminal_that_goes_away_costs_nothing(digits):
    """Its end is a signal, and then an error for whatever is written to it."""
    main, other = pty.openpty()
    command = [sys.executable, "-m", "ddpm_cli", "train", str(digits), "--steps", "1M", *map(str, TRAIN)]
    terminal = {"stdin": other, "stdout": other, "stderr": other}
    process = subprocess.Popen(command, **terminal, start_new_session=True, preexec_fn=heed_signals)
    os.close(other)
    metrics = Path("runs/digits/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(main, False)
            os.read(main, 65536)
        time.sleep(0.05)
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    assert len(runs.checkpoints(Path("runs/digits"))) == 1


def test_training_at_a_terminal_shows_a_bar(digits):
    code, seen = in_a_terminal("train", digits, "--steps", 30, "--sample-every", 30, *TRAIN)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    for shown in ("30/30", "loss", "images/s", "ETA"):
        assert shown in plain


def test_ctrl_c_in_sampling_is_said(small_model):
    command = [sys.executable, "-m", "ddpm_cli", "sample", "-m", str(small_model), "--n", "1M", "-o", "images/"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=heed_signals)
    deadline = time.monotonic() + 60
    while not Path("images/000000.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert b"interrupted: sampling" in err
    assert not list(Path("images").glob(".ddpm-*"))
    for path in Path("images").glob("*.png"):
        assert picture(path).size == (8, 8)
