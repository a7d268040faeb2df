"""The host's side of forwarded connections: each has a stream of its own, and its ends are those of its two sides."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import pytest
from pieces import Pieces

from katapy.errors import NotFound
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
        self.dialled: asyncio.Queue[tuple[int, bool, Pieces]] = asyncio.Queue()
        self.refuse = False
        self.opened: list[socket.socket] = []

    async def dial(self, port: int, ipv6: bool) -> socket.socket:
        if self.refuse:
            raise NotFound("nobody listens there")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.opened.append(theirs)
        self.dialled.put_nowait((port, ipv6, Pieces(theirs)))
        return ours

    async def client(self) -> socket.socket:
        client = socket.socket()
        self.opened.append(client)
        client.setblocking(False)
        await soon(asyncio.get_running_loop().sock_connect(client, self.place))
        return client

    async def connection(self) -> tuple[socket.socket, Pieces]:
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
    data = bytearray()
    while more := await receive(end):
        data += more
    return bytes(data)


def break_off(end: socket.socket) -> None:
    """Close a connection as a process that is killed may."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


async def test_the_guest_is_told_which_port_was_dialled(lab: Lab) -> None:
    await lab.client()
    port, ipv6, _ = await soon(lab.dialled.get())
    assert (port, ipv6) == (lab.place[1], False)


async def test_large_data_go_both_ways_at_once(lab: Lab) -> None:
    client, guest = await lab.connection()
    there, back = bytes(range(256)) * 40_000, bytes(reversed(range(256))) * 40_000

    async def ask() -> None:
        await send(client, there)
        client.shutdown(socket.SHUT_WR)

    async def answer() -> None:
        await soon(guest.send(back))
        await soon(guest.send(b""))

    received, asked, *_ = await asyncio.gather(everything(client), soon(guest.everything()), ask(), answer())
    assert (received, asked) == (back, there)
    await soon(guest.hang_up())


async def test_the_client_ends_first(lab: Lab) -> None:
    """And waits for the answer."""
    client, guest = await lab.connection()
    await send(client, b"question")
    client.shutdown(socket.SHUT_WR)
    assert await soon(guest.everything()) == b"question"
    await soon(guest.send(b"answer"))
    assert await receive(client) == b"answer"
    await soon(guest.send(b""))
    assert await receive(client) == b""


async def test_a_guest_that_hangs_up_after_its_end_has_said_it_all(lab: Lab) -> None:
    """What the client has not read yet, it will."""
    client, guest = await lab.connection()
    client.shutdown(socket.SHUT_WR)
    assert await soon(guest.receive()) == b""
    data = bytes(range(256)) * 80_000

    async def answer() -> None:
        await soon(guest.send(data))
        await soon(guest.send(b""))
        guest.stream.close()

    received, _ = await asyncio.gather(everything(client), answer())
    assert received == data


async def test_the_guest_ends_first(lab: Lab) -> None:
    client, guest = await lab.connection()
    await soon(guest.send(b"greeting"))
    await soon(guest.send(b""))
    assert await everything(client) == b"greeting"
    await send(client, b"reply")
    assert await soon(guest.receive()) == b"reply"
    client.close()
    assert await soon(guest.receive()) == b""
    await soon(guest.hang_up())


async def test_a_port_where_nobody_listens_is_a_reset(lab: Lab) -> None:
    lab.refuse = True
    client = await lab.client()
    with pytest.raises(ConnectionResetError):
        await receive(client)
    lab.refuse = False
    client, guest = await lab.connection()
    await soon(guest.send(b"alive"))
    assert await receive(client) == b"alive"


async def test_a_client_that_breaks_off_breaks_the_stream(lab: Lab) -> None:
    client, guest = await lab.connection()
    await send(client, b"begun")
    assert await soon(guest.receive()) == b"begun"
    break_off(client)
    with pytest.raises(EOFError):
        await soon(guest.receive())


async def test_a_client_that_breaks_off_while_it_waits(lab: Lab) -> None:
    """After the end of what it had to say, reading tells nothing more of it."""
    client, guest = await lab.connection()
    client.shutdown(socket.SHUT_WR)
    assert await soon(guest.receive()) == b""
    break_off(client)
    await soon(guest.hang_up())


async def test_who_waits_for_an_answer_is_told_from_who_has_closed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that did not mind the end of its client held a place for good."""
    quick = {socket.TCP_KEEPIDLE: 1, socket.TCP_KEEPINTVL: 1, socket.TCP_KEEPCNT: 1}
    monkeypatch.setattr("katapy.sandbox.forward._KEEPALIVE", quick)
    (waiting, its_guest), (closed, other_guest) = await lab.connection(), await lab.connection()
    waiting.shutdown(socket.SHUT_WR)
    closed.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 1)
    closed.close()
    await soon(other_guest.hang_up())
    await soon(its_guest.send(b"answer"))
    assert await receive(waiting) == b"answer"


@pytest.mark.parametrize("said", [b"", b"\0\0", b"\0\0\0\5half"])
async def test_a_stream_that_just_ends_is_a_reset(lab: Lab, said: bytes) -> None:
    """Of a virtual machine that died, for example: what came so far is not all that there was."""
    client, guest = await lab.connection()
    await soon(guest.send(b"whole"))
    assert await receive(client) == b"whole"
    await send(guest.stream, said)
    guest.stream.close()
    with pytest.raises(ConnectionResetError):
        await everything(client)


async def test_a_guest_that_goes_on_after_its_end_is_a_reset(lab: Lab) -> None:
    client, guest = await lab.connection()
    await soon(guest.send(b""))
    assert await receive(client) == b""
    await soon(guest.send(b"more"))
    await soon(guest.hang_up())
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        await send(client, bytes(64 << 20))


async def test_there_are_so_many_at_a_time_and_no_more(lab: Lab) -> None:
    """One that has ended makes room."""
    ends = [await lab.connection() for _ in range(CONNECTIONS_MAX)]
    for number, (client, _) in enumerate(ends):
        await send(client, b"%d" % number)
    assert [await soon(guest.receive()) for _, guest in ends] == [b"%d" % number for number in range(len(ends))]
    with pytest.raises(ConnectionResetError):
        await receive(await lab.client())
    client, guest = ends.pop()
    client.shutdown(socket.SHUT_WR)
    await soon(guest.send(b""))
    assert (await soon(guest.receive()), await receive(client)) == (b"", b"")
    await soon(guest.hang_up())
    client, guest = await lab.connection()
    await soon(guest.send(b"served"))
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
            received += len(guest.stream.recv(1 << 20))
    assert turns >= 100


async def test_the_end_of_the_pod_is_a_reset(lab: Lab) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    task = asyncio.create_task(forward([listener], lab.dial))
    with listener, socket.socket() as client:
        client.setblocking(False)
        await soon(asyncio.get_running_loop().sock_connect(client, listener.getsockname()))
        _, _, guest = await soon(lab.dialled.get())
        await soon(guest.send(b"half of it"))
        assert await receive(client) == b"half of it"
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(ConnectionResetError):
            await receive(client)
