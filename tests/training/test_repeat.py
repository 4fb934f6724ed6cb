"""The command that trains a run again has its settings."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_cli.cli.app import build
from ddpm_cli.config import RunConfig
from ddpm_cli.data.survey import Survey
from ddpm_cli.training import request
from ddpm_cli.training.plan import Base, plan_run
from ddpm_cli.training.presets import PRESETS
from ddpm_cli.training.repeat import command_of

OTHER = Survey(9, 9, 0, 64, 64)  # other images, so that nothing is right by chance


def planned(preset: str = "tiny", base: Base | None = None, **options: dict) -> RunConfig:
    found = Survey(9, 9, 9, 28, 28)
    return plan_run(found, "/images/a b.zip", on_gpu=False, preset="auto" if base else preset, base=base, **options)


def parsed(command: str, monkeypatch) -> request.Request:
    """What `ddpm train` makes of a command."""
    program, name, *args = shlex.split(command)
    assert (program, name) == ("ddpm", "train")
    found = []
    monkeypatch.setattr("ddpm_cli.cli.train._train", lambda request, *rest: found.append(request) or 0)
    build("train")(args=args, standalone_mode=False)
    return found[0]


CASES = [
    {},
    {"preset": "cifar10", "data": {"size": 16, "channels": 3}},
    {"data": {"flip": False, "fit": "pad", "background": "#ff0000", "holdout": 0.1}},
    {"train": {"steps": 77, "batch_size": 5, "lr": 3e-4, "seed": 9, "accumulate": 2, "keep": 1, "keep_every": 50}},
    {"train": {"save_every": 3, "sample_every": 4, "lr_decay": 0.25}},
    {"train": {"steps": 40, "sample_every": 500}},
    {"train": {"lr_decay": 0.0}},
    {"train": {"loss": "simple"}},
    {"train": {"loss": "min-snr"}},
    {"objective": {"prediction": "mean", "variance": "learned", "schedule": "cosine"}, "train": {"loss": "vlb"}},
    {"objective": {"variance": "learned-range", "timesteps": 100}},
    {"objective": {"schedule": "quad", "beta_end": 0.03}},
    {"objective": {"schedule": "const", "beta_end": 0.01, "timesteps": 50}},
    {"objective": {"schedule": "jsd", "prediction": "epsilon"}},
    {"objective": {"beta_start": 1e-5}, "preset": "cifar10"},
    {"objective": {"schedule": "learned", "timesteps": 40}, "train": {"loss": "vlb"}},
]


@pytest.mark.parametrize("options", CASES)
def test_the_command_gives_the_settings_of_the_run(monkeypatch, options):
    config = planned(**options)
    asked = parsed(command_of(config, Path("runs/my run")), monkeypatch)
    assert (asked.images, asked.folder) == (["/images/a b.zip"], Path("runs/my run"))
    again = plan_run(OTHER, *asked.images, True, asked.preset, asked.data, asked.train, asked.objective)
    assert again == config


@pytest.mark.parametrize("steps", [5, 77, 5000])
def test_intervals_that_nobody_chose_are_not_named(steps):
    """A --sample-every that is named is kept, also where previews take too long."""
    base = Base("/runs/old", PRESETS["cifar10"].unet(16, 1), PRESETS["cifar10"].schedule())
    for config in (planned(train={"steps": steps}), planned(base=base, train={"steps": steps})):
        assert "-every" not in command_of(config, Path("x"))


def test_a_fine_tuned_run(monkeypatch):
    preset = PRESETS["cifar10"]
    base = Base("/runs/old/checkpoints/step-00000010", preset.unet(16, 1), preset.schedule())
    config = planned(base=base, train={"steps": 12, "loss": "vlb"})
    asked = parsed(command_of(config, Path("new")), monkeypatch)
    assert (asked.start_from, asked.preset, asked.objective) == (base.address, None, {})
    assert plan_run(OTHER, *asked.images, False, "auto", asked.data, asked.train, base=base) == config


def test_a_fine_tuned_run_that_learns_its_betas(monkeypatch):
    learned = {"objective": {"schedule": "learned"}, "train": {"loss": "vlb"}}
    first = planned(**learned)
    base = Base("/runs/old", first.unet, first.schedule)
    config = planned(base=base, **learned)
    asked = parsed(command_of(config, Path("new")), monkeypatch)
    again = plan_run(OTHER, *asked.images, False, "auto", asked.data, asked.train, asked.objective, base)
    assert again == config
    assert again.train.learn_betas


def test_settings_that_the_command_line_lacks_are_python():
    config = planned(train={"ema_decay": 0.99, "lr_warmup": 7}, data={"flip": False})
    config = replace(config, data=replace(config.data, images=("a", "b")))
    text = command_of(config, Path("runs/x"))
    called = []
    exec(text.replace("from ddpm_cli import train", ""), {"train": lambda *a, **k: called.append((a, k))})
    [((images, folder), settings)] = called
    assert (images, folder) == (["a", "b"], "runs/x")
    data = {key: settings.pop(key) for key in ("size", "channels", "flip")}
    again = plan_run(OTHER, ("a", "b"), False, settings.pop("preset"), data, settings)
    assert again == config


def test_a_list_of_betas_has_no_option():
    config = planned()
    betas = tuple(0.001 * (i + 1) for i in range(20))
    schedule = replace(config.schedule, trained_betas=betas, num_train_timesteps=20)
    assert "--schedule" not in command_of(replace(config, schedule=schedule), Path("x"))
