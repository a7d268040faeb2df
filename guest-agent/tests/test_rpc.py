"""gRPC by our own hand, with gRPC's own library at the other end; and what no library would send, byte by byte."""

from __future__ import annotations

import asyncio
import gc
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from katapy_agent import agent_pb2 as pb
from katapy_agent import http2, rpc
from katapy_agent.errors import NotFound
from katapy_agent.hpack import encode
from katapy_agent.server import status_of

SERVICE = pb.DESCRIPTOR.services_by_name["Agent"]
SECONDS = 20.0


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
        self.server = rpc.Server(SERVICE, self.service, status_of)
        self.target = f"unix:{path}"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.listener.bind(str(path))
        self.listener.listen(128)
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


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path / "rpc")
    yield lab
    lab.task.cancel()
    await asyncio.wait([lab.task])
    lab.listener.close()
    gc.collect()  # an error that a test has caught holds its call, and that its connection
    await all_ended(lab.server)


async def test_a_thousand_calls_one_after_the_other(lab: Lab) -> None:
    """Credit that is taken comes back, and the table of headers holds."""
    async with lab.channel() as channel:
        for number in range(1000):
            answer = await call(channel, "CreateContainer", pb.CreateContainerRequest(spec=bytes(number)))
            assert answer.pid == number


async def test_a_hundred_calls_at_once(lab: Lab) -> None:
    async with lab.channel() as channel:
        requests = [pb.CreateContainerRequest(spec=bytes(number)) for number in range(100)]
        answers = await asyncio.gather(*(call(channel, "CreateContainer", request) for request in requests))
    assert [answer.pid for answer in answers] == list(range(100))
    assert lab.service.most > 1


async def test_large_messages_both_ways(lab: Lab) -> None:
    """More than any window, and ten of them at once, so that streams wait for the connection's credit."""
    size = 3 << 20
    async with lab.channel(("grpc.max_receive_message_length", -1)) as channel:
        request = pb.CreateContainerRequest(spec=bytes(size))
        answers = await asyncio.gather(*(call(channel, "CreateContainer", request) for _ in range(10)))
        assert {answer.pid for answer in answers} == {size}
        ask = pb.ListProcessesRequest(container_id=str(size))
        lists = await asyncio.gather(*(call(channel, "ListProcesses", ask) for _ in range(10)))
        assert {len(each.processes[0].command) for each in lists} == {size}


async def test_a_peer_with_small_windows(lab: Lab) -> None:
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with lab.channel(*options) as channel:
        answer = await call(channel, "ListProcesses", pb.ListProcessesRequest(container_id=str(1 << 20)))
    assert len(answer.processes[0].command) == 1 << 20


async def test_a_message_that_is_too_large(lab: Lab) -> None:
    async with lab.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "CreateContainer", pb.CreateContainerRequest(spec=bytes(5 << 20)))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await call(channel, "CreateContainer", pb.CreateContainerRequest(spec=b"12"))).pid == 2


async def test_an_error_says_what_it_is(lab: Lab) -> None:
    async with lab.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "CloseStdin", pb.CloseStdinRequest())
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert error.value.details() == "close_stdin is not here: 100 % of it, nor ä"
    assert dict(error.value.trailing_metadata() or ())["katapy-error"] == "NotFound"


async def test_a_method_that_is_not_there(lab: Lab) -> None:
    async with lab.channel() as channel:
        stub: Any = channel.unary_unary("/katapy.agent.v1.Agent/Nonesuch", lambda _: b"", lambda data: data)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub(None, timeout=SECONDS)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_that_is_no_message(lab: Lab) -> None:
    async with lab.channel() as channel:
        stub: Any = channel.unary_unary("/katapy.agent.v1.Agent/CreateContainer", lambda _: b"\xff", lambda data: data)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub(None, timeout=SECONDS)
    assert error.value.code() is grpc.StatusCode.INTERNAL


async def test_answers_that_stream_and_a_caller_that_has_enough(lab: Lab) -> None:
    async with lab.channel() as channel:
        events = call(channel, "Events", pb.Empty(), timeout=None)
        assert [(await events.read()).oom.container_id for _ in range(3)] == ["0", "1", "2"]
        await lab.service.waiting.wait()
        assert not lab.service.cancelled.is_set()
        events.cancel()
        await asyncio.wait_for(lab.service.cancelled.wait(), SECONDS)


async def test_a_call_that_nobody_waits_for_is_cancelled(lab: Lab) -> None:
    async with lab.channel() as channel:
        waiting = call(channel, "WaitProcess", pb.WaitProcessRequest(), timeout=None)
        task = asyncio.ensure_future(waiting.code())
        await lab.service.waiting.wait()
        waiting.cancel()
        await asyncio.wait_for(lab.service.cancelled.wait(), SECONDS)
        assert await task is grpc.StatusCode.CANCELLED


async def test_a_caller_that_is_gone_ends_its_calls(lab: Lab) -> None:
    async with lab.channel() as channel:
        task = asyncio.ensure_future(call(channel, "WaitProcess", pb.WaitProcessRequest(), timeout=None).code())
        await lab.service.waiting.wait()
    await asyncio.wait_for(lab.service.cancelled.wait(), SECONDS)
    await task


async def test_a_deadline(lab: Lab) -> None:
    """Ours too: the caller's library only says of its own."""
    async with lab.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "WaitProcess", pb.WaitProcessRequest(), timeout=0.2)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(lab.service.cancelled.wait(), SECONDS)


async def test_connections_are_bounded(lab: Lab) -> None:
    """Whoever comes when there are 64 is turned away, and there is room again when one leaves."""
    loop = asyncio.get_running_loop()
    connections = []
    for _ in range(65):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        await loop.sock_connect(connection, lab.target.removeprefix("unix:"))
        connections.append(connection)
    assert await loop.sock_recv(connections[-1], 1) == b""
    assert await loop.sock_recv(connections[0], 1) != b""
    for connection in connections:
        connection.close()
    async with lab.channel() as channel:
        assert (await call(channel, "CreateContainer", pb.CreateContainerRequest(spec=b"1"), wait_for_ready=True)).pid


HELLO = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0)
PATH = [(b":method", b"POST"), (b":path", b"/katapy.agent.v1.Agent/CreateContainer")]
BLOCK = encode(PATH)


async def answer_to(lab: Lab, data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Send bytes and the end, and return the frames that come until the server closes: kind, flags, stream, payload."""
    loop = asyncio.get_running_loop()
    with await lab.raw() as end:
        await loop.sock_sendall(end, data)
        end.shutdown(socket.SHUT_WR)
        received = b""
        async with asyncio.timeout(SECONDS):
            while more := await loop.sock_recv(end, 65536):
                received += more
    frames = []
    while received:
        high, low, kind, flags, number = struct.unpack("!HBBBI", received[:9])
        length = high << 8 | low
        frames.append((kind, flags, number, received[9 : 9 + length]))
        received = received[9 + length :]
    return frames


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 1),
        (HELLO + http2.frame(http2.HEADERS, http2.END_HEADERS, 2, BLOCK), 1),
        (HELLO + http2.frame(http2.DATA, 0, 1, b"x"), 1),
        (HELLO + http2.frame(http2.PUSH_PROMISE, 0, 1, b"x"), 1),
        (HELLO + http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, BLOCK), 1),
        (HELLO + http2.frame(http2.HEADERS, 0, 1, BLOCK) + http2.frame(http2.PING, 0, 0, bytes(8)), 1),
        (HELLO + http2.frame(http2.HEADERS, http2.END_HEADERS | 0x8, 1, b"\x05xx"), 1),
        (HELLO + http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x80"), 9),
        (HELLO + http2.frame(http2.PING, 0, 0, b"short"), 6),
        (HELLO + http2.frame(http2.SETTINGS, 0, 0, b"12345"), 6),
        (HELLO + http2.frame(http2.SETTINGS, 0, 0, struct.pack("!HI", 4, 1 << 31)), 3),
        (HELLO + http2.frame(http2.SETTINGS, 0, 0, struct.pack("!HI", 5, 1)), 1),
        (HELLO + http2.frame(http2.WINDOW_UPDATE, 0, 0, bytes(4)), 3),
        (HELLO + http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), 3),
        (HELLO + b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", 6),
        (
            HELLO + http2.frame(http2.HEADERS, 0, 1, BLOCK) + http2.frame(http2.CONTINUATION, 0, 1, bytes(10000)) * 2,
            11,
        ),
    ],
)
async def test_a_peer_that_breaks_the_rules_is_told_and_left(lab: Lab, data: bytes, code: int) -> None:
    """RFC 9113, section 5.4.1. Others are not hurt."""
    async with lab.channel() as channel:
        frames = await answer_to(lab, data)
        kind, _, _, payload = frames[-1]
        assert (kind, struct.unpack("!I", payload[4:8])[0]) == (http2.GOAWAY, code)
        assert (await call(channel, "CreateContainer", pb.CreateContainerRequest(spec=b"1"))).pid == 1


async def test_a_ping_is_answered(lab: Lab) -> None:
    frames = await answer_to(lab, HELLO + http2.frame(http2.PING, 0, 0, b"12345678"))
    assert (http2.PING, http2.ACK, 0, b"12345678") in frames
    assert (http2.SETTINGS, http2.ACK, 0, b"") in frames


async def test_a_window_of_a_stream_that_grows_too_large_ends_that_stream(lab: Lab) -> None:
    headers = http2.frame(http2.HEADERS, http2.END_HEADERS, 1, BLOCK)
    frames = await answer_to(lab, HELLO + headers + http2.frame(http2.WINDOW_UPDATE, 0, 1, b"\x7f\xff\xff\xff"))
    assert (http2.RST_STREAM, 0, 1, struct.pack("!I", 3)) in frames


async def test_a_padded_request_in_pieces(lab: Lab) -> None:
    """With a priority, in a block that is continued, byte by byte."""
    message = pb.CreateContainerRequest(spec=b"123").SerializeToString()
    body = b"\0" + len(message).to_bytes(4, "big") + message
    data = (
        HELLO
        + http2.frame(http2.HEADERS, 0x8 | 0x20, 1, b"\x02" + bytes(5) + BLOCK[:9] + bytes(2))
        + http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, BLOCK[9:])
        + http2.frame(http2.DATA, 0x8, 1, b"\x03" + body[:4] + bytes(3))
        + http2.frame(http2.DATA, http2.END_STREAM, 1, body[4:])
    )
    loop = asyncio.get_running_loop()
    with await lab.raw() as end:
        for octet in data:
            await loop.sock_sendall(end, bytes((octet,)))
            await asyncio.sleep(0)
        received = b""
        async with asyncio.timeout(SECONDS):
            while b"grpc-status\x010" not in received:
                received += await loop.sock_recv(end, 65536)
    answer = pb.CreateContainerResponse(pid=3).SerializeToString()
    assert b"\0" + len(answer).to_bytes(4, "big") + answer in received


PAYLOADS = st.one_of(st.binary(max_size=40), st.just(BLOCK))
FRAMES = st.builds(http2.frame, st.integers(0, 11), st.integers(0, 255), st.integers(0, 5), PAYLOADS)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.lists(FRAMES, max_size=12).map(lambda frames: HELLO + b"".join(frames))))
def test_nothing_that_is_sent_breaks_it(data: bytes) -> None:
    """Whatever comes, the connection ends with its peer and leaves no call behind."""

    async def send() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
        server = rpc.Server(SERVICE, Service(), status_of)
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        await server.take(theirs)
        with ours:
            await asyncio.get_running_loop().sock_sendall(ours, data)
            ours.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(SECONDS):
                while await asyncio.get_running_loop().sock_recv(ours, 65536):
                    pass
        await all_ended(server)
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1
        assert failures == []

    asyncio.run(send())


def test_every_method_of_the_service_must_be_there() -> None:
    with pytest.raises(AttributeError):
        rpc.Server(SERVICE, object(), status_of)
