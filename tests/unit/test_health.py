"""When a VM whose agent does not answer is taken for dead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from katapy.errors import KatapyError, Timeout, Unavailable
from katapy.sandbox.health import watch_agent

SILENCE = Timeout("guest agent: GetGuestDetails: Deadline Exceeded")


class Guest:
    """A machine whose agent answers as it is told to; then it is heard no more, and ``idle`` is set."""

    def __init__(self, answers: Iterable[KatapyError | None]) -> None:
        self.name = "c1"
        self.answers, self.deadlines = list(answers), list[float]()
        self.killed: KatapyError | None = None
        self.idle = asyncio.Event()
        self.agent = SimpleNamespace(check=self._check)

    async def _check(self, *, deadline: float) -> None:
        self.deadlines.append(deadline)
        if not self.answers:
            self.idle.set()
            await asyncio.Event().wait()
        if (answer := self.answers.pop(0)) is not None:
            raise answer

    def kill(self, why: KatapyError) -> None:
        self.killed = why


async def watch(guest: Any) -> None:
    await watch_agent(guest, 0.03)


async def test_a_guest_that_is_silent_is_killed_and_that_is_said() -> None:
    guest = Guest([None, SILENCE, SILENCE, SILENCE])
    await watch(guest)
    assert isinstance(guest.killed, Unavailable)
    assert str(guest.killed) == (
        "the VM of c1 was killed: its agent has not answered for 0.03 s (agent_timeout in the configuration)"
    )
    assert guest.deadlines == pytest.approx([0.01] * 4)


@pytest.mark.parametrize("error", [SILENCE, Unavailable("the connection is closed")])
async def test_one_answer_is_enough(error: KatapyError) -> None:
    """A host that thaws, or is busy, finds that a deadline has passed; a guest that lives answers the next question."""
    guest = Guest([error, error, None, error, error, None])
    watching = asyncio.create_task(watch(guest))
    await guest.idle.wait()
    watching.cancel()
    await asyncio.wait([watching])
    assert guest.killed is None


async def test_questions_are_not_asked_one_upon_the_other() -> None:
    """Whether the answer comes at once, or an error does."""
    clock = asyncio.get_running_loop().time
    began = clock()
    guest = Guest([None, *[Unavailable("the connection is closed")] * 3])
    await watch(guest)
    assert clock() - began >= 4 * 0.0099
