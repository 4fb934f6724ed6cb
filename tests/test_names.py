"""Names of options: checked, and the nearest one is found."""

import pytest

from ddpm_cli import names
from ddpm_cli.cli.app import COMMANDS
from ddpm_cli.diffusion.samplers import SAMPLERS
from ddpm_cli.errors import UsageError
from ddpm_cli.names import check_name, nearest
from ddpm_cli.training.presets import PRESETS


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("smaple", COMMANDS, "sample"),
        ("trian", COMMANDS, "train"),
        ("denoise", COMMANDS, "denoise-trace"),
        ("neighbours", COMMANDS, "neighbors"),
        ("dpmpp", names.SAMPLERS, "dpm++"),
        ("DDIM", names.SAMPLERS, "ddim"),
        ("ddmi", names.SAMPLERS, "ddim"),
        ("langvin", names.SAMPLERS, "langevin"),
        ("log-snr", names.SPACINGS, "logsnr"),
        ("safe", names.FORMATS, "safetensors"),
        ("eps", names.PREDICTIONS, "epsilon"),
        ("large", names.VARIANCES, "fixed-large"),
        ("learned_range", names.VARIANCES, "learned-range"),
        ("l_simple", names.LOSSES, "simple"),
        ("cifar", PRESETS, "cifar10"),
        ("Cats", ["dogs", "CATS"], "CATS"),
        ("euler", names.SAMPLERS, None),
        ("generate", COMMANDS, None),
        ("d", names.SAMPLERS, None),
        ("", names.SAMPLERS, None),
        ("cats", [], None),
    ],
)
def test_nearest(word, known, meant):
    assert nearest(word, known) == meant


@pytest.mark.parametrize("known", [COMMANDS, PRESETS, names.SPACINGS, names.VARIANCES, names.SCHEDULES])
def test_every_typing_error_of_one_letter_is_mended(known):
    """Without a letter, or with two letters exchanged, a name of four letters or more is found again."""
    for name in known:
        if len(name) < 4 or name.isdigit():
            continue
        for i in range(1, len(name) - 1):
            assert nearest(name[:i] + name[i + 1 :], known) == name
            assert nearest(name[:i] + name[i + 1] + name[i] + name[i + 2 :], known) == name


def test_check_name():
    check_name("--sampler", "dpm++", names.SAMPLERS)
    with pytest.raises(UsageError) as error:
        check_name("--sampler", "ddmi", names.SAMPLERS)
    assert error.value.message == "--sampler ddmi is not one of ddpm, ddim, dpm++, langevin"
    assert error.value.hint == "Did you mean --sampler ddim?"
    with pytest.raises(UsageError) as error:
        check_name("--sampler", "euler", names.SAMPLERS)
    assert error.value.hint is None


def test_the_samplers_are_those_of_the_table():
    assert (*SAMPLERS,) == names.SAMPLERS
