"""Unix sockets by path: any length, private, and the errors."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from katapy.errors import AlreadyExists, Unavailable
from katapy.transport import unix


@pytest.mark.parametrize("length", [1, 200])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_path_of_any_length(tmp_path: Path, length: int, kind: socket.SocketKind) -> None:
    directory = tmp_path / ("d" * length)
    directory.mkdir()
    open_before = len(os.listdir("/proc/self/fd"))
    with unix.listen(directory / "shim.sock", kind) as listening:
        assert stat.S_IMODE((directory / "shim.sock").stat().st_mode) == 0o600
        with unix.connect(directory / "shim.sock", kind) as mine:
            theirs, _ = listening.accept()
            with theirs:
                mine.send(b"x")
                assert theirs.recv(9) == b"x"
                assert unix.peer_of(theirs) == (os.getpid(), os.getuid(), os.getgid())
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_errors_name_the_path(tmp_path: Path) -> None:
    path = tmp_path / "shim.sock"
    with pytest.raises(Unavailable, match=f"cannot connect to {path}"):
        unix.connect(path, socket.SOCK_STREAM)
    unix.listen(path, socket.SOCK_STREAM).close()
    with pytest.raises(Unavailable, match=f"cannot connect to {path}"):  # nobody listens any more
        unix.connect(path, socket.SOCK_STREAM)
    with pytest.raises(AlreadyExists, match=f"cannot listen on {path}"):
        unix.listen(path, socket.SOCK_STREAM)
    with pytest.raises(Unavailable):
        unix.listen(tmp_path / "missing" / ("x" * 100), socket.SOCK_STREAM)
