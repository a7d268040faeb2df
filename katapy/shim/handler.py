"""The attach protocol, translated to the sandbox."""

from __future__ import annotations

import signal
from contextlib import suppress

from katapy.errors import KatapyError, NotFound
from katapy.sandbox.sandbox import Sandbox
from katapy.shim.attach import Attached
from katapy.state import Status


class AttachHandler:
    """What AttachServer asks of a sandbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def attach(self, container_id: str, exec_id: str, pid: int) -> Attached:
        """Give the streams of a process to the host process ``pid``, which stands in for it from now on.

        Waits for a container that is yet to be created: its hooks must be told the pid.
        """
        process = await self._sandbox.expect(container_id, exec_id)
        self._sandbox.announced(process, pid)
        streams = await process.take_streams()
        return Attached(streams.terminal, streams.take())

    async def signal(self, container_id: str, exec_id: str, number: int) -> None:
        """Relay a signal; one that comes too late is dropped."""
        with suppress(NotFound):
            await self._sandbox.kill(container_id, exec_id, number, everyone=False)

    async def resize(self, container_id: str, exec_id: str, columns: int, rows: int) -> None:
        """Set the size of a terminal."""
        with suppress(NotFound):
            await self._sandbox.resize(container_id, exec_id, rows=rows, columns=columns)

    async def wait(self, container_id: str, exec_id: str) -> tuple[int, int]:
        """Return the exit status of a process, and the signal that ended it, when it has ended."""
        end = await self._sandbox.process(container_id, exec_id).wait()
        return end.status, end.signal

    async def detached(self, container_id: str, exec_id: str) -> None:
        """Note that the streams of a process are done with; an exec is forgotten by that when it has ended.

        But not one of an engine's, which deletes it itself.

        A process whose stand-in has died has ended for whoever watches that, so it must not go on.
        """
        with suppress(NotFound):
            process = self._sandbox.process(container_id, exec_id)
            process.released.set()
            if process.status is not Status.STOPPED:
                with suppress(KatapyError):
                    await self._sandbox.kill(container_id, exec_id, signal.SIGKILL, everyone=not exec_id)
            if exec_id and process.stdio.attached:
                await process.exited.wait()
                await self._sandbox.delete(container_id, exec_id)
