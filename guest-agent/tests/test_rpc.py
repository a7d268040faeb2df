"""gRPC by our own hand, with gRPC's own library at the other end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from katapy_agent import agent_pb2 as pb
from katapy_agent import rpc
from katapy_agent.errors import NotFound
from katapy_agent.server import status_of
from rpc_lab import SECONDS, SERVICE, Lab, call, open_lab


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path / "rpc") as made:
        yield made


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("漢" * 2048, "漢" * 1365),  # what is left of 4096 octets is no whole character
        ("50%41", "50%41"),
        ("no such file: \udcff", "no such file: \\udcff"),  # a name that is not UTF-8, as Python has it
    ],
)
async def test_an_error_of_any_text_is_told(lab: Lab, text: str, told: str) -> None:
    """The first and the last once left its caller with another answer, and without one."""

    async def fail(_request: object) -> None:
        raise NotFound(text)

    lab.serve(close_stdin=fail)
    async with lab.channel(("grpc.max_metadata_size", 16 << 10)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "CloseStdin", pb.CloseStdinRequest())
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert error.value.details() == told
    assert dict(error.value.trailing_metadata() or ())["katapy-error"] == "NotFound"


async def test_an_answer_that_is_no_message_is_an_error(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    async def answer(_request: object) -> int:
        return 5

    lab.serve(close_stdin=answer)
    async with lab.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "CloseStdin", pb.CloseStdinRequest())
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert "AttributeError" in (error.value.details() or "")
    assert "AttributeError" in capfd.readouterr().err


async def test_a_call_that_cannot_be_answered_ends(lab: Lab) -> None:
    """A caller without a deadline would wait for ever."""

    async def give_up(_request: object) -> None:
        raise asyncio.CancelledError

    lab.serve(wait_process=give_up)
    async with lab.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(call(channel, "WaitProcess", pb.WaitProcessRequest(), timeout=None), SECONDS)
    assert error.value.code() is grpc.StatusCode.INTERNAL


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
    assert "parsing" in (error.value.details() or "")


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
    """The caller's own; test_http2 has ours."""
    async with lab.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call(channel, "WaitProcess", pb.WaitProcessRequest(), timeout=3)
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


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"2H", 7200),
        (b"3M", 180),
        (b"20S", 20),
        (b"1500m", 1.5),
        (b"250000u", 0.25),
        (b"99999999n", 0.099999999),
        (b"123456789S", None),
        (b"-1S", None),
        (b"1", None),
        (b"", None),
        (None, None),
    ],
)
def test_units_of_a_deadline(value: bytes | None, seconds: float | None) -> None:
    assert rpc._timeout(value) == (seconds if seconds is None else pytest.approx(seconds))


def test_every_method_of_the_service_must_be_there() -> None:
    with pytest.raises(AttributeError):
        rpc.Server(SERVICE, object(), status_of)
