"""`ddpm` as the shell starts it, in new processes."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from ddpm_cli import __version__
from processes import GUARD

DDPM = str(Path(sys.executable).with_name("ddpm"))


def test_help_and_version():
    for command in ([DDPM], [sys.executable, "-m", "ddpm_cli"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        for name in ("train", "sample", "noise", "denoise-trace"):
            assert name in done.stdout
    assert subprocess.run([DDPM, "-V"], capture_output=True, check=True, text=True).stdout == f"ddpm {__version__}\n"


def test_ctrl_c_while_pytorch_is_imported(tmp_path):
    """Its extension modules may lose a KeyboardInterrupt, as this one does."""
    loading = "for _ in range(600):\n    try:\n        time.sleep(0.1)\n    except KeyboardInterrupt:\n        pass\n"
    (tmp_path / "torch.py").write_text(f"import time\nprint('importing', flush=True)\n{loading}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    usual = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a test in the background ignores it
    with subprocess.Popen(
        [DDPM, "sample", "-o", "x.png"], env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=usual
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(GUARD) == 130


def test_a_pipe_gives_the_same_as_files(cli, color_model, photo):
    line = '"$0" noise - --t 30 --format safetensors < "$1" | "$0" denoise-trace - -m "$2" -o - > piped.png'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, DDPM, photo, color_model], capture_output=True, text=True, timeout=GUARD
    )
    assert done.returncode == 0, done.stderr
    assert cli("noise", photo, "--t", 30, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    assert cli("denoise-trace", "n.safetensors", "-m", color_model, "-o", "trace.png")[0] == 0
    assert Path("piped.png").read_bytes() == Path("trace.png").read_bytes()
