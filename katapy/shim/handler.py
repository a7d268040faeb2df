"""The attach protocol, translated to the sandbox."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from katapy.errors import NotFound
from katapy.sandbox.sandbox import Sandbox
from katapy.shim.attach import Attached

log = logging.getLogger(__name__)


class AttachHandler:
    """What AttachServer asks of a sandbox; ``done`` is set when its owner has gone and took the pod with it."""

    def __init__(self, sandbox: Sandbox, done: asyncio.Event) -> None:
        self._sandbox = sandbox
        self._done = done

    async def attach(self, container_id: str, exec_id: str, pid: int) -> Attached:
        """Give the streams of a process to the host process ``pid``, which stands in for it from now on."""
        process = self._sandbox.process(container_id, exec_id)
        streams = await process.take_streams()
        self._sandbox.attached(process, pid)
        return Attached(streams.terminal, streams.take())

    async def signal(self, container_id: str, exec_id: str, number: int) -> None:
        """Relay a signal; one that comes too late is dropped."""
        with suppress(NotFound):
            await self._sandbox.kill(container_id, exec_id, number, everyone=False)

    async def resize(self, container_id: str, exec_id: str, columns: int, rows: int) -> None:
        """Set the size of a terminal."""
        with suppress(NotFound):
            await self._sandbox.resize(container_id, exec_id, rows=rows, columns=columns)

    async def wait(self, container_id: str, exec_id: str) -> int:
        """Return the exit status of a process when it has ended."""
        return (await self._sandbox.process(container_id, exec_id).wait()).status

    async def owner_gone(self, container_id: str) -> None:
        """End a container whose foreground ``katapy run`` was killed: nobody else would."""
        log.warning("the owner of %s is gone: removing it", container_id)
        self._done.set()
