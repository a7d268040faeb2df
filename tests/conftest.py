"""What all tests of the host's side share."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def _signals_as_on_a_terminal() -> None:
    """A background job of a shell ignores SIGINT and SIGQUIT, nohup SIGHUP, and all that a test starts would too."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
