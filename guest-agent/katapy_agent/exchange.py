"""Brings stream connections of the host together with the calls that name them, whichever comes first.

A connection says its name first: one byte with the length, then the name. Everything after that is the stream's own
and is not read here.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from katapy_agent import vsock
from katapy_agent.errors import AlreadyExists, InvalidArgument, Timeout

NAME_MAX: Final = 128
_DEADLINE: Final = 10.0  # seconds for a name to arrive, and for a named connection
_NAMELESS_MAX: Final = 64
_UNCLAIMED_MAX: Final = 1536  # of as many processes as a container may have of the host's


class Exchange:
    """Owns connections from their arrival until `claim` hands them out."""

    def __init__(self) -> None:
        self._unclaimed: dict[str, socket.socket] = {}
        self._claims: dict[str, asyncio.Future[socket.socket]] = {}
        self._nameless: set[asyncio.Task[None]] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections on ``listener``, for ever."""
        async for connection in vsock.accept(listener):
            # They come in one burst, and each is the host's: the rest wait to be accepted.
            while len(self._nameless) >= _NAMELESS_MAX:
                await asyncio.wait(self._nameless, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.create_task(self.introduce(connection))
            self._nameless.add(task)
            task.add_done_callback(self._nameless.discard)

    async def claim(self, name: str) -> socket.socket:
        """Return the connection called ``name``, waiting for it if it has not come yet.

        It does not block and belongs to the caller. Raises InvalidArgument for a name that cannot be, AlreadyExists
        when another call waits for it, Timeout when no such connection comes.
        """
        if not 0 < len(name.encode()) <= NAME_MAX:
            raise InvalidArgument(f"stream name must be 1 to {NAME_MAX} bytes, not {len(name.encode())}")
        if (connection := self._unclaimed.pop(name, None)) is not None:
            return connection
        if name in self._claims:
            raise AlreadyExists(f"stream {name!r} is already waited for")
        self._claims[name] = arrival = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(asyncio.shield(arrival), _DEADLINE)
        except BaseException as error:
            if arrival.done() and not arrival.cancelled():
                arrival.result().close()
            if isinstance(error, TimeoutError):
                raise Timeout(f"no connection for stream {name!r} within {_DEADLINE:g} s") from None
            raise
        finally:
            del self._claims[name]

    async def introduce(self, connection: socket.socket) -> None:
        """Take over a connection that is about to say its name; it does not block."""
        try:
            name = await asyncio.wait_for(_read_name(connection), _DEADLINE)
        except (OSError, EOFError, ValueError, TimeoutError):
            connection.close()
            return
        arrival = self._claims.get(name)
        if arrival is not None and not arrival.done():
            arrival.set_result(connection)
        elif arrival is not None or name in self._unclaimed:
            connection.close()
        else:
            self._keep(name, connection)

    def _keep(self, name: str, connection: socket.socket) -> None:
        self._unclaimed[name] = connection
        if len(self._unclaimed) > _UNCLAIMED_MAX:
            self._unclaimed.pop(next(iter(self._unclaimed))).close()


async def _read_name(connection: socket.socket) -> str:
    length = (await _read_exactly(connection, 1))[0]
    if not 0 < length <= NAME_MAX:
        raise ValueError(length)
    return (await _read_exactly(connection, length)).decode()


async def _read_exactly(connection: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        more = await loop.sock_recv(connection, count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
