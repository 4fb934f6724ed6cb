"""Help, wrong usage, and failures of any command."""

import io
import sys
from pathlib import Path

import pytest
from torch._dynamo.exc import BackendCompilerFailed

from ddpm_cli.cli.console import _stderr
from ddpm_cli.nn.unet import UNet


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
        (("train",), "IMAGES"),
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
        (("sample", "-o", ""), "the value after -o is empty"),
        (("sample", "--output=", "--n", "1"), "--output= has no value"),
        (("sample", "-o="), "-o= has no value"),
        (("info", "-m", ""), "the value after -m is empty"),
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
        (("sample", "-m", "nowhere"), "nowhere"),
        (("train", "nowhere"), "nowhere"),
        (("train", "nowhere", "--resume"), "nowhere"),
        (("train", ""), "the name of the images is empty"),
        (("noise", "none.png"), "none.png"),
        (("noise", "."), "."),
        (("denoise-trace", "none.png"), "none.png"),
    ],
)
def test_failures_exit_1_and_leave_nothing(cli, tmp_path, args, names):
    code, out, err = cli(*args, "-o", "result.png" if args[0] != "train" else "run")
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert names in err
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_named_twice_is_refused(cli):
    for command in ("info", "eval"):
        code, _, err = cli(command, "bundled:digits", "--model", "other")
        assert (code, "bundled:digits and --model other are two models" in err) == (2, True), err


def test_a_model_precedes_that_of_the_environment(cli, monkeypatch):
    monkeypatch.setenv("DDPM_MODEL", "other")
    assert cli("info", "bundled:digits")[0] == 0


def test_a_bug_shows_a_traceback_only_on_request(cli, digits, monkeypatch):
    def fail(*args: object) -> None:
        raise KeyError("a key that nobody expects")

    monkeypatch.setattr("ddpm_cli.cli.train._train", fail)
    code, _, err = cli("train", digits)
    assert (code, err.startswith("Error: KeyError: "), "Traceback" in err) == (1, True, False)
    monkeypatch.setenv("DDPM_DEBUG", "1")
    with pytest.raises(KeyError, match="nobody expects"):
        cli("train", digits)


def test_a_network_that_cannot_be_compiled(cli, small_model, monkeypatch):
    def no_compiler(*inputs):
        raise BackendCompilerFailed(print, RuntimeError("no C++ compiler\nfor long reasons"), None)

    monkeypatch.setattr(UNet, "compile", lambda self, **options: setattr(self, "_compiled_call_impl", no_compiler))
    code, out, err = cli("sample", "-m", small_model, "--compile", "-o", "a.png")
    assert (code, out) == (1, "")
    assert "Error: --compile: PyTorch cannot compile the network here (" in err
    assert "RuntimeError: no C++ compiler)\nHint: Leave it out. It needs a C++ compiler" in err
    assert not Path("a.png").exists()


def test_a_console_outlives_its_stderr(monkeypatch):
    """Python 3.13 and newer report errors of a file that is collected, and a program may have closed stderr."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, write_through=True))
    file = _stderr().file
    file.write("a note")
    assert written.getvalue() == b"a note"
    sys.stderr.close()
    file.close()  # what the collection of garbage does
