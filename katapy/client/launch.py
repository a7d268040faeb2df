"""Starts what outlives a command: the shim of a pod, and the stand-in of a container.

It makes the sockets by which they are reached and hands them over as descriptors, so nobody waits for a path. What
they do is shim/__main__.py's and client/attach.py's; the sandbox directory is made and removed by others.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Final, NamedTuple

import katapy
from katapy.errors import KatapyError, Unavailable, from_wire
from katapy.run import start
from katapy.transport import unix
from katapy.transport.ttrpc import TtrpcClient

SHIM_SOCKET: Final = "shim.sock"
ATTACH_SOCKET: Final = "attach.sock"
LOG: Final = "shim.log"
_REPORT_MAX: Final = 65536
# The package by its directory, without site: a stand-in is to be small, and its bytecode cached.
_STAND_IN: Final = (
    "import os, sys; sys.path.append(sys.argv[1]); from katapy.client.attach import main; os._exit(main(sys.argv[2:]))"
)


class Connected(NamedTuple):
    """A shim that was started, and a connection to its Task API."""

    client: TtrpcClient
    pid: int


class StandIn(NamedTuple):
    """A stand-in that is attached and left to itself."""

    pid: int


def start_shim(root: Path, sandbox_id: str, *, debug: bool, config: Path | None, foreground: bool = False) -> Connected:
    """Start the shim of a pod in its directory ``root``/``sandbox_id``, which exists and is private (0700).

    With ``foreground`` the pod ends with the process that the state names as its creator, however that ends.
    Returns at once: a call on the client waits until the shim serves, and raises Unavailable if it dies before.
    Raises AlreadyExists when the directory has had a shim, Unavailable when it cannot be started.
    """
    directory = root / sandbox_id
    argv = [sys.executable, "-I", "-m", "katapy.shim", "--directory", str(directory), "--id", sandbox_id]
    with (
        unix.listen(directory / SHIM_SOCKET, socket.SOCK_STREAM) as listening,
        unix.listen(directory / ATTACH_SOCKET, socket.SOCK_SEQPACKET) as attaching,
    ):
        fds = listening.fileno(), attaching.fileno()
        argv += ["--socket-fd", str(fds[0]), "--attach-fd", str(fds[1])]
        argv += ["--debug"] if debug else []
        argv += ["--foreground"] if foreground else []
        argv += ["--config", str(config)] if config else []
        client = connect(directory)
        log = _open_log(directory)
        try:
            process = start(argv, name="the shim", fds=fds, stdout=log, stderr=log, die_with_owner=False)
        except KatapyError:
            client.close()
            raise
        finally:
            os.close(log)
    return Connected(client, process.release())


def connect(directory: Path) -> TtrpcClient:
    """Connect to the Task API of the shim in a sandbox directory. Raises Unavailable when there is none."""
    return TtrpcClient(unix.connect(directory / SHIM_SOCKET, socket.SOCK_STREAM))


def connect_attach(directory: Path) -> socket.socket:
    """Connect to the attach socket of the shim in a sandbox directory. Raises Unavailable when there is none."""
    return unix.connect(directory / ATTACH_SOCKET, socket.SOCK_SEQPACKET)


def start_standin(directory: Path, container_id: str, exec_id: str, stdin: int, stdout: int, stderr: int) -> StandIn:
    """Start the process that stands for a container's process on the host, and wait until it is attached.

    ``exec_id`` is "" for init; the descriptors become the stand-in's own. It exits with the process's status, and
    outlives its starter. Raises what the shim answered, Unavailable when the stand-in cannot be started.
    """
    answer, report = os.pipe()
    with open(answer, "rb") as file, connect_attach(directory) as control:  # noqa: PTH123 - a descriptor
        fds = control.fileno(), report
        argv = [sys.executable, "-I", "-S", "-c", _STAND_IN, str(Path(katapy.__file__).parent.parent)]
        argv += ["--socket-fd", str(fds[0]), "--id", container_id, "--exec", exec_id, "--ready-fd", str(fds[1])]
        try:
            process = start(
                argv, name="the stand-in", fds=fds, stdin=stdin, stdout=stdout, stderr=stderr, die_with_owner=False
            )
        finally:
            os.close(report)
        said = file.read(_REPORT_MAX)
    if said == b"+":
        return StandIn(process.release())
    process.kill()
    if not said:
        raise Unavailable(f"the stand-in of {container_id} died before it was attached")
    error = json.loads(said[1:])
    raise from_wire(error["code"], error["kind"], error["error"])


def _open_log(directory: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(directory / LOG, flags, 0o600)
    except OSError as error:
        raise Unavailable(f"cannot open {directory / LOG}: {error.strerror}") from error
