"""The relay of name queries: what clients ask goes out over a stream, each answer to its own client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest
from katapy_agent.errors import InvalidArgument, KatapyError
from katapy_agent.resolver import Resolver

# Of the loopback, and nobody's. Binding port 53 needs root.
ADDRESS = bytes((127, 1, os.getpid() >> 8 & 0xFF, os.getpid() & 0xFF))
PLACE = (socket.inet_ntoa(ADDRESS), 53)
SECONDS = 30.0

pytestmark = pytest.mark.root


@pytest.fixture
async def host() -> AsyncIterator[socket.socket]:
    """The host's end of the stream of a resolver that runs."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    task = asyncio.create_task(Resolver(ADDRESS, theirs).run())
    yield ours
    ours.close()
    await asyncio.wait_for(task, SECONDS)


@pytest.fixture
def client() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.setblocking(False)
        made.connect(PLACE)
        yield made


def query(number: int, text: bytes = b"") -> bytes:
    return struct.pack("!H", number) + bytes(10) + text


async def receive(stream: socket.socket) -> bytes:
    """Return the next message of a stream."""
    (length,) = struct.unpack("!H", await exactly(stream, 2))
    return await exactly(stream, length)


async def exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(stream, count - len(data)), SECONDS)
    return data


async def send(stream: socket.socket, message: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(stream, struct.pack("!H", len(message)) + message)


async def received(client: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 65535), SECONDS)


async def test_an_answer_has_the_id_that_its_client_chose(host: socket.socket, client: socket.socket) -> None:
    client.send(query(7, b"question"))
    asked = await receive(host)
    assert asked[2:] == query(7, b"question")[2:]
    await send(host, asked[:2] + b"\x81\x80 answer")
    assert await received(client) == struct.pack("!H", 7) + b"\x81\x80 answer"


async def test_clients_with_the_same_id_get_their_own_answers(host: socket.socket, client: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        other.connect(PLACE)
        client.send(query(7, b"one"))
        first = await receive(host)
        other.send(query(7, b"two"))
        second = await receive(host)
        assert first[:2] != second[:2]
        # In the other order.
        await send(host, second[:2] + b"for two")
        await send(host, first[:2] + b"for one")
        assert await received(other) == struct.pack("!H", 7) + b"for two"
        assert await received(client) == struct.pack("!H", 7) + b"for one"


async def test_what_nobody_asked_goes_nowhere(host: socket.socket, client: socket.socket) -> None:
    """Nor does a second answer; and what is no query is not asked."""
    await send(host, b"\xff\xff surprise")
    await send(host, b"")
    client.send(b"short")
    client.send(query(1))
    asked = await receive(host)
    assert len(asked) == 12
    for text in (b"first", b"second"):
        await send(host, asked[:2] + text)
    client.send(query(2))
    asked = await receive(host)
    await send(host, asked[:2] + b"third")
    assert await received(client) == struct.pack("!H", 1) + b"first"
    assert await received(client) == struct.pack("!H", 2) + b"third"


async def test_clients_that_have_gone_hold_up_nobody(host: socket.socket, client: socket.socket) -> None:
    """More queries than are remembered, from clients that do not wait for the answers."""
    asked = []
    for number in range(600):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.sendto(query(number), PLACE)
        asked.append(await receive(host))
    for each in asked:
        await send(host, each[:2] + b"late")
    client.send(query(9))
    last = await receive(host)
    await send(host, last[:2] + b"answer")
    assert await received(client) == struct.pack("!H", 9) + b"answer"


async def test_it_ends_with_the_stream() -> None:
    """In the middle of a message, too; and the address is free again."""
    for _ in range(2):
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        resolver = Resolver(ADDRESS, theirs)
        task = asyncio.create_task(resolver.run())
        await asyncio.get_running_loop().sock_sendall(ours, b"\x00\x10half")
        ours.close()
        await asyncio.wait_for(task, SECONDS)


@pytest.mark.parametrize("address", [b"", bytes((10, 0, 0, 1)), bytes(16), bytes((127, 0, 0))])
def test_only_the_loopback_is_listened_at(address: bytes) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), pytest.raises(InvalidArgument, match="one of the loopback"):
        Resolver(address, theirs)
    assert theirs.fileno() == -1


async def test_an_address_is_listened_at_once(host: socket.socket) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), pytest.raises(KatapyError, match=r"listen for name queries at 127\.1\."):
        Resolver(ADDRESS, theirs)
    assert theirs.fileno() == -1
