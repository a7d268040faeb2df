"""What all tests of the host's side share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from record import Recorder


def pytest_configure(config: pytest.Config) -> None:
    named = os.environ.get("KATAPY_RECORD")
    if named:
        config.pluginmanager.register(Recorder(Path(named), nothing_skipped="KATAPY_LAB" in os.environ))


@pytest.fixture(scope="session", autouse=True)
def _signals_as_on_a_terminal() -> None:
    """A background job of a shell ignores SIGINT and SIGQUIT, nohup SIGHUP, and all that a test starts would too."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
