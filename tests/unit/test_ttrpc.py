"""ttrpc: a real server and real clients over unix sockets; frames as containerd sends them, and hostile ones."""

from __future__ import annotations

import asyncio
import socket
import struct
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty

from katapy.client.task import DETAILS_TYPE, SERVICE, Exit, Process, Serving, Stdio, TaskClient, TaskState, Typed
from katapy.errors import CommandNotFound, Internal, KatapyError, NotFound, Timeout, Unavailable, Unsupported
from katapy.proto import task_pb2 as pb
from katapy.proto.ttrpc_pb2 import Request, Response
from katapy.transport import unix
from katapy.transport.ttrpc import HEADER_SIZE, MAX_DATA, TtrpcClient, parse_header
from katapy.transport.ttrpc_server import MAX_REQUESTS, handler_table, serve

TASK = pb.DESCRIPTOR.services_by_name["Task"]


class Service:
    """A Task service whose methods show how the server treats them."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()
        self.deleted = asyncio.Event()
        self.running = 0
        self.seen: list[object] = []

    async def create(self, request: pb.CreateTaskRequest) -> pb.CreateTaskResponse:
        self.seen.append(request)
        return pb.CreateTaskResponse(pid=len(request.bundle))

    async def start(self, request: pb.StartRequest) -> pb.StartResponse:
        raise CommandNotFound(f"no caf\udce9 in {request.id}")  # a path that is not UTF-8

    async def kill(self, request: pb.KillRequest) -> Empty:
        raise NotFound("os: process already finished")

    async def state(self, request: pb.StateRequest) -> pb.StateResponse:
        if request.id == "bug":
            raise ZeroDivisionError("a bug")
        answer = pb.StateResponse(id=request.id, exec_id=request.exec_id, bundle="/b", pid=5, status=pb.STOPPED)
        answer.exit_status, answer.terminal, answer.stdout = 143, True, "out"
        answer.exited_at.FromNanoseconds(1_500_000_000_000_000_001)
        return answer

    async def pids(self, request: pb.PidsRequest) -> pb.PidsResponse:
        answer = pb.PidsResponse(processes=[pb.ProcessInfo(pid=1), pb.ProcessInfo(pid=7)])
        answer.processes[1].info.type_url = DETAILS_TYPE
        answer.processes[1].info.value = pb.ProcessDetails(exec_id="e").SerializeToString()
        return answer

    async def connect(self, request: pb.ConnectRequest) -> pb.ConnectResponse:
        return pb.ConnectResponse(shim_pid=1, task_pid=2, version="v2")

    async def stats(self, request: pb.StatsRequest) -> pb.StatsResponse:
        answer = pb.StatsResponse()
        answer.stats.type_url, answer.stats.value = "metrics", bytes(int(request.id))
        return answer

    async def close_io(self, request: pb.CloseIORequest) -> Empty:
        self.seen.append(request)
        return Empty()

    async def wait(self, request: pb.WaitRequest) -> pb.WaitResponse:
        self.running += 1
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.running -= 1
        return pb.WaitResponse(exit_status=7)

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        await self.release.wait()
        self.deleted.set()
        return pb.DeleteResponse(pid=4, exit_status=137)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shim.sock"


class Server:
    """The server of one test, on a path."""

    def __init__(self, path: Path, name: str = SERVICE) -> None:
        self.service = Service()
        self._path = path
        table = handler_table(TASK, self.service, finish=["Delete"])
        self._serving = serve(unix.listen(path, socket.SOCK_STREAM), {name: table})

    async def __aenter__(self) -> Server:
        await self._serving.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._serving.__aexit__(None, None, None)

    def client(self) -> TtrpcClient:
        return TtrpcClient(unix.connect(self._path, socket.SOCK_STREAM))


class Raw:
    """A peer that writes what it likes."""

    def __init__(self, path: Path) -> None:
        self.sock = unix.connect(path, socket.SOCK_STREAM)
        self.sock.setblocking(False)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def request(self, stream: int, method: str, *, service: str = SERVICE, payload: bytes = b"") -> None:
        await self.send_request(stream, Request(service=service, method=method, payload=payload))

    async def send_request(self, stream: int, request: Request) -> None:
        body = request.SerializeToString()
        await self.send(struct.pack(">IIBB", len(body), stream, 1, 0) + body)

    async def response(self) -> tuple[int, Response]:
        header = parse_header(await self._exactly(HEADER_SIZE))
        assert (header.type, header.flags) == (2, 0)
        return header.stream, Response.FromString(await self._exactly(header.length))

    async def code(self, stream: int) -> int:
        """Return the status code of the next response, which is that stream's."""
        got, response = await self.response()
        assert got == stream
        return response.status.code

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await asyncio.get_running_loop().sock_recv(self.sock, size - len(data))
            assert part, "the server closed the connection"
            data += part
        return data


async def test_requests_carry_every_field(path: Path) -> None:
    async with Server(path) as server:
        with server.client() as client:
            stdio = Stdio("in", "out", "", terminal=True)
            assert await asyncio.to_thread(TaskClient(client).create, "c1", "/bundle", stdio, timeout=30) == 7
    expected = pb.CreateTaskRequest(id="c1", bundle="/bundle", stdin="in", stdout="out", terminal=True)
    assert server.service.seen == [expected]


async def test_answers_become_plain_values(path: Path) -> None:
    async with Server(path) as server:
        server.service.release.set()
        with server.client() as client:
            task = TaskClient(client, timeout=30)
            assert await asyncio.to_thread(task.state, "c1", "e") == TaskState(
                "c1", "e", "/b", 5, "stopped", Stdio("", "out", "", True), 143, 1_500_000_000_000_000_001
            )
            assert await asyncio.to_thread(task.pids, "c1") == [Process(1, ""), Process(7, "e")]
            assert await asyncio.to_thread(task.connect, "c1") == Serving(1, 2, "v2")
            assert await asyncio.to_thread(task.delete, "c1") == Exit(4, 137, 0)
            assert await asyncio.to_thread(task.wait, "c1", timeout=None) == Exit(0, 7, 0)
            assert await asyncio.to_thread(task.stats, "3") == Typed("metrics", bytes(3))


async def test_camel_case_methods_are_found_and_v3_is_only_a_name(path: Path) -> None:
    request = pb.CloseIORequest(id="c1", stdin=True)
    async with Server(path, "containerd.task.v3.Task") as server:
        with server.client() as client:
            await asyncio.to_thread(client.call, "containerd.task.v3.Task", "CloseIO", request, Empty, timeout=30)
    assert server.service.seen == [request]


async def test_errors_keep_their_class_and_text(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Server(path) as server:
        with server.client() as client:
            task = TaskClient(client)
            with pytest.raises(CommandNotFound, match=r"^no caf\? in c1$"):
                await asyncio.to_thread(task.start, "c1")
            with pytest.raises(NotFound, match=r"^os: process already finished$"):
                await asyncio.to_thread(task.kill, "c1", 9)
            with pytest.raises(Unsupported):
                await asyncio.to_thread(task.pause, "c1")
            assert not caplog.records
            with pytest.raises(Internal, match="ZeroDivisionError: a bug"):
                await asyncio.to_thread(task.state, "bug")
    assert "Traceback" in caplog.text


async def test_answers_come_in_any_order(path: Path) -> None:
    async with Server(path) as server:
        with Raw(path) as peer:
            await peer.request(5, "Wait")
            await server.service.started.wait()
            await peer.request(3, "CloseIO")  # a lower stream id than the one before
            assert await peer.code(3) == 0
            server.service.release.set()
            stream, response = await peer.response()
            assert (stream, pb.WaitResponse.FromString(response.payload).exit_status) == (5, 7)


@pytest.mark.parametrize("nanoseconds", [10_000_000, -1])
async def test_the_server_keeps_the_deadline(path: Path, nanoseconds: int) -> None:
    async with Server(path) as server:
        with Raw(path) as peer:
            await peer.send_request(1, Request(service=SERVICE, method="Wait", timeout_nano=nanoseconds))
            assert await peer.code(1) == 4
            assert server.service.running == 0


async def test_a_late_answer_does_not_become_the_next_one(path: Path) -> None:
    async with Server(path) as server:
        with server.client() as client:
            task = TaskClient(client)
            with pytest.raises(Timeout, match=r"within 0\.05 s"):
                await asyncio.to_thread(task.wait, "c1", timeout=0.05)
            assert await asyncio.to_thread(task.create, "c1", "/b", timeout=30) == 2


async def test_the_client_drops_what_it_did_not_ask_for() -> None:
    """An answer to another stream, and one whose header and body come in pieces around a timeout."""
    mine, theirs = socket.socketpair()

    def frame(stream: int, status: int) -> bytes:
        body = Response(payload=pb.WaitResponse(exit_status=status).SerializeToString()).SerializeToString()
        return struct.pack(">IIBB", len(body), stream, 2, 0) + body

    with TtrpcClient(mine) as client, theirs:
        task = TaskClient(client)
        theirs.sendall(frame(77, 1) + frame(1, 2)[:12])
        with pytest.raises(Timeout):
            task.wait("c1", timeout=0.01)
        theirs.sendall(frame(1, 2)[12:] + frame(3, 3))
        assert task.wait("c1", timeout=30).status == 3


@pytest.mark.parametrize(
    "answer", [b"", b"\0\0", struct.pack(">IIBB", 0xFFFFFFFF, 1, 2, 0), b"\0\0\0\1\0\0\0\1\2\0\xff"]
)
def test_a_server_that_dies_or_lies_is_unavailable(answer: bytes) -> None:
    mine, theirs = socket.socketpair()
    with TtrpcClient(mine) as client, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(Unavailable):
            TaskClient(client).connect("c1")
        with pytest.raises(Unavailable):
            TaskClient(client).connect("c1")


async def test_oversize_is_refused_and_the_connection_lives(path: Path) -> None:
    async with Server(path) as server:
        with Raw(path) as peer:
            size = MAX_DATA + 1
            await peer.send(struct.pack(">IIBB", size, 1, 1, 0) + bytes(size))
            assert await peer.code(1) == 8
            await peer.request(3, "CloseIO")
            assert await peer.code(3) == 0
            await peer.request(5, "Stats", payload=pb.StatsRequest(id=str(MAX_DATA)).SerializeToString())
            assert await peer.code(5) == 8
        with server.client() as client, pytest.raises(KatapyError, match="too large for ttrpc"):
            await asyncio.to_thread(TaskClient(client).create, "c1", "x" * MAX_DATA, timeout=30)


async def test_hostile_frames_cost_only_their_own_connection(path: Path) -> None:
    async with Server(path):
        with Raw(path) as liar, Raw(path) as slow, Raw(path) as truncated, Raw(path) as peer:
            await liar.send(struct.pack(">IIBB", 0xFFFFFFFF, 1, 1, 0))
            assert await liar.code(1) == 8  # told at once, not after 4 GiB
            await slow.send(b"\0\0")
            await truncated.send(struct.pack(">IIBB", 1000, 1, 1, 0) + b"x")
            await peer.request(1, "CloseIO")
            assert await peer.code(1) == 0


async def test_wrong_requests_are_answered_on_their_stream(path: Path) -> None:
    async with Server(path):
        with Raw(path) as peer:
            await peer.send(struct.pack(">IIBB", 3, 1, 99, 255) + b"???")  # an unknown type is skipped
            await peer.send(struct.pack(">IIBB", 3, 1, 3, 0) + b"???")  # so are data
            await peer.send(struct.pack(">IIBB", 3, 1, 1, 0) + b"\xff\xff\xff")
            assert await peer.code(1) == 3
            await peer.request(2, "CloseIO")
            assert await peer.code(2) == 3  # a client's streams are odd
            await peer.request(3, "CloseIO", service="no.such.Service")
            assert await peer.code(3) == 12
            await peer.request(5, "Pause")
            assert await peer.code(5) == 12
            await peer.request(7, "CloseIO", payload=b"\xff")
            assert await peer.code(7) == 3
            await peer.request(9, "CloseIO")
            assert await peer.code(9) == 0


async def test_a_stream_in_use_and_too_many_requests_are_refused(path: Path) -> None:
    async with Server(path) as server:
        with Raw(path) as peer:
            await peer.request(1, "Wait")
            await peer.request(1, "Wait")
            assert await peer.code(1) == 3
            for number in range(1, MAX_REQUESTS):
                await peer.request(2 * number + 1, "Wait")
            await peer.request(9999, "CloseIO")
            assert await peer.code(9999) == 8
            assert server.service.running == MAX_REQUESTS


async def test_a_caller_that_leaves_cancels_its_requests(path: Path) -> None:
    async with Server(path) as server:
        with Raw(path) as peer:
            await peer.request(1, "Wait")
            await server.service.started.wait()
        await asyncio.wait_for(server.service.cancelled.wait(), 5)


async def test_a_method_that_must_finish_outlives_its_caller(path: Path) -> None:
    async with Server(path) as server:
        with Raw(path) as peer:
            await peer.request(1, "Delete")
            await peer.request(3, "Wait")
            await server.service.started.wait()
        await server.service.cancelled.wait()  # so the server has seen the end
        server.service.release.set()
        await asyncio.wait_for(server.service.deleted.wait(), 5)


async def test_a_method_that_must_finish_outlives_its_time(path: Path) -> None:
    async with Server(path) as server:
        with Raw(path) as peer:
            await peer.send_request(1, Request(service=SERVICE, method="Delete", timeout_nano=1))
            await peer.send_request(3, Request(service=SERVICE, method="Wait", timeout_nano=10**7))
            assert await peer.code(3) == 4
            server.service.release.set()
            assert await peer.code(1) == 0
            assert server.service.deleted.is_set()


async def test_the_end_of_the_server_is_answered(path: Path) -> None:
    async with Server(path) as server:
        peer = Raw(path)
        await peer.request(1, "Wait")
        await server.service.started.wait()
    with peer:
        assert await peer.code(1) == 14
    with pytest.raises(Unavailable, match="cannot connect to"):
        unix.connect(path, socket.SOCK_STREAM)


async def test_a_peer_that_reads_nothing_holds_up_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katapy.transport.ttrpc_server._FLUSH_SECONDS", 0.05)
    async with Server(path):
        deaf, peer = Raw(path), Raw(path)
        for stream in (1, 3, 5):
            payload = pb.StatsRequest(id=str(MAX_DATA // 2)).SerializeToString()
            await deaf.request(stream, "Stats", payload=payload)
        await peer.request(1, "CloseIO")
        assert await peer.code(1) == 0
    deaf.sock.close()
    peer.sock.close()
