"""`ddpm train`: its defaults, output, errors and files."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from conftest import picture
from ddpm_cli.config import RunConfig
from ddpm_cli.data.cache import cache_folder
from ddpm_cli.data.split import is_held_out, open_part
from ddpm_cli.files import read_config, read_json
from ddpm_cli.training import rehearsal

OPTIONS = ("--batch-size", 4, "--sample-every", 99)  # previews are slow, and the last one is always drawn


@pytest.fixture
def run(quick_run) -> Path:
    """A finished run that the test may change, in the default folder of a run of `digits`."""
    return Path(shutil.copytree(quick_run, "runs/digits"))


def test_a_run_and_samples_of_it(cli, digits):
    code, out, err = cli("train", digits, "--preset", "tiny", "--size", 8, "--steps", 2, "--no-flip", *OPTIONS)
    assert (code, out) == (0, "runs/digits\n")
    for shown in ("60 in ", "8x8 gray", "never mirrored", "tiny", "2 steps of 4", "cpu", "few images (60)"):
        assert shown in err
    run = Path("runs/digits")
    assert json.loads((run / "config.json").read_text())["train"]["batch_size"] == 4
    assert picture(run / "samples" / "step-00000002.png").size == (12 * 42, 12 * 42)
    sample = ("sample", "--n", 1, "--steps", 3)
    assert cli(*sample, "-o", "newest.png")[0] == 0  # from the newest run
    assert cli(*sample, "-m", run / "checkpoints" / "step-00000002", "-o", "named.png")[0] == 0
    assert Path("newest.png").read_bytes() == Path("named.png").read_bytes()
    assert cli(*sample, "--weights", "raw", "-o", "raw.png")[0] == 0


def test_a_run_that_exists_is_not_touched_without_resume_or_force(cli, digits, run):
    code, _, err = cli("train", digits)
    assert (code, "--resume" in err) == (1, True)
    code, out, _ = cli("train", digits, "--from", run, "--steps", 1, *OPTIONS, "--force")
    assert (code, out) == (0, "runs/digits\n")
    assert (Path("runs/digits.old-1") / "checkpoints" / "step-00000004").is_dir()


def test_resume_refuses_options_that_contradict_the_run(cli, digits, run):
    before = (run / "config.json").read_text()
    code, _, err = cli("train", digits, "--resume", "--batch-size", 5, "--flip", "--seed", 1)
    assert code == 2
    for named in ("--batch-size 5 (the run has 4)", "--flip (the run has --no-flip)", "--seed 1 (the run has 0)"):
        assert named in err
    for flags in ((), ("--dry-run",)):
        code, out, err = cli("train", digits, "--resume", "--steps", 3, *flags)
        assert (code, out) == (2, "")
        assert "--steps 3: the run has done 4 already" in err
    shutil.copytree(digits, "others")
    next(Path("others").rglob("*.png")).unlink()
    code, _, err = cli("train", "others", "-o", run, "--resume", "--steps", 10)
    assert (code, "images are not those" in err) == (1, True)
    assert (run / "config.json").read_text() == before


def test_held_out_images_are_not_trained_on(cli, digits, quick_model):
    options = ("--from", quick_model, *OPTIONS, "-o", "run")
    code, _, err = cli("train", digits, *options, "--steps", 2, "--holdout", 0.3)
    assert code == 0, err
    settings = read_config(RunConfig, Path("run/config.json")).data
    train, held = (open_part(settings, cache_folder(), held_out)[0] for held_out in (False, True))
    assert len(train) + len(held) == 60
    assert len(held) > 5
    assert f"{len(train)} in {digits}, 0 left out, {len(held)} held out" in " ".join(err.split())
    assert f"few images ({len(train)})" in err
    model = json.loads(Path("run/checkpoints/step-00000002/ddpm.json").read_text())
    assert (model["images"]["count"], model["images"]["holdout"]) == (len(train), 0.3)
    trained = read_json(Path("run/checkpoints/step-00000002/training/state.json"))
    assert trained["images"] == train.fingerprint
    assert re.search(r"held out +0\.3 of all images", cli("info", "run")[1])
    assert "| held out | 0.3 of all images |" in Path("run/checkpoints/step-00000002/README.md").read_text()

    # The choice stays with the run, also where it is not repeated.
    code, _, err = cli("train", digits, *options, "--steps", 3, "--holdout", 0.2, "--resume")
    assert (code, "--holdout 0.2 (the run has 0.3)" in err) == (2, True)
    code, _, err = cli("train", digits, *options, "--steps", 3, "--resume")
    assert (code, f"{len(held)} held out" in " ".join(err.split())) == (0, True)
    assert read_json(Path("run/checkpoints/step-00000003/training/state.json"))["images"] == train.fingerprint
    code, out, err = cli("train", digits, *options, "--steps", 9, "--resume", "--dry-run", "--json")
    plan = json.loads(out)
    assert (code, plan["images"], plan["held_out"]) == (0, len(train), len(held))


def test_the_size_is_chosen_without_the_held_out_images(cli, digits, tmp_path):
    """One large image among many: where it is held out, all others are squares of 28 pixels."""
    shutil.copytree(digits, "mixed")
    large = next(f"{i}.png" for i in range(99) if is_held_out(f"{i}.png", 0.1))
    Image.new("RGB", (64, 32)).save(f"mixed/{large}")
    sizes = []
    for holdout in (0, 0.1):
        run = ("-o", str(holdout), "--steps", 1, "--batch-size", 1, "-q")
        code, _, err = cli("train", "mixed", "--holdout", holdout, *run)
        assert code == 0, err
        data = json.loads(Path(str(holdout), "config.json").read_text())["data"]
        sizes.append((data["size"], data["channels"], data["holdout"]))
    assert sizes == [(32, 3, 0), (28, 1, 0.1)]


def test_the_learning_rate_falls_to_0_over_the_steps_of_the_longest_run(cli, digits, quick_model):
    options = ("--from", quick_model, *OPTIONS, "-o", "run", "--lr", 0.5)
    code, _, err = cli("train", digits, *options, "--steps", 4, "--lr-decay", 0.5)
    assert (code, "lr 0.5 that falls to 0 from step 2, seed" in " ".join(err.split())) == (0, True), err
    settings = read_config(RunConfig, Path("run/config.json")).train
    assert settings.lr_decay == 0.5
    card = Path("run/checkpoints/step-00000004/README.md").read_text()
    assert "| learning rate at the end | falls to 0 over the last 50 % of the steps |" in card
    code, _, err = cli("train", digits, *options, "--steps", 8, "--resume")
    assert (code, "from step 4" in err) == (0, True), err

    code, _, err = cli("train", digits, *options, "--steps", 9, "--lr-decay", 0.1, "--resume")
    assert (code, "--lr-decay 0.1 (the run has 0.5)" in err) == (2, True)
    code, _, err = cli("train", digits, "-o", "other", "--lr-decay", 1.5)
    assert (code, "--lr-decay 1.5 is not a number from 0 to 1" in err) == (2, True)


def test_fractions_that_cannot_be_held_out(cli, digits):
    for fraction in ("1", "-0.1", "nan", "7"):
        code, _, err = cli("train", digits, "-o", "run", "--holdout", fraction)
        assert (code, "is not a number from 0 to below 1" in err) == (2, True), err
    one = next(digits.rglob("*.png"))
    code, _, err = cli("train", one, "-o", "run", "--holdout", 0.999999)
    assert (code, "none of the one image of" in err) == (2, True), err
    assert not Path("run").exists()


def test_a_note_says_that_no_image_is_held_out(cli, digits, quick_model):
    code, _, err = cli("train", digits, "--from", quick_model, *OPTIONS, "--steps", 1, "--holdout", 1e-9)
    assert (code, "--holdout 1e-09: no image is held out" in err) == (0, True), err


def test_resume_continues(cli, digits, run):
    code, out, err = cli("train", digits, "--resume", "--steps", 6, "--json", "--precision", "fp32")
    result = json.loads(out)
    assert (code, result["run"], result["steps"]) == (0, "runs/digits", 6)
    assert "resuming at step 4" in err


def test_a_resumed_run_keeps_the_interval_of_previews_that_was_chosen(cli, digits, quick_model):
    line = ("train", digits, "--from", quick_model, "--batch-size", 4, "-o", "run")
    assert cli(*line, "--steps", 4, "--sample-every", 3)[0] == 0
    code, _, err = cli(*line, "--steps", 9, "--resume")
    assert (code, "every 3 steps" in err) == (0, True), err
    assert {path.name for path in Path("run/samples").glob("*[0-9].png")} >= {f"step-0000000{n}.png" for n in (3, 6, 9)}


def test_intervals_that_nobody_chose_grow_with_the_steps(cli, digits, quick_model):
    line = ("train", digits, "--from", quick_model, "--batch-size", 4, "-o", "run")
    for steps, every in ((4, 1), (40, 10)):
        assert cli(*line, "--steps", steps, "--resume")[0] == 0
        settings = read_json(Path("run/config.json"))["train"]
        assert (settings["save_every"], settings["sample_every"]) == (every, every)


def test_places_that_cannot_be_written_are_named_before_the_work(cli, digits, quick_model, monkeypatch, tmp_path):
    Path("file").touch()
    line = ("train", digits, "--from", quick_model, *OPTIONS, "--steps", 1)
    code, _, err = cli(*line, "-o", "file/run")
    assert (code, "file/run: cannot be made: " in err, "fits into memory" in err) == (1, True, False), err
    monkeypatch.setenv("DDPM_CACHE_DIR", "file/cache")
    code, _, err = cli(*line, "-o", "run")
    assert (code, "file is not a folder, and decoded images" in err, "DDPM_CACHE_DIR" in err) == (1, True, True), err
    assert not Path("run").exists()


def test_the_same_command_starts_and_continues_a_run(cli, digits, quick_model):
    line = ("train", digits, "--resume", "--from", quick_model, *OPTIONS)
    for steps, shown in ((2, "training, run"), (4, "resuming at step 2"), (4, "runs/digits: has its 4 steps already")):
        code, _, err = cli(*line, "--steps", steps)
        assert (code, shown in err) == (0, True), err


def test_quiet(cli, digits, quick_model):
    assert cli("train", digits, "--from", quick_model, "--steps", 1, *OPTIONS, "-q") == (0, "runs/digits\n", "")


def test_files_that_were_left_out_are_named(cli, digits, quick_model):
    shutil.copytree(digits, "mixed")
    Path("mixed/bad.png").write_bytes(b"x")
    code, _, err = cli("train", "mixed", "--from", quick_model, "--steps", 1, *OPTIONS)
    assert code == 0
    assert "1 left out" in err
    assert "bad.png" in err


def test_bad_options_are_refused_before_anything_is_written(cli, digits):
    code, _, err = cli("train", digits, "--size", 30, "--preset", "tiny")
    assert (code, "--size 30" in err, "Hint: Try --size 32." in err) == (2, True, True)
    Path("folder").mkdir()
    Path("folder/file").touch()
    assert cli("train", digits, "-o", "folder")[0] == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_a_file_in_place_of_a_folder_is_found_at_the_start(cli, digits, run, name):
    shutil.rmtree(run / name)
    (run / name).touch()
    code, _, err = cli("train", digits, "--resume", "--steps", 6)
    assert (code, f"{run / name}: is not a folder, where a run needs one" in err) == (1, True), err
    assert [path.name for path in Path("cache").rglob("index.json")] == []  # no image was decoded


def test_a_folder_whose_name_is_not_utf8(cli, digits, quick_model, tmp_path):
    """The name is part of the model card, and must not break a checkpoint."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(digits, folder)
    code, _, err = cli("train", folder, "-o", "run", "--from", quick_model, "--steps", 1, *OPTIONS)
    assert code == 0, err
    assert "caf\ufffd" in Path("run/checkpoints/step-00000001/README.md").read_text()


def test_dry_run(cli, digits, tmp_path, monkeypatch):
    """It prints the plan, and writes nothing."""
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.0)
    options = ("--preset", "tiny", "--size", 8, "--batch-size", 4, "--steps", 40, "--precision", "fp32")
    code, out, err = cli("train", digits, "--dry-run", *options)
    assert code == 0, err
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert list(rows) == [
        "run",
        "images",
        "prepared",
        "model",
        "objective",
        "training",
        "previews",
        "device",
        "memory",
        "speed",
        "time",
        "disk",
    ]
    assert "1.2M parameters" in rows["model"]
    assert re.fullmatch(r"[\d.]+ steps/s, [\d.e+]+ images/s", rows["speed"])
    assert rows["time"].endswith("for 40 steps, with previews")
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_resumed_run(cli, digits, run, monkeypatch):
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.0)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    code, out, _ = cli("train", digits, "--dry-run", "--resume", "--steps", 400, "--json")
    plan = json.loads(out)
    assert (code, plan["start"], plan["config"]["train"]["steps"]) == (0, 4, 400)
    assert plan["seconds"] > 396 / plan["steps_per_second"] > 0
    weights = sum(path.stat().st_size for path in run.glob("checkpoints/step-00000004/*/*.safetensors"))
    assert plan["checkpoint_bytes"] == 16 * plan["parameters"] == pytest.approx(weights, rel=0.5)  # plus headers
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    assert cli("train", digits, "--dry-run")[0] == 1  # the run itself would be refused too
