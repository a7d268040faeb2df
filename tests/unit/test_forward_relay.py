"""The host's side of forwarded connections: each has a stream of its own, and its ends are those of its two sides."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import pytest

from katapy.errors import NotFound
from katapy.run import readable
from katapy.sandbox.forward import CONNECTIONS_MAX, forward

SECONDS = 30.0
T = TypeVar("T")


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, SECONDS)


class Lab:
    """A listener, and a guest whose ends of the streams are the test's."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.place = self.listener.getsockname()
        self.dialled: asyncio.Queue[tuple[int, bool, socket.socket]] = asyncio.Queue()
        self.refuse = False
        self.opened: list[socket.socket] = []

    @contextlib.asynccontextmanager
    async def dial(self, port: int, ipv6: bool) -> AsyncIterator[socket.socket]:
        if self.refuse:
            raise NotFound("nobody listens there")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.opened.append(theirs)
        self.dialled.put_nowait((port, ipv6, theirs))
        with ours:
            yield ours

    async def client(self) -> socket.socket:
        client = socket.socket()
        self.opened.append(client)
        client.setblocking(False)
        await soon(asyncio.get_running_loop().sock_connect(client, self.place))
        return client

    async def gone(self, guest: socket.socket) -> None:
        """Wait until the host has closed its end of a stream."""
        poller = select.epoll()
        try:
            poller.register(guest, 0)
            await soon(readable(poller.fileno()))
        finally:
            poller.close()

    async def connection(self) -> tuple[socket.socket, socket.socket]:
        """Return the two ends of a connection: the client's and the guest's."""
        client = await self.client()
        _, _, guest = await soon(self.dialled.get())
        return client, guest


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    lab = Lab()
    task = asyncio.create_task(forward([lab.listener], lab.dial))
    yield lab
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(task)
    for each in (lab.listener, *lab.opened):
        each.close()


async def send(end: socket.socket, data: bytes) -> None:
    await soon(asyncio.get_running_loop().sock_sendall(end, data))


async def receive(end: socket.socket) -> bytes:
    """Return what comes next, or nothing at the end."""
    return await soon(asyncio.get_running_loop().sock_recv(end, 1 << 16))


async def everything(end: socket.socket) -> bytes:
    data = b""
    while more := await receive(end):
        data += more
    return data


async def test_the_guest_is_told_which_port_was_dialled(lab: Lab) -> None:
    await lab.client()
    port, ipv6, _ = await soon(lab.dialled.get())
    assert (port, ipv6) == (lab.place[1], False)


async def test_large_data_go_both_ways_at_once(lab: Lab) -> None:
    client, guest = await lab.connection()
    there, back = bytes(range(256)) * 40_000, bytes(reversed(range(256))) * 40_000

    async def one_side(end: socket.socket, data: bytes) -> bytes:
        async def sending() -> None:
            await send(end, data)
            end.shutdown(socket.SHUT_WR)

        received, _ = await asyncio.gather(everything(end), sending())
        return received

    assert list(await asyncio.gather(one_side(client, there), one_side(guest, back))) == [back, there]


@pytest.mark.parametrize("first", ["client", "guest"])
async def test_each_direction_has_an_end_of_its_own(lab: Lab, first: str) -> None:
    client, guest = await lab.connection()
    one, other = (client, guest) if first == "client" else (guest, client)
    await send(one, b"question")
    one.shutdown(socket.SHUT_WR)
    assert await everything(other) == b"question"
    await send(other, b"answer")
    assert await receive(one) == b"answer"
    other.shutdown(socket.SHUT_WR)
    assert await receive(one) == b""


async def test_a_port_where_nobody_listens_is_a_reset(lab: Lab) -> None:
    lab.refuse = True
    client = await lab.client()
    with pytest.raises(ConnectionResetError):
        await receive(client)
    lab.refuse = False
    client, guest = await lab.connection()
    await send(guest, b"alive")
    assert await receive(client) == b"alive"


async def test_a_client_that_breaks_off_ends_the_guests_side(lab: Lab) -> None:
    client, guest = await lab.connection()
    await send(client, b"begun")
    assert await receive(guest) == b"begun"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert await everything(guest) == b""
    with pytest.raises(BrokenPipeError):
        await send(guest, bytes(64 << 20))


async def test_a_client_that_breaks_off_while_it_waits(lab: Lab) -> None:
    """After the end of what it had to say, reading tells nothing more of it."""
    client, guest = await lab.connection()
    client.shutdown(socket.SHUT_WR)
    assert await receive(guest) == b""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    await lab.gone(guest)


async def test_who_waits_for_an_answer_is_told_from_who_has_closed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that did not mind the end of its client held a place for good."""
    quick = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 1}
    monkeypatch.setattr("katapy.sandbox.forward._KEEPALIVE", quick)
    (waiting, its_guest), (closed, other_guest) = await lab.connection(), await lab.connection()
    waiting.shutdown(socket.SHUT_WR)
    closed.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
    closed.close()
    await lab.gone(other_guest)
    await send(its_guest, b"answer")
    assert await receive(waiting) == b"answer"


async def test_a_guest_that_has_gone_is_a_reset_for_who_goes_on(lab: Lab) -> None:
    client, guest = await lab.connection()
    await send(guest, b"last words")
    guest.close()
    assert await everything(client) == b"last words"
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await send(client, bytes(64 << 20))


async def test_there_are_so_many_at_a_time_and_no_more(lab: Lab) -> None:
    """One that has ended makes room."""
    ends = [await lab.connection() for _ in range(CONNECTIONS_MAX)]
    for number, (client, _) in enumerate(ends):
        await send(client, b"%d" % number)
    assert [await receive(guest) for _, guest in ends] == [b"%d" % number for number in range(len(ends))]
    with pytest.raises(ConnectionResetError):
        await receive(await lab.client())
    client, guest = ends.pop()
    for end in (client, guest):
        end.shutdown(socket.SHUT_WR)
    assert (await everything(guest), await everything(client)) == (b"", b"")
    client, guest = await lab.connection()
    await send(guest, b"served")
    assert await receive(client) == b"served"


async def test_others_have_their_turn_after_each_chunk(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and writing that never have to wait gave nobody else one."""
    monkeypatch.setattr("katapy.sandbox.forward._CHUNK", 1024)
    client, guest = await lab.connection()
    await send(client, bytes(100 << 10))
    turns, received = 0, 0
    while received < 100 << 10:
        await asyncio.sleep(0)
        turns += 1
        with contextlib.suppress(BlockingIOError):
            received += len(guest.recv(1 << 20))
    assert turns >= 100


async def test_the_end_of_the_pod_is_a_reset(lab: Lab) -> None:
    """No client takes what has come so far for all that there was."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    task = asyncio.create_task(forward([listener], lab.dial))
    with listener, socket.socket() as client:
        client.setblocking(False)
        await soon(asyncio.get_running_loop().sock_connect(client, listener.getsockname()))
        _, _, guest = await soon(lab.dialled.get())
        await send(guest, b"half of it")
        assert await receive(client) == b"half of it"
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(ConnectionResetError):
            await receive(client)
