"""Which changes of a namespace wake a pod up: those that its VM would be told of, and no others."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from katapy.network.pod import _drain

OWN = frozenset((7, 9))


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def link(kind: int, index: int) -> bytes:
    return message(kind, struct.pack("=BxHiII", 0, 1, index, 0, 0))


def address(kind: int, family: int, scope: int) -> bytes:
    return message(kind, struct.pack("=BBBBi", family, 64, 0, scope, 2))


def route(kind: int, family: int, *, table: int = 254, destination: bytes = b"") -> bytes:
    fixed = struct.pack("=BBBBBBBBI", family, 8 * len(destination), 0, 0, table, 2, 0, 1, 0)
    attribute = struct.pack("=HH", 4 + len(destination), 1) + destination if destination else b""
    return message(kind, fixed + attribute)


def neighbour(kind: int, state: int) -> bytes:
    return message(kind, struct.pack("=BxxxiHBB", socket.AF_INET, 2, state, 0, 0))


LINK_LOCAL = bytes.fromhex("fe80") + bytes(14)
IGNORED = [
    *(link(kind, index) for kind in (16, 17) for index in OWN),
    *(address(kind, socket.AF_INET6, 253) for kind in (20, 21)),
    *(route(kind, socket.AF_INET, table=255, destination=bytes(4)) for kind in (24, 25)),
    *(route(kind, socket.AF_INET6, destination=LINK_LOCAL) for kind in (24, 25)),
    neighbour(28, 0x02),
    neighbour(28, 0x04),
]
TOLD = [
    *(link(kind, 2) for kind in (16, 17)),
    *(address(kind, socket.AF_INET6, 0) for kind in (20, 21)),
    # Somebody gave it that one: no kernel makes them.
    *(address(kind, socket.AF_INET, 253) for kind in (20, 21)),
    *(route(kind, family) for kind in (24, 25) for family in (socket.AF_INET, socket.AF_INET6)),
    route(24, socket.AF_INET6, destination=bytes.fromhex("2001") + bytes(14)),
    neighbour(28, 0x80),
    neighbour(29, 0x02),
]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("each", IGNORED)
def test_what_a_vm_is_not_told_of(ends: tuple[socket.socket, socket.socket], each: bytes) -> None:
    ends[1].send(each)
    assert not _drain(ends[0], OWN)


@pytest.mark.parametrize("each", TOLD)
def test_what_a_vm_is_told_of(ends: tuple[socket.socket, socket.socket], each: bytes) -> None:
    """Also among others, in one datagram or in several; and everything is read."""
    ends[1].send(b"".join([*IGNORED, each, *IGNORED]))
    assert _drain(ends[0], OWN)
    for one in (*IGNORED, each, *IGNORED):
        ends[1].send(one)
    assert _drain(ends[0], OWN)
    assert not _drain(ends[0], OWN)
