"""Memory does not grow with the images."""

import json
import subprocess
import sys

from conftest import ROOT


def test_ten_thousand_images_need_no_more_memory_than_one_thousand():
    """Their pixels have 31 MB; what may grow is their names, some 0.1 KB each, and what malloc does not give back."""
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--counts", "1000", "10000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (json.loads(line) for line in done.stdout.splitlines() if '"packing"' in line)
    assert many["packing"] < few["packing"] + 15
    assert many["training"] < few["training"] + 15
