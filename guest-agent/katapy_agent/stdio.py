"""The standard streams of one process: what it is given as 0, 1 and 2, and the connections that carry them.

The process gets pipes or /dev/null, never a socket: /dev/stdout could not be opened again on one. A process with a
terminal makes that itself, inside its container, and hands over the master. Pumps move the bytes; this module says
what the end of each stream means.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import termios
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from katapy_agent.errors import InvalidArgument, InvalidState
from katapy_agent.exchange import Exchange
from katapy_agent.pump import PIPE_SIZE, Pump

_SIZE_MAX = 0xFFFF


@dataclass(frozen=True)
class Streams:
    """What the host wants of a process's streams: their names, empty for /dev/null.

    With ``terminal`` there is one stream, ``stdout``, for both directions, and ``rows`` and ``columns`` are the
    terminal's size, 0 where the kernel's own is to stay.
    """

    terminal: bool = False
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    rows: int = 0
    columns: int = 0

    def __post_init__(self) -> None:
        if self.terminal and (self.stdin or self.stderr):
            raise InvalidArgument("a terminal has one stream, named in stdout")
        _check_size(self.rows, self.columns)


class Stdio:
    """The agent's side of a process's streams. Owns connections, pipes and the terminal until `close` or their end."""

    def __init__(self, streams: Streams, connections: dict[str, socket.socket]) -> None:
        self.terminal = streams.terminal
        self._connections = connections
        self._child_fds: list[int] = []
        self._console = -1
        self._input: Pump | None = None
        self._outputs: list[Pump] = []

    @classmethod
    async def connect(cls, exchange: Exchange, streams: Streams) -> Stdio:
        """Wait for all connections that ``streams`` names. Raises what `Exchange.claim` raises."""
        named = {role: name for role in ("stdin", "stdout", "stderr") if (name := getattr(streams, role))}
        if len(set(named.values())) < len(named):
            raise InvalidArgument("each stream needs a name of its own")
        connections: dict[str, socket.socket] = {}
        with ExitStack() as undo:
            for role, name in named.items():
                connections[role] = undo.enter_context(contextlib.closing(await exchange.claim(name)))
            undo.pop_all()
        return cls(streams, connections)

    def open_pipes(self) -> tuple[int, int, int] | None:
        """Make the process's ends and start moving bytes; None for a process with a terminal.

        The ends stay open here until `close_pipes`.
        """
        if self.terminal:
            return None
        stdin = self._open_pipe("stdin")
        stdout = self._open_pipe("stdout")
        stderr = self._open_pipe("stderr")
        return stdin, stdout, stderr

    def close_pipes(self) -> None:
        """Close the process's ends, which the process has by now."""
        while self._child_fds:
            os.close(self._child_fds.pop())

    def attach(self, master: int) -> None:
        """Join the master of the process's terminal, which is owned from here on, to its stream."""
        if not self.terminal or self._console >= 0:
            os.close(master)
            raise InvalidState("process has no place for a terminal")
        os.set_blocking(master, False)
        self._console = master
        connection = self._connections.pop("stdout", None)
        if connection is None:
            sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        else:
            self._input = Pump("terminal input", connection.dup().detach(), os.dup(master))
            sink = connection.detach()
        hang_up = partial(asyncio.get_running_loop().call_soon_threadsafe, self._hang_up)
        self._outputs.append(Pump("terminal output", os.dup(master), sink, hang_up))

    def finish(self) -> None:
        """The process has ended: hand on what it wrote, then end the streams, whoever still holds their pipes."""
        if self._input is not None:
            self._input.stop()
        for pump in self._outputs:
            pump.drain()
        self._hang_up()

    def close(self) -> None:
        """End all streams now. May be called in any state, and again."""
        self.finish()
        self.close_pipes()
        for pump in self._outputs:
            pump.stop()
        while self._connections:
            self._connections.popitem()[1].close()

    def close_stdin(self) -> None:
        """Give the process the end of its input, after what has arrived. Without a stream there is nothing to do."""
        if self.terminal:
            raise InvalidState("the input of a terminal cannot be closed")
        if self._input is not None:
            self._input.drain()

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size in characters. Raises InvalidState without a terminal."""
        if self._console < 0:
            raise InvalidState("process has no terminal")
        _check_size(rows, columns)
        fcntl.ioctl(self._console, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _open_pipe(self, role: str) -> int:
        connection = self._connections.pop(role, None)
        if connection is None:
            theirs = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            self._child_fds.append(theirs)
        else:
            reading, writing = os.pipe()
            theirs, ours = (reading, writing) if role == "stdin" else (writing, reading)
            self._child_fds.append(theirs)
            os.set_blocking(ours, False)
            fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            if role == "stdin":
                self._input = Pump(role, connection.detach(), ours)
            else:
                self._outputs.append(Pump(role, ours, connection.detach()))
        return theirs

    def _hang_up(self) -> None:
        # The pumps have descriptors of their own: the last of all to be closed hangs the terminal up.
        if self._console >= 0:
            os.close(self._console)
            self._console = -1
        if self._input is not None and self.terminal:
            self._input.stop()


def _check_size(rows: int, columns: int) -> None:
    if not (0 <= rows <= _SIZE_MAX and 0 <= columns <= _SIZE_MAX):
        raise InvalidArgument(f"terminal size {rows} x {columns} is out of range")
