"""The userspace vsock device: connections, credit, half-close, and guests that break the rules."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vsock_guest import INDIRECT, MEMORY, NEXT, SIZE, WRITE, Guest, Stream

from katapy.transport.virtqueue import ProtocolError
from katapy.transport.vsock_connection import BUFFER
from katapy.transport.vsock_device import CONNECTED, EXHAUSTED, FIRST_PORT, MAX_CONNECTIONS, REFUSED
from katapy.transport.vsock_packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUT_BOTH,
    SHUT_RECEIVE,
    SHUT_SEND,
)

# Where data gets lost, a test waits for it in vain.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as guest:
        yield guest


def read_all(sock: socket.socket) -> bytes:
    """Read what is there; ends at the end or when there is no more."""
    out = b""
    try:
        while data := sock.recv(1 << 20):
            out += data
    except BlockingIOError:
        pass
    return out


def at_end(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False


def ops(stream: Stream) -> list[tuple[int, int]]:
    return [(packet.op, packet.flags) for packet in stream.read()]


# -- connecting


def test_connect_and_talk(guest: Guest) -> None:
    stream = Stream(guest)
    stream.write(b"from the guest")
    assert stream.socket.recv(100) == b"from the guest"
    stream.socket.send(b"from the host")
    stream.read()
    assert stream.data == b"from the host"


def test_refused_by_the_guest(guest: Guest) -> None:
    number, sock = guest.request(7)
    (packet,) = guest.receive()
    guest.send(OP_RST, (packet.src_port, 7))
    assert guest.answers() == [(number, REFUSED)]
    assert at_end(sock)
    assert guest.receive() == []


def test_source_ports_are_privileged_and_unique(guest: Guest) -> None:
    ports = [Stream(guest, port).host_port for port in (1024, 1024, 1025)]
    assert ports == [FIRST_PORT, FIRST_PORT + 1, FIRST_PORT + 2]


def test_request_waits_for_receive_buffers() -> None:
    """The owner may connect while the guest still boots."""
    with Guest(rx_chains=0) as guest:
        guest.request(1024)
        assert guest.receive() == []
        assert guest.wants_kick(0)
        guest.offer_rx(1)
        assert [packet.op for packet in guest.receive()] == [OP_REQUEST]
        assert not guest.wants_kick(0)


@pytest.mark.parametrize("asked", [False, True])
def test_owner_gives_up(asked: bool) -> None:
    """A late answer of the guest finds no connection; one that was never asked for leaves no trace."""
    with Guest(rx_chains=0) as guest:
        number, sock = guest.request(1024)
        if asked:
            guest.offer_rx(4)
            guest.receive()
        sock.close()
        guest.step()
        assert guest.answers() == [(number, REFUSED)]
        if not asked:
            guest.offer_rx(4)
        assert [packet.op for packet in guest.receive()] == [OP_RST] * asked
        guest.send(OP_RESPONSE, (FIRST_PORT, 1024))
        assert [packet.op for packet in guest.receive()] == [OP_RST]


def test_guest_may_not_connect(guest: Guest) -> None:
    guest.send(OP_REQUEST, (1024, 9))
    (packet,) = guest.receive()
    assert (packet.op, packet.src_port, packet.dst_port) == (OP_RST, 1024, 9)


def test_connections_are_bounded(guest: Guest) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    streams = [Stream(guest) for _ in range(MAX_CONNECTIONS)]
    number, sock = guest.request(1024)
    assert guest.answers() == [(number, EXHAUSTED)]
    assert at_end(sock)
    # The host closes one that the guest holds on to for ever: its port is taken back when it is needed.
    streams[100].socket.close()
    assert ops(streams[100])[-1] == (OP_SHUTDOWN, SHUT_BOTH)
    number, _ = guest.request(1024)
    reset, request = guest.receive()
    assert (reset.op, request.op) == (OP_RST, OP_REQUEST)
    assert request.src_port == streams[100].host_port
    guest.send(OP_RESPONSE, (request.src_port, 1024))
    assert guest.answers() == [(number, CONNECTED)]


# -- closing


def test_host_half_close_comes_after_all_data(guest: Guest) -> None:
    stream = Stream(guest)
    sent = os.urandom(150_000)
    assert stream.socket.send(sent) == len(sent)
    stream.socket.shutdown(socket.SHUT_WR)
    seen: list[tuple[int, int]] = []
    while len(stream.data) < len(sent) or not seen:
        seen += [op for op in ops(stream) if op[0] == OP_SHUTDOWN]
        assert not seen or len(stream.data) == len(sent)
    assert (stream.data, seen) == (sent, [(OP_SHUTDOWN, SHUT_SEND)])
    stream.write(b"still open this way")
    assert read_all(stream.socket) == b"still open this way"


def test_guest_half_close_comes_after_all_data(guest: Guest) -> None:
    stream = Stream(guest)
    stream.write(b"the last words")
    stream.send(OP_SHUTDOWN, flags=SHUT_SEND)
    assert stream.socket.recv(100) == b"the last words"
    assert at_end(stream.socket)
    stream.socket.send(b"still open this way")
    stream.read()
    assert stream.data == b"still open this way"


def test_guest_stops_receiving(guest: Guest) -> None:
    stream = Stream(guest)
    stream.send(OP_SHUTDOWN, flags=SHUT_RECEIVE)
    with pytest.raises(BrokenPipeError):
        stream.socket.send(b"x")
    assert ops(stream) == [(OP_SHUTDOWN, SHUT_SEND)]
    stream.write(b"still open this way")
    assert stream.socket.recv(100) == b"still open this way"


def test_guest_closes_with_data_that_the_host_reads_late(guest: Guest) -> None:
    """The guest's end is gone at once; what it had sent is delivered first, and then the end."""
    stream = Stream(guest)
    sent = os.urandom(BUFFER)
    for start in range(0, BUFFER, 8192):
        stream.write(sent[start : start + 8192])
    stream.send(OP_SHUTDOWN, flags=SHUT_BOTH)
    assert ops(stream)[-1] == (OP_RST, 0)
    received = b""
    while len(received) < BUFFER:
        received += read_all(stream.socket)
        guest.step()
    assert received == sent
    assert at_end(stream.socket)


@pytest.mark.parametrize("graceful", [True, False])
def test_end_is_an_end_even_with_unread_bytes_towards_the_guest(guest: Guest, graceful: bool) -> None:
    """Closing a unix socket over unread bytes would make the host's reader fail with ECONNRESET."""
    stream = Stream(guest, buffer=10)
    stream.socket.send(b"x" * 1000)
    stream.write(b"bye")
    if graceful:
        stream.send(OP_SHUTDOWN, flags=SHUT_BOTH)
    else:
        stream.send(OP_RST)
    assert stream.socket.recv(100) == b"bye"
    assert stream.socket.recv(100) == b""
    with pytest.raises(BrokenPipeError):
        stream.socket.send(b"x")


def test_host_closes_while_the_guest_sends(guest: Guest) -> None:
    stream = Stream(guest)
    stream.socket.send(b"the last words")
    stream.socket.close()
    assert ops(stream)[-1] == (OP_SHUTDOWN, SHUT_BOTH)
    assert stream.data == b"the last words"
    for _ in range(3 * BUFFER // 8192):
        stream.write(bytes(8192))  # it may not know yet
        stream.read()
    assert stream.credit > 0
    stream.send(OP_SHUTDOWN, flags=SHUT_BOTH)
    assert [op for op, _ in ops(stream)] == [OP_RST]
    stream.send(OP_CREDIT_REQUEST)
    assert [op for op, _ in ops(stream)] == [OP_RST], "the connection is still known"


def test_host_closes_with_data_that_the_guest_reads_late(guest: Guest) -> None:
    stream = Stream(guest, buffer=4096)
    sent = os.urandom(100_000)
    stream.socket.send(sent)
    stream.socket.close()
    seen: list[tuple[int, int]] = []
    while (OP_SHUTDOWN, SHUT_BOTH) not in seen:
        seen += ops(stream)
        stream.take(4096)
        stream.send(OP_CREDIT_UPDATE)
    assert stream.data == sent


# -- credit


def test_no_more_than_the_guest_has_room_for(guest: Guest) -> None:
    stream = Stream(guest, buffer=5000)
    stream.socket.send(bytes(20_000))
    assert [op for op, _ in ops(stream)] == [OP_RW, OP_RW, OP_CREDIT_REQUEST]
    assert stream.received == 5000
    assert stream.read() == []
    stream.take(1000)
    stream.send(OP_CREDIT_UPDATE)
    stream.read()
    assert stream.received == 6000


def test_guest_shrinks_its_buffer_below_what_is_under_way(guest: Guest) -> None:
    stream = Stream(guest, buffer=5000)
    stream.socket.send(bytes(20_000))
    stream.read()
    stream.buffer = 100
    stream.send(OP_CREDIT_UPDATE)
    assert OP_RW not in [op for op, _ in ops(stream)]
    stream.take(5000)
    stream.send(OP_CREDIT_UPDATE)
    stream.read()
    assert stream.received == 5100


def test_slow_host_stops_the_guest_and_nothing_grows(guest: Guest) -> None:
    stream = Stream(guest)
    total = 0
    while stream.credit >= 8192:
        stream.write(bytes(8192))
        stream.read()
        total += 8192
    assert total <= BUFFER + 512 * 1024  # ours, and the socket's own buffer
    stream.send(OP_CREDIT_REQUEST)
    assert [op for op, _ in ops(stream)] == [OP_CREDIT_UPDATE]
    assert stream.credit < 8192
    received = 0
    while received < total:
        received += len(read_all(stream.socket))
        guest.step()
    stream.read()
    assert stream.credit >= BUFFER // 2


def test_credit_is_told_in_large_steps(guest: Guest) -> None:
    """One interrupt of the guest for every packet would halve the throughput."""
    stream = Stream(guest)
    updates = 0
    for _ in range(256 * 1024 // 4096):
        stream.write(bytes(4096))
        read_all(stream.socket)
        updates += len(stream.read())
    assert updates == 4


def test_guest_overruns_our_buffer(guest: Guest) -> None:
    stream = Stream(guest)
    seen: list[tuple[int, int]] = []
    for _ in range(200):
        stream.write(bytes(8192))
        seen += ops(stream)
        if (OP_RST, 0) in seen:
            break
    else:
        pytest.fail("the guest overran the buffer and was not reset")
    read_all(stream.socket)
    assert at_end(stream.socket)


@pytest.mark.parametrize(("forwarded", "legal"), [(100, True), (101, False), (0x7FFF_FFFF, False), (-1, True)])
def test_acknowledgements(guest: Guest, forwarded: int, legal: bool) -> None:
    """Ahead of what was sent is a lie. Behind is a packet that another thread of the guest overtook: no news."""
    stream = Stream(guest, buffer=100)
    stream.socket.send(bytes(1000))
    stream.read()
    assert stream.received == 100
    stream.forwarded = forwarded & 0xFFFF_FFFF
    stream.send(OP_CREDIT_UPDATE)
    stream.forwarded = 100
    answer = [op for op, _ in ops(stream)]
    if not legal:
        assert answer == [OP_RST]
        assert at_end(stream.socket)
    else:
        assert answer == ([OP_RW, OP_CREDIT_REQUEST] if forwarded > 0 else [])


@settings(max_examples=30)
@given(data=st.data(), layout=st.sampled_from([(3776,), (44, 4096), (20, 24, 1), (10, 10, 10, 10, 10, 700), (4096, 9)]))
def test_host_to_guest_arrives_whole(data: st.DataObject, layout: tuple[int, ...]) -> None:
    """Whatever buffers the guest posts and however it reads; ``Stream.read`` asserts that it is never overrun."""
    sent = os.urandom(data.draw(st.integers(1, 60_000)))
    with Guest(rx_layout=layout) as guest:
        stream = Stream(guest, buffer=data.draw(st.integers(1000, 70_000)))
        stream.socket.send(sent)
        stream.socket.shutdown(socket.SHUT_WR)
        shut = False
        while not shut:
            shut = any(op == OP_SHUTDOWN for op, _ in ops(stream))
            stream.take(data.draw(st.integers(1000, 70_000)))
            stream.send(OP_CREDIT_UPDATE)
        assert stream.data == sent


@settings(max_examples=30)
@given(data=st.data())
def test_guest_to_host_arrives_whole(data: st.DataObject) -> None:
    """Whatever packets the guest makes within its credit, and however slowly the host reads."""
    sizes = data.draw(st.lists(st.integers(1, 15_000), min_size=1, max_size=40))
    cut = data.draw(st.sampled_from([1, 20, 44, 45]))
    with Guest() as guest:
        stream = Stream(guest)
        sent = received = b""
        while sizes:
            room = min(sizes[0], stream.credit)
            if room > 0:
                chunk = os.urandom(room)
                kick = data.draw(st.booleans()) or guest.offered[1] % 16 == 0
                guest.send(OP_RW, stream.ports, data=chunk, cut=cut, kick=kick)
                stream.sent += room
                sent += chunk
                sizes.pop(0)
            else:
                guest.kick(1)
            if room <= 0 or data.draw(st.booleans()):
                received += read_all(stream.socket)
                stream.read()
        stream.send(OP_SHUTDOWN, flags=SHUT_SEND)
        while len(received) < len(sent):
            received += read_all(stream.socket)
            guest.step()
        assert received == sent
        assert at_end(stream.socket)


def test_one_busy_stream_does_not_starve_another(guest: Guest) -> None:
    busy, other = Stream(guest, buffer=1 << 30), Stream(guest)
    while True:
        try:
            busy.socket.send(bytes(65536))
        except BlockingIOError:
            break
    other.socket.send(b"my turn")
    packets = guest.receive() + guest.receive()
    assert b"my turn" in [packet.data for packet in packets]


# -- packets that break the rules


def data_after_its_end(stream: Stream) -> None:
    stream.send(OP_SHUTDOWN, flags=SHUT_SEND)
    stream.write(b"x")


WRONG_PACKETS: dict[str, Callable[[Stream], None]] = {
    "unknown operation": lambda s: s.send(99),
    "operation zero": lambda s: s.send(0),
    "second response": lambda s: s.send(OP_RESPONSE),
    "request on a live stream": lambda s: s.send(OP_REQUEST),
    "data where none belongs": lambda s: s.send(OP_CREDIT_UPDATE, b"data"),
    "length beyond the buffer": lambda s: s.guest.send(OP_RW, s.ports, length=10, data=b"123456789"),
    "length of 4 GiB": lambda s: s.guest.send(OP_RW, s.ports, length=0xFFFF_FFFF, data=b"1"),
    "data after its end": data_after_its_end,
}


@pytest.mark.parametrize("name", WRONG_PACKETS)
def test_wrong_packet_resets_its_connection_only(guest: Guest, name: str) -> None:
    bystander, stream = Stream(guest), Stream(guest)
    WRONG_PACKETS[name](stream)
    (packet,) = guest.receive()
    assert (packet.op, packet.src_port) == (OP_RST, stream.host_port)
    assert at_end(stream.socket)
    bystander.write(b"unharmed")
    assert bystander.socket.recv(100) == b"unharmed"


@pytest.mark.parametrize("op", [OP_RW, OP_SHUTDOWN, OP_CREDIT_UPDATE, OP_RST + 96])
def test_anything_but_an_answer_fails_the_request(guest: Guest, op: int) -> None:
    number, sock = guest.request(1024)
    (request,) = guest.receive()
    guest.send(op, (request.src_port, 1024))
    assert guest.answers() == [(number, REFUSED)]
    assert [packet.op for packet in guest.receive()] == [OP_RST]
    assert at_end(sock)


@pytest.mark.parametrize(
    ("ports", "kind"), [((FIRST_PORT, 1), 1), ((1000, 1024), 1), ((FIRST_PORT, 1024), 2), ((FIRST_PORT, 1024), 0xFFFF)]
)
def test_packet_of_no_connection_is_answered_with_a_reset(guest: Guest, ports: tuple[int, int], kind: int) -> None:
    stream = Stream(guest)
    guest.send(OP_RW, ports, data=b"stray", kind=kind)
    (packet,) = guest.receive()
    assert (packet.op, packet.kind) == (OP_RST, kind)
    guest.send(OP_RST, ports, kind=kind)
    assert guest.receive() == []
    stream.write(b"fine")
    assert stream.socket.recv(100) == b"fine"


@pytest.mark.parametrize("cids", [(4, 2), (3, 3), (3, 1), (0, 0), (3, 2**64 - 1)])
def test_packet_with_another_address_is_dropped(guest: Guest, cids: tuple[int, int]) -> None:
    stream = Stream(guest)
    guest.send(OP_RW, stream.ports, data=b"forged", cids=cids)
    assert guest.receive() == []
    assert not read_all(stream.socket)
    assert len(guest.used(1)) == 1


def test_flood_of_strays_without_receive_buffers_is_bounded() -> None:
    with Guest(rx_chains=0) as guest:
        for number in range(600):
            guest.send(OP_REQUEST, (1, number))
        guest.offer_rx(SIZE)
        resets = 0
        while packets := guest.receive():
            resets += len(packets)
        assert 0 < resets <= 256


def test_flood_of_credit_requests_gets_one_answer(guest: Guest) -> None:
    stream = Stream(guest)
    for _ in range(SIZE // 2 - 1):
        stream.send(OP_CREDIT_REQUEST, kick=False)
    guest.kick(1)
    assert len(stream.read()) == 1


# -- descriptors that break the rules


def chain(*descriptors: tuple[int, int, int, int]) -> Callable[[Guest, int], None]:
    """Offer a chain that starts at descriptor 0; each is (offset, length, flags, next)."""

    def offer(guest: Guest, queue: int) -> None:
        for index, (offset, length, flags, following) in enumerate(descriptors):
            guest.descriptor(queue, index, offset, length, flags | (0 if queue else WRITE), following)
        guest.offer(queue, 0)

    return offer


WRONG_BUFFERS: dict[str, tuple[str, Callable[[Guest, int], None]]] = {
    "chain of one loops": ("longer than the queue", chain((0x9000, 64, NEXT, 0))),
    "chain of two loops": ("longer than the queue", chain((0x9000, 64, NEXT, 1), (0x9000, 64, NEXT, 0))),
    "empty descriptors loop": ("longer than the queue", chain((0x9000, 0, NEXT, 0))),
    "next outside the queue": ("outside the queue", chain((0x9000, 64, NEXT, SIZE))),
    "next far outside": ("outside the queue", chain((0x9000, 64, NEXT, 0xFFFF))),
    "head outside the queue": ("outside the queue", lambda guest, queue: guest.offer(queue, SIZE)),
    "head far outside": ("outside the queue", lambda guest, queue: guest.offer(queue, 0xFFFF)),
    "beyond memory": ("not in guest memory", chain((MEMORY, 64, 0, 0))),
    "below memory": ("not in guest memory", chain((-64, 64, 0, 0))),
    "crosses the end": ("not in guest memory", chain((MEMORY - 32, 64, 0, 0))),
    "crosses the start": ("not in guest memory", chain((-32, 64, 0, 0))),
    "address wraps around": ("not in guest memory", chain((2**64 - 0x4000_0000 - 16, 64, 0, 0))),
    "length of 4 GiB": ("not in guest memory", chain((0x9000, 0xFFFF_FFFF, 0, 0))),
    "shorter than a header": ("no room", chain((0x9000, 43, 0, 0))),
    "empty": ("no room", chain((0x9000, 0, 0, 0))),
    "indirect": ("indirect", chain((0x9000, 64, INDIRECT, 0))),
    "indirect in a chain": ("indirect", chain((0x9000, 64, NEXT, 1), (0x9000, 64, INDIRECT, 0))),
    "index jumps ahead": ("ahead", lambda guest, queue: guest.set_available(queue, guest.offered[queue] + SIZE + 1)),
    "index goes back": ("ahead", lambda guest, queue: guest.set_available(queue, guest.offered[queue] - 1)),
}


@pytest.mark.parametrize("queue", [0, 1])
@pytest.mark.parametrize("name", WRONG_BUFFERS)
def test_wrong_buffer_ends_the_device(name: str, queue: int) -> None:
    reason, offer = WRONG_BUFFERS[name]
    with Guest(rx_chains=0) as guest:
        guest.request(1024)
        offer(guest, queue)
        with pytest.raises(ProtocolError, match=reason):
            guest.kick(queue)


@pytest.mark.parametrize("queue", [0, 1])
def test_wrong_direction_ends_the_device(queue: int) -> None:
    with Guest(rx_chains=0) as guest:
        guest.request(1024)
        guest.descriptor(queue, 0, 0x9000, 64, WRITE if queue else 0)
        guest.offer(queue, 0)
        with pytest.raises(ProtocolError, match="direction"):
            guest.kick(queue)


def test_receive_buffer_without_room_for_data_ends_the_device() -> None:
    """It would take packets of no bytes for ever."""
    with Guest(rx_chains=0) as guest:
        guest.request(1024)
        guest.descriptor(0, 0, 0x9000, 44, WRITE)
        guest.offer(0, 0)
        with pytest.raises(ProtocolError, match="no room"):
            guest.kick(0)


def test_longest_chain_is_not_a_loop() -> None:
    with Guest(rx_layout=(44, *[59] * (SIZE - 1))) as guest:
        stream = Stream(guest)
        sent = os.urandom(59 * (SIZE - 1) * 2)
        stream.socket.send(sent)
        while len(stream.data) < len(sent):
            assert len(stream.read()) == 1
        assert stream.data == sent


@settings(max_examples=60)
@given(data=st.data())
def test_any_descriptors_end_in_work_or_a_clean_error(data: st.DataObject) -> None:
    """Random rings, on both queues, in front of live connections."""
    offsets = st.sampled_from([0, 0x4000, 0x9000, 0x10000, 0x80000, MEMORY - 64, MEMORY, -1, 1 << 40])
    lengths = st.sampled_from([0, 1, 43, 44, 45, 100, 4096, 65536, MEMORY, 0xFFFF_FFFF])
    with Guest() as guest:
        stream = Stream(guest)
        stream.socket.send(bytes(100_000))
        guest.request(5)
        try:
            for _ in range(data.draw(st.integers(1, 8))):
                queue = data.draw(st.integers(0, 1))
                for index in range(4):
                    flags = data.draw(st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, 0xFFFF]))
                    following = data.draw(st.integers(0, 5))
                    guest.descriptor(queue, index, data.draw(offsets), data.draw(lengths), flags, following)
                guest.offer(queue, data.draw(st.integers(0, 5)))
                guest.kick(queue)
        except ProtocolError:
            pass


@settings(max_examples=60)
@given(data=st.data())
def test_any_packets_leave_the_device_alive(data: st.DataObject) -> None:
    with Guest() as guest:
        streams = [Stream(guest) for _ in range(2)]
        guest.request(1024)
        for _ in range(data.draw(st.integers(0, 30))):
            for stream in streams:
                if data.draw(st.booleans()):
                    try:
                        stream.socket.send(bytes(5000))
                    except OSError:
                        stream.socket.close()
            guest.send(
                data.draw(st.integers(0, 8)),
                (data.draw(st.integers(FIRST_PORT - 1, FIRST_PORT + 3)), 1024),
                flags=data.draw(st.integers(0, 3)),
                data=data.draw(st.binary(max_size=80)),
                buffer=data.draw(st.integers(0, 2**32 - 1)),
                forwarded=data.draw(st.one_of(st.integers(0, 9000), st.integers(0, 2**32 - 1))),
            )
            guest.receive()
        guest.receive()
        guest.answers()
        after = Stream(guest, 77)
        after.write(b"alive")
        assert after.socket.recv(100) == b"alive"


# -- notifications


def test_guest_is_interrupted_only_if_it_wants_to_be(guest: Guest) -> None:
    stream = Stream(guest)
    guest.interrupted(0)
    stream.socket.send(b"x")
    guest.step()
    assert guest.interrupted(0)
    guest.memory[0x1000] = 1  # VRING_AVAIL_F_NO_INTERRUPT
    stream.socket.send(b"x")
    guest.step()
    assert not guest.interrupted(0)
    assert len(guest.used(0)) == 2


def test_kicks_are_wanted_exactly_when_the_device_waits(guest: Guest) -> None:
    stream = Stream(guest)
    stream.write(b"x")
    assert guest.wants_kick(1)
    assert not guest.wants_kick(0)
    stream.send(OP_RW, b"unnoticed until the kick", kick=False)
    guest.step()
    assert stream.socket.recv(100) == b"x"
    guest.kick(1)
    assert stream.socket.recv(100) == b"unnoticed until the kick"
