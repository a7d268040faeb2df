"""The children of the process that runs the tests."""

from __future__ import annotations

from pathlib import Path


def children() -> set[int]:
    """Return the pids of this process's children, dead ones that nobody has reaped among them.

    The kernel lists them by thread (proc(5), /proc/pid/task/tid/children). Where a thread ends meanwhile another one
    has its children, so all are asked again.
    """
    while True:
        try:
            return {
                int(pid)
                for thread in Path("/proc/self/task").iterdir()
                for pid in (thread / "children").read_text().split()
            }
        except (FileNotFoundError, ProcessLookupError):
            continue
