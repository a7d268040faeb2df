"""Writes down what tests did, each line as it happens: what began, how it ended, and on what sort of host.

The lines are JSON objects in the file that KATAPY_RECORD names. They go into the table of docs/testing.md, and say of a
lab that hangs where it does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_KATAPY = Path(sys.executable).with_name("katapy")
_CHECK_DEADLINE = 120.0
_WHY_CHARACTERS = 3000


class Recorder:
    """A plugin of pytest. ``nothing_skipped``: a test that is skipped fails the run, as it was asked for by name."""

    def __init__(self, file: Path, *, nothing_skipped: bool) -> None:
        self._file = file
        self._nothing_skipped = nothing_skipped
        self._skipped: list[str] = []

    def _write(self, **line: object) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self._write(host=describe_host(), starts=session.config.getoption("--starts", None))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write(collected=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(began=nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write(ended=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            # pytest prints this at its end only, which a lab that hangs does not see.
            why = {"why": report.longreprtext[-_WHY_CHARACTERS:]} if report.outcome == "failed" else {}
            self._write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 1), **why)
        if report.outcome == "skipped":
            self._skipped.append(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._nothing_skipped and self._skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._nothing_skipped and self._skipped:
            terminalreporter.line(f"nothing may be skipped here: {', '.join(self._skipped)}", red=True)


def describe_host() -> dict[str, str]:
    """Return what katapy runs on here: accelerator, vsock device, cgroups and the guest's kernel."""
    done = subprocess.run([_KATAPY, "check", "--format", "json"], capture_output=True, timeout=_CHECK_DEADLINE)
    found = {each["name"]: each["detail"] for each in json.loads(done.stdout)}
    first = {name: found[name].split(maxsplit=1)[0].rstrip(":") for name in ("accelerator", "vsock")}
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    kernel = found["kernel"].rpartition("(")[2].rstrip(")")
    return {**first, "cgroup": "v2" if unified else "v1", "kernel": kernel}
