"""The stand-ins that the shim starts itself, for an engine that names paths instead of coming for the streams.

One for each process: it carries bytes between the fifos and the guest, and its pid on the host is the process's. It is
the same program that `katapy create` leaves behind (client/attach.py) and comes to attach.sock like that one. Here it
is started and reaped, and the writing end of its standard input is held.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import run
from katapy.client.launch import connect_attach, new_processes, standin_command
from katapy.errors import InvalidArgument, Unavailable
from katapy.sandbox.process import FILE, GuestProcess, StdioRequest

_NSENTER: Final = "/usr/bin/nsenter"
_KILL_SECONDS: Final = 5.0


@dataclass
class _Held:
    """A stand-in that was started; ``stdin`` is the writing end of its standard input, -1 without."""

    process: run.Process
    ended: asyncio.Task[int]
    stdin: int

    def close_stdin(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1


class StandIns:
    """The stand-ins of a pod. ``mounts`` is a descriptor of the host's mount namespace: theirs is made from that."""

    def __init__(self, directory: Path, mounts: int) -> None:
        self._directory, self._mounts = directory, mounts
        self._held: dict[tuple[str, str], _Held] = {}

    async def start(self, guest: GuestProcess, network: Sequence[str] = ()) -> None:
        """Start the stand-in of a process and wait until it has announced itself.

        ``network`` is the command that puts it into the pod's network. It dies with the shim.
        Raises InvalidArgument where a path cannot be opened, Unavailable where it dies.
        """
        held = self._start(guest, network)
        self._held[guest.container_id, guest.exec_id] = held
        announced = asyncio.create_task(guest.announced.wait(), name="await the stand-in")
        try:
            await asyncio.wait({announced, held.ended}, return_when=asyncio.FIRST_COMPLETED)
            if not guest.announced.is_set():
                raise Unavailable(f"the stand-in of {guest.name} ended at once, with status {held.ended.result()}")
        except BaseException:
            await self.remove(guest)
            raise
        finally:
            announced.cancel()

    def _start(self, guest: GuestProcess, network: Sequence[str]) -> _Held:
        with ExitStack() as stack:
            streams, writer = _open_streams(guest.stdio, stack)
            control = stack.enter_context(connect_attach(self._directory))
            # As seen from this process, so that none of those that follow inherits it.
            host = [_NSENTER, f"--mount=/proc/{os.getpid()}/fd/{self._mounts}", "--"]
            command = standin_command(control.fileno(), guest.container_id, guest.exec_id)
            with nullcontext() if guest.exec_id else new_processes():
                process = run.start(
                    [*host, *network, *command],
                    name="the stand-in",
                    fds=[control.fileno()],
                    stdin=streams[0],
                    stdout=streams[1],
                    stderr=streams[2],
                )
            held = os.dup(writer) if writer >= 0 else -1
        return _Held(process, asyncio.create_task(process.wait(), name=f"wait for the stand-in of {guest.name}"), held)

    def close_stdin(self, guest: GuestProcess) -> bool:
        """Let standard input end where the engine has closed it; False for a process whose stand-in is not ours."""
        held = self._held.get((guest.container_id, guest.exec_id))
        if held is not None:
            held.close_stdin()
        return held is not None

    async def remove(self, guest: GuestProcess) -> None:
        """End the stand-in of a process if it has not ended; what its reader has not taken by now is lost."""
        held = self._held.pop((guest.container_id, guest.exec_id), None)
        if held is not None:
            held.close_stdin()
            held.process.signal(9)
            await asyncio.wait({held.ended}, timeout=_KILL_SECONDS)

    async def close(self) -> None:
        """End them all."""
        left, self._held = self._held, {}
        for held in left.values():
            held.close_stdin()
            held.process.signal(9)
        if left:
            await asyncio.wait({held.ended for held in left.values()}, timeout=_KILL_SECONDS)


def _open_streams(stdio: StdioRequest, stack: ExitStack) -> tuple[list[int | None], int]:
    """Return descriptors for standard input, output and error, and the writing end of the input's fifo, or -1.

    They are closed with ``stack``. Raises InvalidArgument.
    """
    fds: list[int | None] = [None, None, None]
    writer = -1
    for index, name in enumerate(("stdin", "stdout", "stderr")):
        path = getattr(stdio, name).removeprefix(FILE)
        if not path:
            continue
        try:
            # Without waiting for the other end of a fifo: the engine may have it opened already, and closed.
            fd = _open(path, stack, os.O_RDONLY | os.O_NONBLOCK) if index == 0 else _open_output(path, stack)
            if index == 0 and stat.S_ISFIFO(os.fstat(fd).st_mode):
                # Held, so that the input ends when the engine says so, and not between two of its writers.
                writer = _open(path, stack, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidArgument(f"cannot open {name}: {path}: {error.strerror}") from error
        fds[index] = fd
    return fds, writer


def _open_output(path: str, stack: ExitStack) -> int:
    """Open a fifo for both: with a reader of its own, an engine that is started again costs no output."""
    try:
        is_fifo = stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        is_fifo = False
    return _open(path, stack, os.O_RDWR if is_fifo else os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _open(path: str, stack: ExitStack, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY, 0o640)
    stack.callback(os.close, fd)
    return fd
