"""The spinning of OpenMP threads is limited before PyTorch is loaded, and the user's settings are respected."""

import os
import subprocess
import sys

import pytest

from ddpm_cli.threads import limit_spinning


@pytest.mark.parametrize(("running", "expected"), [(1, "10000"), (1 + (os.cpu_count() or 1), "1000")])
def test_threads_sleep_sooner_on_a_busy_machine(tmp_path, running, expected):
    load = tmp_path / "loadavg"
    load.write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
    environment = {}
    limit_spinning(environment, load)
    assert environment == {"GOMP_SPINCOUNT": expected}


@pytest.mark.parametrize("chosen", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_the_users_choice_stays(tmp_path, chosen):
    environment = dict(chosen)
    limit_spinning(environment, tmp_path / "missing")
    assert environment == chosen


def test_it_is_set_before_torch_is_loaded():
    code = "import sys, os, ddpm_cli; print('torch' in sys.modules, 'GOMP_SPINCOUNT' in os.environ)"
    unset = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    found = subprocess.run([sys.executable, "-c", code], env=unset, capture_output=True, text=True, check=True)
    assert found.stdout == "False True\n"
