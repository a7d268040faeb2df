"""The shim's side of the attach protocol: a real server, clients that behave and clients that do not."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from katapy.client.attach import DATAGRAM_MAX
from katapy.errors import CommandNotFound, NotFound, Unavailable
from katapy.shim.attach import Attached, AttachServer
from katapy.transport import unix


class Sandbox:
    """A handler that records what it is asked."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self.exit: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self.opened = asyncio.Event()
        self.opened.set()
        self.far: list[socket.socket] = []
        self.given: list[socket.socket] = []
        self.terminal = False

    async def attach(self, container_id: str, exec_id: str, pid: int) -> Attached:
        self.calls.put_nowait(("attach", container_id, exec_id, pid))
        await self.opened.wait()
        if container_id == "missing":
            raise CommandNotFound("no such program")
        if container_id == "bug":
            raise KeyError(container_id)
        names = ["stdout"] if self.terminal else ["stdin", "stdout", "stderr"]
        pairs = [socket.socketpair() for _ in names]
        self.given = [near for near, _ in pairs]
        self.far = [far for _, far in pairs]
        return Attached(self.terminal, list(zip(names, self.given, strict=True)))

    async def signal(self, container_id: str, exec_id: str, number: int) -> None:
        self.calls.put_nowait(("signal", container_id, exec_id, number))
        raise NotFound("os: process already finished")

    async def resize(self, container_id: str, exec_id: str, columns: int, rows: int) -> None:
        self.calls.put_nowait(("resize", container_id, exec_id, columns, rows))

    async def wait(self, container_id: str, exec_id: str) -> tuple[int, int]:
        return await asyncio.shield(self.exit)

    async def detached(self, container_id: str, exec_id: str) -> None:
        self.calls.put_nowait(("detached", container_id, exec_id))

    def close(self) -> None:
        for sock in self.far:
            sock.close()


class Client:
    """A client that says what it likes."""

    def __init__(self, path: Path) -> None:
        self.sock = unix.connect(path, socket.SOCK_SEQPACKET)
        self.sock.setblocking(False)
        self.fds: list[int] = []

    async def say(self, message: object) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def hear(self) -> Any:
        data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.sock, DATAGRAM_MAX), 5)
        return json.loads(data) if data else None

    async def attach(self, container_id: str = "c1", exec_id: str = "") -> None:
        await self.say({"attach": container_id, "exec": exec_id})


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    sandbox = Sandbox()
    async with AttachServer(unix.listen(tmp_path / "attach.sock", socket.SOCK_SEQPACKET), sandbox):
        yield sandbox
        assert all(sock.fileno() == -1 for sock in sandbox.given)
    sandbox.close()


@pytest.fixture
def client(tmp_path: Path, sandbox: Sandbox) -> Any:
    client = Client(tmp_path / "attach.sock")
    yield client
    client.sock.close()


async def next_call(sandbox: Sandbox) -> tuple[Any, ...]:
    return await asyncio.wait_for(sandbox.calls.get(), 5)


async def test_streams_signals_sizes_and_the_exit(sandbox: Sandbox, client: Client) -> None:
    await client.attach("c1", "e1")
    assert (await next_call(sandbox))[:3] == ("attach", "c1", "e1")
    assert await client.hear() == {"terminal": False, "streams": ["stdin", "stdout", "stderr"]}
    await client.say({"signal": 15})
    await client.say({"resize": [80, 24]})
    assert await next_call(sandbox) == ("signal", "c1", "e1", 15)  # that it raised NotFound disturbs nobody
    assert await next_call(sandbox) == ("resize", "c1", "e1", 80, 24)
    await client.say({"signal": 9})  # nobody reads this one before the end
    sandbox.exit.set_result((137, 9))
    assert await client.hear() == {"exit": 137, "signal": 9}
    assert await client.hear() is None


async def test_the_streams_are_the_given_ones(sandbox: Sandbox, client: Client) -> None:
    sandbox.terminal = True
    await client.attach()
    await next_call(sandbox)
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    readable = loop.create_future()
    loop.add_reader(client.sock, readable.set_result, None)
    await readable
    loop.remove_reader(client.sock)
    data, fds, _, _ = socket.recv_fds(client.sock, DATAGRAM_MAX, 3)
    assert json.loads(data) == {"terminal": True, "streams": ["stdout"]}
    with socket.socket(fileno=fds[0]) as stream:
        sandbox.far[0].send(b"x")
        assert stream.recv(9) == b"x"


async def test_errors_are_told_with_their_class(
    tmp_path: Path, sandbox: Sandbox, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    await client.attach("missing")
    assert await client.hear() == {"error": "no such program", "kind": "CommandNotFound", "code": 5}
    other = Client(tmp_path / "attach.sock")
    await other.attach("bug")
    assert (await other.hear())["kind"] == "Internal"
    assert "Traceback" in caplog.text
    other.sock.close()


async def test_a_lost_process_is_told(sandbox: Sandbox, client: Client) -> None:
    await client.attach()
    await client.hear()
    await next_call(sandbox)
    sandbox.exit.set_exception(Unavailable("the VM died" + "\0" * DATAGRAM_MAX))
    answer = await client.hear()
    assert answer["kind"] == "Unavailable"
    assert answer["error"].startswith("the VM died")
    client.sock.close()
    assert sandbox.calls.empty()


async def test_whoever_has_done_with_the_streams_is_noticed(sandbox: Sandbox, client: Client) -> None:
    """Before that, what the process wrote may still be on its way, and its container is not to be removed."""
    await client.attach("c1", "e1")
    await client.hear()
    await next_call(sandbox)
    sandbox.exit.set_result((0, 0))
    assert await client.hear() == {"exit": 0}
    assert sandbox.calls.empty()
    client.sock.close()
    assert await next_call(sandbox) == ("detached", "c1", "e1")


async def test_who_never_had_the_streams_is_not_done_with_them(sandbox: Sandbox, client: Client) -> None:
    sandbox.opened.clear()
    await client.attach()
    await next_call(sandbox)
    client.sock.close()
    for _ in range(50):  # turns of the loop: the server hears the end in the first ones
        await asyncio.sleep(0)
    assert sandbox.calls.empty()


@pytest.mark.parametrize(
    "first",
    [
        {"attach": "c1"},
        {"attach": "c1", "exec": "", "more": 1},
        {"attach": 1, "exec": ""},
        {"attach": "c1", "exec": None},
        {"signal": 9},
        [],
        b"{",
        b"\xff",
        b"[" * DATAGRAM_MAX,
        b" " * DATAGRAM_MAX + b"{}",
    ],
)
async def test_a_wrong_first_message_is_refused(sandbox: Sandbox, client: Client, first: object) -> None:
    await client.say(first)
    assert (await client.hear())["kind"] == "InvalidArgument"
    assert await client.hear() is None
    assert sandbox.calls.empty()


@pytest.mark.parametrize(
    "later",
    [
        {"signal": 0},
        {"signal": 65},
        {"signal": "9"},
        {"signal": 9, "more": 1},
        {"resize": [80]},
        {"resize": [80, 0]},
        {},
    ],
)
async def test_a_wrong_later_message_ends_the_attachment(sandbox: Sandbox, client: Client, later: object) -> None:
    await client.attach()
    await client.hear()
    await next_call(sandbox)
    await client.say(later)
    assert (await client.hear())["kind"] == "InvalidArgument"
    assert await client.hear() is None
    assert await next_call(sandbox) == ("detached", "c1", "")


async def test_a_silent_client_blocks_nobody_and_is_dropped(
    sandbox: Sandbox, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("katapy.shim.attach._HELLO_SECONDS", 0.02)
    silent = Client(tmp_path / "attach.sock")
    await client.attach()
    assert await client.hear()
    assert (await silent.hear())["kind"] == "Timeout"
    assert await silent.hear() is None
    silent.sock.close()


async def test_the_end_of_the_server_ends_attachments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And does not look like the client's leaving: the sandbox is going anyway."""
    sandbox = Sandbox()
    path = tmp_path / "attach.sock"
    with caplog.at_level(logging.WARNING):
        async with AttachServer(unix.listen(path, socket.SOCK_SEQPACKET), sandbox):
            client = Client(path)
            await client.attach()
            await client.hear()
            await next_call(sandbox)
        assert await client.hear() is None
    assert sandbox.calls.empty()
    assert not caplog.records
    client.sock.close()
    sandbox.close()
