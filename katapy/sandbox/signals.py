"""Signals for the processes of a pod, and that SIGKILL ends them in bounded time, whatever their guest does.

A guest that does not answer is ended, with its VM. One that answers may have a process that does not end all the same,
because it hangs in the kernel, or because the guest lies. The pod's other containers are not to suffer from that: the
VM is ended then only where nothing is left in it that was not to be killed.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Mapping
from typing import Any, Final

from katapy.errors import Timeout, Unavailable
from katapy.sandbox.container import Container
from katapy.sandbox.machine import Machine
from katapy.sandbox.process import GuestProcess
from katapy.state import Status

log = logging.getLogger(__name__)

# Milliseconds are usual. Engines that have sent SIGKILL wait for its effect from five seconds on, and some for ever.
_ANSWER_SECONDS: Final = 10.0
# An engine's SIGKILL comes only when it has the answer to the signal before.
_PENDING_SECONDS: Final = 2.0
# What a killed process leaves takes time to free. `katapy delete --force` waits for 30.
_END_SECONDS: Final = 20.0


class Signals:
    """Sends signals to processes of the pod ``sandbox_id``, whose containers of this moment are in ``containers``."""

    def __init__(self, sandbox_id: str, containers: Mapping[str, Container]) -> None:
        self._sandbox_id, self._containers = sandbox_id, containers
        self._tasks: set[asyncio.Task[None]] = set()
        self._awaited: set[str] = set()  # ids of containers whose end is seen to

    async def send(self, machine: Machine, process: GuestProcess, number: int, *, everyone: bool) -> None:
        """Send a signal to a process, or to ``everyone`` in its container.

        One that the guest does not take at once waits for it, as it would for a process that is stopped; SIGKILL for
        an exec does not, and raises Timeout.
        """
        if number == signal.SIGKILL:
            deadline = _ANSWER_SECONDS
            sending = machine.agent.signal(process.container_id, process.exec_id, number, deadline=deadline)
            await machine.guarded(sending)
            return
        sending = machine.agent.signal(process.container_id, process.exec_id, number, everyone=everyone)
        task = self._own(machine.guarded(sending), f"send signal {number} to {process.name}")
        await asyncio.wait([task], timeout=_PENDING_SECONDS)
        if task.done():
            task.result()
        else:
            log.warning("signal %d to %s waits: its VM does not answer", number, process.name)

    async def kill(self, machine: Machine, container: Container, *, everyone: bool) -> None:
        """Send SIGKILL to a container's init, or to ``everyone`` in it, and see to it that it ends."""
        deadline = _ANSWER_SECONDS
        sending = machine.agent.signal(container.id, "", signal.SIGKILL, everyone=everyone, deadline=deadline)
        try:
            await machine.guarded(sending)
        except (Timeout, Unavailable) as error:
            self._end(machine, f"it was to kill {container.id}, and does not answer: {error}")
            return
        container.killed = True
        if container.id not in self._awaited:
            self._own(self._make_sure(machine, container), f"see {container.id} end")

    async def close(self) -> None:
        """Let go of what waits."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _make_sure(self, machine: Machine, container: Container) -> None:
        self._awaited.add(container.id)
        try:
            async with asyncio.timeout(_END_SECONDS):
                await container.init.exited.wait()
        except TimeoutError:
            text = f"{container.id} has not ended {_END_SECONDS:g} s after SIGKILL"
            if container.id == self._sandbox_id or not self._others(container):
                self._end(machine, text)
            else:
                log.warning("%s, and its VM has others to serve", text)
        finally:
            self._awaited.discard(container.id)

    def _others(self, container: Container) -> list[str]:
        """Return the containers that are wanted beside this one; the sandbox's own is there for these."""
        return [
            other.id
            for other in self._containers.values()
            if other.id not in (container.id, self._sandbox_id)
            and other.init.status is not Status.STOPPED
            and not other.killed
        ]

    def _end(self, machine: Machine, why: str) -> None:
        machine.kill(Unavailable(f"the VM of {self._sandbox_id} was killed: {why}"))

    def _own(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("%s: %s", task.get_name(), error)
