"""QEMU's control protocol against a small QEMU that answers what the test says."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest

from katapy.errors import Timeout, Unavailable
from katapy.hypervisor import qmp

GREETING = {"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}


class FakeQemu:
    """The other end: greets, agrees on capabilities; what else it says is the test's."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._end.setblocking(False)
        self._loop = asyncio.get_running_loop()

    async def say(self, *messages: object) -> None:
        data = b"".join(json.dumps(message).encode() + b"\r\n" for message in messages)
        await self._loop.sock_sendall(self._end, data)

    async def hear(self) -> dict[str, object]:
        heard: dict[str, object] = json.loads(await self._loop.sock_recv(self._end, 65536))
        return heard

    async def greet(self) -> None:
        await self.say(GREETING)
        assert (await self.hear())["execute"] == "qmp_capabilities"
        await self.say({"return": {}})

    def hang_up(self) -> None:
        self._end.close()


@pytest.fixture
async def pair() -> AsyncIterator[tuple[socket.socket, FakeQemu]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, FakeQemu(theirs)


async def connected(pair: tuple[socket.socket, FakeQemu]) -> qmp.Qmp:
    control, _ = await asyncio.gather(qmp.connect(pair[0], name="web", timeout=30), pair[1].greet())
    return control


async def test_a_command_gets_its_answer(pair: tuple[socket.socket, FakeQemu]) -> None:
    control = await connected(pair)
    running = asyncio.create_task(control.execute("query-status", {"a": 1}, timeout=30))
    heard = await pair[1].hear()
    assert (heard["execute"], heard["arguments"]) == ("query-status", {"a": 1})
    await pair[1].say({"return": {"status": "running"}, "id": heard["id"]})
    assert await running == {"status": "running"}
    await control.close()


async def test_a_refusal_carries_qemus_words(pair: tuple[socket.socket, FakeQemu]) -> None:
    control = await connected(pair)
    running = asyncio.create_task(control.execute("device_add", timeout=30))
    heard = await pair[1].hear()
    await pair[1].say({"error": {"class": "GenericError", "desc": "no such bus"}, "id": heard["id"]})
    with pytest.raises(Unavailable, match="device_add failed: no such bus"):
        await running
    await control.close()


async def test_every_command_has_a_deadline(pair: tuple[socket.socket, FakeQemu]) -> None:
    control = await connected(pair)
    with pytest.raises(Timeout, match="did not answer stop within"):
        await control.execute("stop", timeout=0.01)
    await control.close()


async def test_a_qemu_that_dies_ends_the_command(pair: tuple[socket.socket, FakeQemu]) -> None:
    control = await connected(pair)
    running = asyncio.create_task(control.execute("stop", timeout=30))
    await pair[1].hear()
    pair[1].hang_up()
    with pytest.raises(Unavailable, match="stop failed"):
        await running
    with pytest.raises(Unavailable, match="cont failed"):
        await control.execute("cont", timeout=30)
    await control.close()


async def test_a_qemu_that_never_greets(pair: tuple[socket.socket, FakeQemu]) -> None:
    with pytest.raises(Timeout, match="did not greet"):
        await qmp.connect(pair[0], name="web", timeout=0.01)


async def test_a_qemu_that_ends_at_once(pair: tuple[socket.socket, FakeQemu]) -> None:
    pair[1].hang_up()
    with pytest.raises(Unavailable, match="ended before it greeted"):
        await qmp.connect(pair[0], name="web", timeout=30)


async def test_a_qemu_that_ends_just_after_its_greeting(pair: tuple[socket.socket, FakeQemu]) -> None:
    """Where the guest reset at once, an AssertionError of the library came out instead of the reason."""

    async def greet_and_end() -> None:
        await pair[1].say(GREETING)
        await pair[1].hear()
        stamp = {"seconds": 1, "microseconds": 0}
        event = {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": stamp}
        await pair[1].say({"return": {}}, event)
        pair[1].hang_up()

    control, _ = await asyncio.gather(qmp.connect(pair[0], name="web", timeout=30), greet_and_end())
    with pytest.raises(Unavailable, match="cont failed"):
        await control.execute("cont", timeout=30)
    assert control.shutdown_reason() == "guest-reset"
    await control.close()


async def test_a_qemu_that_has_ended_is_heard_out(pair: tuple[socket.socket, FakeQemu]) -> None:
    """Its process may be gone before its last event was read."""
    control = await connected(pair)
    stamp = {"seconds": 1, "microseconds": 0}
    await pair[1].say({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": stamp})
    pair[1].hang_up()
    assert control.shutdown_reason() is None
    await control.ended()
    assert control.shutdown_reason() == "guest-reset"
    await control.close()


async def test_events_are_bounded_and_the_shutdown_is_known(pair: tuple[socket.socket, FakeQemu]) -> None:
    """The library keeps every event for ever; a guest can cause as many as it likes."""
    control = await connected(pair)
    assert control.shutdown_reason() is None
    stamp = {"seconds": 1, "microseconds": 0}
    for _ in range(100):
        await pair[1].say({"event": "RTC_CHANGE", "data": {"offset": 1}, "timestamp": stamp})
    await pair[1].say({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}, "timestamp": stamp})
    running = asyncio.create_task(control.execute("stop", timeout=30))
    heard = await pair[1].hear()
    await pair[1].say({"return": {}, "id": heard["id"]})
    await running
    assert control.shutdown_reason() == "guest-reset"
    assert len(control._events) <= 16
    assert not control._client.events.history
    assert control._client.events.empty()
    await control.close()
