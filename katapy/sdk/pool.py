"""Sandboxes that wait for whoever needs one: `katapy sandbox --serve N`, and how the SDK is given one of them.

Over a unix socket of the pool's, SOCK_SEQPACKET, one datagram of JSON each way:

    client  {"shape": text}, what the sandbox must be like
    pool    {"id": id of a started one} or {"none": why not}

From then on that sandbox is the client's, once, until either side closes the connection: then the pool removes it, and
closes its side when nothing is left. Another one is started in its place.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from katapy.errors import AlreadyExists, KatapyError, Unavailable
from katapy.transport import unix

if TYPE_CHECKING:
    from katapy.sdk.sandbox import Sandbox

# '~' is in no container's id.
SOCKET: Final = "~pool.sock"
_MESSAGE_MAX: Final = 65536
_HELLO_SECONDS: Final = 10.0
# Between two tries to start a sandbox, where the one before failed.
_RETRY_SECONDS: Final = 5.0
log = logging.getLogger(__name__)


class Lease:
    """A sandbox of a pool that is this process's until it is closed."""

    def __init__(self, connection: socket.socket, sandbox_id: str) -> None:
        self.id = sandbox_id
        self._connection = connection

    def close(self) -> None:
        """Give it up and wait until the pool has removed it."""
        with self._connection, suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            self._connection.settimeout(60)
            self._connection.recv(_MESSAGE_MAX)


def lease(path: Path, shape: str) -> Lease | None:
    """Return a sandbox of the pool at ``path``, None where there is no pool, or none like that is ready."""
    try:
        connection = unix.connect(path, socket.SOCK_SEQPACKET)
    except Unavailable:
        return None
    try:
        connection.settimeout(_HELLO_SECONDS)
        connection.send(json.dumps({"shape": shape}).encode())
        answer = _parse(connection.recv(_MESSAGE_MAX))
    except OSError:
        answer = {}
    match answer:
        case {"id": str(sandbox_id)}:
            return Lease(connection, sandbox_id)
    connection.close()
    return None


class Pool:
    """Keeps ``count`` sandboxes started that ``make`` makes, and gives each away once; a context manager."""

    def __init__(self, make: Callable[[], Sandbox], count: int, path: Path) -> None:
        """Listen at ``path``. Raises AlreadyExists where another pool does, Unavailable."""
        self._make, self._count, self._path = make, count, path
        self._changed = threading.Condition()
        self._ready: deque[Sandbox] = deque()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        with suppress(Unavailable):
            unix.connect(path, socket.SOCK_SEQPACKET).close()
            raise AlreadyExists(f"another pool serves at {path}")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._listening = unix.listen(path, socket.SOCK_SEQPACKET)
        self._inode = path.lstat().st_ino
        self._threads = [
            threading.Thread(target=work, name=name)
            for name, work in (("fill the pool", self._fill), ("accept", self._accept))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def await_ready(self, count: int) -> None:
        """Wait until ``count`` sandboxes are ready."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) >= count or self._closing)

    def close(self) -> None:
        """Take no more clients, end those there are, and remove all sandboxes. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            clients = dict(self._clients)
        # A socket that listens is not woken up by close(2), but by that.
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for connection in clients:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (*self._threads, *clients.values()):
            thread.join()
        # Another pool may have taken the place. While ours is open its inode's number is no other's.
        with suppress(FileNotFoundError):
            if self._path.lstat().st_ino == self._inode:
                self._path.unlink()
        self._listening.close()
        while self._ready:
            self._ready.popleft().close()

    def _fill(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or len(self._ready) < self._count)
                if self._closing:
                    return
            sandbox = self._make()
            try:
                sandbox.open()
            except (KatapyError, OSError) as error:
                log.warning("%s; trying again", error)
                sandbox.close()
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, _RETRY_SECONDS)
                continue
            with self._changed:
                self._ready.append(sandbox)
                self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                with self._changed:
                    if self._closing:
                        return
                    # Too many descriptors, for one: that may pass, and nobody else would accept.
                    log.warning("cannot accept a client: %s; trying again", error)
                    self._changed.wait_for(lambda: self._closing, _RETRY_SECONDS)
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="serve")
            with self._changed:
                if self._closing:
                    connection.close()
                    return
                self._clients[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        sandbox = None
        try:
            connection.settimeout(_HELLO_SECONDS)
            sandbox = self._take(_parse(connection.recv(_MESSAGE_MAX)).get("shape"))
            connection.send(json.dumps({"id": sandbox.id} if sandbox else {"none": "none like that is ready"}).encode())
            connection.settimeout(None)
            while sandbox is not None and connection.recv(_MESSAGE_MAX):
                pass
        except OSError:
            pass
        finally:
            if sandbox is not None:
                sandbox.close()
            with self._changed:
                del self._clients[connection]
            connection.close()

    def _take(self, shape: Any) -> Sandbox | None:
        """Return a sandbox that nobody has had, and that lives; None where none is like that."""
        while True:
            with self._changed:
                if not self._ready or self._ready[0].shape != shape:
                    return None
                sandbox = self._ready.popleft()
                self._changed.notify_all()
            if sandbox.alive:
                return sandbox
            sandbox.close()


def _parse(data: bytes) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        message = json.loads(data)
        if isinstance(message, dict):
            return message
    return {}


def chosen(pool: str | os.PathLike[str] | None, state_dir: Path) -> Path | None:
    """Return the socket of the pool to ask, None for none: ``pool`` is a path, "" for none, None for the usual one."""
    if pool is None:
        return state_dir / SOCKET
    return Path(pool) if os.fspath(pool) else None
