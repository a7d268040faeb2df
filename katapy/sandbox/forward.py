"""Connections to the loopback of the pod's network namespace, as `kubectl port-forward` makes them, and their relay.

The kernel leads them to a listener (``network.loopback``). For each a stream to the guest is opened, whose agent
connects to the same port of the VM's loopback. What is said travels in pieces, as agent.proto has it, because a stream
that just ends may be that of a guest that died: only an end that was said is one. A guest can only answer: no
connection begins in it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final

from katapy.errors import KatapyError
from katapy.run import readable
from katapy.transport.accept import accept

log = logging.getLogger(__name__)

CONNECTIONS_MAX: Final = 64
"""Of a pod at a time; further ones are reset."""
_CHUNK: Final = 64 << 10
_LENGTH: Final = struct.Struct("!I")
# struct linger: what a close sends.
_RESET, _FAREWELL = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)

# A client that has closed both halves looks like one that waits for an answer, until it is asked whether it is there.
_KEEPALIVE: Final = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6}  # the first two: seconds

Dial = Callable[[int, bool], Awaitable[socket.socket]]
"""Returns a stream to a port of the guest's loopback; with True ::1 was meant. Raises KatapyError."""


async def forward(listeners: Iterable[socket.socket], dial: Dial) -> None:
    """Relay every connection to ``listeners``, which stay the caller's, until cancelled."""
    alive: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as tasks:
        for listener in listeners:
            tasks.create_task(_accept_all(listener, dial, tasks, alive))


async def _accept_all(
    listener: socket.socket, dial: Dial, tasks: asyncio.TaskGroup, alive: set[asyncio.Task[None]]
) -> None:
    while True:
        near = await accept(listener)
        # Until all has gone well: nobody is to take a half of something for the whole.
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            near.setsockopt(socket.IPPROTO_TCP, option, value)
        if len(alive) >= CONNECTIONS_MAX:
            near.close()
            continue
        task = tasks.create_task(_relay(near, dial))
        alive.add(task)
        # Not in the task: one that is cancelled before its first step runs no finally.
        task.add_done_callback(partial(_ended, alive, near))


def _ended(alive: set[asyncio.Task[None]], near: socket.socket, task: asyncio.Task[None]) -> None:
    alive.discard(task)
    near.close()


async def _relay(near: socket.socket, dial: Dial) -> None:
    """Serve one connection; the caller closes it."""
    port = near.getsockname()[1]
    try:
        far = await dial(port, near.family == socket.AF_INET6)
    except KatapyError as error:
        # It was accepted before anybody could know: a reset is as near to a refusal as can be.
        log.debug("cannot forward a connection to port %d: %s", port, error)
        return
    with far:
        try:
            async with asyncio.TaskGroup() as tasks:
                said, ended = asyncio.Event(), asyncio.Event()
                others = [tasks.create_task(_take(far, near, said, ended)), tasks.create_task(_watch(near))]
                await _give(near, far, said)
                await ended.wait()
                for each in others:
                    each.cancel()
        except* OSError:
            pass  # the reset tells
        else:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FAREWELL)


async def _watch(near: socket.socket) -> None:
    """Raise OSError once the client is gone, which reading does not tell after the end of what it had to say."""
    with select.epoll() as poller:
        poller.register(near, 0)  # errors and hang-ups are told in any case
        await readable(poller.fileno())
    if error := near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))


async def _give(near: socket.socket, far: socket.socket, said: asyncio.Event) -> None:
    """Pass on what a client says, in pieces, and its end."""
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(near, _CHUNK):
        await loop.sock_sendall(far, _LENGTH.pack(len(data)) + data)
        # Neither waits where there is no need to, and others of this loop have work, too.
        await asyncio.sleep(0)
    # Before it is: once it is, the stream may end at any moment.
    said.set()
    await loop.sock_sendall(far, _LENGTH.pack(0))


async def _take(far: socket.socket, near: socket.socket, said: asyncio.Event, ended: asyncio.Event) -> None:
    """Pass on the guest's pieces and, with ``ended``, their end; until the stream ends.

    Raises OSError where that comes before both ends were ``said``.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            left = await _receive_length(far)
        except ConnectionResetError:
            if said.is_set() and ended.is_set():
                return
            raise
        if not left:
            near.shutdown(socket.SHUT_WR)
            ended.set()
        while left:
            data = await _receive(far, min(left, _CHUNK))
            await loop.sock_sendall(near, data)
            left -= len(data)
            await asyncio.sleep(0)


async def _receive_length(far: socket.socket) -> int:
    header = b""
    while len(header) < _LENGTH.size:
        header += await _receive(far, _LENGTH.size - len(header))
    return int(_LENGTH.unpack(header)[0])


async def _receive(far: socket.socket, most: int) -> bytes:
    """Return what comes next. Raises ConnectionResetError at the end of the stream."""
    data = await asyncio.get_running_loop().sock_recv(far, most)
    if not data:
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return data
