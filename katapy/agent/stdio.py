"""The standard streams of a process in the guest: each is a vsock connection of its own that carries raw bytes.

The host dials port 1025 and says which stream it is (one byte of length, then the name); the RPC that starts the
process names the same streams. Nothing here looks at the bytes: the connected sockets go to whoever pumps them.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from katapy.errors import Timeout, Unavailable
from katapy.proto import agent_pb2

PORT: Final = 1025
_NAME_SECONDS: Final = 10.0

Connect = Callable[[int], Coroutine[Any, Any, socket.socket]]


@dataclass
class Streams:
    """The host's ends of a process's streams, by name: stdin, stdout, stderr; with a terminal only stdout."""

    terminal: bool
    sockets: dict[str, socket.socket]

    def take(self) -> list[tuple[str, socket.socket]]:
        """Give the sockets away; the caller owns them now."""
        taken, self.sockets = list(self.sockets.items()), {}
        return taken

    def close(self) -> None:
        """Close what nobody has taken."""
        for _, sock in self.take():
            sock.close()


async def open_streams(
    connect: Connect, names: list[str], *, terminal: bool, rows: int = 0, columns: int = 0
) -> tuple[Streams, agent_pb2.Stdio]:
    """Connect the streams ``names`` of one process.

    ``connect`` dials a guest port. Returns the sockets, and the description to send with the RPC that starts the
    process. Raises Unavailable or Timeout.
    """
    token = secrets.token_hex(16)
    streams = Streams(terminal, {})
    wanted = ["stdout"] if terminal else names
    tasks = {name: asyncio.create_task(_open(connect, f"{token}/{name}"), name=f"open {name}") for name in wanted}
    try:
        for name, task in tasks.items():
            streams.sockets[name] = await task
    except BaseException:
        for task in tasks.values():
            task.cancel()
        for sock in await asyncio.gather(*tasks.values(), return_exceptions=True):
            if isinstance(sock, socket.socket):
                sock.close()
        raise
    stdio = agent_pb2.Stdio(terminal=terminal, rows=rows, columns=columns)
    for name in wanted:
        setattr(stdio, name, f"{token}/{name}")
    return streams, stdio


async def open_stream(connect: Connect) -> tuple[str, socket.socket]:
    """Connect one more stream, and return the name to tell the guest. Raises Unavailable or Timeout."""
    name = secrets.token_hex(16)
    return name, await _open(connect, name)


async def _open(connect: Connect, name: str) -> socket.socket:
    with ExitStack() as stack:
        sock = stack.enter_context(await connect(PORT))
        encoded = name.encode()
        try:
            # A guest may never give the credit for even these bytes.
            async with asyncio.timeout(_NAME_SECONDS):
                await asyncio.get_running_loop().sock_sendall(sock, bytes([len(encoded)]) + encoded)
        except TimeoutError as error:
            text = f"cannot open a stream to the guest: it did not take the name within {_NAME_SECONDS:g} s"
            raise Timeout(text) from error
        except OSError as error:
            raise Unavailable(f"cannot open a stream to the guest: {error.strerror}") from error
        stack.pop_all()
        return sock
