"""A gRPC server (PROTOCOL-HTTP2.md of gRPC): unary calls and streams of answers, on connections of the host.

Which methods there are comes from a service's descriptor; what they do is the caller's. An error of theirs becomes the
status that ``Fail`` says.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, Final, NamedTuple

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from katapy_agent import vsock
from katapy_agent.hpack import Header
from katapy_agent.http2 import Connection, Stream

MESSAGE_MAX: Final = 4 << 20
_CONNECTIONS_MAX: Final = 64
# Octets of an error's text: thrice as many when each is written as three, which must fit in one frame of headers.
_TEXT_MAX: Final = 4096
_PREFIX: Final = 5  # octets before a message: whether it is compressed, and its length
_OK: Final = 0
_UNKNOWN_METHOD: Final = 12
_TOO_LARGE: Final = 8
_DEADLINE_EXCEEDED: Final = 4
_INTERNAL: Final = 13
_TYPE: Final = b"application/grpc"
_ANSWER: Final[list[Header]] = [(b":status", b"200"), (b"content-type", _TYPE)]
_NOT_GRPC: Final[list[Header]] = [(b":status", b"415")]
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


class Status(NamedTuple):
    """How a call ended: a code of google.rpc.Code, a text, and trailing metadata."""

    code: int
    message: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


Fail = Callable[[Exception], Status]


class _Method(NamedTuple):
    call: Callable[[Any], Any]
    decode: Callable[[bytes], Any]
    streaming: bool


class Server:
    """Serves the methods of ``service``, which are those of ``implementation`` with their names in snake case."""

    def __init__(self, descriptor: ServiceDescriptor, implementation: object, fail: Fail) -> None:
        """Raises AttributeError where ``implementation`` lacks a method."""
        self._fail = fail
        self._methods: Mapping[bytes, _Method] = {
            f"/{descriptor.full_name}/{method.name}".encode(): _Method(
                getattr(implementation, _snake(method.name)),
                GetMessageClass(method.input_type).FromString,
                method.server_streaming,
            )
            for method in descriptor.methods
        }
        self._connections = 0

    async def serve(self, listener: socket.socket) -> None:
        """Serve every connection that the host makes to ``listener``, for ever."""
        async for connection in vsock.accept(listener):
            if self._connections < _CONNECTIONS_MAX:
                await self.take(connection)
            else:
                connection.close()

    async def take(self, connection: socket.socket) -> None:
        """Serve a connected stream socket, which is this server's from now on, and return at once."""
        self._connections += 1
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(self._connection, connection)

    def _connection(self) -> Connection:
        return Connection(self._answer, body_max=MESSAGE_MAX + _PREFIX, ended=self._ended)

    def _ended(self) -> None:
        self._connections -= 1

    async def _answer(self, stream: Stream) -> None:
        if not stream.headers.get(b"content-type", b"").startswith(_TYPE):
            await stream.send(_NOT_GRPC)
            return
        method = self._methods.get(stream.headers.get(b":path", b""))
        if method is None:
            await _end(stream, Status(_UNKNOWN_METHOD, "no such method"))
            return
        if stream.too_large:
            await _end(stream, Status(_TOO_LARGE, f"the message is larger than {MESSAGE_MAX} bytes"))
            return
        try:
            request = method.decode(_message(stream.body))
        except (ValueError, DecodeError) as error:
            await _end(stream, Status(_INTERNAL, str(error)))
            return
        answer = self._stream if method.streaming else self._unary
        try:
            async with asyncio.timeout(_timeout(stream.headers.get(b"grpc-timeout"))):
                await answer(stream, method.call(request))
        except TimeoutError:  # the call's own: what a method raises is a status by now
            await _end(stream, Status(_DEADLINE_EXCEEDED, "the deadline is over"))

    async def _unary(self, stream: Stream, call: Awaitable[Any]) -> None:
        try:
            answer = _framed(await call)
        except Exception as error:
            await _end(stream, self._fail(error))
            return
        await stream.send(_ANSWER, answer, _trailers(Status(_OK)))

    async def _stream(self, stream: Stream, answers: AsyncGenerator[Any, None]) -> None:
        try:
            async with aclosing(answers):
                async for answer in answers:
                    await stream.send([] if stream.begun else _ANSWER, _framed(answer))
        except Exception as error:
            await _end(stream, self._fail(error))
            return
        await _end(stream, Status(_OK))


async def _end(stream: Stream, status: Status) -> None:
    # Without an answer, its headers and the trailers are one block (Trailers-Only).
    if stream.begun:
        await stream.send([], trailers=_trailers(status))
    else:
        await stream.send([*_ANSWER, *_trailers(status)])


def _trailers(status: Status) -> list[Header]:
    trailers = [(b"grpc-status", b"%d" % status.code)]
    if status.message:
        trailers.append((b"grpc-message", _percent_encoded(status.message)))
    return trailers + [(name.encode(), value.encode()) for name, value in status.metadata]


def _percent_encoded(text: str) -> bytes:
    """Return a text as gRPC writes it in headers, cut to whole characters; a file's name in it may not be UTF-8."""
    cut = text.encode(errors="backslashreplace")[:_TEXT_MAX].decode(errors="ignore")
    return b"".join(
        bytes((octet,)) if 0x20 <= octet <= 0x7E and octet != 0x25 else b"%%%02X" % octet for octet in cut.encode()
    )


def _framed(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


def _message(body: bytearray) -> bytes:
    if len(body) < _PREFIX or body[0] or int.from_bytes(body[1:_PREFIX], "big") != len(body) - _PREFIX:
        raise ValueError("the request is not one message that is not compressed")
    return bytes(body[_PREFIX:])


def _timeout(value: bytes | None) -> float | None:
    match = _TIMEOUT.fullmatch(value or b"")
    return int(match[1]) * _UNITS[match[2]] if match else None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
