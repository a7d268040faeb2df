"""Our server of HTTP/2, byte by byte: what RFC 9113 has a peer do, and what no library would send."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from katapy_agent import agent_pb2 as pb
from katapy_agent import http2, rpc
from katapy_agent.hpack import encode
from katapy_agent.server import status_of
from rpc_lab import HELLO, SECONDS, SERVICE, Frame, Lab, Peer, Service, all_ended, call, open_lab

TYPE = (b"content-type", b"application/grpc")
PATH = [(b":method", b"POST"), (b":path", b"/katapy.agent.v1.Agent/CreateContainer"), TYPE]
BLOCK = encode(PATH)
REQUEST = http2.frame(http2.HEADERS, http2.END_HEADERS, 1, BLOCK)


def call_of(number: int, block: bytes, body: bytes) -> bytes:
    headers = http2.frame(http2.HEADERS, http2.END_HEADERS, number, block)
    return headers + http2.frame(http2.DATA, http2.END_STREAM, number, body)


def reset(number: int, code: int) -> Frame:
    return http2.RST_STREAM, 0, number, struct.pack("!I", code)


def reset_frame(number: int, code: int) -> bytes:
    return http2.frame(*reset(number, code))


WAITING = call_of(1, encode([(b":path", b"/katapy.agent.v1.Agent/WaitProcess"), TYPE]), bytes(5))


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path / "rpc") as made:
        yield made


async def answer_to(lab: Lab, data: bytes) -> list[Frame]:
    """Send bytes, and return the frames that come until the server closes, which it must do by itself."""
    with await lab.raw() as end:
        peer = Peer(end)
        await peer.send(data)
        frames = []
        while frame := await peer.frame():
            frames.append(frame)
    return frames


@asynccontextmanager
async def connected(lab: Lab, data: bytes) -> AsyncIterator[Peer]:
    """Give a peer that has sent ``data``."""
    with await lab.raw() as end:
        peer = Peer(end)
        await peer.send(data)
        yield peer


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
        (HELLO + http2.frame(http2.WINDOW_UPDATE, 0, 0, bytes(4)), 1),
        (HELLO + http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), 3),
        (HELLO + http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\0\0\1"), 6),
        (HELLO + http2.frame(http2.WINDOW_UPDATE, 0, 1, b"\0\0\0\1"), 1),
        (HELLO + http2.frame(http2.PING, 0, 1, bytes(8)), 1),
        (HELLO + http2.frame(http2.SETTINGS, 0, 1), 1),
        (HELLO + http2.frame(http2.SETTINGS, http2.ACK, 0, bytes(6)), 6),
        (HELLO + http2.frame(http2.RST_STREAM, 0, 1, bytes(4)), 1),
        (HELLO + http2.frame(http2.HEADERS, http2.END_HEADERS, 0, BLOCK), 1),
        (HELLO + http2.frame(http2.HEADERS, http2.END_HEADERS | 0x20, 1, bytes(4)), 6),
        (HELLO + REQUEST + http2.frame(http2.DATA, 0, 0, b"x"), 1),
        (HELLO + REQUEST + REQUEST, 1),
        (HELLO + REQUEST + http2.frame(http2.RST_STREAM, 0, 1, b"x"), 6),
        (HELLO + WAITING + http2.frame(http2.DATA, 0, 1, b"x"), 5),
        (
            HELLO
            + WAITING
            + http2.frame(http2.WINDOW_UPDATE, 0, 1, struct.pack("!I", (1 << 31) - 65536))
            + http2.frame(http2.SETTINGS, 0, 0, struct.pack("!HI", 4, 65536)),
            3,
        ),
        (http2.PREFACE + http2.frame(http2.PING, 0, 0, bytes(8)), 1),
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


async def test_a_ping_and_settings_are_answered(lab: Lab) -> None:
    async with connected(lab, HELLO + http2.frame(http2.PING, 0, 0, b"12345678")) as peer:
        frames = await peer.frames_so_far()
    assert (http2.PING, http2.ACK, 0, b"12345678") in frames
    assert (http2.SETTINGS, http2.ACK, 0, b"") in frames


async def test_a_window_of_a_stream_that_grows_too_large_ends_that_stream(lab: Lab) -> None:
    for growth, code in ((b"\x7f\xff\xff\xff", 3), (bytes(4), 1)):
        lab.service.cancelled.clear()
        async with connected(lab, HELLO + WAITING + http2.frame(http2.WINDOW_UPDATE, 0, 1, growth)) as peer:
            assert reset(1, code) in await peer.frames_so_far()


async def test_a_peer_that_is_gone_ends_its_calls(lab: Lab) -> None:
    """Without a word, as gRPC's library never goes."""
    async with connected(lab, HELLO + WAITING):
        await asyncio.wait_for(lab.service.waiting.wait(), SECONDS)
        assert not lab.service.cancelled.is_set()
    await asyncio.wait_for(lab.service.cancelled.wait(), SECONDS)


async def test_a_peer_that_breaks_the_rules_ends_its_calls(lab: Lab) -> None:
    async with connected(lab, HELLO + WAITING) as peer:
        await asyncio.wait_for(lab.service.waiting.wait(), SECONDS)
        await peer.send(http2.frame(http2.PUSH_PROMISE, 0, 1))
        await asyncio.wait_for(lab.service.cancelled.wait(), SECONDS)


async def test_a_call_that_is_reset_is_cancelled_and_says_no_more(lab: Lab) -> None:
    async with connected(lab, HELLO + WAITING) as peer:
        await asyncio.wait_for(lab.service.waiting.wait(), SECONDS)
        await peer.frames_so_far()
        await peer.send(reset_frame(1, 8))
        assert await peer.frames_so_far() == []
    assert lab.service.cancelled.is_set()


async def test_a_deadline_is_kept_here_too(lab: Lab) -> None:
    """gRPC's library only tells of its own."""
    block = encode([(b":path", b"/katapy.agent.v1.Agent/WaitProcess"), TYPE, (b"grpc-timeout", b"50m")])
    async with connected(lab, HELLO + call_of(1, block, bytes(5))) as peer:
        while (frame := await peer.frame()) and frame[0] != http2.HEADERS:
            pass
    assert frame is not None
    assert b"grpc-status\x014" in frame[3]
    assert lab.service.cancelled.is_set()


@pytest.mark.parametrize("body", [b"", bytes(4), b"\1" + bytes(4), b"\0\0\0\0\5", bytes(10)])
async def test_a_request_that_is_not_one_message(lab: Lab, body: bytes) -> None:
    async with connected(lab, HELLO + call_of(1, BLOCK, body)) as peer:
        (answer,) = [each for each in await peer.frames_so_far() if each[0] == http2.HEADERS]
    assert b"grpc-status\x0213" in answer[3]


async def test_a_request_that_is_too_large_is_not_awaited(lab: Lab) -> None:
    """RFC 9113, section 8.1: answered before its end, it is asked to stop without an error."""
    large = http2.frame(http2.DATA, 0, 1, bytes(16384)) * 257
    async with connected(lab, HELLO + REQUEST) as peer:
        await peer.send(large)
        frames = await peer.frames_so_far()
        assert [each[0] for each in frames[-2:]] == [http2.HEADERS, http2.RST_STREAM]
        assert b"grpc-status\x018" in frames[-2][3]
        assert frames[-1] == reset(1, 0)
        # What was under way does no harm.
        await peer.send(http2.frame(http2.DATA, http2.END_STREAM, 1, bytes(16384)))
        assert await peer.frames_so_far() == []


async def test_a_stream_that_has_ended_does_not_begin_again(lab: Lab) -> None:
    async with connected(lab, HELLO + call_of(1, BLOCK, bytes(5))) as peer:
        assert [each[2] for each in await peer.frames_so_far() if each[0] == http2.DATA] == [1]
        await peer.send(http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, BLOCK))
        assert await peer.frames_so_far() == []


def data_in(frames: list[Frame]) -> list[int]:
    return [len(payload) for kind, _, _, payload in frames if kind == http2.DATA]


async def test_no_octet_is_sent_that_the_peer_did_not_ask_for(lab: Lab) -> None:
    """RFC 9113, section 6.9: a window of a stream, one that shrinks below nothing (6.9.2), and the connection's."""

    def settings(window: int) -> bytes:
        return http2.frame(http2.SETTINGS, 0, 0, struct.pack("!HI", 4, window))

    def grow(number: int, count: int) -> bytes:
        return http2.frame(http2.WINDOW_UPDATE, 0, number, struct.pack("!I", count))

    request = pb.ListProcessesRequest(container_id="100000").SerializeToString()
    block = encode([(b":path", b"/katapy.agent.v1.Agent/ListProcesses"), TYPE])
    body = b"\0" + len(request).to_bytes(4, "big") + request
    async with connected(lab, http2.PREFACE + settings(10) + call_of(1, block, body)) as peer:
        await peer.frames_so_far()
        sent = 10
        for more, sizes in (
            (grow(1, 7), [7]),
            (settings(0), []),  # ten less than nothing
            (grow(1, 10), []),
            (grow(1, 5), [5]),
            (settings(3), [3]),
            (grow(1, 1 << 20), [16384, 16384, 16384, 16358]),  # what the connection has left of 65535
            (grow(0, 1), [1]),
        ):
            await peer.send(more)
            assert data_in(await peer.frames_so_far()) == sizes
            sent += sum(sizes)
        assert sent == 65536
        await peer.send(grow(0, 1 << 20) + http2.frame(http2.SETTINGS, 0, 0, struct.pack("!HI", 5, 1 << 20)))
        frames = await peer.frames_so_far()
        assert sent + sum(data_in(frames)) > 100000
        assert frames[-1][:3] == (http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1)


async def test_credit_that_was_used_is_given_back(lab: Lab) -> None:
    """More than the connection's first 16 MiB, on streams that have ended too; and no more than was used."""
    used = given = 0
    async with connected(lab, HELLO + WAITING + reset_frame(1, 8)) as peer:
        first = await peer.frames_so_far()
        for _ in range(600):
            await peer.send(http2.frame(http2.DATA, 0, 1, bytes(16384)) * 2)
            used += 2 * 16384
            frames = await peer.frames_so_far()
            given += sum(int.from_bytes(each[3], "big") for each in frames if each[0] == http2.WINDOW_UPDATE)
    assert used - (8 << 20) <= given <= used
    assert [each[3] for each in first if each[0] == http2.WINDOW_UPDATE] == [struct.pack("!I", (16 << 20) - 65535)]


async def test_no_more_streams_than_were_agreed(lab: Lab) -> None:
    numbers = range(1, 2 * (http2.STREAMS_MAX + 1), 2)
    async with connected(lab, HELLO) as peer:
        for number in numbers:
            await peer.send(http2.frame(http2.HEADERS, http2.END_HEADERS, number, BLOCK))
        resets = [each for each in await peer.frames_so_far() if each[0] == http2.RST_STREAM]
    assert resets == [reset(numbers[-1], 7)]


async def test_what_is_not_grpc_is_told_so(lab: Lab) -> None:
    block = encode([PATH[1], (b"content-type", b"application/json")])
    end = http2.END_HEADERS | http2.END_STREAM
    async with connected(lab, HELLO + http2.frame(http2.HEADERS, end, 1, block)) as peer:
        assert (http2.HEADERS, end, 1, encode([(b":status", b"415")])) in await peer.frames_so_far()


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
    async with connected(lab, b"") as peer:
        for octet in data:
            await peer.send(bytes((octet,)))
            await asyncio.sleep(0)
        frames = await peer.frames_so_far()
    answer = pb.CreateContainerResponse(pid=3).SerializeToString()
    assert (http2.DATA, 0, 1, b"\0" + len(answer).to_bytes(4, "big") + answer) in frames


PAYLOADS = st.one_of(st.binary(max_size=40), st.just(BLOCK))
FRAMES = st.builds(http2.frame, st.integers(0, 11), st.integers(0, 255), st.integers(0, 5), PAYLOADS)


@settings(max_examples=150)
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
