"""The selection of tests in two labs side by side: which runs of pytest each has, and both of them at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final, NamedTuple

from features import FEATURES, HARDWARE

# Of the second lane, chosen so that both take as long; tests that need the same template are in the same one.
_SECOND: Final = (
    "run and exit status",
    "limits of memory (OOM), pids, devices",
    "cgroups of the host",
    "networks through taps",
    "containerd",
    "cleanup after kill -9",
    "CIDs of the kernel's vsock",
    "vhost-net",
    "systemd makes the cgroups",
)
# What is worth a second run, on the vsock device that most hosts with KVM do not use.
_WITH_OWN_VSOCK: Final = ("tests/functional/test_run.py::test_detach_exec_kill_delete",)

LANES: Final = ("pods", "engines")


class Selected(NamedTuple):
    """One run of pytest: its name, the ``vsock`` of katapy's configuration, and node ids."""

    name: str
    vsock: str
    selected: list[str]


def runs_of(lane: str) -> list[Selected]:
    """Return the runs of a lane, one of `LANES`."""
    features = FEATURES | HARDWARE
    if lane == "engines":
        own = Selected("user-vsock", "user", list(_WITH_OWN_VSOCK))
        return [Selected("kernel-vsock", "auto", _tests_of(features, _SECOND)), own]
    return [Selected("kernel-vsock", "auto", _tests_of(features, [name for name in features if name not in _SECOND]))]


def _tests_of(features: dict[str, tuple[str, ...]], names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(test for name in names for test in features[name]))


def run_beside(program: Sequence[str], options: Sequence[str]) -> int:
    """Run a program once for each lane, with ``--lane`` and its name before the options; return the exit status.

    That is 0 if it is both times. What one prints comes line by line, with the name of its lane. They are gone
    afterwards, whatever happens.
    """
    with ExitStack() as stack:
        processes = []
        for lane in LANES:
            # Ends with us; and what interrupts us is for us to hand on.
            argv = ["setpriv", "--pdeathsig=TERM", "--", *program, f"--lane={lane}", *options]
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0
            )
            stack.callback(process.wait)
            printer = threading.Thread(target=_print_lines, args=(lane, process))
            printer.start()
            stack.callback(printer.join)
            stack.callback(process.terminate)
            processes.append(process)
        statuses = [process.wait() for process in processes]
        return next(filter(None, statuses), 0)


def _print_lines(lane: str, process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    prefix = f"{lane:{max(map(len, LANES))}} | ".encode()
    with process.stdout:
        for line in process.stdout:
            sys.stdout.buffer.write(prefix + line)
            sys.stdout.buffer.flush()
