"""The guest's side of forwarded connections: to the loopback of either family, and bytes and ends both ways."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import TypeVar

import pytest
from katapy_agent import forward
from katapy_agent.errors import InvalidArgument, NotFound
from pieces import Pieces

SECONDS = 30.0
T = TypeVar("T")


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, SECONDS)


def listener(family: int, address: str, port: int = 0) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
        made.listen(128)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made


def _listeners_at_one_port() -> tuple[socket.socket, socket.socket]:
    """Return one at 127.0.0.1 and one at ::1."""
    while True:
        server6 = listener(socket.AF_INET6, "::1")
        try:
            return listener(socket.AF_INET, "127.0.0.1", server6.getsockname()[1]), server6
        except OSError as error:
            server6.close()
            if error.errno != errno.EADDRINUSE:  # somebody's there
                raise


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A listener of a container's, at 127.0.0.1 only."""
    with listener(socket.AF_INET, "127.0.0.1") as made:
        yield made


@pytest.fixture
def server6() -> Iterator[socket.socket]:
    """One at ::1 only."""
    try:
        made = listener(socket.AF_INET6, "::1")
    except OSError as error:
        if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            pytest.skip("this kernel has no IPv6")
        raise
    with made:
        yield made


async def accepted(server: socket.socket) -> socket.socket:
    connection, _ = await soon(asyncio.get_running_loop().sock_accept(server))
    return connection


async def send(end: socket.socket, data: bytes) -> None:
    await soon(asyncio.get_running_loop().sock_sendall(end, data))


async def receive(end: socket.socket) -> bytes:
    """Return what comes next, or nothing at the end."""
    return await soon(asyncio.get_running_loop().sock_recv(end, 1 << 16))


async def everything(end: socket.socket) -> bytes:
    data = bytearray()
    while more := await receive(end):
        data += more
    return bytes(data)


# -- the connection


async def test_the_other_family_is_tried_where_nobody_listens(server: socket.socket, server6: socket.socket) -> None:
    for each in (server, server6):
        for ipv6 in (False, True):
            with await soon(forward.connect(each.getsockname()[1], ipv6=ipv6)) as made, await accepted(each) as taken:
                assert made.getpeername() == each.getsockname()
                assert taken.getpeername() == made.getsockname()


@pytest.mark.usefixtures("server6")
async def test_the_family_that_was_dialled_comes_first() -> None:
    server, server6 = _listeners_at_one_port()
    port = server.getsockname()[1]
    with server, server6:
        for ipv6, expected in ((False, server), (True, server6)):
            with await soon(forward.connect(port, ipv6=ipv6)) as made:
                assert made.getpeername() == expected.getsockname()


async def test_nobody_listens(server: socket.socket) -> None:
    port = server.getsockname()[1]
    server.close()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotFound, match=f"^cannot connect to port {port} of the loopback: connection refused$"):
        await soon(forward.connect(port, ipv6=False))
    assert os.listdir("/proc/self/fd") == before


async def test_who_does_not_accept_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_CONNECT_SECONDS", 0.05)
    with listener(socket.AF_INET, "127.0.0.1") as full:
        full.listen(0)
        with socket.create_connection(full.getsockname()), pytest.raises(NotFound, match="timed out"):
            await soon(forward.connect(full.getsockname()[1], ipv6=False))


@pytest.mark.parametrize("port", [0, 1 << 16, (1 << 32) - 1])
async def test_what_is_no_port(port: int) -> None:
    with pytest.raises(InvalidArgument, match=f"not a port: {port}"):
        await forward.connect(port, ipv6=False)


# -- the relay


Ends = tuple[Pieces, socket.socket]


@contextlib.asynccontextmanager
async def relayed(server: socket.socket) -> AsyncIterator[Ends]:
    """Give the host's end of a stream, and the server's of a connection; the relay between ends with them."""
    host, stream = socket.socketpair()
    stream.setblocking(False)
    connection = await soon(forward.connect(server.getsockname()[1], ipv6=False))
    taken = await accepted(server)
    relay = asyncio.create_task(forward.relay(stream, connection))
    try:
        yield Pieces(host), taken
    finally:
        host.close()
        taken.close()
    await soon(relay)
    assert (stream.fileno(), connection.fileno()) == (-1, -1)


@pytest.fixture
async def ends(server: socket.socket) -> AsyncIterator[Ends]:
    async with relayed(server) as made:
        yield made


async def test_large_data_go_both_ways_at_once(ends: Ends) -> None:
    host, server = ends
    there, back = bytes(range(256)) * 40_000, bytes(reversed(range(256))) * 40_000

    async def ask() -> None:
        await soon(host.send(there))
        await soon(host.send(b""))

    async def answer() -> None:
        await send(server, back)
        server.shutdown(socket.SHUT_WR)

    received, asked, *_ = await asyncio.gather(soon(host.everything()), everything(server), ask(), answer())
    assert (received, asked) == (back, there)
    await soon(host.hang_up())


async def test_the_client_ends_first(ends: Ends) -> None:
    """And waits for the answer."""
    host, server = ends
    await soon(host.send(b"question"))
    await soon(host.send(b""))
    assert await everything(server) == b"question"
    await send(server, b"answer")
    assert await soon(host.receive()) == b"answer"
    server.close()
    assert await soon(host.receive()) == b""
    await soon(host.hang_up())


async def test_the_server_ends_first(ends: Ends) -> None:
    host, server = ends
    await send(server, b"greeting")
    server.shutdown(socket.SHUT_WR)
    assert await soon(host.everything()) == b"greeting"
    await soon(host.send(b"reply"))
    assert await receive(server) == b"reply"
    await soon(host.send(b""))
    assert await receive(server) == b""
    await soon(host.hang_up())


async def test_a_host_that_hangs_up_after_its_end_has_said_it_all(ends: Ends) -> None:
    """What the server has not read yet, it will."""
    host, server = ends
    server.shutdown(socket.SHUT_WR)
    assert await soon(host.receive()) == b""
    data = bytes(range(256)) * 80_000

    async def ask() -> None:
        await soon(host.send(data))
        await soon(host.send(b""))
        host.stream.close()

    received, _ = await asyncio.gather(everything(server), ask())
    assert received == data


async def test_a_server_that_breaks_off_breaks_the_stream(ends: Ends) -> None:
    """What came so far is not all that there was."""
    host, server = ends
    await send(server, b"begun")
    assert await soon(host.receive()) == b"begun"
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.close()
    with pytest.raises(EOFError):
        await soon(host.receive())


@pytest.mark.parametrize("said", [b"", b"\0\0", b"\0\0\0\5half"])
async def test_a_stream_that_just_ends_is_a_reset(ends: Ends, said: bytes) -> None:
    host, server = ends
    await soon(host.send(b"whole"))
    assert await receive(server) == b"whole"
    await send(host.stream, said)
    host.stream.close()
    with pytest.raises(ConnectionResetError):
        await everything(server)


async def test_a_host_that_lets_go_while_it_waits_is_a_reset(ends: Ends) -> None:
    """Its client has gone, after the end of what it had to say."""
    host, server = ends
    await soon(host.send(b""))
    assert await receive(server) == b""
    host.stream.close()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await send(server, bytes(64 << 20))


async def test_who_does_not_read_stops_the_other_end_and_no_third(ends: Ends) -> None:
    """What is under way is bounded: by the buffers of the two sockets, and one chunk."""
    host, server = ends
    flood = asyncio.create_task(send(server, bytes(64 << 20)))
    with listener(socket.AF_INET, "127.0.0.1") as other_server:
        async with relayed(other_server) as (other_host, taken):
            for number in range(100):
                await soon(other_host.send(b"%d" % number))
                assert await receive(taken) == b"%d" % number
    assert not flood.done()
    received = 0
    while received < 64 << 20:
        received += len(await soon(host.receive()))
    await soon(flood)


async def test_others_have_their_turn_after_each_chunk(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and writing that never have to wait gave nobody else one."""
    monkeypatch.setattr(forward, "_CHUNK", 1024)
    host, server = ends
    await send(server, b"x")
    await soon(host.receive())  # the relay is at work
    await send(server, bytes(100 << 10))
    turns, received = 0, 0
    while received < 100 << 10:
        await asyncio.sleep(0)
        turns += 1
        with contextlib.suppress(BlockingIOError):
            received += len(host.stream.recv(1 << 20))
    assert turns >= 100


async def test_many_at_once(server: socket.socket) -> None:
    """As many as the host allows, and their descriptors are all closed."""
    before = os.listdir("/proc/self/fd")

    async def one(number: int) -> None:
        async with relayed(server) as (host, taken):
            await soon(host.send(b"%d" % number))
            await send(taken, await receive(taken))
            assert await soon(host.receive()) == b"%d" % number

    await asyncio.gather(*(one(number) for number in range(64)))
    assert os.listdir("/proc/self/fd") == before
