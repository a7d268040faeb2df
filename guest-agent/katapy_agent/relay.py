"""Carries the host's gRPC connections from vsock, which gRPC does not speak, to the server's unix socket."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import Final

from katapy_agent import vsock
from katapy_agent.pump import Pump

_CONNECTIONS_MAX: Final = 64


async def serve(listener: socket.socket, path: str) -> None:
    """Join every connection that the host makes to ``listener`` with a new one to the unix socket at ``path``."""
    loop = asyncio.get_running_loop()
    connections = asyncio.Semaphore(_CONNECTIONS_MAX)
    async for outer in vsock.accept(listener):
        await connections.acquire()
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await loop.sock_connect(inner, path)
        release = partial(loop.call_soon_threadsafe, connections.release)
        Pump("relay in", outer.dup().detach(), inner.dup().detach())
        Pump("relay out", inner.detach(), outer.detach(), release)
