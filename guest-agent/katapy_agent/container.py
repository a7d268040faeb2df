"""One container: its cgroup, its init and the processes started in it later, and which verbs are legal when.

How a container is built is `child`'s business, inside the new process; limits are `cgroups`'. This module keeps the
life cycle of runtime-spec (creating, created, running, stopped) and runc's paused, where every state follows from
what exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from katapy_agent import cgroups, child, config, procfs, rootfs
from katapy_agent.errors import (
    AlreadyExists,
    InvalidArgument,
    InvalidState,
    KatapyError,
    NotFound,
    Timeout,
    Unavailable,
    Unsupported,
)
from katapy_agent.events import Events, Exit, OutOfMemory
from katapy_agent.exchange import Exchange
from katapy_agent.launcher import Launcher
from katapy_agent.oom import FileWatch
from katapy_agent.process import Process, check_signal
from katapy_agent.procfs import ProcessFacts
from katapy_agent.reaper import Reaper
from katapy_agent.resources import Resources
from katapy_agent.stdio import Stdio, Streams

_EXECS_MAX: Final = 512  # running in one container
_ENDED_MAX: Final = 1024  # whose exit status is kept
_KILL_DEADLINE: Final = 10.0
_BUILDERS: Final = 2  # processes of ours that are in a container's cgroup while init is made
_LIST_BYTES: Final = 2 << 20  # of commands in one answer


class State(StrEnum):
    """Where a container is in its life (runtime-spec, runtime.md, "State"; paused is runc's)."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Services:
    """What every container uses of the agent."""

    launcher: Launcher
    reaper: Reaper
    exchange: Exchange
    events: Events
    files: FileWatch


class Joined(NamedTuple):
    """The namespaces that a container shares with another, whose init ``pidfd`` is."""

    pidfd: int
    types: Sequence[str]


class Container:
    """A container; it exists from the first moment of its creation until it was removed."""

    def __init__(self, container_id: str, services: Services) -> None:
        self.id = container_id
        self._services = services
        self._changing = asyncio.Lock()  # held while processes are started, or all removed
        self._cgroup: cgroups.Cgroup | None = None
        self._spec: config.Spec | None = None
        self._init: Process | None = None
        self._started = False
        self._paused = False
        self._removed = False
        self._execs: dict[str, Process] = {}
        self._oom_kills = 0
        self._watch = -1

    @property
    def state(self) -> State:
        """The state now."""
        if self._init is None:
            return State.CREATING
        if self._init.exit_status is not None:
            return State.STOPPED
        if self._paused:
            return State.PAUSED
        return State.RUNNING if self._started else State.CREATED

    async def build(
        self, spec: config.Spec, streams: Streams, *, bundle: str = "", joined: Joined | None = None
    ) -> int:
        """Build the container up to an init that waits for `start`; return init's pid. Leaves nothing on failure.

        ``bundle`` is what its hooks are told of a directory of the host.
        """
        if spec.process is None:
            raise InvalidArgument(f"container {self.id}: config.json has no process")
        if streams.terminal != spec.process.terminal:
            raise InvalidArgument(f"container {self.id}: config.json and the streams disagree about the terminal")
        resources = spec.linux.resources
        pids = 0 if "pids.max" in resources.unified else resources.pids.limit
        async with AsyncExitStack() as undo:
            stdio = await Stdio.connect(self._services.exchange, streams)
            undo.callback(stdio.close)
            cgroup = cgroups.Cgroup.create(self.id, resources)
            undo.push_async_callback(asyncio.to_thread, cgroup.remove)
            undo.callback(cgroup.kill)
            if pids > 0:
                cgroup.limit_pids(pids + _BUILDERS)
            plan = child.plan_init(
                spec,
                container_id=self.id,
                cgroup=str(cgroup.path),
                rows=streams.rows,
                columns=streams.columns,
                bundle=bundle,
                joined=joined.types if joined else (),
            )
            init = await Process.build(
                self._services.launcher, self._services.reaper, plan, stdio, joined.pidfd if joined else None
            )
            if pids > 0:
                cgroup.limit_pids(pids)
            undo.pop_all()
        self._spec, self._cgroup, self._init = spec, cgroup, init
        init.when_ended(self._init_ended)
        # A kernel without the memory controller, or no watch is left: then kills are counted at the end.
        with contextlib.suppress(OSError):
            self._watch = self._services.files.add(str(cgroup.memory_events), self._memory_events_changed)
        return init.pid

    async def start(self) -> None:
        """Let init execute its program."""
        async with self._changing:
            init = self._require(State.CREATED)
            assert self._spec is not None
            if sources := rootfs.bind_sources(self._spec):
                # Where the host does not answer, it is only this that waits.
                await asyncio.to_thread(rootfs.refresh, sources)
            self._started = True
            await init.execute()

    async def exec(self, exec_id: str, process: config.Process, streams: Streams) -> int:
        """Start one more process and return its pid. The name of one that has ended may be used again."""
        if streams.terminal != process.terminal:
            raise InvalidArgument(f"process {exec_id}: its description and its streams disagree about the terminal")
        self._require(State.RUNNING)
        with ExitStack() as undo:
            stdio = await Stdio.connect(self._services.exchange, streams)
            undo.callback(stdio.close)
            async with self._changing:
                init = self._require(State.RUNNING)
                self._check_name(exec_id)
                assert self._spec is not None
                plan = child.plan_exec(
                    process,
                    spec=self._spec,
                    init_pid=init.pid,
                    cgroup=str(self.cgroup.path),
                    rows=streams.rows,
                    columns=streams.columns,
                )
                try:
                    started = await Process.build(self._services.launcher, self._services.reaper, plan, stdio)
                    try:
                        await started.execute()
                    except BaseException:
                        started.abandon()
                        raise
                except KatapyError as error:
                    # The container's end may be why, of which nobody has told us yet.
                    if procfs.is_ending(init.pid):
                        raise InvalidState(f"container {self.id} is {State.STOPPED}, not {State.RUNNING}") from error
                    raise
                self._execs.pop(exec_id, None)  # the newest is last: the oldest ended ones are forgotten first
                self._execs[exec_id] = started
            undo.pop_all()
        started.when_ended(lambda: self._exec_ended(exec_id, started))
        return started.pid

    async def update(self, resources: Resources) -> None:
        """Change limits of the container, which has not ended: all, or none. Raises KatapyError."""
        async with self._changing:
            if self._spec is None or self.state is State.STOPPED:
                raise InvalidState(f"container {self.id} is {self.state}: its limits cannot be changed")
            if resources.devices and resources.devices != self._spec.linux.resources.devices:
                raise Unsupported("devices cannot be changed: a container keeps those that it was created with")
            # The kernel takes memory back before it takes a lower limit.
            await asyncio.to_thread(self.cgroup.update, resources)

    async def pause(self) -> None:
        """Freeze every process of the running container. Raises Timeout, and then none is frozen."""
        async with self._changing:
            self._require(State.RUNNING)
            await asyncio.to_thread(self.cgroup.freeze)
            self._paused = True

    async def resume(self) -> None:
        """Let the paused container go on."""
        async with self._changing:
            self._require(State.PAUSED)
            await asyncio.to_thread(self.cgroup.thaw)
            self._paused = False

    @contextlib.contextmanager
    def join(self, types: Sequence[str]) -> Iterator[Joined]:
        """Hold the container's namespaces of these ``types`` for another that is built.

        Raises InvalidState where its init has ended, or is yet to be made.
        """
        if self._init is None or self.state is State.STOPPED:
            raise InvalidState(f"container {self.id} is {self.state}: its namespaces cannot be joined")
        # The agent reaps in this thread only, so the pid is still its.
        pidfd = os.pidfd_open(self._init.pid)
        try:
            yield Joined(pidfd, types)
        finally:
            os.close(pidfd)

    def process(self, exec_id: str) -> Process:
        """Return the process called ``exec_id``, the container's init for an empty one. Raises NotFound."""
        if exec_id:
            if exec_id not in self._execs:
                raise NotFound(f"container {self.id} has no process {exec_id!r}")
            return self._execs[exec_id]
        if self._init is None:
            raise InvalidState(f"container {self.id} is creating")
        return self._init

    def signal_all(self, number: int) -> None:
        """Send a signal to every process of the container; to none, where all have ended."""
        check_signal(number)
        if number == signal.SIGKILL:
            self.cgroup.kill()
            return
        for pid in self.cgroup.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stats(self) -> cgroups.Stats:
        """Return what the container uses."""
        return self.cgroup.stats()

    def processes(self) -> list[tuple[ProcessFacts, str]]:
        """Return the container's processes, each with its exec id where it was started by `exec`."""
        pids = self.cgroup.pids()
        exec_ids = {process.pid: exec_id for exec_id, process in self._execs.items() if process.exit_status is None}
        command_max = min(procfs.COMMAND_MAX, _LIST_BYTES // max(len(pids), 1))
        facts = [procfs.describe(pid, command_max=command_max) for pid in pids]
        return [(fact, exec_ids.get(fact.pid, "")) for fact in facts if fact is not None]

    def oom_killed(self) -> bool:
        """Tell whether the kernel has killed a process of the container because of a memory limit."""
        self._memory_events_changed()
        return self._oom_kills > 0

    async def remove(self) -> None:
        """Kill what is left, end all streams, remove the cgroup. Idempotent.

        Raises InvalidState while the container is created, Timeout when a process cannot be killed.
        """
        self.cgroup.kill()
        async with self._changing:
            if self._removed:
                return
            self.cgroup.kill()  # a process that was being started got past the first one
            processes = [self.process(""), *self._execs.values()]
            try:
                async with asyncio.timeout(_KILL_DEADLINE):
                    for process in processes:
                        await process.wait()
            except TimeoutError:
                raise Timeout(f"container {self.id}: processes survive SIGKILL for {_KILL_DEADLINE:g} s") from None
            self.oom_killed()
            self._services.files.remove(self._watch)
            for process in processes:
                process.stdio.close()
            await asyncio.to_thread(self.cgroup.remove)
            self._removed = True

    @property
    def cgroup(self) -> cgroups.Cgroup:
        """The container's cgroup. Raises InvalidState while there is none."""
        if self._cgroup is None:
            raise InvalidState(f"container {self.id} is {State.CREATING}")
        return self._cgroup

    def _require(self, state: State) -> Process:
        """Return the container's init. Raises InvalidState in any other state."""
        if self._init is None or self.state is not state:
            raise InvalidState(f"container {self.id} is {self.state}, not {state}")
        return self._init

    def _check_name(self, exec_id: str) -> None:
        running = [name for name, process in self._execs.items() if process.exit_status is None]
        if exec_id in running:
            raise AlreadyExists(f"container {self.id} already has a process {exec_id!r}")
        if len(running) >= _EXECS_MAX:
            raise Unavailable(f"container {self.id} already runs {_EXECS_MAX} processes of the host's")

    def _init_ended(self) -> None:
        # The kernel has killed the rest of its PID namespace already, unless that is another container's.
        self.cgroup.kill()
        self._publish_end("", self.process(""))

    def _exec_ended(self, exec_id: str, process: Process) -> None:
        self._publish_end(exec_id, process)
        ended = [name for name, other in self._execs.items() if other.exit_status is not None]
        for name in ended[:-_ENDED_MAX]:
            del self._execs[name]

    def _publish_end(self, exec_id: str, process: Process) -> None:
        assert process.exit_status is not None
        self._memory_events_changed()
        self._services.events.publish(Exit(self.id, exec_id, process.exit_status))

    def _memory_events_changed(self) -> None:
        kills = self.cgroup.oom_kills()
        if kills > self._oom_kills:
            self._oom_kills = kills
            self._services.events.publish(OutOfMemory(self.id))
