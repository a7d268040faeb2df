"""One process that the host asked for, a container's init or an exec, from its first fork to its exit status."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping

from katapy_agent.errors import Internal, InvalidArgument, NotFound, Unavailable
from katapy_agent.launcher import Console, Control, Forked, Launcher, Ready
from katapy_agent.reaper import Reaper
from katapy_agent.stdio import Stdio

_SIGNAL_MAX = 64


class Process:
    """A process that exists, or did. Owns its streams."""

    def __init__(self, pid: int, stdio: Stdio, control: Control) -> None:
        self.pid = pid
        self.stdio = stdio
        self.exit_status: int | None = None
        self.ended_by = 0  # a signal, 0 for none
        self._control = control
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @classmethod
    async def build(
        cls,
        launcher: Launcher,
        reaper: Reaper,
        plan: Mapping[str, object],
        stdio: Stdio,
        joined: int | None = None,
    ) -> Process:
        """Start a process that follows ``plan`` and return it when it waits to execute its program.

        Raises the process's own KatapyError when a step of its plan fails. ``stdio`` becomes the process's; after an
        exception it is still the caller's. ``joined`` is a pidfd that the plan needs.
        """
        try:
            control = launcher.launch(plan, stdio.open_pipes(), joined)
        finally:
            stdio.close_pipes()
        try:
            return await cls._build(control, reaper, stdio)
        except BaseException:
            control.close()
            raise

    @classmethod
    async def _build(cls, control: Control, reaper: Reaper, stdio: Stdio) -> Process:
        process: Process | None = None
        while True:
            match await control.report():
                case Forked(pid) if process is None:
                    process = cls(pid, stdio, control)
                    reaper.watch(pid, process._reaped)
                case Console(master):
                    stdio.attach(master)
                case Ready() if process is not None:
                    return process
                case None:
                    # Not by itself: it would have reported why.
                    raise Unavailable("process was killed before it executed its program")
                case _:
                    raise Internal("process reported out of order while it was built")

    async def execute(self) -> None:
        """Let the process execute its program and return when it has, or is dead. Raises KatapyError if it cannot."""
        self._control.start()
        try:
            if await self._control.report() is not None:
                raise Internal("process reported out of order while it was started")
        finally:
            self._control.close()

    def abandon(self) -> None:
        """Kill it, if it lives: nobody knows of it."""
        if self.exit_status is None:
            os.kill(self.pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal, 1 to 64. Raises NotFound when the process has ended."""
        check_signal(number)
        # The agent reaps in this thread only, so a pid without an exit status is still this process.
        if self.exit_status is not None:
            raise NotFound("os: process already finished")
        os.kill(self.pid, number)

    async def wait(self) -> int:
        """Wait for the end and return the exit status: 0 to 255, 128 + N where signal N ended the process."""
        return await asyncio.shield(self._ended)

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call ``call`` from the event loop once the process has ended."""
        self._ended.add_done_callback(lambda _future: call())

    def _reaped(self, code: int) -> None:
        self.ended_by = max(-code, 0)
        self.exit_status = code if code >= 0 else 128 - code
        self.stdio.finish()
        self._ended.set_result(self.exit_status)


def check_signal(number: int) -> None:
    """Raise InvalidArgument unless ``number`` is a signal's."""
    if not 1 <= number <= _SIGNAL_MAX:
        raise InvalidArgument(f"there is no signal {number}")
