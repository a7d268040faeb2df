"""Tells the engine what happens to its containers: one queue, one sender, so that the order is that of publish().

Owns the connection to the engine's events service. When there is something to tell is decided by the Task service.
Source: containerd, api/services/ttrpc/events/v1 and docs/runtime-v2.md, "Events".
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from katapy import run
from katapy.errors import KatapyError, Timeout, Unavailable
from katapy.proto import events_pb2 as pb
from katapy.shim.engine import Engine
from katapy.transport import unix
from katapy.transport.ttrpc import TtrpcClient

_SERVICE: Final = "containerd.services.events.ttrpc.v1.Events"
_SEND_SECONDS: Final = 5.0
# An engine that is started again takes seconds; what it has not heard by then it finds out by asking.
_ATTEMPTS: Final = 5
_RETRY_SECONDS: Final = 1.0
_FLUSH_SECONDS: Final = 2.0
_TOPICS: Final[dict[type[Message], str]] = {
    pb.TaskCreate: "/tasks/create",
    pb.TaskStart: "/tasks/start",
    pb.TaskExit: "/tasks/exit",
    pb.TaskDelete: "/tasks/delete",
    pb.TaskExecAdded: "/tasks/exec-added",
    pb.TaskExecStarted: "/tasks/exec-started",
    pb.TaskOOM: "/tasks/oom",
    pb.TaskPaused: "/tasks/paused",
    pb.TaskResumed: "/tasks/resumed",
}
log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where events go."""

    async def send(self, envelope: pb.Envelope) -> None:
        """Deliver one. Raises KatapyError."""

    def close(self) -> None:
        """Release what is held."""


class Publisher:
    """While entered, events are sent; without an engine that wants them they are dropped."""

    def __init__(self, engine: Engine | None) -> None:
        self._namespace = engine.namespace if engine else ""
        self._sink = _sink(engine) if engine else None
        self._queue: asyncio.Queue[pb.Envelope] = asyncio.Queue()
        self._sending: asyncio.Task[None] | None = None

    def publish(self, event: Message) -> None:
        """Have an event sent, after those before it. Never waits."""
        if self._sink is None:
            return
        content = Any(type_url=event.DESCRIPTOR.full_name, value=event.SerializeToString())
        envelope = pb.Envelope(namespace=self._namespace, topic=_TOPICS[type(event)], event=content)
        envelope.timestamp.GetCurrentTime()
        self._queue.put_nowait(envelope)

    async def __aenter__(self) -> Publisher:
        if self._sink is not None:
            self._sending = asyncio.create_task(self._send_all(self._sink), name="send events")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sending is None or self._sink is None:
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._queue.join(), _FLUSH_SECONDS)
        self._sending.cancel()
        await asyncio.wait([self._sending])
        self._sink.close()

    async def _send_all(self, sink: Sink) -> None:
        while True:
            envelope = await self._queue.get()
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    await sink.send(envelope)
                    break
                except KatapyError as error:
                    log.debug("cannot tell the engine of %s: %s", envelope.topic, error)
                await asyncio.sleep(attempt * _RETRY_SECONDS)
            else:
                log.warning("the engine was not told of %s: it did not listen", envelope.topic)
            self._queue.task_done()


def _sink(engine: Engine) -> Sink | None:
    if engine.ttrpc:
        return _Service(Path(engine.ttrpc.removeprefix("unix://")))
    # CRI-O names itself and has no address: it wants no events.
    return _Program(engine) if engine.address and engine.publisher else None


class _Service:
    """The events service of the engine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._client: TtrpcClient | None = None

    async def send(self, envelope: pb.Envelope) -> None:
        # In a thread: the client is the blocking one that the command line uses.
        await asyncio.to_thread(self._forward, pb.ForwardRequest(envelope=envelope))

    def _forward(self, request: pb.ForwardRequest) -> None:
        if self._client is None:
            self._client = TtrpcClient(unix.connect(self._path, socket.SOCK_STREAM), peer="the engine")
        try:
            self._client.call(_SERVICE, "Forward", request, Empty, timeout=_SEND_SECONDS)
        except (Unavailable, Timeout):
            self.close()
            raise

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class _Program:
    """The engine's own program, started once for each event, which it reads from standard input."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def send(self, envelope: pb.Envelope) -> None:
        engine = self._engine
        argv = [engine.publisher, "--address", engine.address, "publish"]
        argv += ["--namespace", engine.namespace, "--topic", envelope.topic]
        stdin = os.memfd_create("event")
        try:
            os.pwrite(stdin, envelope.event.SerializeToString(), 0)
            process = run.start(argv, name="the engine's publisher", stdin=stdin)
        finally:
            os.close(stdin)
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                status = await process.wait()
        except TimeoutError as error:
            raise Timeout(f"{engine.publisher} did not end within {_SEND_SECONDS:g} s") from error
        finally:
            await process.stop(grace=0)
        if status:
            raise Unavailable(f"{engine.publisher} ended with status {status}")

    def close(self) -> None:
        pass
