"""The back end's side of the vhost-user protocol, for a vsock device (docs/interop/vhost-user.rst of QEMU).

Owns what QEMU sets up: the guest's memory, the two rings and their eventfds. Starts and stops the device's queues
accordingly and leaves what travels on them to it. Every message is checked before it has an effect; a wrong one
raises ProtocolError.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Final

from katapy.transport.poller import Poller
from katapy.transport.virtqueue import MAX_SIZE, GuestMemory, ProtocolError, Region, Virtqueue
from katapy.transport.vsock_device import VsockDevice
from katapy.transport.vsock_packet import HEADER

GET_FEATURES: Final = 1
SET_FEATURES: Final = 2
SET_OWNER: Final = 3
SET_MEM_TABLE: Final = 5
SET_VRING_NUM: Final = 8
SET_VRING_ADDR: Final = 9
SET_VRING_BASE: Final = 10
GET_VRING_BASE: Final = 11
SET_VRING_KICK: Final = 12
SET_VRING_CALL: Final = 13
SET_VRING_ERR: Final = 14
GET_PROTOCOL_FEATURES: Final = 15
SET_PROTOCOL_FEATURES: Final = 16
SET_VRING_ENABLE: Final = 18
GET_CONFIG: Final = 24

F_PROTOCOL_FEATURES: Final = 1 << 30
F_VERSION_1: Final = 1 << 32
FEATURES: Final = F_VERSION_1 | F_PROTOCOL_FEATURES
PROTOCOL_FEATURES: Final = 1 << 9  # VHOST_USER_PROTOCOL_F_CONFIG: QEMU asks us for the CID

MESSAGE: Final = struct.Struct("<III")
_VERSION: Final = 1
_VERSION_MASK: Final = 3
_REPLY: Final = 4
_MAX_PAYLOAD: Final = 512
_MAX_REGIONS: Final = 8
_NO_FD: Final = 1 << 8
_U64: Final = struct.Struct("<Q")
_STATE: Final = struct.Struct("<II")
_ADDRESSES: Final = struct.Struct("<IIQQQQ")
_REGION: Final = struct.Struct("<QQQQ")
_CONFIG: Final = struct.Struct("<III")
_QUEUES: Final = 2


class Disconnected(Exception):
    """A peer has closed its socket: the regular end."""


class _Ring:
    """What QEMU has said of one queue so far."""

    __slots__ = ("size", "base", "addresses", "kick", "call", "enabled")

    def __init__(self) -> None:
        self.size = 0
        self.base = 0
        self.addresses: tuple[int, int, int] | None = None
        self.kick = -1
        self.call = -1
        self.enabled = False


class VhostUser:
    """Carries out what QEMU asks on one socket."""

    def __init__(self, sock: socket.socket, poller: Poller, device: VsockDevice) -> None:
        """Serve ``sock``, which stays the caller's, through ``poller``."""
        sock.setblocking(False)
        self._socket = sock
        self._poller = poller
        self._device = device
        self._memory = GuestMemory()
        self._features = 0
        self._rings = [_Ring() for _ in range(_QUEUES)]
        self._message = bytearray()
        self._fds: list[int] = []
        poller.add(sock.fileno(), select.EPOLLIN, self._on_readable)

    # -- framing

    def _on_readable(self, _events: int) -> None:
        """Read a part of a message, never past its end: descriptors belong to the message that they came with."""
        message = self._message
        want = MESSAGE.size
        if len(message) >= MESSAGE.size:
            want += self._payload_size()
        try:
            data, fds, flags, _address = socket.recv_fds(self._socket, want - len(message), _MAX_REGIONS)
        except ConnectionResetError:
            raise Disconnected from None
        self._fds += fds
        if not data:
            raise Disconnected
        if flags & socket.MSG_CTRUNC or len(self._fds) > _MAX_REGIONS:
            raise ProtocolError("vhost-user message has too many descriptors")
        message += data
        if len(message) >= MESSAGE.size and len(message) == MESSAGE.size + self._payload_size():
            payload, received = bytes(message[MESSAGE.size :]), self._fds
            request, _, _ = MESSAGE.unpack_from(message)
            self._message, self._fds = bytearray(), []
            try:
                self._on_message(request, payload, received)
            except struct.error as error:
                raise ProtocolError(f"vhost-user request {request} has {len(payload)} bytes of payload") from error
            finally:
                for fd in received:
                    os.close(fd)

    def _payload_size(self) -> int:
        request, flags, size = MESSAGE.unpack_from(self._message)
        if flags & _VERSION_MASK != _VERSION or flags & _REPLY or size > _MAX_PAYLOAD:
            raise ProtocolError(f"vhost-user request {request} has flags {flags:#x} and {size} bytes of payload")
        return int(size)

    def _reply(self, request: int, payload: bytes) -> None:
        try:
            self._socket.sendall(MESSAGE.pack(request, _VERSION | _REPLY, len(payload)) + payload)
        except OSError as error:
            raise Disconnected from error

    # -- requests

    def _on_message(self, request: int, payload: bytes, fds: list[int]) -> None:
        """Carry out one request; a descriptor that is kept is duplicated."""
        handlers: dict[int, Callable[[bytes, list[int]], bytes | None]] = {
            GET_FEATURES: lambda _payload, _fds: _U64.pack(FEATURES),
            SET_FEATURES: self._set_features,
            SET_OWNER: lambda _payload, _fds: None,
            SET_MEM_TABLE: self._set_mem_table,
            SET_VRING_NUM: self._set_vring_num,
            SET_VRING_ADDR: self._set_vring_addr,
            SET_VRING_BASE: self._set_vring_base,
            GET_VRING_BASE: self._get_vring_base,
            SET_VRING_KICK: self._set_vring_kick,
            SET_VRING_CALL: self._set_vring_call,
            SET_VRING_ERR: lambda _payload, _fds: None,
            GET_PROTOCOL_FEATURES: lambda _payload, _fds: _U64.pack(PROTOCOL_FEATURES),
            SET_PROTOCOL_FEATURES: self._set_protocol_features,
            SET_VRING_ENABLE: self._set_vring_enable,
            GET_CONFIG: self._get_config,
        }
        handler = handlers.get(request)
        if handler is None:
            raise ProtocolError(f"vhost-user request {request} is not supported")
        reply = handler(payload, fds)
        if reply is not None:
            self._reply(request, reply)

    def _set_features(self, payload: bytes, _fds: list[int]) -> None:
        (features,) = _U64.unpack(payload)
        if features & ~FEATURES:
            raise ProtocolError(f"features {features:#x} were not offered")
        self._features = features
        self._update()

    def _set_protocol_features(self, payload: bytes, _fds: list[int]) -> None:
        (features,) = _U64.unpack(payload)
        if features & ~PROTOCOL_FEATURES:
            raise ProtocolError(f"protocol features {features:#x} were not offered")

    def _get_config(self, payload: bytes, _fds: list[int]) -> bytes:
        offset, size, flags = _CONFIG.unpack_from(payload)
        config = _U64.pack(self._device.cid)[offset : offset + size]
        if len(config) != size or len(payload) != _CONFIG.size + size:
            raise ProtocolError(f"{size} bytes at {offset} are outside the configuration space")
        return _CONFIG.pack(offset, size, flags) + config

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        count, _padding = _STATE.unpack_from(payload)
        if not 0 < count == len(fds) or len(payload) != _STATE.size + count * _REGION.size:
            raise ProtocolError(f"memory table of {count} regions has {len(fds)} descriptors, {len(payload)} bytes")
        regions = []
        for fd, (guest, size, user, offset) in zip(fds, _REGION.iter_unpack(payload[_STATE.size :]), strict=True):
            regions.append(Region.map(fd, guest, user, size, offset))
        self._memory = GuestMemory(regions)
        # Rings and buffers on hold lie in the old mapping: start again from the same index in the new one.
        for index in range(_QUEUES):
            self._stop(index)
        self._update()

    def _set_vring_num(self, payload: bytes, _fds: list[int]) -> None:
        ring, size = self._stopped_ring(payload)
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise ProtocolError(f"queue size {size} is not a power of two up to {MAX_SIZE}")
        ring.size = size

    def _set_vring_base(self, payload: bytes, _fds: list[int]) -> None:
        ring, base = self._stopped_ring(payload)
        if base > 0xFFFF:
            raise ProtocolError(f"queue base {base} is not a 16-bit index")
        ring.base = base

    def _set_vring_addr(self, payload: bytes, _fds: list[int]) -> None:
        index, flags, desc, used, avail, _log = _ADDRESSES.unpack(payload)
        if flags:
            raise ProtocolError("dirty logging was not offered")
        ring = self._ring(index)
        self._stop(index)
        ring.addresses = desc, avail, used
        self._update()

    def _get_vring_base(self, payload: bytes, _fds: list[int]) -> bytes:
        index, _ = _STATE.unpack(payload)
        ring = self._ring(index)
        self._stop(index)
        if ring.kick >= 0:
            self._poller.remove(ring.kick)
            os.close(ring.kick)
            ring.kick = -1
        return _STATE.pack(index, ring.base)

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        index, fd = self._event(payload, fds)
        if fd < 0:
            raise ProtocolError("a queue without kicks was not offered")
        ring = self._ring(index)
        if ring.kick >= 0:
            self._poller.remove(ring.kick)
            os.close(ring.kick)
            ring.kick = -1
        self._stop(index)
        kick = os.dup(fd)
        # Edge-triggered, an eventfd reports every write and never needs to be read.
        handler = self._on_kick_tx if index else self._on_kick_rx
        try:
            self._poller.add(kick, select.EPOLLIN | select.EPOLLET, handler)
        except OSError as error:
            os.close(kick)
            raise ProtocolError(f"cannot watch the kick of queue {index}: {error.strerror}") from error
        ring.kick = kick
        self._update()

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        index, fd = self._event(payload, fds)
        ring = self._ring(index)
        if ring.call >= 0:
            os.close(ring.call)
        ring.call = os.dup(fd) if fd >= 0 else -1
        queue = self._queue(index)
        if queue is not None:
            queue.call = ring.call

    def _set_vring_enable(self, payload: bytes, _fds: list[int]) -> None:
        index, enabled = _STATE.unpack(payload)
        self._ring(index).enabled = bool(enabled)
        self._stop(index)
        self._update()

    # -- queues

    def _ring(self, index: int) -> _Ring:
        if index >= _QUEUES:
            raise ProtocolError(f"there is no queue {index}")
        return self._rings[index]

    def _stopped_ring(self, payload: bytes) -> tuple[_Ring, int]:
        index, value = _STATE.unpack(payload)
        ring = self._ring(index)
        if self._queue(index) is not None:
            raise ProtocolError(f"queue {index} is running")
        return ring, value

    def _event(self, payload: bytes, fds: list[int]) -> tuple[int, int]:
        (value,) = _U64.unpack(payload)
        if value & ~(_NO_FD | 0xFF) or len(fds) != (0 if value & _NO_FD else 1):
            raise ProtocolError(f"event {value:#x} of a queue has {len(fds)} descriptors")
        return value & 0xFF, fds[0] if fds else -1

    def _queue(self, index: int) -> Virtqueue | None:
        return self._device.tx if index else self._device.rx

    def _stop(self, index: int) -> None:
        queue = self._queue(index)
        if queue is not None:
            self._rings[index].base = queue.base
            self._set_queue(index, None)

    def _update(self) -> None:
        """Start what is complete: size, addresses, a kick, and enabled where that was negotiated."""
        for index, ring in enumerate(self._rings):
            enabled = ring.enabled or not self._features & F_PROTOCOL_FEATURES
            if self._queue(index) is None and ring.addresses and ring.size and ring.kick >= 0 and enabled:
                queue = Virtqueue(
                    self._memory,
                    ring.addresses,
                    size=ring.size,
                    base=ring.base,
                    header=HEADER.size,
                    writable=index == 0,
                    call=ring.call,
                )
                self._set_queue(index, queue)

    def _set_queue(self, index: int, queue: Virtqueue | None) -> None:
        if index:
            self._device.tx = queue
            self._device.on_kick_tx()
        else:
            self._device.rx = queue
            self._device.on_kick_rx()

    def _on_kick_rx(self, _events: int) -> None:
        self._device.on_kick_rx()

    def _on_kick_tx(self, _events: int) -> None:
        self._device.on_kick_tx()

    def close(self) -> None:
        """Close every descriptor that came in."""
        for fd in (*self._fds, *(fd for ring in self._rings for fd in (ring.kick, ring.call) if fd >= 0)):
            os.close(fd)
        self._rings = []
