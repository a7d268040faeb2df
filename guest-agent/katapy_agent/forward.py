"""Relays connections from the host to ports of the pod's loopback, as `kubectl port-forward` needs it.

Whoever dials a port of the pod's loopback on the host is connected to the host's supervisor instead, for the VM's
loopback is another. The supervisor has a stream for each connection, and here is its other end: a connection to the
port that was dialled, inside the VM, whose network is the pod's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from typing import Final

from katapy_agent.errors import InvalidArgument, NotFound

_CONNECT_SECONDS: Final = 10.0
_CHUNK: Final = 64 << 10
_LENGTH: Final = struct.Struct("!I")
# struct linger: what a close sends.
_RESET, _FAREWELL = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


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


async def relay(host: socket.socket, connection: socket.socket) -> None:
    """Relay until both directions have ended, or something breaks, and close both sockets."""
    # Until all has gone well: nobody is to take a half of something for the whole.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with host, connection:
        try:
            async with asyncio.TaskGroup() as tasks:
                said, ended = asyncio.Event(), asyncio.Event()
                taking = tasks.create_task(_take(host, connection, said, ended))
                await _give(connection, host, said)
                await ended.wait()
                taking.cancel()
        except* OSError:
            pass  # the close tells the host, and the reset the other end
        else:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FAREWELL)


async def _give(connection: socket.socket, host: socket.socket, said: asyncio.Event) -> None:
    """Pass on what a connection says, in pieces, and its end."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(connection, _CHUNK):
        await loop.sock_sendall(host, _LENGTH.pack(len(data)) + data)
        # Neither waits where there is no need to, and others of this loop have work, too.
        await asyncio.sleep(0)
    # Before it is: once it is, the stream may end at any moment.
    said.set()
    await loop.sock_sendall(host, _LENGTH.pack(0))


async def _take(host: socket.socket, connection: socket.socket, said: asyncio.Event, ended: asyncio.Event) -> None:
    """Pass on the host's pieces and, with ``ended``, their end; until the stream ends.

    Raises OSError where that comes before both ends were ``said``.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            left = await _receive_length(host)
        except ConnectionResetError:
            if said.is_set() and ended.is_set():
                return
            raise
        if not left:
            connection.shutdown(socket.SHUT_WR)
            ended.set()
        while left:
            data = await _receive(host, min(left, _CHUNK))
            await loop.sock_sendall(connection, data)
            left -= len(data)
            await asyncio.sleep(0)


async def _receive_length(host: socket.socket) -> int:
    header = b""
    while len(header) < _LENGTH.size:
        header += await _receive(host, _LENGTH.size - len(header))
    return int(_LENGTH.unpack(header)[0])


async def _receive(host: socket.socket, most: int) -> bytes:
    """Return what comes next. Raises ConnectionResetError at the end of the stream."""
    data = await asyncio.get_running_loop().sock_recv(host, most)
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return data
