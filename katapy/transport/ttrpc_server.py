"""An asyncio ttrpc server: any protobuf service, one task per request.

It owns the connections and the tasks of their requests. What a method does belongs to the object that is served
(the shim's translator); the frame and the errors on the wire are ttrpc.py's.

A request ends early in three ways, each a cancellation of its handler: its timeout_nano passes (DEADLINE_EXCEEDED),
its caller's connection closes (nobody is left to answer: a Create unwinds its sandbox), or the server itself ends.
Methods named in ``finish`` go on when their caller leaves and when their time has passed, because half of them done
would be worse than all: a Delete that containerd waits ten seconds for would never unmount what it had mounted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from katapy.errors import Internal, InvalidArgument, KatapyError, Timeout, Unavailable
from katapy.proto.ttrpc_pb2 import Request, Response, Status
from katapy.transport.accept import accepting
from katapy.transport.ttrpc import (
    HEADER_SIZE,
    INVALID_ARGUMENT,
    MAX_DATA,
    RESOURCE_EXHAUSTED,
    UNIMPLEMENTED,
    MessageType,
    frame,
    parse_header,
    status_of,
)

MAX_REQUESTS: Final = 128  # under way on one connection
_FLUSH_SECONDS: Final = 2.0  # a peer that does not read its last answer may hold up the end of the server this long
_DISCARD: Final = 65536
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """One RPC: how its request is read and who serves it."""

    request: type[Message]
    function: Callable[[Message], Awaitable[Message]]
    finish: bool


Services = Mapping[str, Mapping[str, Method]]


def handler_table(
    service: ServiceDescriptor, implementation: object, *, finish: Collection[str] = ()
) -> dict[str, Method]:
    """Bind the methods of a protobuf service to the async methods of an object, named in snake_case.

    ``CloseIO`` is served by ``async def close_io(self, request: CloseIORequest) -> Empty``. A method that the object
    does not have is answered with UNIMPLEMENTED. ``finish`` names the RPCs that outlive their caller's connection and
    their time.
    """
    table = {}
    for method in service.methods:
        function = getattr(implementation, re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", method.name).lower(), None)
        if function is not None:
            table[method.name] = Method(GetMessageClass(method.input_type), function, method.name in finish)
    return table


def serve(listening: socket.socket, services: Services) -> AbstractAsyncContextManager[None]:
    """While entered, serve ``services``, by full name (``containerd.task.v2.Task``), on a listening socket.

    At the end the requests under way are cancelled and answered with Unavailable, and what was answered is flushed.
    Connections are admitted, and ``listening`` is closed, as accept.py says.
    """

    async def serve_connection(sock: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        try:
            await _Connection(reader, writer, services).run()
        finally:
            writer.close()
            try:
                with contextlib.suppress(OSError, TimeoutError):
                    async with asyncio.timeout(_FLUSH_SECONDS):
                        await writer.wait_closed()
            finally:
                # Not flushed within the time, or cancelled: drop it, or its transport would outlive the server.
                writer.transport.abort()

    return accepting(listening, serve_connection)


class _Connection:
    """One peer. Frames need no lock: each is one write() to a transport that keeps their order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, services: Services) -> None:
        self._reader = reader
        self._writer = writer
        self._services = services
        self._requests: dict[int, tuple[asyncio.Task[None], Method]] = {}

    async def run(self) -> None:
        """Read frames until the peer closes, then wait for the end of the requests that it left behind."""
        async with asyncio.TaskGroup() as tasks:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    await self._read_frame(tasks)
            for task, method in self._requests.values():
                # Once: another cancellation would interrupt the undoing that the first one began.
                if not method.finish and not task.cancelling():
                    task.cancel()

    async def _read_frame(self, tasks: asyncio.TaskGroup) -> None:
        header = parse_header(await self._reader.readexactly(HEADER_SIZE))
        if header.length > MAX_DATA:
            if header.type == MessageType.REQUEST:
                # Answered before the rest is read: a peer that announces 4 GiB may never send them.
                text = f"a message of {header.length} bytes is too large (at most {MAX_DATA})"
                await self._answer(header.stream, Response(status=Status(code=RESOURCE_EXHAUSTED, message=text)))
            await self._discard(header.length)
            return
        data = await self._reader.readexactly(header.length)
        if header.type != MessageType.REQUEST:
            return
        try:
            request, method = self._admit(header.stream, data)
        except _Refused as refused:
            await self._answer(header.stream, Response(status=refused.status))
            return
        task = tasks.create_task(self._serve(header.stream, request, method))
        self._requests[header.stream] = task, method

    async def _discard(self, count: int) -> None:
        while count:
            data = await self._reader.read(min(count, _DISCARD))
            if not data:
                raise EOFError
            count -= len(data)

    def _admit(self, stream: int, data: bytes) -> tuple[Request, Method]:
        """Check a request before anything runs for it. Raises _Refused."""
        if stream % 2 == 0 or stream in self._requests:
            raise _Refused(INVALID_ARGUMENT, f"stream {stream} is not a new odd number")
        if len(self._requests) >= MAX_REQUESTS:
            raise _Refused(RESOURCE_EXHAUSTED, f"{MAX_REQUESTS} requests are under way on this connection")
        try:
            request = Request.FromString(data)
        except DecodeError as error:
            raise _Refused(INVALID_ARGUMENT, "the request is not a ttrpc.Request") from error
        method = self._services.get(request.service, {}).get(request.method)
        if method is None:
            raise _Refused(UNIMPLEMENTED, f"no method {request.service[:200]}/{request.method[:200]} is served here")
        return request, method

    async def _serve(self, stream: int, request: Request, method: Method) -> None:
        try:
            response = await _respond(request, method)
        except asyncio.CancelledError:
            self._write(
                stream,
                Response(status=status_of(Unavailable(f"{request.method} was cancelled, because the shim ends"))),
            )
            raise
        finally:
            del self._requests[stream]
        with contextlib.suppress(OSError):
            await self._answer(stream, response)

    async def _answer(self, stream: int, response: Response) -> None:
        self._write(stream, response)
        await self._writer.drain()

    def _write(self, stream: int, response: Response) -> None:
        if self._writer.is_closing():
            return  # the peer has gone
        try:
            data = frame(stream, MessageType.RESPONSE, response)
        except InvalidArgument as error:
            status = Status(code=RESOURCE_EXHAUSTED, message=str(error))
            data = frame(stream, MessageType.RESPONSE, Response(status=status))
        self._writer.write(data)


class _Refused(Exception):
    def __init__(self, code: int, message: str) -> None:
        self.status = Status(code=code, message=message)


async def _respond(request: Request, method: Method) -> Response:
    """Run the handler and say how it ended."""
    try:
        message = method.request.FromString(request.payload)
    except DecodeError:
        return Response(status=Status(code=INVALID_ARGUMENT, message=f"the request of {request.method} is malformed"))
    seconds = request.timeout_nano / 1e9 if request.timeout_nano and not method.finish else None
    try:
        async with asyncio.timeout(seconds) as deadline:
            answer = await method.function(message)
        return Response(status=Status(), payload=answer.SerializeToString())
    except KatapyError as error:
        return Response(status=status_of(error))
    except Exception as error:
        if isinstance(error, TimeoutError) and deadline.expired():
            return Response(status=status_of(Timeout(f"{request.method} did not end within {seconds:g} s")))
        _log.exception("%s failed", request.method)
        return Response(status=status_of(Internal(f"{request.method} failed: {type(error).__name__}: {error}")))
