"""virtiofsd: the daemon that serves a pod's staging tree to its VM over vhost-user.

Debian 12 has the C daemon of QEMU 7.2, Debian 13 the one written in Rust; their options differ, the service is the
same. Either runs in its own namespaces with its own seccomp filter and sees nothing but the exported directory.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import run
from katapy.console import Console
from katapy.devices import SharedDir
from katapy.errors import NotFound, Unavailable

_SOCKET: Final = "virtiofsd.sock"


@dataclass(frozen=True)
class Virtiofsd:
    """A running daemon, the device to give to the VM, and what the daemon prints, which a guest may provoke."""

    process: run.Process
    device: SharedDir
    output: Console


def find_virtiofsd(candidates: Iterable[Path]) -> Path:
    """Return the first of the candidates that exists, by its real name, which tells the daemons apart. Raises NotFound.

    Debian 13 has the daemon that is written in Rust under the other's name, too.
    """
    paths = list(candidates)
    for path in paths:
        if os.access(path, os.X_OK):
            return path.resolve()
    where = " and ".join(map(str, paths))
    raise NotFound(f"virtiofsd is missing: {where}; apt-get install qemu-system-common, on Debian 13 virtiofsd")


def command(program: Path, source: Path, fd: int) -> list[str]:
    """Return the daemon's arguments: it serves ``source`` to whoever connects to the listening socket ``fd``."""
    if program.parts[-2:] == ("qemu", "virtiofsd"):
        if "," in str(source):
            raise Unavailable(f"cannot share {source}: this virtiofsd takes no comma in a path")
        options = f"source={source},sandbox=namespace,cache=auto,announce_submounts,modcaps=-mknod"
        return [str(program), f"--fd={fd}", "-f", "-o", options, "-o", "log_level=err"]
    return [
        str(program),
        f"--fd={fd}",
        f"--shared-dir={source}",
        "--sandbox=namespace",
        "--cache=auto",
        "--announce-submounts",
        "--modcaps=-mknod",
        "--log-level=error",
    ]


@asynccontextmanager
async def start_virtiofsd(program: Path, source: Path, directory: Path, tag: str) -> AsyncIterator[Virtiofsd]:
    """Run virtiofsd on ``source``; ``directory`` is the sandbox directory, for the moment that a socket needs a name.

    Raises NotFound when the program is missing, Unavailable when it does not start.
    """
    with ExitStack() as stack:
        ours, listener = _connected(directory)
        stack.callback(ours.close)
        read, write = socket.socketpair()
        stack.callback(read.close)
        with listener, write:
            argv = command(program, source, listener.fileno())
            process = run.start(argv, name="virtiofsd", fds=[listener.fileno()], stderr=write.fileno())
        output = Console(read)
        stack.callback(output.close)
        try:
            yield Virtiofsd(process, SharedDir(tag, ours.fileno()), output)
        finally:
            # Who serves is a child. It ends with its parent and with the VM, but only if it heeds what it is told.
            process.kill_children()
            await process.stop(grace=0)


def _connected(directory: Path) -> tuple[socket.socket, socket.socket]:
    """Return a connected socket and the listening one that holds its other end; virtiofsd only takes the latter."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Through a descriptor: a path in sun_path has at most 107 bytes, the directory may be longer.
    parent = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = f"/proc/self/fd/{parent}/{_SOCKET}"
        listener.bind(name)
        try:
            listener.listen(1)
            ours.connect(name)
        finally:
            os.unlink(_SOCKET, dir_fd=parent)
    except OSError as error:
        listener.close()
        ours.close()
        raise Unavailable(f"cannot make virtiofsd's socket in {directory}: {error.strerror}") from error
    finally:
        os.close(parent)
    return ours, listener
