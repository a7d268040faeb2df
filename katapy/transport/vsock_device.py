"""The virtio-vsock device: shares two virtqueues among the connections of one virtual machine.

Owns the table of connections and the host's ports. Every connection starts on the host; what a guest asks for
is refused. Named as the guest sees them: *rx* carries packets to the guest, *tx* those that it sends. A packet that
breaks the rules resets its connection; a buffer that breaks them raises ProtocolError, which ends the process.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from katapy.transport.poller import Poller
from katapy.transport.virtqueue import Chain, Virtqueue, put
from katapy.transport.vsock_connection import EVENTS, Connection
from katapy.transport.vsock_packet import HEADER, HOST_CID, OP_RESPONSE, OP_RST, SHUT_BOTH, STREAM

FIRST_PORT: Final = 512
LAST_PORT: Final = 1023
"""Below 1024 as the agent demands; one live connection per port, so that these bound the connections."""

CONNECTED: Final = 0
REFUSED: Final = 1
EXHAUSTED: Final = 2

MAX_CONNECTIONS: Final = LAST_PORT - FIRST_PORT + 1

_BATCH: Final = 64
_TURNS: Final = 32
_MAX_RESETS: Final = 256


class VsockDevice:
    """``rx`` and ``tx`` are the running queues, or None; ``answer`` is told what became of a request to connect."""

    def __init__(self, cid: int, poller: Poller, answer: Callable[[int, int], None]) -> None:
        self.rx: Virtqueue | None = None
        self.tx: Virtqueue | None = None
        self._kicked = False
        self.cid = cid
        self._poller = poller
        self._answer = answer
        self._next_port = FIRST_PORT
        self._connections: dict[int, Connection] = {}
        # Ordered sets: those whose sockets or packets need a look, and those that wait for their turn on rx.
        self._touched: dict[Connection, None] = {}
        self._senders: dict[Connection, None] = {}
        self._resets: deque[bytes] = deque()

    def connect(self, request: int, guest_port: int, sock: socket.socket) -> None:
        """Connect ``sock``, now ours, to a port of the guest; the answer comes under the number ``request``."""
        host_port = self._free_port()
        if host_port is None:
            sock.close()
            self._answer(request, EXHAUSTED)
            return
        connection = Connection(sock, self.cid, host_port, guest_port, request)
        self._connections[host_port] = connection
        self._senders[connection] = None

        def handler(events: int) -> None:
            connection.on_event(events)
            self._touched[connection] = None

        self._poller.add(sock.fileno(), EVENTS, handler)

    def on_kick_rx(self) -> None:
        """The guest offers receive buffers after there were none."""
        if self.rx is not None:
            self.rx.want_kicks(False)

    def on_kick_tx(self) -> None:
        """The guest has sent packets."""
        self._kicked = True

    def run(self) -> bool:
        """Move packets both ways, a bounded number; returns whether there is more to do without an event."""
        chains = self._take_tx()
        for chain in chains:
            self._on_packet(chain)
        touched, self._touched = self._touched, {}
        for connection in touched:
            connection.flush()
            self._settle(connection)
        # Only now: until the flush, what the guest sent was still in its own memory.
        if self.tx is not None:
            for _ in chains:
                self.tx.push(0)
            self.tx.publish()
        return self._fill_rx() or bool(chains)

    def close(self) -> None:
        """Close every connection's socket."""
        for connection in self._connections.values():
            self._release(connection)

    # -- from the guest

    def _take_tx(self) -> list[Chain]:
        tx = self.tx
        if tx is None or not self._kicked:
            return []
        chains = tx.peek(_BATCH)
        if not chains:
            tx.want_kicks(True)
            chains = tx.peek(_BATCH)
            if not chains:
                self._kicked = False
                return []
        tx.want_kicks(False)
        return chains

    def _on_packet(self, chain: Chain) -> None:
        source, target, guest_port, host_port, length, kind, op, flags, buffer, forwarded = HEADER.unpack(
            b"".join(chain.header)
        )
        if source != self.cid or target != HOST_CID:
            return
        connection = self._connections.get(host_port)
        if connection is None or connection.gone or connection.guest_port != guest_port or kind != STREAM:
            if op != OP_RST:
                self._reset(host_port, guest_port, kind)
            return
        self._touched[connection] = None
        if op == OP_RST:
            connection.on_reset()
        elif not connection.on_packet(op, flags, buffer, forwarded, length, chain):
            self._abort(connection)
        elif op == OP_RESPONSE:
            self._answer(connection.request, CONNECTED)
        elif connection.theirs == SHUT_BOTH:
            self._reset(host_port, guest_port)
            connection.on_reset()

    # -- to the guest

    def _fill_rx(self) -> bool:
        rx = self.rx
        if rx is None:
            return False
        supplied = True
        for _ in range(_TURNS):
            supplied = bool(self._resets or self._senders) and self._has_buffer(rx)
            if not supplied:
                break
            if self._resets:
                put(rx.peek(1)[0].header, self._resets.popleft())
                rx.push(HEADER.size)
                continue
            connection = next(iter(self._senders))
            del self._senders[connection]
            connection.emit(rx)
            self._settle(connection)
        rx.publish()
        return supplied

    @staticmethod
    def _has_buffer(rx: Virtqueue) -> bool:
        if rx.peek(1):
            return True
        rx.want_kicks(True)
        if not rx.peek(1):
            return False
        rx.want_kicks(False)
        return True

    def _reset(self, host_port: int, guest_port: int, kind: int = STREAM) -> None:
        # A guest that floods us while it offers no buffers loses answers, and only its own.
        if len(self._resets) < _MAX_RESETS:
            self._resets.append(HEADER.pack(HOST_CID, self.cid, host_port, guest_port, 0, kind, OP_RST, 0, 0, 0))

    # -- the table

    def _free_port(self) -> int | None:
        for _ in range(MAX_CONNECTIONS):
            port = self._next_port
            self._next_port = FIRST_PORT if port == LAST_PORT else port + 1
            if port not in self._connections:
                return port
        # A guest may hold its end of a stream for ever that the host has long closed.
        for port, connection in self._connections.items():
            if connection.socket is None:
                self._abort(connection)
                return port
        return None

    def _settle(self, connection: Connection) -> None:
        if connection.abandoned:
            self._abort(connection)
        elif connection.done:
            self._remove(connection)
        else:
            if connection.told == SHUT_BOTH:
                self._release(connection)
            if connection.wants:
                self._senders[connection] = None

    def _abort(self, connection: Connection) -> None:
        if connection.requested and not connection.gone:
            self._reset(connection.host_port, connection.guest_port)
        self._remove(connection)

    def _remove(self, connection: Connection) -> None:
        self._release(connection)
        self._touched.pop(connection, None)
        self._senders.pop(connection, None)
        del self._connections[connection.host_port]
        if not connection.established:
            self._answer(connection.request, REFUSED)

    def _release(self, connection: Connection) -> None:
        if connection.socket is not None:
            self._poller.remove(connection.socket.fileno())
            connection.close()
