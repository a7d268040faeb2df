"""The stand-ins that the shim starts itself, for an engine that names paths instead of coming for the streams.

One for each process: it carries bytes between the fifos and the guest, and its pid on the host is the process's. It is
the same program that `katapy create` leaves behind (client/attach.py) and comes to attach.sock like that one. Here it
is started and reaped, and given its standard input when the process is started, with a writing end held here.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import run
from katapy.client.launch import connect_attach, new_processes, standin_command
from katapy.errors import InvalidArgument, Unavailable
from katapy.sandbox.process import FILE, GuestProcess
from katapy.shim.logger import Logger, start_logger

_NSENTER: Final = "/usr/bin/nsenter"
_KILL_SECONDS: Final = 5.0
# As long as containerd's own shim: who has left for good takes nothing more, and it cannot be told from who is slow.
_DRAIN_SECONDS: Final = 2.0


@dataclass
class _Held:
    """A stand-in that was started. Over ``gate`` it is given ``stdin``, whose writing end is ``writer`` then.

    ``logger`` is who takes what it carries, where that is a program.
    """

    process: run.Process
    ended: asyncio.Task[int]
    stdin: str
    gate: socket.socket | None
    logger: Logger | None = None
    writer: int = -1
    closed: bool = False

    def open_stdin(self) -> None:
        """Open the fifo for both and give the reading end away. Raises OSError."""
        if self.gate is None:
            return
        with self.gate as gate:
            self.gate = None
            # Without waiting for the other end: the engine may have closed it already.
            fd = os.open(self.stdin, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
            try:
                # Held, so that the input ends when the engine says so, and not between two of its writers.
                if not self.closed and stat.S_ISFIFO(os.fstat(fd).st_mode):
                    self.writer = os.open(self.stdin, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                with suppress(OSError):  # it has ended, and needs no input
                    socket.send_fds(gate, [b"\0"], [fd])
            finally:
                os.close(fd)

    def close_stdin(self) -> None:
        """Let standard input end with what the engine has written."""
        self.closed = True
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def end(self) -> None:
        """Kill it and let go of what is held."""
        self.close_stdin()
        if self.gate is not None:
            self.gate.close()
        self.process.signal(signal.SIGKILL)


class StandIns:
    """The stand-ins of a pod. ``mounts`` is a descriptor of the host's mount namespace: theirs is made from that.

    ``namespace`` is the engine's own notion, of which logging programs are told.
    """

    def __init__(self, directory: Path, mounts: int, namespace: str = "") -> None:
        self._directory, self._mounts, self._namespace = directory, mounts, namespace
        self._held: dict[tuple[str, str], _Held] = {}

    async def start(self, guest: GuestProcess, network: Sequence[str] = ()) -> None:
        """Start the stand-in of a process and wait until it has announced itself.

        ``network`` is the command that puts it into the pod's network. It dies with the shim.
        Raises InvalidArgument where a path cannot be opened, Unavailable where it dies.
        """
        held = await self._start(guest, network)
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

    async def _start(self, guest: GuestProcess, network: Sequence[str]) -> _Held:
        if not guest.stdio.logger:
            return self._start_process(guest, network)
        container_id = guest.container_id
        logger = await start_logger(
            guest.stdio.logger, container_id=container_id, namespace=self._namespace, mounts=self._mounts
        )
        try:
            held = self._start_process(guest, network, logger)
        except BaseException:
            logger.release()
            await logger.finish()
            raise
        logger.release()
        return held

    def _start_process(self, guest: GuestProcess, network: Sequence[str], logger: Logger | None = None) -> _Held:
        stdio = guest.stdio
        with ExitStack() as stack:
            stdout: int | None
            stderr: int | None
            if logger is not None:
                stdout, stderr = logger.stdout, logger.stderr
            else:
                stdout, stderr = (_open_output(getattr(stdio, name), name, stack) for name in ("stdout", "stderr"))
            control = stack.enter_context(connect_attach(self._directory))
            ours, theirs = socket.socketpair() if stdio.stdin else (None, None)
            command = standin_command(control.fileno(), guest.container_id, guest.exec_id)
            fds = [control.fileno()]
            if theirs is not None:
                fds.append(stack.enter_context(theirs).fileno())
                command += ["--gate-fd", str(theirs.fileno())]
            # As seen from this process, so that none of those that follow inherits it.
            host = [_NSENTER, f"--mount=/proc/{os.getpid()}/fd/{self._mounts}", "--"]
            try:
                with nullcontext() if guest.exec_id else new_processes():
                    process = run.start(
                        [*host, *network, *command], name="the stand-in", fds=fds, stdout=stdout, stderr=stderr
                    )
            except BaseException:
                if ours is not None:
                    ours.close()
                raise
        ended = asyncio.create_task(process.wait(), name=f"wait for the stand-in of {guest.name}")
        return _Held(process, ended, stdio.stdin.removeprefix(FILE), ours, logger)

    def open_stdin(self, guest: GuestProcess) -> None:
        """Let standard input flow, as the process is about to start.

        Not before: an engine's client that has written all of its input says so by CloseIO, but not while it waits for
        Create, and then never. Raises InvalidArgument where the path cannot be opened.
        """
        held = self._held.get((guest.container_id, guest.exec_id))
        if held is not None:
            try:
                held.open_stdin()
            except OSError as error:
                raise InvalidArgument(f"cannot open stdin: {held.stdin}: {error.strerror}") from error

    def close_stdin(self, guest: GuestProcess) -> bool:
        """Let standard input end where the engine has closed it; False for a process whose stand-in is not ours."""
        held = self._held.get((guest.container_id, guest.exec_id))
        if held is not None:
            held.close_stdin()
        return held is not None

    async def drain(self, guest: GuestProcess) -> None:
        """Give a process's reader some time for what the process has written, now that that has ended."""
        held = self._held.get((guest.container_id, guest.exec_id))
        if held is not None:
            await asyncio.wait({held.ended}, timeout=_DRAIN_SECONDS)
            await self.remove(guest)

    async def remove(self, guest: GuestProcess) -> None:
        """End the stand-in of a process if it has not ended; what its reader has not taken by now is lost."""
        held = self._held.pop((guest.container_id, guest.exec_id), None)
        if held is not None:
            held.end()
            await asyncio.wait({held.ended}, timeout=_KILL_SECONDS)
            if held.logger is not None:
                await held.logger.finish()

    async def close(self) -> None:
        """End them all."""
        left, self._held = self._held, {}
        for held in left.values():
            held.end()
        if left:
            await asyncio.wait({held.ended for held in left.values()}, timeout=_KILL_SECONDS)
            await asyncio.gather(*(held.logger.finish() for held in left.values() if held.logger is not None))


def _open_output(uri: str, name: str, stack: ExitStack) -> int | None:
    """Return a descriptor that is closed with ``stack``; None for no output. Raises InvalidArgument.

    A fifo is opened for both: nobody is waited for, and with a reader of its own, an engine that is started again costs
    no output.
    """
    path = uri.removeprefix(FILE)
    if not path:
        return None
    try:
        try:
            is_fifo = stat.S_ISFIFO(os.stat(path).st_mode)
        except FileNotFoundError:
            is_fifo = False
        flags = os.O_RDWR if is_fifo else os.O_WRONLY | os.O_APPEND | os.O_CREAT
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY, 0o640)
    except OSError as error:
        raise InvalidArgument(f"cannot open {name}: {path}: {error.strerror}") from error
    stack.callback(os.close, fd)
    return fd
