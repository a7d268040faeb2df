"""A stream of a forwarded connection, spoken as agent.proto has it (ForwardConnectionRequest), from either end."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final

_LENGTH: Final = struct.Struct("!I")


class Pieces:
    """One end."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self.stream = stream

    async def send(self, data: bytes) -> None:
        """Send data in one piece, or with none say that there will be no more."""
        await asyncio.get_running_loop().sock_sendall(self.stream, _LENGTH.pack(len(data)) + data)

    async def receive(self) -> bytes:
        """Return the next piece, none at the end that was said. Raises EOFError where the stream ends."""
        (length,) = _LENGTH.unpack(await self._exactly(_LENGTH.size))
        return await self._exactly(length)

    async def everything(self) -> bytes:
        """Return all until the end that was said."""
        data = bytearray()
        while piece := await self.receive():
            data += piece
        return bytes(data)

    async def hang_up(self) -> None:
        """Wait until the stream ends, and what is in it no more. Raises OSError where the other end breaks it."""
        while await asyncio.get_running_loop().sock_recv(self.stream, 1 << 16):
            pass

    async def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = await asyncio.get_running_loop().sock_recv(self.stream, count - len(data))
            if not more:
                raise EOFError
            data += more
        return bytes(data)
