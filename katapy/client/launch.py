"""Starts what outlives a command: the shim of a pod, and the stand-in of a container.

It makes the sockets by which they are reached and hands them over as descriptors, so nobody waits for a path. What
they do is shim/__main__.py's and client/attach.py's; the sandbox directory is made and removed by others.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import katapy
from katapy import linux, preload
from katapy.errors import KatapyError, Unavailable, from_wire
from katapy.run import Process, start
from katapy.transport import unix

if TYPE_CHECKING:
    from katapy.transport.ttrpc import TtrpcClient

SHIM_SOCKET: Final = "shim.sock"
ATTACH_SOCKET: Final = "attach.sock"
LOG: Final = "shim.log"
_REPORT_MAX: Final = 65536
# The package by its directory, without site: a stand-in is to be small, and its bytecode cached.
_STAND_IN: Final = (
    "import os, sys; sys.path.append(sys.argv[1]); from katapy.client.attach import main; os._exit(main(sys.argv[2:]))"
)


# Last before its program: /proc is then that of the process namespace it begins, and mounts still come and go.
_PROC: Final = ("/usr/bin/unshare", "--mount", "--propagation", "slave", "--mount-proc", "--")
# The same where /proc is that of a view (view.py), whose root is a descriptor; a root file system may have none.
_PROC_OF_VIEW: Final = '/usr/bin/mount --no-canonicalize -t proc proc "$0" 2> /dev/null; exec "$@"'


class Connected(NamedTuple):
    """A shim that was started, and a connection to its Task API."""

    client: TtrpcClient
    pid: int


class StandIn:
    """A stand-in that was started and has announced itself; whoever started it calls ``attached`` or ``kill``."""

    def __init__(self, process: Process, ready: int, name: str) -> None:
        """Wait until it has announced itself, over its report ``ready``. Raises Unavailable when it died."""
        self.pid = process.pid
        self._process, self._ready, self._name = process, ready, name
        if os.read(ready, 1) != b"!":
            self.kill()
            raise Unavailable(f"the stand-in of {name} died at once")

    def attached(self) -> int:
        """Wait until it has the streams, leave it to itself, and return its pid.

        Raises what the shim answered it, Unavailable when it died.
        """
        ready, self._ready = self._ready, -1
        with open(ready, "rb") as file:  # noqa: PTH123 - a descriptor
            said = file.read(_REPORT_MAX)
        if said == b"+":
            return self._process.release()
        self.kill()
        if not said:
            raise Unavailable(f"the stand-in of {self._name} died before it was attached")
        error = json.loads(said[1:])
        raise from_wire(error["code"], error["kind"], error["error"])

    def kill(self) -> None:
        """End it; its process in the guest, if there is one, lives on without streams."""
        self._process.kill()
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1


def start_shim(
    root: Path,
    sandbox_id: str,
    *,
    debug: bool,
    config: Path | None,
    foreground: bool = False,
    systemd_cgroup: bool = False,
) -> Connected:
    """Start the shim of a pod in its directory ``root``/``sandbox_id``, which exists and is private (0700).

    With ``foreground`` the pod ends with the process that the state names as its creator, however that ends; with
    ``systemd_cgroup`` systemd makes its cgroups.
    Returns at once: a call on the client waits until the shim serves, and raises Unavailable if it dies before.
    Raises AlreadyExists when the directory has had a shim, Unavailable when it cannot be started.
    """
    directory = root / sandbox_id
    arguments = {
        "root": str(root),
        "id": sandbox_id,
        "debug": debug,
        "config": str(config) if config else None,
        "foreground": foreground,
        "systemd_cgroup": systemd_cgroup,
    }
    with _sockets(directory) as listening:
        client = connect(directory)
        try:
            pid = _give(directory, arguments, listening)
        except KatapyError:
            client.close()
            raise
    return Connected(client, pid)


def start_engine_shim(directory: Path, arguments: Mapping[str, object]) -> None:
    """Start the shim of a pod that an engine talks to, in its directory, with what its ``main`` is to know.

    As ``start_shim``, but nothing of a client is loaded: the engine waits for the command that calls this.
    """
    with _sockets(directory) as listening:
        _give(directory, arguments, listening)


@contextmanager
def _sockets(directory: Path) -> Iterator[list[int]]:
    """Listen where a shim is reached while the context lasts; the descriptors are the Task API's and attach's."""
    with (
        unix.listen(directory / SHIM_SOCKET, socket.SOCK_STREAM) as listening,
        unix.listen(directory / ATTACH_SOCKET, socket.SOCK_SEQPACKET) as attaching,
    ):
        yield [listening.fileno(), attaching.fileno()]


def _give(directory: Path, arguments: Mapping[str, object], listening: list[int]) -> int:
    """Let a shim begin, and return its pid."""
    log = _open_log(directory)
    try:
        shim = preload.take()
        shim.give(arguments, [*listening, log])
    finally:
        os.close(log)
    return shim.pid


def connect(directory: Path) -> TtrpcClient:
    """Connect to the Task API of the shim in a sandbox directory. Raises Unavailable when there is none."""
    from katapy.transport.ttrpc import TtrpcClient  # not above: who starts a shim for an engine does without protobuf

    return TtrpcClient(unix.connect(directory / SHIM_SOCKET, socket.SOCK_STREAM))


def connect_attach(directory: Path) -> socket.socket:
    """Connect to the attach socket of the shim in a sandbox directory. Raises Unavailable when there is none."""
    return unix.connect(directory / ATTACH_SOCKET, socket.SOCK_SEQPACKET)


def start_standin(
    directory: Path,
    container_id: str,
    exec_id: str,
    streams: tuple[int, int, int],
    *,
    prefix: Sequence[str] = (),
    view: int = -1,
) -> StandIn:
    """Start the process that stands for a container's process on the host: it exits with that one's status.

    ``exec_id`` is "" for init; ``streams`` become its own; ``prefix`` is a command that executes the one behind it,
    in another namespace for example; ``view`` is what ``view_of`` gave. It outlives its starter.
    Raises Unavailable when it cannot be started.
    """
    answer, report = os.pipe()
    own_processes = not exec_id
    with connect_attach(directory) as control, new_processes() if own_processes else nullcontext():
        fds = [fd for fd in (control.fileno(), report, view) if fd >= 0]
        argv = [*prefix, *standin_command(control.fileno(), container_id, exec_id, view), "--ready-fd", str(report)]
        stdin, stdout, stderr = streams
        try:
            process = start(
                argv, name="the stand-in", fds=fds, stdin=stdin, stdout=stdout, stderr=stderr, die_with_owner=False
            )
        except BaseException:
            os.close(answer)
            raise
        finally:
            os.close(report)
    return StandIn(process, answer, container_id)


def standin_command(control: int, container_id: str, exec_id: str, view: int = -1) -> list[str]:
    """Return the command of a stand-in; ``control`` is a connection to attach.sock that it inherits, ``view`` too.

    That of a container's init has to be started within ``new_processes``.
    """
    package = str(Path(katapy.__file__).parent.parent)
    argv = [sys.executable, "-I", "-S", "-c", _STAND_IN, package]
    argv += ["--socket-fd", str(control), "--id", container_id, "--exec", exec_id]
    if view >= 0:
        return ["/bin/sh", "-c", _PROC_OF_VIEW, f"/proc/self/fd/{view}/proc", *argv, "--view-fd", str(view)]
    return argv if exec_id else [*_PROC, *argv]


@contextmanager
def new_processes() -> Iterator[None]:
    """Have the one process that is started meanwhile begin a namespace of processes.

    Whoever lists the processes of a container's pid (podman top) is to see none of the host. The namespace is begun by
    the next child, so that it stays this process's own, whose exit status goes to the engine.
    """
    with open("/proc/self/ns/pid", "rb") as own:  # noqa: PTH123 - a descriptor
        linux.unshare(linux.CLONE_NEWPID)
        try:
            yield
        finally:
            linux.setns(own.fileno(), linux.CLONE_NEWPID)


def send_console(path: Path) -> int:
    """Make a pseudo-terminal, send its master to the unix socket ``path``, and return its slave.

    The message is what runc sends: the terminal's name, and one descriptor. Raises Unavailable.
    """
    master, slave = os.openpty()
    try:
        with unix.connect(path, socket.SOCK_STREAM) as receiver:
            socket.send_fds(receiver, [os.ttyname(slave).encode()], [master])
    except OSError as error:
        os.close(slave)
        raise Unavailable(f"cannot send the terminal to {path}: {error.strerror}") from error
    except BaseException:
        os.close(slave)
        raise
    finally:
        os.close(master)
    return slave


def _open_log(directory: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(directory / LOG, flags, 0o600)
    except OSError as error:
        raise Unavailable(f"cannot open {directory / LOG}: {error.strerror}") from error
