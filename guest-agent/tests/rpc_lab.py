"""A server of our own gRPC with a service that does what a test wants, and peers of it."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
from katapy_agent import agent_pb2 as pb
from katapy_agent import http2, rpc
from katapy_agent.errors import NotFound
from katapy_agent.server import status_of

SERVICE = pb.DESCRIPTOR.services_by_name["Agent"]
SECONDS = 20.0
HELLO = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)


class Service:
    """Answers as a test wants it: the methods of agent.proto by other names are refused."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.running = self.most = 0

    def __getattr__(self, name: str) -> Any:
        async def refuse(_request: object) -> None:
            raise NotFound(f"{name} is not here: 100 % of it, nor ä")

        if name.startswith("_"):
            raise AttributeError(name)
        return refuse

    async def create_container(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        return pb.CreateContainerResponse(pid=len(request.spec))

    async def list_processes(self, request: pb.ListProcessesRequest) -> pb.ListProcessesResponse:
        size = int(request.container_id)
        return pb.ListProcessesResponse(processes=[pb.ProcessInfo(command="x" * size)])

    async def wait_process(self, _request: pb.WaitProcessRequest) -> pb.WaitProcessResponse:
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError

    async def events(self, _request: pb.Empty) -> AsyncIterator[pb.Event]:
        try:
            for number in range(3):
                yield pb.Event(oom=pb.OomEvent(container_id=str(number)))
            self.waiting.set()
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


class Lab:
    """A server on a unix socket, and what it serves."""

    def __init__(self, path: Path) -> None:
        self.service = Service()
        self.target = f"unix:{path}"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.listener.bind(str(path))
        self.listener.listen(128)
        self.server = rpc.Server(SERVICE, self.service, status_of)
        self.task = asyncio.create_task(self.server.serve(self.listener))

    def serve(self, **methods: Any) -> None:
        """Serve these methods instead of the service's own."""
        self.task.cancel()
        vars(self.service).update(methods)
        self.server = rpc.Server(SERVICE, self.service, status_of)
        self.task = asyncio.create_task(self.server.serve(self.listener))

    def channel(self, *options: tuple[str, object]) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1), *options])

    async def raw(self) -> socket.socket:
        """Connect as no library does."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        await self.server.take(theirs)
        return ours


async def all_ended(server: rpc.Server) -> None:
    """Wait until no connection is left."""
    async with asyncio.timeout(SECONDS):
        while server._connections:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


def call(channel: grpc.aio.Channel, method: str, request: Any, **options: Any) -> Any:
    descriptor = SERVICE.methods_by_name[method]
    make = channel.unary_stream if descriptor.server_streaming else channel.unary_unary
    answer = getattr(pb, descriptor.output_type.name)
    stub = make(f"/{SERVICE.full_name}/{method}", type(request).SerializeToString, answer.FromString)
    return stub(request, **{"timeout": SECONDS, **options})


@asynccontextmanager
async def open_lab(path: Path) -> AsyncIterator[Lab]:
    """Give a server on the unix socket ``path``, of which nothing is left at the end."""
    lab = Lab(path)
    yield lab
    lab.task.cancel()
    await asyncio.wait([lab.task])
    lab.listener.close()
    gc.collect()  # an error that a test has caught holds its call, and that its connection
    await all_ended(lab.server)


Frame = tuple[int, int, int, bytes]  # kind, flags, stream, payload


class Peer:
    """Reads the frames that a server sends to ``end``."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._received = b""

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.end, data)

    async def frame(self) -> Frame | None:
        """Return the next frame, or None at the end."""
        if not await self._have(9):
            return None
        high, low, kind, flags, number = struct.unpack("!HBBBI", self._received[:9])
        length = high << 8 | low
        assert await self._have(9 + length)
        payload, self._received = self._received[9 : 9 + length], self._received[9 + length :]
        return kind, flags, number, payload

    async def frames_so_far(self) -> list[Frame]:
        """Return what the server has to say by now.

        A ping is answered as it is read, calls by tasks: those have had their turns when the last ping is read.
        """
        frames = []
        for number in range(3):
            ping = bytes((number,)) * 8
            await self.send(http2.frame(http2.PING, 0, 0, ping))
            while (frame := await self.frame()) != (http2.PING, http2.ACK, 0, ping):
                assert frame is not None
                frames.append(frame)
        return frames

    async def _have(self, count: int) -> bool:
        async with asyncio.timeout(SECONDS):
            while len(self._received) < count:
                more = await asyncio.get_running_loop().sock_recv(self.end, 65536)
                if not more:
                    return False
                self._received += more
        return True
