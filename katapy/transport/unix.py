"""Unix sockets by path, whatever the length of the path, and who is at the other end.

It gives and takes sockets; what is said over them belongs to ttrpc.py, ttrpc_server.py and the attach protocol.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from katapy.errors import AlreadyExists, Unavailable

_PATH_MAX: Final = 107  # bytes; sizeof(sun_path) less the final NUL (unix(7))
_UCRED: Final = struct.Struct("iII")  # struct ucred


class Peer(NamedTuple):
    """A process at the other end of a connection."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Return who connected (SO_PEERCRED); the kernel recorded it at connect(2), so it cannot be forged."""
    return Peer(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def receive_from(sock: socket.socket, size: int) -> tuple[bytes, int]:
    """Receive a datagram and the pid of the process that sent it, which may have inherited the connection.

    The pid is what the kernel vouches for (SCM_CREDENTIALS), or that of peer_of() where the sender attached none.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    data, control, _, _ = sock.recvmsg(size, socket.CMSG_SPACE(_UCRED.size))
    pids = [Peer(*_UCRED.unpack(item)).pid for _, kind, item in control if kind == socket.SCM_CREDENTIALS]
    return data, next(filter(None, pids), 0) or peer_of(sock).pid


def listen(path: Path, kind: socket.SocketKind) -> socket.socket:
    """Bind and listen on ``path``, mode 0600.

    Raises AlreadyExists when something has the name, Unavailable when the socket cannot be made.
    """
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        # The mode of the inode before bind(2): there is no moment at which others may connect.
        os.fchmod(sock.fileno(), 0o600)
        with _address(path) as address:
            sock.bind(address)
        sock.listen()
    except OSError as error:
        sock.close()
        kind_of_error = AlreadyExists if error.errno == errno.EADDRINUSE else Unavailable
        raise kind_of_error(f"cannot listen on {path}: {error.strerror}") from error
    return sock


def connect(path: Path, kind: socket.SocketKind) -> socket.socket:
    """Connect to ``path``. Raises Unavailable when nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with _address(path) as address:
            sock.connect(address)
    except OSError as error:
        sock.close()
        raise Unavailable(f"cannot connect to {path}: {error.strerror}") from error
    return sock


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """Yield an address for ``path``: a path too long for sun_path is reached through a descriptor of its directory."""
    if len(os.fsencode(path)) <= _PATH_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
