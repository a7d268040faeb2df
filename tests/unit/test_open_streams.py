"""Opening the streams of a process: their names on the wire, and guests that do not play along."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from katapy.agent import stdio
from katapy.agent.stdio import open_streams
from katapy.errors import Timeout, Unavailable


class Guest:
    """Takes the connections; ``full`` ones have no room for a byte."""

    def __init__(self, stack: ExitStack, *, full: bool = False, gone: bool = False) -> None:
        self._stack, self._full, self._gone = stack, full, gone
        self.ends: list[socket.socket] = []

    async def connect(self, port: int) -> socket.socket:
        """Stand for ``Vsock.connect``."""
        assert port == 1025
        ours, theirs = socket.socketpair()
        self.ends.append(self._stack.enter_context(theirs))
        ours.setblocking(False)
        if self._full:
            with suppress(BlockingIOError):
                while True:
                    ours.send(bytes(65536))
        if self._gone:
            theirs.close()
        return ours


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is left unclosed by the code is a ResourceWarning, which fails the test."""
    with ExitStack() as stack:
        yield stack


async def test_each_stream_says_its_name(stack: ExitStack) -> None:
    guest = Guest(stack)
    streams, described = await open_streams(guest.connect, ["stdin", "stderr"], terminal=False)
    stack.callback(streams.close)
    names = [described.stdin, described.stderr]
    assert [end.recv(100) for end in guest.ends] == [bytes([len(name)]) + name.encode() for name in names]
    assert described.stdout == ""
    assert list(streams.sockets) == ["stdin", "stderr"]


async def test_a_terminal_has_one_stream(stack: ExitStack) -> None:
    guest = Guest(stack)
    streams, described = await open_streams(guest.connect, [], terminal=True, rows=24, columns=80)
    stack.callback(streams.close)
    assert list(streams.sockets) == ["stdout"]
    assert (described.terminal, described.rows, described.columns) == (True, 24, 80)


@pytest.mark.timeout(60)
async def test_a_guest_that_takes_no_byte(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that accepts a stream and gives no credit for its name held up Create and Start for ever."""
    monkeypatch.setattr(stdio, "_NAME_SECONDS", 0.05)
    with pytest.raises(Timeout, match=r"did not take the name within 0\.05 s"):
        await open_streams(Guest(stack, full=True).connect, ["stdin", "stdout"], terminal=False)


async def test_a_guest_that_is_gone(stack: ExitStack) -> None:
    with pytest.raises(Unavailable, match="cannot open a stream to the guest: Broken pipe"):
        await open_streams(Guest(stack, gone=True).connect, ["stdin"], terminal=False)
