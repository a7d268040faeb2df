"""Relays name queries: whoever asks a resolver on the pod's loopback on the host asks here.

docker answers the names of a user network at an address of the container's loopback, inside the network namespace that
it made. The VM's loopback is another, so the guest has a listener at that address, and passes queries and answers over
a stream of the host's, each preceded by its length (RFC 1035, 4.2.2). The query's id tells which client an answer is
for, so each gets one of its own on the way.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import OrderedDict
from typing import Final

from katapy_agent.errors import InvalidArgument, doing

_PORT: Final = 53
_MESSAGE_MAX: Final = 65535
_HEADER: Final = 12
_WAITING_MAX: Final = 512
_LENGTH: Final = struct.Struct("!H")


class Resolver:
    """A listener at one address; it ends with the stream."""

    def __init__(self, address: bytes, stream: socket.socket) -> None:
        """Listen at ``address``, 127.0.0.0/8, and relay over ``stream``, which is owned from here on.

        Raises InvalidArgument, AlreadyExists where somebody listens there.
        """
        if len(address) != 4 or address[0] != 127:
            stream.close()
            raise InvalidArgument("a resolver's address is one of the loopback")
        self._stream = stream
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            with doing(f"listen for name queries at {socket.inet_ntoa(address)}"):
                self._listener.bind((socket.inet_ntoa(address), _PORT))
        except BaseException:
            self.close()
            raise
        self._waiting: OrderedDict[bytes, tuple[bytes, tuple[str, int]]] = OrderedDict()
        self._last = 0

    async def run(self) -> None:
        """Relay until the host hangs up."""
        try:
            async with asyncio.TaskGroup() as both:
                asking = both.create_task(self._ask())
                await self._answer()
                asking.cancel()
        finally:
            self.close()

    def close(self) -> None:
        """Close both sockets. Idempotent."""
        self._stream.close()
        self._listener.close()

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            query, client = await loop.sock_recvfrom(self._listener, _MESSAGE_MAX)
            if len(query) < _HEADER:
                continue
            self._last = self._last + 1 & 0xFFFF
            own = _LENGTH.pack(self._last)
            self._waiting[own] = query[:2], client
            self._waiting.move_to_end(own)
            if len(self._waiting) > _WAITING_MAX:
                self._waiting.popitem(last=False)
            await loop.sock_sendall(self._stream, _LENGTH.pack(len(query)) + own + query[2:])

    async def _answer(self) -> None:
        loop = asyncio.get_running_loop()
        while length := await self._exactly(_LENGTH.size):
            answer = await self._exactly(*_LENGTH.unpack(length))
            asked = self._waiting.pop(answer[:2], None)
            if asked is not None:
                number, client = asked
                try:
                    await loop.sock_sendto(self._listener, number + answer[2:], client)
                except OSError:  # it has gone
                    continue

    async def _exactly(self, count: int) -> bytes:
        """Return so many bytes, or none where the stream has ended."""
        data = b""
        while len(data) < count:
            try:
                more = await asyncio.get_running_loop().sock_recv(self._stream, count - len(data))
            except OSError:
                return b""
            if not more:
                return b""
            data += more
        return data
