"""The host's side of relayed name queries: which resolver is meant, and messages both ways."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from katapy.oci.default import default_spec
from katapy.oci.spec import Spec, parse_spec
from katapy.sandbox.resolver import find_resolver, open_resolv_conf, relay

SECONDS = 30.0


def spec(*sources: Path) -> Spec:
    document = default_spec()
    document["mounts"] += [
        {"destination": "/etc/resolv.conf", "type": "bind", "source": str(source), "options": ["bind"]}
        for source in sources
    ]
    return parse_spec(json.dumps(document).encode(), bundle="/bundle")


def found(*sources: Path) -> str:
    """Return the resolver of a container with these files as its resolv.conf."""
    fd = open_resolv_conf(spec(*sources))
    if fd is None:
        return ""
    try:
        return find_resolver(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("nameserver 127.0.0.11\noptions ndots:0\n", "127.0.0.11"),
        ("# nameserver 127.0.0.1\nsearch a\nnameserver 10.0.0.1\n nameserver\t127.0.0.53 # stub\n", "127.0.0.53"),
        ("nameserver 10.0.0.1\nnameserver fe80::1%eth0\nnameserver ::1\n", ""),
        ("nameserver\nnameserver 127.0.0\nnameserver 127.0.0.256\n", ""),
        ("\x00\xff nameserver", ""),
        ("", ""),
    ],
)
def test_the_resolver_of_a_resolv_conf(tmp_path: Path, text: str, address: str) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(text, encoding="latin-1")
    assert found(path) == address


def test_the_last_mount_counts(tmp_path: Path) -> None:
    for name in ("127.0.0.1", "127.0.0.2"):
        (tmp_path / name).write_text(f"nameserver {name}\n")
    assert found(tmp_path / "127.0.0.1", tmp_path / "127.0.0.2") == "127.0.0.2"


def test_a_file_that_cannot_be_read_names_nothing(tmp_path: Path) -> None:
    assert found() == ""
    assert found(tmp_path / "missing") == ""
    assert found(tmp_path) == ""


def test_what_is_put_in_a_file_s_place_is_not_followed(tmp_path: Path) -> None:
    """A guest may own the directory; what the engine writes into the file counts."""
    path, secret = tmp_path / "resolv.conf", tmp_path / "secret"
    path.write_text("nameserver 10.0.0.1\n")
    secret.write_text("nameserver 127.0.0.9\n")
    fd = open_resolv_conf(spec(path))
    assert fd is not None
    try:
        assert find_resolver(fd) == ""
        path.write_text("nameserver 127.0.0.11\n")
        assert find_resolver(fd) == "127.0.0.11"
        path.unlink()
        path.symlink_to(secret)
        assert find_resolver(fd) == "127.0.0.11"
    finally:
        os.close(fd)


@pytest.fixture
async def relayed(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """The guest's end of the stream, and the resolver."""
    resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    resolver.bind(("127.0.0.1", 0))
    monkeypatch.setattr("katapy.sandbox.resolver._PORT", resolver.getsockname()[1])
    guest, stream = socket.socketpair()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for each in (resolver, guest, stream, datagrams):
        each.setblocking(False)
    task = asyncio.create_task(relay(stream, datagrams, "127.0.0.1"))
    yield guest, resolver
    guest.close()
    await asyncio.wait_for(task, SECONDS)
    for each in (resolver, stream, datagrams):
        each.close()


async def test_messages_go_both_ways(relayed: tuple[socket.socket, socket.socket]) -> None:
    """Also when they come in pieces, and many at once."""
    guest, resolver = relayed
    loop = asyncio.get_running_loop()
    messages = [b"%d " % number + b"x" * number for number in range(200)]
    sent = b"".join(struct.pack("!H", len(message)) + message for message in messages)
    for start in range(0, len(sent), 77):
        await loop.sock_sendall(guest, sent[start : start + 77])
    for message in messages:
        data, place = await asyncio.wait_for(loop.sock_recvfrom(resolver, 65535), SECONDS)
        assert data == message
        await loop.sock_sendto(resolver, data.upper(), place)
    expected = sent.upper()
    answered = b""
    while len(answered) < len(expected):
        answered += await asyncio.wait_for(loop.sock_recv(guest, 65535), SECONDS)
    assert answered == b"".join(struct.pack("!H", len(message)) + message.upper() for message in messages)


async def test_a_resolver_that_is_not_there_ends_nothing(relayed: tuple[socket.socket, socket.socket]) -> None:
    guest, resolver = relayed
    loop = asyncio.get_running_loop()
    place = resolver.getsockname()
    resolver.close()
    for _ in range(3):
        await loop.sock_sendall(guest, b"\x00\x05query")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(place)
        again.setblocking(False)
        await loop.sock_sendall(guest, b"\x00\x05query")
        data, client = await asyncio.wait_for(loop.sock_recvfrom(again, 65535), SECONDS)
        assert data == b"query"
        await loop.sock_sendto(again, b"answer", client)
        assert await asyncio.wait_for(loop.sock_recv(guest, 100), SECONDS) == b"\x00\x06answer"
