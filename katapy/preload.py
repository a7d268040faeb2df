"""Starts the process of a shim while it is not known yet for which pod: it loads what it needs, and waits.

Reading a command line and a bundle takes as long as loading a shim does, and a host has more than one CPU. The process
ends when nobody has a use for it: when the socket over which it waits is closed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from katapy.errors import Unavailable
from katapy.run import ENVIRONMENT

CONTROL_FD: Final = 3
MESSAGE_MAX: Final = 65536
_PROGRAM: Final = (
    "import os; from katapy import lean; lean.skip_python_messages(); lean.skip_openssl()\n"
    # Without a farewell: what is to be undone is undone, and whoever ends a container waits for the end of its shim.
    "from katapy.shim.__main__ import main; os._exit(main())"
)


class Waiting(NamedTuple):
    """A shim that waits for its arguments, this process's own child."""

    pid: int
    control: socket.socket

    def give(self, arguments: Mapping[str, object], fds: Sequence[int]) -> None:
        """Let it begin with these arguments, plain JSON, and descriptors. Raises Unavailable where it has died."""
        with self.control:
            try:
                socket.send_fds(self.control, [json.dumps(arguments).encode()], list(fds))
            except OSError as error:
                os.kill(self.pid, signal.SIGKILL)
                reap(self.pid)
                raise Unavailable(f"cannot start the shim: it died while it was loaded: {error.strerror}") from error

    def drop(self) -> None:
        """End it, and wait for that."""
        self.control.close()
        os.kill(self.pid, signal.SIGKILL)
        reap(self.pid)


_begun: list[Waiting] = []


def begin(*, stderr: int = 2) -> None:
    """Start one that ``take`` will return; until it has its arguments its errors go to the descriptor ``stderr``."""
    _begun.append(_start(stderr))


def take() -> Waiting:
    """Return a shim that waits, the one that was begun if there is one. Raises Unavailable."""
    return _begun.pop() if _begun else _start()


def drop() -> None:
    """End what was begun and is not needed."""
    while _begun:
        _begun.pop().drop()


def reap(pid: int) -> int | None:
    """Wait for the end of a shim, our child. Returns its status, None where this program lets nobody know of any."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        # SIGCHLD is ignored, by a program that uses the SDK.
        return None


def _start(stderr: int = 2) -> Waiting:
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise Unavailable(f"cannot start the shim: {error.strerror}") from error
    # What it was started for follows as arguments, for whoever looks at a list of processes.
    argv = [sys.executable, "-I", "-c", _PROGRAM, Path(sys.argv[0]).name, *sys.argv[1:]]
    with theirs:
        try:
            # In a session of its own: what a terminal sends to the command is not for the pod.
            actions = [
                (os.POSIX_SPAWN_DUP2, stderr, 2),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), CONTROL_FD),
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
            ]
            # Nor does it inherit what a caller ignores: with SIGCHLD ignored, every hook would succeed.
            pid = os.posix_spawn(
                sys.executable,
                argv,
                ENVIRONMENT,
                file_actions=actions,
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGCHLD,),
            )
        except OSError as error:
            ours.close()
            raise Unavailable(f"cannot start the shim: {error.strerror}") from error
    return Waiting(pid, ours)


def await_arguments() -> tuple[dict[str, Any], list[int]]:
    """In the shim: wait for its arguments and descriptors; there are none where nobody has a use for it."""
    with socket.socket(fileno=CONTROL_FD) as control:
        data, fds, _flags, _address = socket.recv_fds(control, MESSAGE_MAX, 8)
    return (json.loads(data) if data else {}), fds
