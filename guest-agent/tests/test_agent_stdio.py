"""The streams of a process, with this test as the host on one side and the process on the other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import socket
import struct
import termios
import tty
from collections.abc import AsyncIterator, Iterator
from fcntl import ioctl

import pytest
from katapy_agent.errors import AlreadyExists, InvalidArgument, InvalidState, Timeout
from katapy_agent.exchange import Exchange
from katapy_agent.stdio import Stdio, Streams


class Host:
    """An exchange that is served, and connections to it."""

    def __init__(self, exchange: Exchange, path: str) -> None:
        self.exchange = exchange
        self._path = path

    def connect(self, greeting: bytes) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self._path)
        connection.settimeout(30)
        connection.sendall(greeting)
        return connection

    def stream(self, name: str) -> socket.socket:
        return self.connect(bytes([len(name)]) + name.encode())


@pytest.fixture
async def host(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    path = str(tmp_path_factory.mktemp("x") / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.setblocking(False)
        listener.bind(path)
        listener.listen()
        exchange = Exchange()
        serving = asyncio.create_task(exchange.serve(listener))
        yield Host(exchange, path)
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def receive(connection: socket.socket) -> bytes:
    return await asyncio.to_thread(connection.recv, 1 << 20)


async def test_a_stream_is_found_before_and_after_its_call(host: Host) -> None:
    with host.stream("early") as early:
        await asyncio.sleep(0.01)
        with await host.exchange.claim("early") as claimed:
            early.sendall(b"1")
            assert await receive_ready(claimed) == b"1"
    waiting = asyncio.create_task(host.exchange.claim("late"))
    await asyncio.sleep(0)
    with pytest.raises(AlreadyExists):
        await host.exchange.claim("late")
    with host.stream("late") as late, await waiting as claimed:
        late.sendall(b"2")
        assert await receive_ready(claimed) == b"2"


async def receive_ready(connection: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(connection, 100)


@pytest.mark.parametrize("greeting", [b"\0", b"\x81", b"\2\xff\xfe"])
async def test_a_name_that_cannot_be_closes_the_connection(host: Host, greeting: bytes) -> None:
    with host.connect(greeting) as connection:
        assert await receive(connection) == b""


async def test_a_name_that_waits_already_is_not_taken_twice(host: Host) -> None:
    with host.stream("n") as first, host.stream("n") as second:
        assert await receive(second) == b""
        with await host.exchange.claim("n") as claimed:
            first.sendall(b"first")
            assert await receive_ready(claimed) == b"first"


async def test_a_stream_that_never_comes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katapy_agent.exchange._DEADLINE", 0.01)
    with pytest.raises(Timeout, match="'never'"):
        await host.exchange.claim("never")
    for name in ("", "x" * 129):
        with pytest.raises(InvalidArgument):
            await host.exchange.claim(name)


async def test_a_silent_connection_is_closed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katapy_agent.exchange._DEADLINE", 0.01)
    with host.connect(b"\5ab") as connection:
        assert await receive(connection) == b""


@contextlib.contextmanager
def process_of(stdio: Stdio) -> Iterator[tuple[int, int, int]]:
    """Give the process's descriptors, duplicated as the launcher's message would."""
    fds = stdio.open_pipes()
    assert fds is not None
    stdin, stdout, stderr = (os.dup(fd) for fd in fds)
    stdio.close_pipes()
    try:
        yield stdin, stdout, stderr
    finally:
        for fd in (stdin, stdout, stderr):
            with contextlib.suppress(OSError):
                os.close(fd)
        stdio.close()


async def test_bytes_and_ends_of_all_three(host: Host) -> None:
    with host.stream("i") as hin, host.stream("o") as hout, host.stream("e") as herr:
        stdio = await Stdio.connect(host.exchange, Streams(stdin="i", stdout="o", stderr="e"))
        with process_of(stdio) as (stdin, stdout, stderr):
            hin.sendall(b"in")
            hin.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(os.read, stdin, 9) == b"in"
            assert await asyncio.to_thread(os.read, stdin, 9) == b""
            os.write(stdout, b"out")
            os.write(stderr, b"err")
            assert (await receive(hout), await receive(herr)) == (b"out", b"err")
            os.close(stdout)
            assert await receive(hout) == b""
            os.write(stderr, b"more")
            assert await receive(herr) == b"more"


async def test_streams_without_a_name_are_dev_null() -> None:
    stdio = await Stdio.connect(Exchange(), Streams())
    with process_of(stdio) as fds:
        assert {os.readlink(f"/proc/self/fd/{fd}") for fd in fds} == {"/dev/null"}
        assert os.read(fds[0], 1) == b""
        assert os.write(fds[1], b"x") == 1


async def test_host_that_closes_its_reading_end_breaks_the_pipe(host: Host) -> None:
    with host.stream("o") as hout:
        stdio = await Stdio.connect(host.exchange, Streams(stdout="o"))
    with process_of(stdio) as (_, stdout, _):
        hout.close()
        with pytest.raises(BrokenPipeError):
            await asyncio.to_thread(write_for_ever, stdout)


async def test_host_that_only_ends_its_own_direction_still_reads(host: Host) -> None:
    with host.stream("o") as hout:
        stdio = await Stdio.connect(host.exchange, Streams(stdout="o"))
        with process_of(stdio) as (_, stdout, _):
            hout.shutdown(socket.SHUT_WR)
            os.write(stdout, b"still")
            assert await receive(hout) == b"still"


def write_for_ever(fd: int) -> None:
    """Write until that fails, or nobody has read for a while."""
    os.set_blocking(fd, False)
    room = select.poll()
    room.register(fd, select.POLLOUT)
    while room.poll(30_000):
        os.write(fd, b"x" * 4096)


async def test_process_that_closes_its_input_breaks_the_stream(host: Host) -> None:
    with host.stream("i") as hin:
        stdio = await Stdio.connect(host.exchange, Streams(stdin="i"))
        with process_of(stdio) as (stdin, _, _):
            os.close(stdin)
            with pytest.raises(OSError):  # noqa: PT011 - EPIPE or ECONNRESET
                await asyncio.to_thread(write_for_ever, hin.fileno())


async def test_the_end_of_the_process_drains_and_ends_a_pipe_that_is_still_held(host: Host) -> None:
    with host.stream("o") as hout:
        stdio = await Stdio.connect(host.exchange, Streams(stdout="o"))
        with process_of(stdio) as (_, stdout, _):
            os.write(stdout, b"x" * 700_000)
            stdio.finish()
            count = 0
            while data := await receive(hout):
                count += len(data)
            assert count == 700_000


async def test_a_pipe_that_is_written_for_ever_does_not_outlive_the_process(host: Host) -> None:
    with host.stream("o") as hout:
        stdio = await Stdio.connect(host.exchange, Streams(stdout="o"))
        with process_of(stdio) as (_, stdout, _):
            writer = asyncio.create_task(asyncio.to_thread(write_for_ever, stdout))
            await receive(hout)
            stdio.finish()
            while await receive(hout):
                pass
            with pytest.raises(BrokenPipeError):
                await writer


async def test_close_stdin_hands_on_what_has_come_first(host: Host) -> None:
    with host.stream("i") as hin:
        hin.sendall(b"words")
        stdio = await Stdio.connect(host.exchange, Streams(stdin="i"))
        with process_of(stdio) as (stdin, _, _):
            stdio.close_stdin()
            assert await asyncio.to_thread(os.read, stdin, 9) == b"words"
            assert await asyncio.to_thread(os.read, stdin, 9) == b""


def fill(fd: int) -> None:
    """Write until nothing is taken any more for a moment."""
    os.set_blocking(fd, False)
    room = select.poll()
    room.register(fd, select.POLLOUT)
    while room.poll(50):
        os.write(fd, b"x" * 4096)


async def test_close_ends_a_stream_that_the_host_does_not_read(host: Host) -> None:
    with host.stream("o") as hout:
        stdio = await Stdio.connect(host.exchange, Streams(stdout="o"))
        with process_of(stdio) as (_, stdout, _):
            await asyncio.to_thread(fill, stdout)
            stdio.close()
            while await receive(hout):
                pass


async def test_terminal_goes_both_ways_and_half_close_does_not_hang_it_up(host: Host) -> None:
    with host.stream("t") as terminal:
        stdio = await Stdio.connect(host.exchange, Streams(terminal=True, stdout="t"))
        assert stdio.open_pipes() is None
        master, slave = pty.openpty()
        tty.setraw(slave)
        stdio.attach(master)
        terminal.sendall(b"typed")
        assert await asyncio.to_thread(os.read, slave, 9) == b"typed"
        terminal.shutdown(socket.SHUT_WR)
        os.write(slave, b"shown")
        assert await receive(terminal) == b"shown"
        stdio.resize(24, 80)
        assert struct.unpack("HHHH", ioctl(slave, termios.TIOCGWINSZ, b"\0" * 8))[:2] == (24, 80)
        with pytest.raises(InvalidState):
            stdio.close_stdin()
        os.close(slave)
        assert await receive(terminal) == b""
        while stdio._console >= 0:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        stdio.close()


async def test_host_that_closes_a_terminal_hangs_it_up(host: Host) -> None:
    with host.stream("t") as terminal:
        stdio = await Stdio.connect(host.exchange, Streams(terminal=True, stdout="t"))
    master, slave = pty.openpty()
    stdio.attach(master)
    terminal.close()
    # Who waits in a terminal while it is hung up reads its end; who comes later gets an error.
    with contextlib.suppress(OSError):
        assert await asyncio.to_thread(os.read, slave, 9) == b""
    os.close(slave)
    stdio.close()


@pytest.mark.parametrize(
    "fields",
    [{"terminal": True, "stdin": "a", "stdout": "b"}, {"rows": 65536}, {"columns": -1}],
)
def test_streams_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        Streams(**fields)  # type: ignore[arg-type]


async def test_many_streams_at_once() -> None:
    """All that had come before the agent looked were accepted in one go, and those beyond 64 closed."""
    exchange, (listener, *streams) = Exchange(), [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(101)]
    listener.setblocking(False)
    listener.bind("")  # a name that the kernel chooses
    listener.listen(128)
    for number, each in enumerate(streams):
        each.connect(listener.getsockname())
        each.sendall(bytes([3]) + f"{number:03}".encode())
    serving = asyncio.create_task(exchange.serve(listener))
    for number in range(len(streams)):
        (await exchange.claim(f"{number:03}")).close()
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    for each in (listener, *streams):
        each.close()


async def test_one_name_for_two_streams_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        await Stdio.connect(Exchange(), Streams(stdout="same", stderr="same"))


async def test_nothing_is_kept_when_a_stream_is_missing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with host.stream("o") as hout:
        while "o" not in host.exchange._unclaimed:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        monkeypatch.setattr("katapy_agent.exchange._DEADLINE", 0.01)
        with pytest.raises(Timeout):
            await Stdio.connect(host.exchange, Streams(stdout="o", stderr="e"))
        assert await receive(hout) == b""
