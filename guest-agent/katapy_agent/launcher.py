"""Starts the processes of containers, cheaply: by a fork of a small process that was forked before the agent grew.

The agent is multi-threaded and large; the launcher process is neither, has all that a container's construction
imports, and shares its memory with every process it forks until that executes its program. What such a fork does is
`child`'s business; the plan it follows comes from there too.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from katapy_agent import child, errors

_MESSAGE_MAX: Final = 64 << 10
_FDS_MAX: Final = 8


@dataclass(frozen=True)
class Forked:
    """The process exists; ``pid`` is in the agent's PID namespace."""

    pid: int


@dataclass(frozen=True)
class Console:
    """The process has a terminal; ``master`` is the descriptor of its other side, owned by the receiver."""

    master: int


@dataclass(frozen=True)
class Ready:
    """The process is built and waits to be started."""


Report = Forked | Console | Ready


class Control:
    """The agent's end of the socket over which a process reports while it is built."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    async def report(self) -> Report | None:
        """Return the next report; None when there will be none: the program is executed, or the process is dead.

        Raises the process's own KatapyError, or Internal for a message that makes no sense.
        """
        await _readable(self._socket)
        try:
            data, ancillary, _flags, _ = self._socket.recvmsg(
                _MESSAGE_MAX, socket.CMSG_SPACE(_FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # it died before it had read what it was told
            return None
        fds = _descriptors(ancillary)
        try:
            report = _parse(data, fds) if data else None
        except BaseException:
            _close(fds)
            raise
        return report

    def start(self) -> None:
        """Let the process execute its program. A process that is dead by now is not an error here."""
        try:
            self._socket.send(b'{"start": true}')
        except (BrokenPipeError, ConnectionResetError):
            return

    def close(self) -> None:
        """Stop listening; a process that still waits to be started ends."""
        self._socket.close()


class Launcher:
    """The agent's handle on the launcher process ``pid``."""

    def __init__(self, pid: int, requests: socket.socket) -> None:
        self.pid = pid
        self._requests = requests

    def launch(
        self, plan: Mapping[str, object], stdio: tuple[int, int, int] | None, joined: int | None = None
    ) -> Control:
        """Start a process that follows ``plan`` with ``stdio`` (None: it makes its own) and return its control socket.

        ``joined`` is a pidfd that the plan needs. All descriptors stay the caller's.
        Raises Unavailable when the launcher does not take the request.
        """
        encoded = json.dumps(plan).encode()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, io.FileIO(os.memfd_create("plan"), "w") as memory:
            memory.write(encoded)
            ours.setblocking(False)
            request = json.dumps({"plan_size": len(encoded), "joined": joined is not None}).encode()
            others = [] if joined is None else [joined]
            try:
                socket.send_fds(self._requests, [request], [memory.fileno(), theirs.fileno(), *others, *(stdio or ())])
            except OSError as error:
                ours.close()
                raise errors.Unavailable(f"cannot start a process: launcher: {error.strerror}") from error
        return Control(ours)


def start_launcher() -> Launcher:
    """Fork the launcher process and return the handle on it. Call while this process has one thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _end_with(partial(_serve, theirs))
    theirs.close()
    return Launcher(pid, ours)


def _serve(requests: socket.socket) -> None:
    # Its own children are nobody's business: the processes of containers are their grandchildren, and the agent's.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        data, fds, _flags, _ = socket.recv_fds(requests, _MESSAGE_MAX, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        try:
            forked = os.fork()
        except OSError as error:
            _refuse(fds[1], f"cannot fork: {(error.strerror or '').lower()}")
        else:
            if forked == 0:
                _end_with(partial(_become, data, fds))
        _close(fds)


def _become(data: bytes, fds: list[int]) -> NoReturn:
    request = json.loads(data)
    memory, control, *stdio = fds
    joined = stdio.pop(0) if request["joined"] else None
    _close_all_but({0, 1, 2, *fds})
    # Else the kernel would reap, and forget the status of, a process whose parent has not ended yet.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The agent is never to be killed for want of memory; what it starts may be.
    Path("/proc/self/oom_score_adj").write_text("0")
    plan = json.loads(os.pread(memory, request["plan_size"], 0))
    os.close(memory)
    child.run(plan, control, (stdio[0], stdio[1], stdio[2]) if stdio else None, joined)


def _end_with(last: Callable[[], object]) -> NoReturn:
    """Call ``last`` and leave this forked process, whatever happens in it."""
    try:
        last()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _refuse(control: int, message: str) -> None:
    # The agent may have given it up.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(control)) as end:
        end.send(json.dumps({"error": {"kind": "Unavailable", "message": message}}).encode())


def _parse(data: bytes, fds: list[int]) -> Report:
    try:
        message = json.loads(data)
    except ValueError:
        message = None
    match message:
        case {"pid": int(pid)} if pid > 1 and not fds:
            return Forked(pid)
        case {"console": True} if len(fds) == 1:
            return Console(fds[0])
        case {"ready": True} if not fds:
            return Ready()
        case {"error": {"kind": str(kind), "message": str(message)}} if not fds:
            raise errors.by_name(kind)(message)
    raise errors.Internal("process under construction sent a report that makes no sense")


async def _readable(end: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(end, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(end)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _close_all_but(keep: set[int]) -> None:
    start = 0
    for fd in sorted(keep):
        if start < fd:  # an empty range would be all descriptors
            os.closerange(start, fd)
        start = fd + 1
    os.closerange(start, 1 << 20)
