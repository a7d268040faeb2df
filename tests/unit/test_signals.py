"""SIGKILL ends a container in bounded time: what becomes of its VM, by what its guest says and what else is in it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine
from typing import Any, cast

import pytest

from katapy.errors import KatapyError, NotFound, Timeout
from katapy.oci.bundle import Bundle
from katapy.oci.default import default_spec
from katapy.oci.spec import parse_spec
from katapy.sandbox import signals
from katapy.sandbox.container import Container
from katapy.sandbox.machine import Machine
from katapy.sandbox.process import GuestProcess, StdioRequest
from katapy.sandbox.signals import Signals


class Guest:
    """A machine and its agent, which takes signals, does not answer, or answers with an error."""

    def __init__(self, *, answer: KatapyError | None = None, silent: bool = False) -> None:
        self.answer, self.silent = answer, silent
        self.taken: list[tuple[str, int]] = []
        self.killed: KatapyError | None = None
        self.was_killed = asyncio.Event()
        self.agent = self

    async def signal(self, container_id: str, exec_id: str, number: int, **options: Any) -> None:
        if self.silent:
            await asyncio.sleep(options.get("deadline") or 60)
            raise Timeout("no answer")
        if self.answer is not None:
            raise self.answer
        self.taken.append((exec_id or container_id, number))

    async def guarded(self, work: Coroutine[Any, Any, None]) -> None:
        await work

    def kill(self, why: KatapyError) -> None:
        self.killed = why
        self.was_killed.set()

    @property
    def machine(self) -> Machine:
        return cast(Machine, self)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_ANSWER_SECONDS", "_PENDING_SECONDS", "_END_SECONDS"):
        monkeypatch.setattr(signals, name, 0.05)


def pod(*ids: str) -> tuple[Signals, dict[str, Container]]:
    """Return the signals of a pod whose sandbox is p, and its containers."""
    spec = parse_spec(json.dumps(default_spec()).encode(), bundle="/bundle")
    bundle = Bundle("/bundle", "/bundle/rootfs", spec)
    containers = {
        name: Container(bundle, GuestProcess(name, "", StdioRequest(terminal=False)), cast(Any, None)) for name in ids
    }
    return Signals("p", containers), containers


async def test_a_vm_that_does_not_answer_is_killed() -> None:
    sending, containers = pod("p", "c1", "c2")
    guest = Guest(silent=True)
    await sending.kill(guest.machine, containers["c1"], everyone=True)
    assert "it was to kill c1, and does not answer" in str(guest.killed)


async def test_what_ends_costs_nothing() -> None:
    sending, containers = pod("p", "c1")
    guest = Guest()
    await sending.kill(guest.machine, containers["p"], everyone=False)
    containers["p"].init.finish(137, oom_killed=False)
    await asyncio.sleep(0.1)
    assert (guest.killed, guest.taken) == (None, [("p", signal.SIGKILL)])
    guest.answer = NotFound("gone")
    with pytest.raises(NotFound):
        await sending.kill(guest.machine, containers["c1"], everyone=False)


async def test_a_sandbox_that_does_not_end_takes_its_vm_along() -> None:
    sending, containers = pod("p", "c1")
    guest = Guest()
    await sending.kill(guest.machine, containers["p"], everyone=False)
    await asyncio.wait_for(guest.was_killed.wait(), 30)
    assert "p has not ended" in str(guest.killed)


async def test_a_container_that_does_not_end_leaves_the_others_alone() -> None:
    """Until they have ended, too, or were to: a pod can always be removed."""
    sending, containers = pod("p", "c1", "c2", "c3")
    guest = Guest()
    await sending.kill(guest.machine, containers["c1"], everyone=True)
    await asyncio.sleep(0.1)
    assert guest.killed is None
    containers["c2"].init.finish(0, oom_killed=False)
    await sending.kill(guest.machine, containers["c3"], everyone=True)
    await sending.kill(guest.machine, containers["c1"], everyone=True)
    await asyncio.wait_for(guest.was_killed.wait(), 30)


async def test_other_signals_wait_with_the_vm() -> None:
    sending, containers = pod("p")
    guest = Guest(silent=True)
    await sending.send(guest.machine, containers["p"].init, signal.SIGTERM, everyone=False)
    assert guest.killed is None
    process = GuestProcess("p", "e1", StdioRequest(terminal=False))
    with pytest.raises(Timeout):
        await sending.send(guest.machine, process, signal.SIGKILL, everyone=False)
    await sending.close()
