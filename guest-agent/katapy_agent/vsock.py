"""Listens for the host on vsock and lets nobody else in.

A connection is the host's when it comes from CID 2 and from a reserved port: only root on the host can bind those,
and the host promises to. Everyone else, containers in this guest first of all, is closed at once. In tests the
listeners are unix sockets, which their directory's mode guards.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Final

CONTROL_PORT: Final = 1024
STDIO_PORT: Final = 1025
_RESERVED_PORTS: Final = 1024
_BACKLOG: Final = 128


def listen(port: int) -> socket.socket:
    """Return a listening vsock socket; there need not be a vsock device yet. Raises OSError."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(_BACKLOG)
    return listener


async def accept(listener: socket.socket) -> AsyncIterator[socket.socket]:
    """Yield connections from the host, for ever. They do not block, and belong to the caller."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, peer = await loop.sock_accept(listener)
        except ConnectionError:  # gone before it was accepted
            continue
        if is_host(listener.family, peer):
            yield connection
        else:
            connection.close()


def is_host(family: int, peer: object) -> bool:
    """Tell whether a connection from ``peer``, as accept(2) gave it, is the host's."""
    if family != socket.AF_VSOCK:
        return True
    match peer:
        case (socket.VMADDR_CID_HOST, int(port)):
            return 0 <= port < _RESERVED_PORTS
    return False
