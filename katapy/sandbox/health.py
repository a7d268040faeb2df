"""Whether the agent of a VM still answers. A VM that stands still says nothing of it, and its pod would never end."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from katapy.errors import KatapyError, Unavailable
from katapy.sandbox.machine import Machine

log = logging.getLogger(__name__)

# Whoever is frozen together with a VM, and thaws, finds one deadline passed that the VM had no chance to keep.
_QUESTIONS: Final = 3


async def watch_agent(machine: Machine, seconds: float) -> None:
    """End the VM when its agent has given no sign of life for ``seconds``, whatever it was asked for."""
    deadline = seconds / _QUESTIONS
    clock = asyncio.get_running_loop().time
    unanswered = 0
    while unanswered < _QUESTIONS:
        asked = clock()
        try:
            await machine.agent.check(deadline=deadline)
            unanswered = 0
        except KatapyError as error:
            unanswered += 1
            log.warning("%s: its agent does not answer (%d of %d): %s", machine.name, unanswered, _QUESTIONS, error)
        await asyncio.sleep(asked + deadline - clock())
    why = f"its agent has not answered for {seconds:g} s (agent_timeout in the configuration)"
    machine.kill(Unavailable(f"the VM of {machine.name} was killed: {why}"))
