"""QEMU's control protocol, the only module that knows the library ``qemu.qmp``; its types and errors stay inside.

Source: QEMU's docs/interop/qmp-spec.rst. The library is imported on the first ``connect``, in a thread: it costs as
much time as QEMU takes to start, and both happen at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from katapy.errors import Timeout, Unavailable

if TYPE_CHECKING:
    from qemu.qmp import QMPClient
    from qemu.qmp.message import Message

_EVENTS_KEPT: Final = 16
_MESSAGE_MAX: Final = 1 << 20
_CLOSE_DEADLINE: Final = 1.0
_MIGRATION: Final = "MIGRATION"
# MigrationStatus in qapi/migration.json: those that nothing follows
_MIGRATION_ENDS: Final = ("completed", "failed", "cancelled")


class Qmp:
    """A connection in command mode; see ``connect``."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._events: deque[tuple[str, object]] = deque(maxlen=_EVENTS_KEPT)
        self._migration: asyncio.Queue[str] = asyncio.Queue()
        self._unplugged: dict[str, asyncio.Event] = {}
        # The library keeps every accepted event for ever; its filter sees them all and accepts none.
        client.events.event_filter = self._note

    def _note(self, event: Message) -> bool:
        name, data = str(event["event"]), event.get("data")
        self._events.append((name, data))
        if name == _MIGRATION and isinstance(data, Mapping):
            self._migration.put_nowait(str(data.get("status")))
        if name == "DEVICE_DELETED" and isinstance(data, Mapping):
            self._unplugged.pop(str(data.get("device")), asyncio.Event()).set()
        return False

    async def migrated(self) -> str:
        """Wait for the end of a migration, whose capability ``events`` is on, and return its MigrationStatus."""
        while (status := await self._migration.get()) not in _MIGRATION_ENDS:
            pass
        return status

    async def unplug(self, device: str, *, timeout: float) -> None:
        """Ask the guest to let go of a device, and wait until it has.

        Raises Timeout where it does not within ``timeout`` seconds, else as ``execute`` does.
        """
        gone = self._unplugged.setdefault(device, asyncio.Event())
        await self.execute("device_del", {"id": device}, timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                await gone.wait()
        except TimeoutError as error:
            raise Timeout(f"the guest did not let go of {device} within {timeout:g} s") from error

    async def send(self, fd: int, name: str, *, timeout: float) -> None:
        """Give QEMU a duplicate of ``fd``, which commands know by ``name``. Raises as ``execute`` does."""
        self._client.send_fd_scm(fd)
        await self.execute("getfd", {"fdname": name}, timeout=timeout)

    def shutdown_reason(self) -> str | None:
        """Return why QEMU says that the guest stopped (ShutdownCause: guest-panic, guest-reset, …), if it has."""
        for name, data in reversed(self._events):
            if name == "SHUTDOWN" and isinstance(data, Mapping):
                return str(data.get("reason"))
        return None

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float) -> object:
        """Run one command and return its answer.

        Raises Timeout when there is none within ``timeout`` seconds, Unavailable when QEMU refuses or is gone.
        """
        from qemu.qmp import QMPError

        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise Timeout(f"QEMU did not answer {command} within {timeout:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise Unavailable(f"QEMU command {command} failed: {error}") from error

    async def ended(self) -> None:
        """Wait until QEMU, which has ended, is heard out: its last event may come after its process is gone."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_DEADLINE):
                while self._client.runstate.name == "RUNNING":
                    await self._client.runstate_changed()

    async def close(self) -> None:
        """Close the connection; how it had ended does not matter any more."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_CLOSE_DEADLINE):
                await self._client.disconnect()


async def connect(ours: socket.socket, *, name: str, timeout: float) -> Qmp:
    """Greet the QEMU at the other end of the connected socket ``ours``, which belongs to the connection from now on.

    Raises Timeout after ``timeout`` seconds, Unavailable when QEMU ends first.
    """
    module = await asyncio.to_thread(importlib.import_module, "qemu.qmp")
    make: Callable[[str, int], QMPClient] = module.QMPClient
    client = make(name, _MESSAGE_MAX)
    qmp = Qmp(client)
    try:
        async with asyncio.timeout(timeout):
            await client.connect(ours)
    except TimeoutError as error:
        raise Timeout(f"QEMU of {name} did not greet within {timeout:g} s") from error
    except module.QMPError as error:
        raise Unavailable(f"QEMU of {name} ended before it greeted") from error
    except AssertionError:
        # The library asserts that the session which it has just established still is one. QEMU may have ended since,
        # which the next command tells, and shutdown_reason().
        if client.runstate is not module.Runstate.DISCONNECTING:
            raise
    return qmp
