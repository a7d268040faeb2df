"""A relay between gRPC, which cannot speak vsock, and the guest agent's vsock connection.

The gRPC library dials a unix socket; this module accepts that one connection, and copies bytes between it and the
connected vsock stream. The socket's name is gone as soon as gRPC has connected: nobody else can use it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from katapy.errors import Unavailable

_NAME: Final = "agent.sock"
_CHUNK: Final = 64 * 1024


@asynccontextmanager
async def start_relay(directory: Path, guest: socket.socket) -> AsyncIterator[str]:
    """Relay one connection to ``guest`` (connected, non-blocking; closed at the end). Gives gRPC's target address."""
    parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # Through a descriptor: a path in sun_path has at most 107 bytes, the directory may be longer.
    address = f"/proc/self/fd/{parent}/{_NAME}"
    try:
        try:
            listener.bind(address)
            listener.listen(1)
        except OSError as error:
            raise Unavailable(f"cannot make {directory / _NAME}: {error.strerror}") from error
        task = asyncio.create_task(_serve(listener, guest, parent), name="agent relay")
        try:
            yield f"unix:{address}"
        finally:
            task.cancel()
            await asyncio.wait([task])
    finally:
        guest.close()
        listener.close()
        with suppress(FileNotFoundError):
            os.unlink(_NAME, dir_fd=parent)
        os.close(parent)


async def _serve(listener: socket.socket, guest: socket.socket, parent: int) -> None:
    loop = asyncio.get_running_loop()
    client, _ = await loop.sock_accept(listener)
    listener.close()
    os.unlink(_NAME, dir_fd=parent)
    copies = [
        asyncio.create_task(_copy(client, guest), name="agent relay: to the guest"),
        asyncio.create_task(_copy(guest, client), name="agent relay: from the guest"),
    ]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for copy in copies:
            copy.cancel()
        await asyncio.wait(copies)
        client.close()
        guest.close()


async def _copy(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with suppress(OSError):
        while data := await loop.sock_recv(source, _CHUNK):
            await loop.sock_sendall(target, data)
