"""The server's side of HTTP/2 (RFC 9113) on one connection, as far as gRPC needs it.

gRPC's own library would do, and costs half a second of an emulated boot and a fifth of the guest's memory. The peer is
the host, which is trusted; what it sends is bounded all the same. A request is handed on when it is complete. Nothing
here knows of gRPC: what is in a request and its answer is `rpc`'s.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

from katapy_agent.hpack import Decoder, Header, HpackError, encode

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Types of frames, section 6.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
_PADDED: Final = 0x8
_WITH_PRIORITY: Final = 0x20
# Error codes, section 7.
NO_ERROR: Final = 0x0
_PROTOCOL_ERROR: Final = 0x1
_INTERNAL_ERROR: Final = 0x2
_FLOW_CONTROL_ERROR: Final = 0x3
_STREAM_CLOSED: Final = 0x5
_FRAME_SIZE_ERROR: Final = 0x6
_REFUSED_STREAM: Final = 0x7
_COMPRESSION_ERROR: Final = 0x9
_ENHANCE_YOUR_CALM: Final = 0xB
# Settings, section 6.5.2.
_MAX_CONCURRENT_STREAMS: Final = 0x3
_INITIAL_WINDOW_SIZE: Final = 0x4
_MAX_FRAME_SIZE: Final = 0x5
_MAX_HEADER_LIST_SIZE: Final = 0x6

_HEADER: Final = 9
FRAME_MAX: Final = 16384
_FRAME_LIMIT: Final = (1 << 24) - 1
_WINDOW: Final = 65535
_WINDOW_MAX: Final = (1 << 31) - 1
_CREDIT: Final = 1 << 24  # octets that may be on their way to us on the whole connection
STREAMS_MAX: Final = 1024
HEADERS_MAX: Final = 16 << 10
# What the frames of section 6 must be: of a size, of the connection, of a stream, and that of one that was opened.
_SIZES: Final = {PRIORITY: 5, RST_STREAM: 4, PING: 8, WINDOW_UPDATE: 4}
_OF_CONNECTION: Final = (SETTINGS, PING, GOAWAY)
_OF_STREAM: Final = (DATA, HEADERS, PRIORITY, RST_STREAM, CONTINUATION)
_OF_OPENED: Final = (DATA, RST_STREAM, WINDOW_UPDATE)


class _ConnectionError(Exception):
    """The peer breaks the rules: the connection ends, with this code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Stream:
    """A request and, as far as it was sent, its answer."""

    def __init__(self, connection: Connection, number: int, window: int) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.complete = False  # whether the peer has said that there is no more
        self.too_large = False
        self.begun = False  # whether the answer's headers were sent
        self.task: asyncio.Task[None] | None = None
        self.credit = window
        self._connection = connection
        self._number = number

    async def send(self, headers: list[Header], data: bytes = b"", trailers: list[Header] | None = None) -> None:
        """Send headers (none: they were sent before), data, and what ends the answer, as far as each is there.

        Waits until the peer takes the data. Headers must fit in one frame.
        """
        if headers:
            self.begun = True
            end = END_STREAM if not data and trailers is None else 0
            self._connection.write(HEADERS, END_HEADERS | end, self._number, encode(headers))
        sent = 0
        while sent < len(data):
            count = await self._connection.take_credit(self, len(data) - sent)
            self._connection.write(DATA, 0, self._number, data[sent : sent + count])
            sent += count
        if trailers is not None:
            self._connection.write(HEADERS, END_HEADERS | END_STREAM, self._number, encode(trailers))


def frame(kind: int, flags: int, number: int, payload: bytes = b"") -> bytes:
    """Return a frame (section 4.1) of the stream ``number``, 0 for the connection."""
    length = len(payload)
    return struct.pack("!HBBBI", length >> 8, length & 0xFF, kind, flags, number) + payload


Handle = Callable[[Stream], Coroutine[Any, Any, None]]


class Connection(asyncio.Protocol):
    """A connection that a host has made; ``handle`` is what becomes of a request, in a task of its own.

    The task is cancelled when the peer wants no answer any more, or is gone. ``ended`` is called at the end.
    """

    def __init__(self, handle: Handle, *, body_max: int, ended: Callable[[], object] = lambda: None) -> None:
        self._handle = handle
        self._body_max = body_max
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()
        self._greeted = self._settled = False  # whether the preface was read, and the settings that follow it
        self._decoder = Decoder()
        self._streams: dict[int, Stream] = {}
        self._last = 0
        self._block: tuple[int, int, bytearray] | None = None  # of a stream, with these flags, so far
        self._received = 0
        self._credit = _WINDOW
        self._initial = _WINDOW
        self._frame_max = FRAME_MAX
        self._more = asyncio.Event()
        self._output = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say what we take."""
        self._transport = cast(asyncio.Transport, transport)
        settings = (
            (_MAX_CONCURRENT_STREAMS, STREAMS_MAX),
            (_INITIAL_WINDOW_SIZE, _CREDIT),
            (_MAX_HEADER_LIST_SIZE, HEADERS_MAX),
        )
        self.write(SETTINGS, 0, 0, b"".join(struct.pack("!HI", *setting) for setting in settings))
        self.write(WINDOW_UPDATE, 0, 0, struct.pack("!I", _CREDIT - _WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """End what is under way: there is nobody to answer."""
        self._transport = None
        for stream in self._streams.values():
            if stream.task is not None:
                stream.task.cancel()
        self._streams.clear()
        self._more.set()
        self._ended()

    def data_received(self, data: bytes) -> None:
        """Do what the frames say that are complete now."""
        self._input += data
        try:
            while self._transport is not None and self._read_frame():
                pass
        except _ConnectionError as error:
            self._give_up(error.code, str(error))

    def write(self, kind: int, flags: int, number: int, payload: bytes = b"") -> None:
        """Send a frame, together with all others of this turn of the event loop."""
        if self._transport is None:
            return
        if not self._output:
            asyncio.get_running_loop().call_soon(self._flush)
        self._output += frame(kind, flags, number, payload)

    async def take_credit(self, stream: Stream, wanted: int) -> int:
        """Wait until the peer takes data of a stream; return how many octets may be sent in one frame now."""
        while True:
            count = min(wanted, stream.credit, self._credit, self._frame_max)
            if count > 0:
                stream.credit -= count
                self._credit -= count
                return count
            self._more.clear()
            await self._more.wait()

    def _flush(self) -> None:
        if self._transport is not None:
            self._transport.write(bytes(self._output))
        self._output.clear()

    def _give_up(self, code: int, text: str) -> None:
        self.write(GOAWAY, 0, 0, struct.pack("!II", self._last, code) + text.encode())
        self._flush()
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def _read_frame(self) -> bool:
        """Take one frame from the input. Returns False where there is no complete one."""
        if not self._greeted:
            if not PREFACE.startswith(self._input[: len(PREFACE)]):
                raise _ConnectionError(_PROTOCOL_ERROR, "this is not HTTP/2")
            if len(self._input) < len(PREFACE):
                return False
            del self._input[: len(PREFACE)]
            self._greeted = True
        if len(self._input) < _HEADER:
            return False
        high, low, kind, flags, number = struct.unpack_from("!HBBBI", self._input)
        length = high << 8 | low
        if length > FRAME_MAX:
            raise _ConnectionError(_FRAME_SIZE_ERROR, f"a frame of {length} octets is too large")
        if len(self._input) < _HEADER + length:
            return False
        payload = bytes(self._input[_HEADER : _HEADER + length])
        del self._input[: _HEADER + length]
        if self._block is not None and (kind != CONTINUATION or number & _WINDOW_MAX != self._block[0]):
            raise _ConnectionError(_PROTOCOL_ERROR, "a header block is interrupted")
        self._check_frame(kind, number & _WINDOW_MAX, length)
        self._take_frame(kind, flags, number & _WINDOW_MAX, payload)
        return True

    def _check_frame(self, kind: int, number: int, length: int) -> None:
        if not self._settled and kind != SETTINGS:
            raise _ConnectionError(_PROTOCOL_ERROR, "settings must come first")
        if length != _SIZES.get(kind, length):
            raise _ConnectionError(_FRAME_SIZE_ERROR, f"a frame of type {kind} has {_SIZES[kind]} octets")
        if number != 0 if kind in _OF_CONNECTION else number == 0 and kind in _OF_STREAM:
            raise _ConnectionError(_PROTOCOL_ERROR, f"a frame of type {kind} cannot be of stream {number}")
        if number > self._last and kind in _OF_OPENED:
            raise _ConnectionError(_PROTOCOL_ERROR, f"stream {number} was not opened")

    def _take_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == DATA:
            self._take_data(flags, number, payload)
        elif kind == HEADERS:
            self._take_headers(flags, number, payload)
        elif kind == CONTINUATION:
            self._take_continuation(flags, payload)
        elif kind == SETTINGS:
            self._take_settings(flags, payload)
        elif kind == WINDOW_UPDATE:
            self._take_window_update(number, payload)
        elif kind == PING:
            if not flags & ACK:
                self.write(PING, ACK, 0, payload)
        elif kind == RST_STREAM:
            self._forget(number)
        elif kind == PUSH_PROMISE:
            raise _ConnectionError(_PROTOCOL_ERROR, "a client cannot push")
        # What else there is may be passed over: priorities, a peer that will open no more streams, extensions.

    def _take_headers(self, flags: int, number: int, payload: bytes) -> None:
        payload = _unpadded(flags, payload)
        if flags & _WITH_PRIORITY:
            if len(payload) < _SIZES[PRIORITY]:
                raise _ConnectionError(_FRAME_SIZE_ERROR, "a priority is incomplete")
            payload = payload[_SIZES[PRIORITY] :]
        if number % 2 == 0:
            raise _ConnectionError(_PROTOCOL_ERROR, f"{number} is not a client's stream")
        self._block = (number, flags, bytearray(payload))
        self._end_block(flags)

    def _take_continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise _ConnectionError(_PROTOCOL_ERROR, "nothing is continued")
        self._block[2].extend(payload)
        if len(self._block[2]) > HEADERS_MAX:
            raise _ConnectionError(_ENHANCE_YOUR_CALM, "a header block is too large")
        self._end_block(flags)

    def _end_block(self, flags: int) -> None:
        if self._block is None or not flags & END_HEADERS:
            return
        number, first_flags, block = self._block
        self._block = None
        try:
            headers = self._decoder.decode(bytes(block), size_max=HEADERS_MAX)
        except HpackError as error:
            raise _ConnectionError(_COMPRESSION_ERROR, str(error)) from error
        stream = self._streams.get(number)
        if stream is None:
            if number <= self._last:  # of one that has ended here: a client's trailers, for example
                return
            self._last = number
            if len(self._streams) >= STREAMS_MAX:
                self.write(RST_STREAM, 0, number, struct.pack("!I", _REFUSED_STREAM))
                return
            stream = self._streams[number] = Stream(self, number, self._initial)
            stream.headers = dict(headers)
        elif stream.complete or not first_flags & END_STREAM:
            raise _ConnectionError(_PROTOCOL_ERROR, "trailers are not the end of a request")
        if first_flags & END_STREAM:
            stream.complete = True
            self._begin(number, stream)

    def _take_data(self, flags: int, number: int, payload: bytes) -> None:
        # What is received is taken: of a stream there is never more than its first credit.
        self._received += len(payload)
        if self._received >= _CREDIT // 2:
            self.write(WINDOW_UPDATE, 0, 0, struct.pack("!I", self._received))
            self._received = 0
        payload = _unpadded(flags, payload)
        stream = self._streams.get(number)
        if stream is None:
            return
        if stream.complete:
            raise _ConnectionError(_STREAM_CLOSED, "there is data after the end of a request")
        stream.complete = bool(flags & END_STREAM)
        if not stream.too_large:
            stream.body += payload
        if len(stream.body) > self._body_max:
            stream.too_large = True
            stream.body.clear()
        if stream.complete or stream.too_large:
            self._begin(number, stream)

    def _take_settings(self, flags: int, payload: bytes) -> None:
        if len(payload) % 6 or (flags & ACK and payload):
            raise _ConnectionError(_FRAME_SIZE_ERROR, "settings make no sense")
        self._settled = True
        if flags & ACK:
            return
        for setting, value in struct.iter_unpack("!HI", payload):
            if setting == _INITIAL_WINDOW_SIZE:
                for stream in self._streams.values():
                    stream.credit += value - self._initial
                self._initial = value
                if max([value, *(stream.credit for stream in self._streams.values())]) > _WINDOW_MAX:
                    raise _ConnectionError(_FLOW_CONTROL_ERROR, "a window is too large")
            elif setting == _MAX_FRAME_SIZE:
                if not FRAME_MAX <= value <= _FRAME_LIMIT:
                    raise _ConnectionError(_PROTOCOL_ERROR, "a size of frames makes no sense")
                self._frame_max = value
        self.write(SETTINGS, ACK, 0)
        self._more.set()

    def _take_window_update(self, number: int, payload: bytes) -> None:
        count = int.from_bytes(payload, "big") & _WINDOW_MAX
        stream = self._streams.get(number)
        if number == 0:
            self._credit += count
            if code := _wrong_update(count, self._credit):
                raise _ConnectionError(code, "the window does not grow, or too much")
        elif stream is not None:
            stream.credit += count
            if code := _wrong_update(count, stream.credit):
                self.write(RST_STREAM, 0, number, struct.pack("!I", code))
                self._forget(number)
        self._more.set()

    def _begin(self, number: int, stream: Stream) -> None:
        if stream.task is None:
            stream.task = asyncio.get_running_loop().create_task(self._run(number, stream))

    async def _run(self, number: int, stream: Stream) -> None:
        code = _INTERNAL_ERROR
        try:
            await self._handle(stream)
            code = NO_ERROR
        finally:
            # The peer is told of an answer that does not come, or that the rest of its request is of no use. It may
            # have ended the stream itself.
            wanted = self._streams.pop(number, None) is not None
            if wanted and (code != NO_ERROR or not stream.complete):
                self.write(RST_STREAM, 0, number, struct.pack("!I", code))

    def _forget(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None and stream.task is not None:
            stream.task.cancel()


def _wrong_update(count: int, window: int) -> int:
    """Return the error code of a window that grew by ``count`` to ``window``, or NO_ERROR (section 6.9)."""
    if count == 0:
        return _PROTOCOL_ERROR
    return _FLOW_CONTROL_ERROR if window > _WINDOW_MAX else NO_ERROR


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & _PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise _ConnectionError(_PROTOCOL_ERROR, "there is more padding than data")
    return payload[1 : len(payload) - payload[0]]
