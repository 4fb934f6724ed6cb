"""Signals to stop, sent to this process."""

import os
import signal
import sys

import pytest

from ddpm_cli import signals


def test_a_second_signal_stops_at_once(monkeypatch):
    """A signal right after the first one is ignored: launchers and batch systems may both send it."""
    monkeypatch.setattr(signals, "_ONE_SIGNAL", float("inf"))
    before = signal.getsignal(signal.SIGTERM)
    with signals.stop_signals([signal.SIGTERM], again=lambda number: sys.exit(128 + number)) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        monkeypatch.setattr(signals, "_ONE_SIGNAL", 0.0)
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
