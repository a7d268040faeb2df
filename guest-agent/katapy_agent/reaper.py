"""Reaps every process that ends under the agent, and says so to whoever watches it.

Pid 1 inherits all orphans, so it reaps by `waitpid(-1)` and nothing else in the agent may wait for a process. A
process is known by its pid only from a message that may come after its end: statuses that nobody watches are kept,
the newest few thousand, until they are claimed.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Final

_UNCLAIMED_MAX: Final = 4096


class Reaper:
    """The one that calls wait(2). All of it runs in the event loop's thread: there, a watched pid is no other's."""

    def __init__(self) -> None:
        self._watched: dict[int, Callable[[int], None]] = {}
        self._unclaimed: dict[int, int] = {}

    def start(self) -> None:
        """Reap on every SIGCHLD of this process, beginning now. Call in the running loop, in the main thread."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self.reap)
        self.reap()

    def watch(self, pid: int, ended: Callable[[int], None]) -> None:
        """Call ``ended(code)`` once when ``pid`` has ended, possibly before this returns.

        The code is its exit status, 0 to 255, or -N where signal N ended the process.
        """
        code = self._unclaimed.pop(pid, None)
        # A process that still exists has not been reaped: the status kept is that of an earlier owner of its pid.
        if code is None or _exists(pid):
            self._watched[pid] = ended
        else:
            ended(code)

    def reap(self) -> None:
        """Collect everything that has ended."""
        while True:
            try:
                pid, wait_status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._report(pid, os.waitstatus_to_exitcode(wait_status))

    def _report(self, pid: int, code: int) -> None:
        ended = self._watched.pop(pid, None)
        if ended is not None:
            ended(code)
            return
        self._unclaimed.pop(pid, None)
        self._unclaimed[pid] = code
        if len(self._unclaimed) > _UNCLAIMED_MAX:
            del self._unclaimed[next(iter(self._unclaimed))]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
