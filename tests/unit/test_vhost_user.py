"""vhost-user: what QEMU says is checked, and rings start, stop and move as it says."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vsock_guest import MEMORY, SIZE, USER_BASE, Guest, Stream

from katapy.transport import vhost_user as vu
from katapy.transport.virtqueue import ProtocolError

U64 = struct.Struct("<Q")
STATE = struct.Struct("<II")


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as guest:
        yield guest


def table(*regions: tuple[int, int, int, int]) -> bytes:
    return STATE.pack(len(regions), 0) + b"".join(struct.pack("<QQQQ", *region) for region in regions)


def ring_addresses(index: int, desc: int, used: int, avail: int, flags: int = 0) -> bytes:
    return struct.pack("<IIQQQQ", index, flags, desc, used, avail, 0)


WRONG_MESSAGES = {
    "unknown request": (99, b""),
    "reset owner": (4, b""),
    "feature not offered": (vu.SET_FEATURES, U64.pack(1 << 28)),
    "protocol feature not offered": (vu.SET_PROTOCOL_FEATURES, U64.pack(1)),
    "short payload": (vu.SET_FEATURES, b"\0\0"),
    "long payload": (vu.SET_FEATURES, bytes(16)),
    "huge payload": (vu.SET_FEATURES, bytes(513)),
    "no descriptors": (vu.SET_MEM_TABLE, table((0, 4096, 0, 0))),
    "no regions": (vu.SET_MEM_TABLE, table()),
    "regions missing": (vu.SET_MEM_TABLE, STATE.pack(3, 0)),
    "config beyond the end": (vu.GET_CONFIG, struct.pack("<III", 4, 8, 0) + bytes(8)),
    "config of another size": (vu.GET_CONFIG, struct.pack("<III", 0, 8, 0) + bytes(4)),
    "size of a running queue": (vu.SET_VRING_NUM, STATE.pack(0, SIZE)),
    "base of a running queue": (vu.SET_VRING_BASE, STATE.pack(1, 0)),
    "third queue's size": (vu.SET_VRING_NUM, STATE.pack(2, SIZE)),
    "third queue's addresses": (vu.SET_VRING_ADDR, ring_addresses(2, USER_BASE, USER_BASE, USER_BASE)),
    "third queue's base": (vu.GET_VRING_BASE, STATE.pack(2, 0)),
    "third queue enabled": (vu.SET_VRING_ENABLE, STATE.pack(0xFFFF_FFFF, 1)),
    "logging": (vu.SET_VRING_ADDR, ring_addresses(0, USER_BASE, USER_BASE, USER_BASE, 1)),
    "ring outside memory": (vu.SET_VRING_ADDR, ring_addresses(0, USER_BASE + MEMORY, USER_BASE, USER_BASE)),
    "ring crosses the end": (vu.SET_VRING_ADDR, ring_addresses(0, USER_BASE + MEMORY - 16, USER_BASE, USER_BASE)),
    "ring below memory": (vu.SET_VRING_ADDR, ring_addresses(0, USER_BASE - 16, USER_BASE, USER_BASE)),
    "ring at the end of the address space": (vu.SET_VRING_ADDR, ring_addresses(0, 2**64 - 16, USER_BASE, USER_BASE)),
    "descriptors unaligned": (vu.SET_VRING_ADDR, ring_addresses(0, USER_BASE + 8, USER_BASE, USER_BASE)),
    "used ring unaligned": (vu.SET_VRING_ADDR, ring_addresses(0, USER_BASE, USER_BASE + 2, USER_BASE)),
    "kick without descriptor": (vu.SET_VRING_KICK, U64.pack(0)),
    "kick by polling": (vu.SET_VRING_KICK, U64.pack(1 << 8)),
    "kick of no queue": (vu.SET_VRING_KICK, U64.pack(1 << 20)),
}


@pytest.mark.parametrize("name", WRONG_MESSAGES)
def test_wrong_message_ends_the_device(guest: Guest, name: str) -> None:
    with pytest.raises(ProtocolError):
        guest.message(*WRONG_MESSAGES[name])


@pytest.mark.parametrize("flags", [0, 2, 3, 5])
def test_wrong_version_or_a_reply_ends_the_device(guest: Guest, flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        guest.message(vu.GET_FEATURES, flags=flags)


@pytest.mark.parametrize(
    ("request_", "value"),
    [(vu.SET_VRING_NUM, 0), (vu.SET_VRING_NUM, 3), (vu.SET_VRING_NUM, 2048), (vu.SET_VRING_BASE, 65536)],
)
def test_wrong_size_or_base_of_a_stopped_queue(guest: Guest, request_: int, value: int) -> None:
    guest.stop_ring(0)
    with pytest.raises(ProtocolError, match=r"size|base"):
        guest.message(request_, STATE.pack(0, value))


@pytest.mark.parametrize("region", [(0, MEMORY + 1, 0, 0), (0, MEMORY, 0, 1), (0, 0, 0, 0), (0, 2**63, 0, 2**63)])
def test_memory_larger_than_its_file_is_refused(guest: Guest, region: tuple[int, int, int, int]) -> None:
    """Touching pages past the end of a file would be SIGBUS, not an exception."""
    with pytest.raises(ProtocolError, match=r"cannot map|ring of"):
        guest.message(vu.SET_MEM_TABLE, table(region), [guest.memfd])


def test_too_many_descriptors_end_the_device(guest: Guest) -> None:
    with pytest.raises(ProtocolError, match="too many"):
        guest.message(vu.SET_MEM_TABLE, table(), [guest.memfd] * 9)


def test_kick_that_cannot_be_watched_ends_the_device(guest: Guest) -> None:
    with pytest.raises(ProtocolError, match="cannot watch"):
        guest.message(vu.SET_VRING_KICK, U64.pack(0), [guest.memfd])


def test_messages_in_pieces_and_several_at_once(guest: Guest) -> None:
    message = vu.MESSAGE.pack(vu.GET_FEATURES, 1, 0)
    for byte in message + message:
        guest.vhost.send(bytes([byte]))
        guest.step(1)
    guest.vhost.send(message + message + vu.MESSAGE.pack(vu.SET_VRING_CALL, 1, 8))
    guest.step()
    # The descriptor comes with the payload of the third message and belongs to no other.
    socket.send_fds(guest.vhost, [U64.pack(0) + message], [guest.calls[0]])
    guest.step()
    assert guest.vhost.recv(4096) == (vu.MESSAGE.pack(vu.GET_FEATURES, 5, 8) + U64.pack(vu.FEATURES)) * 5


def test_descriptors_do_not_leak(guest: Guest) -> None:
    guest.set_memory()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        guest.set_memory()
        guest.message(vu.SET_VRING_CALL, U64.pack(0), [guest.calls[0]])
        guest.message(vu.SET_VRING_KICK, U64.pack(0), [guest.kicks[0]])
        guest.message(vu.GET_FEATURES, b"", [guest.memfd])
    assert len(os.listdir("/proc/self/fd")) <= before


def test_peers_leaving_is_the_regular_end(guest: Guest) -> None:
    guest.vhost.shutdown(socket.SHUT_WR)
    with pytest.raises(vu.Disconnected):
        guest.step()


def test_owner_leaving_is_the_regular_end(guest: Guest) -> None:
    guest.control.shutdown(socket.SHUT_WR)
    with pytest.raises(vu.Disconnected):
        guest.step()


def test_pause_and_resume_keep_connections_and_data(guest: Guest) -> None:
    stream = Stream(guest)
    stream.socket.send(b"before")
    stream.read()
    bases = [guest.stop_ring(index) for index in range(2)]
    assert bases == [guest.offered[0] - guest.rx_chains, guest.offered[1]]
    stream.socket.send(b" after")
    guest.step()
    assert guest.used(0) == []
    for index, base in enumerate(bases):
        guest.set_ring(index, base)
    stream.read()
    stream.write(b"reply")
    assert stream.data == b"before after"
    assert stream.socket.recv(100) == b"reply"


def test_new_memory_table_while_running(guest: Guest) -> None:
    """QEMU sends one whenever the memory map changes, with buffers on hold and data under way."""
    stream = Stream(guest)
    for number in range(200):
        stream.socket.send(b"%4d" % number)
        guest.set_memory()
        stream.read()
    assert stream.data == b"".join(b"%4d" % number for number in range(200))


def test_queue_waits_to_be_enabled() -> None:
    with Guest(start=False) as guest:
        guest.negotiate()
        guest.set_memory()
        guest.set_ring(0)
        guest.message(vu.SET_VRING_ENABLE, STATE.pack(0, 0))
        guest.request(1024)
        guest.offer_rx(4)
        assert guest.used(0) == []
        guest.message(vu.SET_VRING_ENABLE, STATE.pack(0, 1))
        assert len(guest.receive()) == 1


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 41), st.binary(max_size=48), st.integers(0, 2)), max_size=12))
def test_any_messages_end_in_an_answer_or_a_clean_error(messages: list[tuple[int, bytes, int]]) -> None:
    with Guest() as guest, contextlib.suppress(ProtocolError):
        for request, payload, fds in messages:
            guest.message(request, payload, [guest.memfd] * fds)
