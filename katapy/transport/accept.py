"""Accepting connections with asyncio: who is let in, and who owns the tasks that serve them.

What is said on a connection belongs to the servers above: ttrpc_server.py, shim/attach.py.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from katapy.run import readable
from katapy.transport.unix import peer_of

_RETRY_SECONDS: Final = 1.0
_NO_RESOURCES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_log = logging.getLogger(__name__)

Serve = Callable[[socket.socket], Awaitable[None]]


@asynccontextmanager
async def accepting(listening: socket.socket, serve: Serve) -> AsyncIterator[None]:
    """While entered, run ``serve`` in a task of its own for each connection; at the end these are cancelled.

    Only processes with this process's own uid are served. The socket is non-blocking and closed after ``serve``. What
    that raises is logged and ends that connection only. ``listening`` is closed at the end.
    """
    listening.setblocking(False)
    with listening:
        task = asyncio.create_task(_accept_all(listening, serve), name="accept connections")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()


async def _accept_all(listening: socket.socket, serve: Serve) -> None:
    async with asyncio.TaskGroup() as connections:
        while True:
            sock = await accept(listening)
            peer = peer_of(sock)
            if peer.uid != os.geteuid():
                _log.warning("refused a connection from pid %d, uid %d", peer.pid, peer.uid)
                sock.close()
                continue
            task = connections.create_task(_guard(sock, peer.pid, serve))
            # Not in the task: one that is cancelled before its first step runs no finally.
            task.add_done_callback(partial(_close, sock))


async def accept(listening: socket.socket) -> socket.socket:
    """Return the next connection to a non-blocking listener, non-blocking itself and the caller's to close."""
    while True:
        # Not loop.sock_accept(): when it is cancelled just after a connection came, that one is lost.
        await readable(listening.fileno())
        try:
            sock = listening.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as error:
            if error.errno not in _NO_RESOURCES:
                raise
            # The connection stays in the backlog, and no event tells that descriptors are free again.
            _log.warning("cannot accept a connection: %s", error.strerror)
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            sock.setblocking(False)
            return sock


def _close(sock: socket.socket, _task: asyncio.Task[None]) -> None:
    sock.close()


async def _guard(sock: socket.socket, pid: int, serve: Serve) -> None:
    try:
        await serve(sock)
    except Exception:
        _log.exception("a connection from pid %d failed", pid)
