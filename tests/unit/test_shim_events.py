"""Events as an engine gets them: a real ttrpc server stands for it."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from katapy.errors import Unavailable
from katapy.proto import events_pb2 as pb
from katapy.shim.engine import Engine
from katapy.shim.events import Publisher
from katapy.transport import unix
from katapy.transport.ttrpc_server import Method, serve

SERVICE = "containerd.services.events.ttrpc.v1.Events"


class Listener:
    """An engine that notes what it is told; it refuses the first ``refusals``."""

    def __init__(self, refusals: int = 0) -> None:
        self.seen: list[pb.Envelope] = []
        self.heard = asyncio.Semaphore(0)
        self._refusals = refusals

    async def forward(self, request: Message) -> Empty:
        assert isinstance(request, pb.ForwardRequest)
        if self._refusals:
            self._refusals -= 1
            raise Unavailable("not now")
        self.seen.append(request.envelope)
        self.heard.release()
        return Empty()

    @property
    def services(self) -> dict[str, dict[str, Method]]:
        return {SERVICE: {"Forward": Method(pb.ForwardRequest, self.forward, False)}}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told is heard, however slow the machine."""
    monkeypatch.setattr("katapy.shim.events._FLUSH_SECONDS", 60.0)


def engine(path: Path | str, publisher: str = "", address: str = "") -> Engine:
    return Engine("default", address, str(path), publisher, "/link", "/log")


async def test_order_and_form(tmp_path: Path) -> None:
    listener, path = Listener(), tmp_path / "ttrpc.sock"
    async with (
        serve(unix.listen(path, socket.SOCK_STREAM), listener.services),
        Publisher(engine(path)) as publisher,
    ):
        publisher.publish(pb.TaskCreate(container_id="c1", pid=7))
        for number in range(20):
            publisher.publish(pb.TaskExecAdded(container_id="c1", exec_id=str(number)))
        publisher.publish(pb.TaskExit(container_id="c1", id="c1", pid=7, exit_status=3))
    first, *_, last = listener.seen
    assert (first.topic, first.namespace, first.event.type_url) == (
        "/tasks/create",
        "default",
        "containerd.events.TaskCreate",
    )
    assert first.timestamp.seconds > 0
    assert [pb.TaskExecAdded.FromString(each.event.value).exec_id for each in listener.seen[1:-1]] == [
        str(number) for number in range(20)
    ]
    assert pb.TaskExit.FromString(last.event.value).exit_status == 3


async def test_an_engine_that_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it could not be told it is told again, before anything else."""
    monkeypatch.setattr("katapy.shim.events._RETRY_SECONDS", 0.01)
    listener, path = Listener(refusals=2), tmp_path / "ttrpc.sock"
    async with Publisher(engine(path)) as publisher:
        publisher.publish(pb.TaskStart(container_id="c1"))
        publisher.publish(pb.TaskExit(container_id="c1"))
        await asyncio.sleep(0.01)
        async with serve(unix.listen(path, socket.SOCK_STREAM), listener.services):
            for _ in range(2):
                await asyncio.wait_for(listener.heard.acquire(), 10)
    assert [each.topic for each in listener.seen] == ["/tasks/start", "/tasks/exit"]


async def test_the_engine_s_program(tmp_path: Path) -> None:
    """Without a socket for events."""
    program = tmp_path / "publisher"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/args\ncat > {tmp_path}/event\n')
    program.chmod(0o755)
    async with Publisher(engine("", str(program), "/a.sock")) as publisher:
        publisher.publish(pb.TaskStart(container_id="c1", pid=5))
    assert (tmp_path / "args").read_text() == "--address /a.sock publish --namespace default --topic /tasks/start\n"
    assert b"containerd.events.TaskStart" in (tmp_path / "event").read_bytes()


async def test_nobody_wants_events() -> None:
    """The command line; and CRI-O, which names its program and no address."""
    for nobody in (None, engine("", "/bin/false")):
        async with Publisher(nobody) as publisher:
            publisher.publish(pb.TaskStart(container_id="c1"))
