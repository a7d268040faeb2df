"""Relays connections from the host to ports of the pod's loopback, as `kubectl port-forward` needs it.

Whoever dials a port of the pod's loopback on the host is connected to the host's supervisor instead, for the VM's
loopback is another. The supervisor has a stream for each connection, and here is its other end: a connection to the
port that was dialled, inside the VM, whose network is the pod's.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Final, Self

from katapy_agent.errors import InvalidArgument, NotFound

_CONNECT_SECONDS: Final = 10.0
_CHUNK: Final = 64 << 10


async def connect(port: int, *, ipv6: bool) -> socket.socket:
    """Return a connection, which does not block, to a port of the loopback, by either family; ``ipv6`` is tried first.

    Raises InvalidArgument, NotFound where nobody takes it.
    """
    if not 0 < port < 1 << 16:
        raise InvalidArgument(f"not a port: {port}")
    places = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    failures = []
    for family, address in reversed(places) if ipv6 else places:
        try:
            return await _connect(family, address, port)
        except OSError as error:  # TimeoutError is one
            failures.append(os.strerror(error.errno).lower() if error.errno else "timed out")
    raise NotFound(f"cannot connect to port {port} of the loopback: {failures[0]}")


async def _connect(family: int, address: str, port: int) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        connection.close()
        raise
    return connection


class Forward:
    """A stream of the host's and the connection that it is for; both are closed at the end of the context."""

    def __init__(self, host: socket.socket, connection: socket.socket) -> None:
        self._host, self._connection = host, connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._host.close()
        self._connection.close()

    async def relay(self) -> None:
        """Copy both ways, each until its end; where one side breaks, nothing more is copied."""
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_copy(self._host, self._connection))
                both.create_task(_copy(self._connection, self._host))
        except* OSError:
            pass  # the close tells the other side


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK):
        await loop.sock_sendall(sink, data)
        # Neither waits where there is no need to, and others of this loop have work, too.
        await asyncio.sleep(0)
    sink.shutdown(socket.SHUT_WR)
