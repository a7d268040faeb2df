"""One process of a container as the host sees it: its state, its streams, its end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from katapy.agent.stdio import Streams
from katapy.errors import InvalidState, KatapyError, NotFound, Unsupported
from katapy.state import Status

ATTACH = "attach:"
FILE = "file://"
BINARY = "binary://"


class Exit(NamedTuple):
    """How a process ended: ``status`` 0 to 255 (128 + N for signal N), when, and by which ``signal``, 0 for none."""

    status: int
    at: datetime
    signal: int = 0

    @classmethod
    def now(cls, status: int, signal: int = 0) -> Exit:
        """Return an end that is noticed now."""
        return cls(status, datetime.now(UTC), signal)


@dataclass(frozen=True)
class StdioRequest:
    """Which streams a caller of the Task API asked for.

    A stream that is ``attach:`` the caller comes for itself, to the attach socket. Any other is a path, of a fifo
    usually, or a ``file://`` URI, and somebody is started who carries it. Empty is /dev/null. Both outputs may be a
    ``binary://`` URI, of a program that takes both.
    """

    terminal: bool
    stdin: str = ""
    stdout: str = ""
    stderr: str = ""

    @property
    def attached(self) -> bool:
        """Whether the caller comes for the streams itself."""
        return ATTACH in (self.stdin, self.stdout, self.stderr)

    @property
    def logger(self) -> str:
        """The URI of the program that takes both outputs; empty for none."""
        return self.stdout if self.stdout.startswith(BINARY) else ""

    def names(self) -> list[str]:
        """Return the names of the streams that are wanted. Raises Unsupported for a URI that is not known."""
        wanted = []
        for name in ("stdin", "stdout", "stderr"):
            uri = getattr(self, name)
            logged = name != "stdin" and self.logger and uri == self.stdout
            if uri and uri != ATTACH and not logged and not uri.startswith(("/", FILE)):
                raise Unsupported(f"cannot open {name}: {uri!r} is not a kind of stream that katapy serves")
            if uri:
                wanted.append(name)
        return wanted


@dataclass(eq=False)
class GuestProcess:
    """A process: created when it is known, running when it was started, stopped when it has ended."""

    container_id: str
    exec_id: str
    stdio: StdioRequest
    status: Status = Status.CREATED
    guest_pid: int = 0
    host_pid: int = 0  # the stand-in's, once it has announced itself
    announced: asyncio.Event = field(default_factory=asyncio.Event)
    streams: Streams | None = None
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    exit: Exit | None = None
    oom_killed: bool = False
    lost: KatapyError | None = None  # why its end will never be known
    lost_at: datetime | None = None
    released: asyncio.Event = field(default_factory=asyncio.Event)  # whoever took the streams has done with them
    watch: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.released.set()

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"process {self.exec_id} of {self.container_id}" if self.exec_id else f"container {self.container_id}"

    def require(self, allowed: Sequence[Status], verb: str) -> None:
        """Raise InvalidState unless the process is in one of the ``allowed`` states."""
        if self.status not in allowed:
            raise InvalidState(f"cannot {verb} {self.name}: it is {self.status}")

    def finish(self, status: int, *, oom_killed: bool, signal: int = 0) -> None:
        """Note the end; the first report counts."""
        if self.exit is None and self.lost is None:
            self.exit = Exit.now(status, signal)
            self.oom_killed = oom_killed
            self._ended()

    def lose(self, why: KatapyError) -> None:
        """Note that the end will never be known, because the VM is gone."""
        if self.exit is None and self.lost is None:
            self.lost, self.lost_at = why, datetime.now(UTC)
            self._ended()

    def _ended(self) -> None:
        self.status = Status.STOPPED
        self.exited.set()
        self.opened.set()

    async def wait(self) -> Exit:
        """Wait for the end. Raises what ``lose`` was given."""
        await self.exited.wait()
        if self.exit is None:
            assert self.lost is not None
            raise self.lost
        return self.exit

    async def take_streams(self) -> Streams:
        """Wait until the streams are open and give them away. Raises NotFound when someone has taken them."""
        await self.opened.wait()
        if self.lost is not None:
            raise self.lost
        if self.streams is None:
            raise NotFound(f"{self.name} has no streams to attach to")
        taken, self.streams = self.streams, None
        self.released.clear()
        return taken

    def close(self) -> None:
        """Release what the process still holds on the host."""
        if self.watch is not None:
            self.watch.cancel()
        if self.streams is not None:
            self.streams.close()
            self.streams = None
