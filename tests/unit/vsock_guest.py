"""The other side of the userspace vsock device, for its tests: QEMU's messages and the guest's half of the queues.

Memory is a real memfd, messages travel over a real socket pair with real descriptors; only the virtual machine is
missing. The device runs in the test's own process, one step at a time, so that nothing here depends on time.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

from katapy.transport import vhost_user as vu
from katapy.transport.vsock_packet import HEADER, HOST_CID, OP_REQUEST, OP_RESPONSE, OP_RW, STREAM
from katapy.transport.vsock_process import ANSWER, CONNECT, GUEST_CID, Server

SIZE: Final = 64
"""Entries of each queue."""
MEMORY: Final = 1 << 20
GUEST_BASE: Final = 0x4000_0000
USER_BASE: Final = 0x7F00_0000_0000
RX_BUFFER: Final = 3776
"""What Linux posts."""
NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4

_DESC: Final = struct.Struct("<QIHH")
_RINGS: Final = (0x0000, 0x4000)
_AVAIL: Final = 0x1000
_USED: Final = 0x2000
_RX_DATA: Final = 0x10000
_TX_DATA: Final = 0x80000
_TX_SLOT: Final = (MEMORY - _TX_DATA) // SIZE


class Packet(NamedTuple):
    """A packet that the device sent."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    kind: int
    op: int
    flags: int
    buffer: int
    forwarded: int
    data: bytes


class Guest:
    """A guest with its device, set up and running unless ``start`` is False."""

    def __init__(self, *, start: bool = True, rx_layout: Sequence[int] = (RX_BUFFER,), rx_chains: int | None = None):
        """``rx_layout`` gives the sizes of the descriptors that make up one receive buffer."""
        self.vhost, theirs = socket.socketpair()
        self.control, owner = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        self._theirs = theirs, owner
        self.server = Server(theirs, owner)
        self.memfd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, MEMORY)
        self.memory = mmap.mmap(self.memfd, MEMORY)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in _RINGS]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in _RINGS]
        self.offered = [0, 0]
        self._seen = [0, 0]
        self._numbers = 0
        self._hosts: list[socket.socket] = []
        self.rx_layout = rx_layout
        self.rx_chains = SIZE // len(rx_layout) if rx_chains is None else rx_chains
        if start:
            self.negotiate()
            self.set_memory()
            for index in range(2):
                self.set_ring(index)
            self.offer_rx(self.rx_chains)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close everything, the device's part included."""
        for sock in self._hosts:
            sock.close()
        self.server.close()
        for sock in (self.vhost, self.control, *self._theirs):
            sock.close()
        self.memory.close()
        for fd in (self.memfd, *self.kicks, *self.calls):
            os.close(fd)

    def step(self, count: int = 8) -> None:
        """Let the device do what there is to do."""
        for _ in range(count):
            self.server.step(0)

    # -- QEMU

    def message(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        """Send a vhost-user message and let the device handle it."""
        socket.send_fds(self.vhost, [vu.MESSAGE.pack(request, flags, len(payload)) + payload], fds)
        self.step(4)

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """Send a message that has a reply and return its payload."""
        self.message(request, payload)
        reply = self.vhost.recv(4096, socket.MSG_DONTWAIT)
        answered, flags, size = vu.MESSAGE.unpack_from(reply)
        assert (answered, flags, size) == (request, 5, len(reply) - vu.MESSAGE.size)
        return reply[vu.MESSAGE.size :]

    def negotiate(self) -> None:
        """Exchange features as QEMU does."""
        (features,) = struct.unpack("<Q", self.ask(vu.GET_FEATURES))
        assert features == vu.FEATURES
        (features,) = struct.unpack("<Q", self.ask(vu.GET_PROTOCOL_FEATURES))
        self.message(vu.SET_PROTOCOL_FEATURES, struct.pack("<Q", features))
        self.message(vu.SET_OWNER)
        assert self.ask(vu.GET_CONFIG, struct.pack("<IIIQ", 0, 8, 0, 0))[-8:] == struct.pack("<Q", GUEST_CID)
        self.message(vu.SET_FEATURES, struct.pack("<Q", vu.FEATURES))

    def set_memory(self) -> None:
        """Describe the memory, as one region."""
        region = struct.pack("<IIQQQQ", 1, 0, GUEST_BASE, MEMORY, USER_BASE, 0)
        self.message(vu.SET_MEM_TABLE, region, [self.memfd])

    def set_ring(self, index: int, base: int = 0) -> None:
        """Set one queue up and start it."""
        self.message(vu.SET_VRING_NUM, struct.pack("<II", index, SIZE))
        self.message(vu.SET_VRING_BASE, struct.pack("<II", index, base))
        ring = USER_BASE + _RINGS[index]
        self.message(vu.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, ring, ring + _USED, ring + _AVAIL, 0))
        self.message(vu.SET_VRING_KICK, struct.pack("<Q", index), [self.kicks[index]])
        self.message(vu.SET_VRING_CALL, struct.pack("<Q", index), [self.calls[index]])
        self.message(vu.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def stop_ring(self, index: int) -> int:
        """Stop a queue as for a pause; returns the index to go on from."""
        stopped, base = struct.unpack("<II", self.ask(vu.GET_VRING_BASE, struct.pack("<II", index, 0)))
        assert stopped == index
        return int(base)

    # -- rings

    def descriptor(self, queue: int, index: int, offset: int, length: int, flags: int, following: int = 0) -> None:
        """Write a descriptor; ``offset`` is relative to the guest's memory."""
        at = _RINGS[queue] + 16 * index
        address = (GUEST_BASE + offset) & 0xFFFF_FFFF_FFFF_FFFF
        _DESC.pack_into(self.memory, at, address, length & 0xFFFF_FFFF, flags, following)

    def offer(self, queue: int, head: int) -> None:
        """Put a chain into the available ring, without a kick."""
        ring = _RINGS[queue] + _AVAIL
        struct.pack_into("<H", self.memory, ring + 4 + self.offered[queue] % SIZE * 2, head)
        self.offered[queue] = (self.offered[queue] + 1) & 0xFFFF
        self.set_available(queue, self.offered[queue])

    def set_available(self, queue: int, index: int) -> None:
        """Write the available index."""
        struct.pack_into("<H", self.memory, _RINGS[queue] + _AVAIL + 2, index & 0xFFFF)

    def kick(self, queue: int) -> None:
        """Notify the device and let it work."""
        os.eventfd_write(self.kicks[queue], 1)
        self.step()

    def wants_kick(self, queue: int) -> bool:
        """Whether the device asks for kicks."""
        return not self.memory[_RINGS[queue] + _USED] & 1

    def used(self, queue: int) -> list[tuple[int, int]]:
        """Return what the device has given back since the last call: heads and lengths."""
        ring = _RINGS[queue] + _USED
        (index,) = struct.unpack_from("<H", self.memory, ring + 2)
        out = []
        while self._seen[queue] != index:
            out.append(struct.unpack_from("<II", self.memory, ring + 4 + self._seen[queue] % SIZE * 8))
            self._seen[queue] = (self._seen[queue] + 1) & 0xFFFF
        return [(head, length) for head, length in out]

    def interrupted(self, queue: int) -> bool:
        """Whether the device has interrupted the guest since the last call."""
        try:
            return bool(os.eventfd_read(self.calls[queue]))
        except BlockingIOError:
            return False

    # -- packets

    def offer_rx(self, count: int) -> None:
        """Offer the first ``count`` receive buffers."""
        for number in range(count):
            head = number * len(self.rx_layout)
            self._write_rx(head)
            self.offer(0, head)
        self.kick(0)

    def _write_rx(self, head: int) -> None:
        offset, last = _RX_DATA + head // len(self.rx_layout) * sum(self.rx_layout), len(self.rx_layout) - 1
        for position, length in enumerate(self.rx_layout):
            more = NEXT if position < last else 0
            self.descriptor(0, head + position, offset, length, WRITE | more, head + position + 1)
            offset += length

    def receive(self) -> list[Packet]:
        """Return the packets that arrived, and offer their buffers again."""
        self.step()
        packets = []
        for head, length in self.used(0):
            start = _RX_DATA + head // len(self.rx_layout) * sum(self.rx_layout)
            packet = Packet._make((*HEADER.unpack_from(self.memory, start), self.memory[start + 44 : start + length]))
            assert packet.length == len(packet.data) == length - 44
            packets.append(packet)
            self.offer(0, head)
        if packets and self.wants_kick(0):
            self.kick(0)
        return packets

    def send(
        self,
        op: int,
        ports: tuple[int, int],
        *,
        data: bytes = b"",
        flags: int = 0,
        buffer: int = 262144,
        forwarded: int = 0,
        kind: int = STREAM,
        length: int | None = None,
        cids: tuple[int, int] = (GUEST_CID, HOST_CID),
        cut: int = 44,
        kick: bool = True,
    ) -> None:
        """Send a packet to a host's port from a guest's, in two descriptors, the first of ``cut`` bytes."""
        host_port, guest_port = ports
        self.used(1)
        number = self.offered[1] % (SIZE // 2)
        size = len(data) if length is None else length
        packet = HEADER.pack(*cids, guest_port, host_port, size, kind, op, flags, buffer, forwarded) + data
        offset = _TX_DATA + number * 2 * _TX_SLOT
        self.memory[offset : offset + len(packet)] = packet
        head = number * 2
        if len(packet) == cut:
            self.descriptor(1, head, offset, cut, 0)
        else:
            self.descriptor(1, head, offset, cut, NEXT, head + 1)
            self.descriptor(1, head + 1, offset + cut, len(packet) - cut, 0)
        self.offer(1, head)
        if kick:
            self.kick(1)

    # -- the owner

    def request(self, port: int) -> tuple[int, socket.socket]:
        """Ask for a connection as the shim does; returns the request's number and the host's end."""
        ours, theirs = socket.socketpair()
        self._numbers += 1
        self._hosts.append(ours)
        with theirs:
            socket.send_fds(self.control, [CONNECT.pack(self._numbers, port)], [theirs.fileno()])
        ours.setblocking(False)
        self.step(2)
        return self._numbers, ours

    def answers(self) -> list[tuple[int, int]]:
        """Return the device's answers so far: request numbers and statuses."""
        out: list[tuple[int, int]] = []
        while True:
            try:
                number, status = ANSWER.unpack(self.control.recv(ANSWER.size))
            except BlockingIOError:
                return out
            out.append((number, status))


class Stream:
    """An established connection, with the guest's half of its bookkeeping."""

    def __init__(self, guest: Guest, port: int = 1024, buffer: int = 262144):
        self.guest = guest
        self.guest_port = port
        self.buffer = buffer
        self.received = self.forwarded = self.sent = 0
        self.data = b""
        self.device_buffer = self.device_forwarded = 0
        number, self.socket = guest.request(port)
        packets = guest.receive()
        assert [packet.op for packet in packets] == [OP_REQUEST]
        self.host_port = packets[0].src_port
        self.ports = self.host_port, port
        self.send(OP_RESPONSE)
        assert guest.answers() == [(number, 0)]
        self.note(packets[0])

    def send(self, op: int, data: bytes = b"", *, flags: int = 0, kick: bool = True) -> None:
        """Send a packet of this stream."""
        self.guest.send(op, self.ports, data=data, flags=flags, buffer=self.buffer, forwarded=self.forwarded, kick=kick)
        self.sent += len(data)

    def write(self, data: bytes) -> None:
        """Send data."""
        self.send(OP_RW, data)

    def note(self, packet: Packet) -> None:
        """Take the device's credit from a packet."""
        assert (packet.src_cid, packet.dst_cid, packet.kind) == (HOST_CID, GUEST_CID, STREAM)
        assert (packet.src_port, packet.dst_port) == (self.host_port, self.guest_port)
        self.device_buffer, self.device_forwarded = packet.buffer, packet.forwarded

    def read(self) -> list[Packet]:
        """Receive packets, collect their data; nothing is acknowledged until ``take``."""
        packets = self.guest.receive()
        for packet in packets:
            self.note(packet)
            self.received += packet.length
            assert self.received - self.forwarded <= self.buffer, "the device overran the guest's buffer"
            self.data += packet.data
        return packets

    def take(self, size: int) -> None:
        """Count bytes as read by the guest's program."""
        self.forwarded = min(self.received, self.forwarded + size)

    @property
    def credit(self) -> int:
        """How many bytes the guest may send."""
        return self.device_buffer - (self.sent - self.device_forwarded)
