"""ttrpc (github.com/containerd/ttrpc, PROTOCOL.md): the frame, the errors on the wire, and a small blocking client.

The client is for the command line, so nothing here imports asyncio; the server is in ttrpc_server.py. Only unary
calls exist: katapy serves and calls no streaming method. Sockets are connected by unix.py or given.
"""

from __future__ import annotations

import socket
import struct
import time
from enum import IntEnum
from typing import Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from katapy.errors import InvalidArgument, Timeout, Unavailable, codes_of, from_wire
from katapy.proto.ttrpc_pb2 import Request, Response, Status

MAX_DATA: Final = 4 << 20  # bytes of one message, the limit of every ttrpc implementation
OK: Final = 0
INVALID_ARGUMENT: Final = 3
RESOURCE_EXHAUSTED: Final = 8
UNIMPLEMENTED: Final = 12
_ERROR_TYPE: Final = "katapy.error"  # type_url of the detail that carries the name of an exception class
_HEADER: Final = struct.Struct(">IIBB")
HEADER_SIZE: Final = _HEADER.size

M = TypeVar("M", bound=Message)


class MessageType(IntEnum):
    """What a frame carries. Data belongs to streaming calls; a receiver ignores the types that it does not know."""

    REQUEST = 1
    RESPONSE = 2
    DATA = 3


class Header(NamedTuple):
    """The first ten bytes of a frame; ``length`` counts the bytes after them."""

    length: int
    stream: int
    type: int
    flags: int


def parse_header(data: bytes) -> Header:
    """Read a header from exactly HEADER_SIZE bytes; every value of every field is possible."""
    return Header(*_HEADER.unpack(data))


def frame(stream: int, kind: MessageType, message: Message) -> bytes:
    """Return the bytes of one unary frame (flags 0). Raises InvalidArgument above MAX_DATA."""
    data = message.SerializeToString()
    if len(data) > MAX_DATA:
        raise InvalidArgument(f"a message of {len(data)} bytes is too large for ttrpc (at most {MAX_DATA})")
    return _HEADER.pack(len(data), stream, kind, 0) + data


def status_of(error: BaseException) -> Status:
    """Say an exception on the wire: its code, its text and, for our own client, the name of its class."""
    # A path in the text may hold bytes that are not UTF-8, which a protobuf string cannot.
    status = Status(code=codes_of(error).rpc, message=str(error).encode(errors="replace").decode())
    status.details.add(type_url=_ERROR_TYPE, value=type(error).__name__.encode())
    return status


def raise_status(status: Status) -> None:
    """Raise the error that ``status`` tells; return when it is OK."""
    if status.code != OK:
        names = [detail.value.decode(errors="replace") for detail in status.details if detail.type_url == _ERROR_TYPE]
        raise from_wire(status.code, names[0] if names else "", status.message)


class TtrpcClient:
    """A connection to a ttrpc server: one call at a time, blocking, not to be shared by threads.

    A call that must not hold up others (Wait) takes a connection of its own. After Unavailable the connection is of
    no more use; after Timeout it is, and the late answer is dropped.
    """

    def __init__(self, sock: socket.socket, *, peer: str = "the shim") -> None:
        """Own the connected ``sock``; ``peer`` names the other side in error messages."""
        self._sock = sock
        self._peer = peer
        self._stream = -1
        self._received = bytearray()

    def __enter__(self) -> TtrpcClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the server cancels what is still under way for it."""
        self._sock.close()

    def wait_closed(self, timeout: float) -> bool:
        """Wait until the server has closed the connection; returns False when it has not after ``timeout`` seconds."""
        self._sock.settimeout(timeout)
        try:
            while self._sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def call(self, service: str, method: str, request: Message, response_type: type[M], *, timeout: float | None) -> M:
        """Call a unary method and return its response.

        ``timeout`` in seconds covers sending, serving and receiving, and is told to the server; None waits for ever.
        Raises the error that the server answered, Timeout, Unavailable when the connection is dead, InvalidArgument
        when the request is larger than MAX_DATA.
        """
        envelope = Request(service=service, method=method, payload=request.SerializeToString())
        if timeout is not None:
            envelope.timeout_nano = max(1, int(timeout * 1e9))
        self._stream += 2
        data = frame(self._stream, MessageType.REQUEST, envelope)
        deadline = None if timeout is None else time.monotonic() + timeout
        what = f"{service.rpartition('.')[2]}.{method}"
        try:
            self._send(data, deadline)
            response = Response.FromString(self._answer(deadline))
            raise_status(response.status)
            return response_type.FromString(response.payload)
        except TimeoutError as error:
            raise Timeout(f"{self._peer} did not answer {what} within {timeout:g} s") from error
        except OSError as error:
            self.close()
            raise Unavailable(f"{self._peer} died during {what}: {error.strerror or error}") from error
        except DecodeError as error:
            self.close()
            raise Unavailable(f"{self._peer} answered {what} with something else than protobuf") from error

    def _send(self, data: bytes, deadline: float | None) -> None:
        self._limit(deadline)
        try:
            self._sock.sendall(data)
        except TimeoutError:
            # Part of the frame may be gone: nothing can follow it on this connection.
            self.close()
            raise

    def _answer(self, deadline: float | None) -> bytes:
        """Return the body of the response to the latest request; late answers to earlier ones are dropped."""
        while True:
            # The header stays buffered until its body is complete, so a timeout between them loses no bytes.
            self._fill(HEADER_SIZE, deadline)
            header = parse_header(bytes(self._received[:HEADER_SIZE]))
            if header.length > MAX_DATA:
                raise OSError(f"it announced a message of {header.length} bytes")
            end = HEADER_SIZE + header.length
            self._fill(end, deadline)
            body = bytes(self._received[HEADER_SIZE:end])
            del self._received[:end]
            if header.stream == self._stream and header.type == MessageType.RESPONSE:
                return body

    def _fill(self, size: int, deadline: float | None) -> None:
        while len(self._received) < size:
            self._limit(deadline)
            data = self._sock.recv(max(65536, size - len(self._received)))
            if not data:
                raise ConnectionResetError("it closed the connection")
            self._received += data

    def _limit(self, deadline: float | None) -> None:
        """Give the next system call what is left until ``deadline``."""
        if deadline is None:
            self._sock.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
