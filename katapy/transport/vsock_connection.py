"""One stream between a socket of the host and a port of the guest (virtio 1.2, section 5.10.6).

Owns the host's socket, the credit of both directions and what each side has shut down. Bytes move between the socket
and the guest's memory by readv(2) and writev(2), without a copy; only what a slow reader on the host leaves behind is
kept, and that is bounded by the credit that the guest was given. Leaves to the device which connection has its
turn, and to the poller when the socket is ready: it is watched edge-triggered, so ``readable`` and ``writable`` hold
until a system call says otherwise.

``ours``, ``told`` and ``theirs`` are SHUT_* bits: what the host will not do any more, what of it the guest has
been told, and what the guest said of itself.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final

from katapy.transport.virtqueue import Chain, Virtqueue, cut, put
from katapy.transport.vsock_packet import (
    HEADER,
    HOST_CID,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RW,
    OP_SHUTDOWN,
    SHUT_BOTH,
    SHUT_RECEIVE,
    SHUT_SEND,
    STREAM,
)

EVENTS: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
BUFFER: Final = 256 * 1024
"""Bytes of one connection that the guest may have under way: our buf_alloc."""
BURST: Final = 64
"""Receive buffers that one connection may fill before the next has its turn."""

_UPDATE: Final = BUFFER // 4
_WRAP: Final = 0xFFFF_FFFF
_IOV_MAX: Final = os.sysconf("SC_IOV_MAX")


class Connection:
    """A stream, from the host's request to the end of both halves."""

    __slots__ = (
        "cid", "host_port", "guest_port", "request", "requested", "established", "gone", "abandoned", "socket",
        "ours", "told", "theirs", "_readable", "_writable", "_hangup", "_in_flight", "_peer_buffer",
        "_peer_forwarded", "_asked", "_received", "_forwarded", "_announced", "_update_due", "_batch", "_pending",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, cid: int, host_port: int, guest_port: int, request: int) -> None:
        """Take over ``sock``; ``request`` is the number under which the owner asked for the connection."""
        sock.setblocking(False)
        self.socket: socket.socket | None = sock
        self.cid = cid
        self.host_port = host_port
        self.guest_port = guest_port
        self.request = request
        self.established = False
        self.gone = False  # the guest has no such connection any more
        self.abandoned = False  # the owner gave up before the guest answered
        self.ours = self.told = self.theirs = 0
        self.requested = False  # the guest was asked
        self._readable = self._writable = True
        self._hangup = False
        # Towards the guest: sent and not yet taken; the guest's buffer; its latest count of bytes taken.
        self._in_flight = self._peer_buffer = self._peer_forwarded = 0
        self._asked = False
        # From the guest, modulo 2**32: received; passed on to the host; passed on and told to the guest.
        self._received = self._forwarded = self._announced = 0
        self._update_due = False
        self._batch: list[memoryview] = []  # still in the guest's memory
        self._pending = bytearray()

    # -- what happens to it

    def on_event(self, events: int) -> None:
        """Take note of what epoll saw on the socket."""
        if events & select.EPOLLOUT:
            self._writable = True
        if events & (select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP):
            self._readable = True
        if events & (select.EPOLLRDHUP | select.EPOLLHUP):
            self._hangup = True
        if events & (select.EPOLLHUP | select.EPOLLERR):
            if self.established:
                self._stop_receiving()
            else:
                self.abandoned = True

    def on_packet(self, op: int, flags: int, buffer: int, forwarded: int, length: int, chain: Chain) -> bool:
        """Take a packet of the guest; False if it breaks the rules. Its data stays in place until ``flush``."""
        if not self._on_credit(buffer, forwarded):
            return False
        if op == OP_RW:
            return self._on_data(length, chain)
        if length:
            return False
        if op == OP_RESPONSE:
            fresh = self.requested and not self.established
            self.established = True
            return fresh
        if op == OP_SHUTDOWN:
            return self._on_shutdown(flags)
        if op == OP_CREDIT_REQUEST:
            self._update_due = True
        return self.established and op in (OP_CREDIT_REQUEST, OP_CREDIT_UPDATE)

    def _on_credit(self, buffer: int, forwarded: int) -> bool:
        taken = (forwarded - self._peer_forwarded) & _WRAP
        if taken > self._in_flight:
            # Behind what it said before: threads of the guest may overtake one another. Ahead of us: a lie.
            return taken > _WRAP >> 1
        self._in_flight -= taken
        self._peer_forwarded = forwarded
        self._peer_buffer = buffer
        if self._credit > 0:
            self._asked = False
        return True

    def _on_data(self, length: int, chain: Chain) -> bool:
        under_way = (self._received - self._forwarded) & _WRAP
        if not self.established or self.theirs & SHUT_SEND or length > min(chain.room, BUFFER - under_way):
            return False
        self._received = (self._received + length) & _WRAP
        if self.ours & SHUT_RECEIVE:
            self._discard()
        else:
            self._batch += chain.body if length == chain.room else cut(chain.body, length)[0]
        return True

    def _on_shutdown(self, flags: int) -> bool:
        self.theirs |= flags & SHUT_BOTH
        if self.theirs & SHUT_RECEIVE and not self.ours & SHUT_SEND:
            self._stop_sending()
        return self.established

    def on_reset(self) -> None:
        """The guest has forgotten the connection; what it sent before is still delivered."""
        self.gone = True
        self.theirs = SHUT_BOTH
        self._stop_sending()

    def _stop_sending(self) -> None:
        self.ours |= SHUT_SEND
        if self.socket is not None:
            self.socket.shutdown(socket.SHUT_RD)

    def _stop_receiving(self) -> None:
        self.ours |= SHUT_RECEIVE
        self._discard()

    def _discard(self) -> None:
        self._batch.clear()
        self._pending.clear()
        self._forwarded = self._received

    # -- guest to host

    def flush(self) -> None:
        """Pass what the guest sent on to the host's socket; what does not fit is copied out of the guest's memory."""
        while self._writable and (self._pending or self._batch):
            self._write(self.socket)
        for view in self._batch:
            self._pending += view
        self._batch.clear()
        if (self._forwarded - self._announced) & _WRAP >= _UPDATE:
            self._update_due = True
        if self.theirs & SHUT_SEND and not self._pending and self.socket is not None:
            self.socket.shutdown(socket.SHUT_WR)

    def _write(self, sock: socket.socket | None) -> None:
        offer: list[bytearray | memoryview] = [self._pending]
        offer += self._batch[: _IOV_MAX - 1]
        try:
            written = os.writev(sock.fileno(), offer) if sock is not None else 0
        except BlockingIOError:
            self._writable = False
            return
        except OSError:
            self._stop_receiving()
            return
        self._writable = written == sum(map(len, offer))
        self._forwarded = (self._forwarded + written) & _WRAP
        from_pending = min(written, len(self._pending))
        del self._pending[:from_pending]
        for view in cut(self._batch, written - from_pending)[1]:
            self._pending += view
        self._batch.clear()

    # -- host to guest

    @property
    def _credit(self) -> int:
        return self._peer_buffer - self._in_flight

    @property
    def wants(self) -> bool:
        """Whether there is something for the guest that it would take now."""
        if self.gone:
            return False
        if not self.established:
            return not self.requested
        if self.ours != self.told or self._update_due:
            return True
        return self._readable and not self.ours & SHUT_SEND and (self._credit > 0 or not self._asked)

    def emit(self, queue: Virtqueue) -> None:
        """Put what there is into the guest's receive buffers, as many as there are and BURST at most."""
        if not self.established:
            self.requested = self.requested or self._control(queue, OP_REQUEST)
            return
        if self._readable and not self.ours & SHUT_SEND:
            if self._credit > 0:
                self._read(queue)
            elif not self._asked:
                self._asked = self._control(queue, OP_CREDIT_REQUEST)
        if self.ours != self.told and self._control(queue, OP_SHUTDOWN, self.ours):
            self.told = self.ours
        if self._update_due:
            self._control(queue, OP_CREDIT_UPDATE)

    def _read(self, queue: Virtqueue) -> None:
        views, wanted = self._room(queue)
        if not wanted or self.socket is None:
            return
        try:
            size = os.readv(self.socket.fileno(), views)
        except BlockingIOError:
            self._readable = False
            return
        except ConnectionResetError:
            size = 0  # closed with unread bytes: as good as an end
        if size == 0:
            self.ours |= SHUT_SEND
            return
        # A socket that gave less has no more, unless its end is near: then the next read must see it.
        self._readable = size == wanted or self._hangup
        self._in_flight += size
        self._packets(queue, size)

    def _room(self, queue: Virtqueue) -> tuple[list[memoryview], int]:
        """Return where data may go, limited by the guest's buffers and its credit, and how much."""
        views: list[memoryview] = []
        wanted, credit = 0, self._credit
        for chain in queue.peek(BURST):
            if wanted + chain.room > credit:
                views += cut(chain.body, credit - wanted)[0]
                wanted = credit
                break
            views += chain.body
            wanted += chain.room
        if len(views) > _IOV_MAX:
            del views[_IOV_MAX:]
            wanted = sum(map(len, views))
        return views, wanted

    def _packets(self, queue: Virtqueue, size: int) -> None:
        header, described = b"", 0
        for chain in queue.peek(BURST):
            length = min(size, chain.room)
            if length != described:
                header, described = self._header(OP_RW, 0, length), length
            put(chain.header, header)
            queue.push(HEADER.size + length)
            size -= length
            if not size:
                return

    def _control(self, queue: Virtqueue, op: int, flags: int = 0) -> bool:
        chains = queue.peek(1)
        if chains:
            put(chains[0].header, self._header(op, flags, 0))
            queue.push(HEADER.size)
        return bool(chains)

    def _header(self, op: int, flags: int, length: int) -> bytes:
        self._announced = self._forwarded
        self._update_due = False
        ports = self.host_port, self.guest_port
        return HEADER.pack(HOST_CID, self.cid, *ports, length, STREAM, op, flags, BUFFER, self._forwarded)

    # -- the end

    @property
    def done(self) -> bool:
        """Whether nobody needs the connection any more."""
        return self.gone and not self._pending

    def close(self) -> None:
        """Close the socket; the host reads what was delivered, then the end."""
        if self.socket is None:
            return
        self._discard()
        # Closing over unread bytes would give the host's reader ECONNRESET in place of the end.
        try:
            self.socket.shutdown(socket.SHUT_RD)
            while self.socket.recv(65536):
                pass
        except OSError:
            pass
        self.socket.close()
        self.socket = None
