"""The orchestrator: one pod, its virtual machine and its containers.

The only place that acts across hypervisor, network, storage and agent. It knows no protocol: the shim translates
the Task API and the attach protocol into these methods. All methods run on one event loop. A verb on a container
holds that container's lock, except for the ones that must work while another waits: kill, wait, state.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

from katapy.config import Config
from katapy.errors import AlreadyExists, InvalidState, KatapyError, NotFound, Unavailable
from katapy.oci.bundle import load_bundle
from katapy.oci.layer import LayerLimits
from katapy.oci.linux import Resources
from katapy.oci.update import parse_change
from katapy.proto import agent_pb2
from katapy.sandbox.container import Container
from katapy.sandbox.creation import create_in_guest, exec_in_guest
from katapy.sandbox.health import watch_agent
from katapy.sandbox.hooks import hooks_seconds
from katapy.sandbox.host import Host, await_stand_in, remove_cgroup
from katapy.sandbox.host_cgroup import HostCgroup
from katapy.sandbox.machine import Machine, start_machine
from katapy.sandbox.network import SandboxNetwork
from katapy.sandbox.process import Exit, GuestProcess, StdioRequest
from katapy.sandbox.record import Record
from katapy.sandbox.share import check_shareable, share
from katapy.sandbox.signals import Signals
from katapy.sandbox.sizing import Size, check_fits, vm_size
from katapy.state import Status
from katapy.storage.layer import DIRECTORY, WritableLayer
from katapy.storage.root_disk import open_root_disk
from katapy.storage.shared_dir import TAG
from katapy.timing import phase

log = logging.getLogger(__name__)

# A guest that does not answer must not hold up the end of its pod: what it has not done by then, it loses.
_REMOVE_DEADLINE: Final = 10.0
_DESTROY_DEADLINE: Final = 10.0
# Engines ask for those of all containers one after the other: one pod is not to hold up what is known of the others.
_STATS_DEADLINE: Final = 3.0
# What a process has written may still be on its way to a slow reader when the container is deleted.
_DRAIN_DEADLINE: Final = 10.0
_KILLED: Final = 128 + signal.SIGKILL

StartStandIn = Callable[[Container], Awaitable[None]]


class Sandbox:
    """A pod. ``directory`` is its private directory below ``root``; the first container brings up the VM."""

    def __init__(self, root: Path, sandbox_id: str, record: Record, config: Config, host: Host) -> None:
        self.root, self.id, self.directory = root, sandbox_id, root / sandbox_id
        self._record = record
        self._config = config
        self._host = host
        self._cgroup: HostCgroup | None = None
        self._added = asyncio.Condition()
        self._creating: set[asyncio.Task[Any]] = set()
        self._removals: dict[Container, asyncio.Task[None]] = {}
        self._closing = False
        self._containers: dict[str, Container] = {}
        self._layering = threading.Lock()
        self._layers: dict[str, WritableLayer] = {}  # by the root file system below
        self._root_disk = ""  # its path, where one is the root of the first container
        self._signals = Signals(sandbox_id, self._containers)
        self._stack = AsyncExitStack()
        self._machine: Machine | None = None
        self._network: SandboxNetwork | None = None
        self._starting = asyncio.Lock()
        self._failure_watch: asyncio.Task[None] | None = None
        self._watches: list[asyncio.Task[None]] = []

    def configure(self, config: Config) -> None:
        """Use another configuration for the VM, which the first container brings up."""
        self._config = config

    @property
    def empty(self) -> bool:
        """Whether no container is left."""
        return not self._containers

    def process(self, container_id: str, exec_id: str = "") -> GuestProcess:
        """Return a process. Raises NotFound."""
        container = self._container(container_id)
        if not exec_id:
            return container.init
        if exec_id not in container.execs:
            raise NotFound(f"process {exec_id!r} of {container_id} does not exist")
        return container.execs[exec_id]

    def bundle(self, container_id: str) -> str:
        """Return the bundle's directory of a container. Raises NotFound."""
        return self._container(container_id).bundle.path

    async def create(
        self, container_id: str, bundle_path: str, stdio: StdioRequest, stand_in: StartStandIn | None = None
    ) -> GuestProcess:
        """Create a container from a bundle; the first one boots the VM. On failure nothing of it is left.

        ``stand_in`` brings the process of the host that stands for it; without, the caller comes for the streams.
        """
        names = stdio.names()
        bundle = await asyncio.to_thread(load_bundle, bundle_path)
        if self._closing:
            raise Unavailable(f"cannot create {container_id}: the pod {self.id} is ending")
        if container_id in self._containers:
            raise AlreadyExists(f"container with id exists: {container_id}")
        if container_id == self.id:
            self._root_disk = bundle.spec.root_disk
        check_shareable(bundle.spec, container_id, pod_root_disk=self._root_disk)
        process = GuestProcess(container_id, "", stdio, status=Status.CREATING)
        if container_id == self.id:
            record = self._record
        elif stand_in is None:
            record = Record(self.root, container_id)
        else:
            record = Record.begin(self.root, bundle, container_id)
        container = Container(bundle, process, record)
        self._containers[container_id] = container
        task = asyncio.current_task()
        assert task is not None
        self._creating.add(task)
        try:
            async with self._added:
                self._added.notify_all()
            if bundle.spec.layer is not None:
                container.rootfs = await asyncio.to_thread(self._layered, bundle.rootfs, bundle.spec.layer)
            machine = await self._prepare(container, stand_in)
            with phase("share files"):
                shared = await asyncio.to_thread(share, machine.parts.tree, container)
            with phase("create the container"):
                await machine.guarded(create_in_guest(machine, self.id, container, names, shared))
            await self._host.finish(container)
        except BaseException:
            await self._forget(container)
            raise
        finally:
            self._creating.discard(task)
        process.watch = asyncio.create_task(self._watch(process), name=f"wait for {process.name}")
        if process.status is Status.CREATING:
            process.status = Status.CREATED
        log.debug("%s: created", container_id)
        container.record.created(bundle.spec.process.to_guest(), machine.parts.acceleration.kind.value)
        return process

    def _layered(self, rootfs: str, limits: LayerLimits) -> str:
        """Return a root file system with its writable layer, which the pod's containers share. Raises Unavailable."""
        with self._layering:
            if rootfs not in self._layers:
                directory = self.directory / DIRECTORY / str(len(self._layers))
                layer = self._layers[rootfs] = WritableLayer(directory, rootfs, limits)
                self._stack.callback(layer.close)
            return str(self._layers[rootfs].path)

    async def _prepare(self, container: Container, stand_in: StartStandIn | None) -> Machine:
        """Boot the VM, and meanwhile do what the host has to do for a container."""
        with phase("await the stand-in"):
            await (stand_in(container) if stand_in is not None else await_stand_in(container.init))
        if container.id == self.id:
            with phase("make the cgroup"):
                self._cgroup = await self._host.make_pod_cgroup(container, self._size(container), self._config)
        else:
            await self._host.make_member_cgroup(container)
        hooks = asyncio.create_task(self._host.prepare(container), name="run hooks")
        boot = asyncio.create_task(self._running_machine(container, hooks), name="boot the VM")
        try:
            await hooks
            return await boot
        finally:
            await _ended(hooks, boot)

    async def expect(self, container_id: str, exec_id: str) -> GuestProcess:
        """Return a process, waiting for a container that is yet to be created. Raises NotFound for an exec."""
        async with self._added:
            await self._added.wait_for(lambda: container_id in self._containers)
        return self.process(container_id, exec_id)

    async def start(self, container_id: str, exec_id: str) -> GuestProcess:
        """Let a created container or exec process run."""
        container, process = self._container(container_id), self.process(container_id, exec_id)
        async with container.lock:
            process.require([Status.CREATED], "start")
            machine = self._alive()
            if exec_id:
                container.init.require([Status.RUNNING], "start a process in")
                await machine.guarded(exec_in_guest(machine, process, container.exec_specs[exec_id]))
                process.watch = asyncio.create_task(self._watch(process), name=f"wait for {process.name}")
            else:
                if self._network is not None:
                    with phase("settle the network"):
                        await machine.guarded(self._network.settled())
                hooks = hooks_seconds(container.bundle.spec.hooks.start_container)
                with phase("start the container"):
                    await machine.guarded(machine.agent.start_container(container_id, hooks=hooks))
            if process.status is Status.CREATED:
                process.status = Status.RUNNING
                if not exec_id:
                    container.record.running()
        if not exec_id:
            await self._after_start(container)
        return process

    async def _after_start(self, container: Container) -> None:
        """Run the poststart hooks; a container whose hooks fail must not go on."""
        try:
            await self._host.run_hooks(container, "poststart", container.bundle.spec.hooks.poststart)
        except KatapyError:
            with suppress(KatapyError):
                await self.kill(container.id, "", signal.SIGKILL, everyone=True)
            raise

    def add_exec(self, container_id: str, exec_id: str, process_json: bytes, stdio: StdioRequest) -> None:
        """Note a process that ``start`` will run in a running container."""
        container = self._container(container_id)
        container.init.require([Status.RUNNING], "execute a process in")
        stdio.names()
        if exec_id in container.execs:
            raise AlreadyExists(f"process {exec_id!r} of {container_id} exists")
        container.execs[exec_id] = GuestProcess(container_id, exec_id, stdio)
        container.exec_specs[exec_id] = process_json

    async def kill(self, container_id: str, exec_id: str, number: int, *, everyone: bool) -> None:
        """Send a signal, or with 0 none; to ``everyone`` while the container is being created, too.

        Raises NotFound when the process has ended. A container that SIGKILL does not end is ended with its VM.
        """
        container, process = self._container(container_id), self.process(container_id, exec_id)
        if process.status is Status.STOPPED:
            raise NotFound("os: process already finished")
        if process.status is Status.CREATING and not everyone:
            raise InvalidState(f"cannot signal {process.name}: it is {process.status}")
        if number == 0:
            return
        if exec_id and process.status is Status.CREATED:
            process.finish(_KILLED, oom_killed=False)
            return
        try:
            machine = self._alive()
            if number == signal.SIGKILL and not exec_id:
                await self._signals.kill(machine, container, everyone=everyone)
            else:
                await self._signals.send(machine, process, number, everyone=everyone)
        except KatapyError as error:
            if self._machine is None or self._machine.failed_with() is None:
                raise
            # It has ended with its VM, and whoever is told so looks at once.
            await process.exited.wait()
            raise NotFound("os: process already finished") from error

    async def pause(self, container_id: str) -> None:
        """Freeze a running container."""
        container = self._container(container_id)
        async with container.lock:
            container.init.require([Status.RUNNING], "pause")
            machine = self._alive()
            await machine.guarded(machine.agent.pause(container_id))
            # It may have been killed meanwhile, and has ended then.
            if container.init.status is Status.RUNNING:
                container.init.status = Status.PAUSED
                container.record.paused()
                container.changed()

    async def resume(self, container_id: str) -> None:
        """Let a paused container go on."""
        container = self._container(container_id)
        async with container.lock:
            container.init.require([Status.PAUSED], "resume")
            machine = self._alive()
            await machine.guarded(machine.agent.resume(container_id))
            if container.init.status is Status.PAUSED:
                container.init.status = Status.RUNNING
                container.record.running()
                container.changed()

    async def wait_resumed(self, container_id: str) -> None:
        """Wait until a container is not paused, or has ended."""
        container = self._container(container_id)
        await container.until(lambda: container.init.status is not Status.PAUSED)

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change limits of a container, on the host and in the guest; ``resources`` is JSON, as in config.json.

        Raises InvalidArgument for what is wrong or above what the VM has. On failure every limit is as before.
        """
        container = self._container(container_id)
        async with container.lock:
            container.init.require([Status.CREATED, Status.RUNNING, Status.PAUSED], "update")
            machine = self._alive()
            change, before = parse_change(resources, container.resources), parse_change(b"{}", container.resources)
            check_fits(machine.parts.size, before.resources, change.resources)
            await self._update_host(container, before.resources, change.resources)
            try:
                await machine.guarded(machine.agent.update(container_id, change.request))
            except KatapyError:
                await self._update_host(container, change.resources, before.resources)
                raise
            container.resources = change.document

    async def _update_host(self, container: Container, before: Resources, after: Resources) -> None:
        # The cgroup of a further container has its stand-in and no limits: those on the host are the pod's.
        if container.id == self.id:
            await self._host.update(container, before, after)

    async def stats(self, container_id: str) -> agent_pb2.StatsContainerResponse:
        """Return what a container uses, as its guest says."""
        machine = self._alive()
        self.process(container_id)
        return await machine.guarded(machine.agent.stats(container_id, deadline=_STATS_DEADLINE))

    async def next_event(self, container_id: str, ooms: int, seconds: float) -> tuple[int, bool]:
        """Wait until memory has run out another number of times than ``ooms``, or the end, for at most ``seconds``.

        Returns that number, and whether the container has ended.
        """
        container = self._container(container_id)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await container.until(lambda: container.ooms != ooms or container.init.status is Status.STOPPED)
        return container.ooms, container.init.status is Status.STOPPED

    async def resize(self, container_id: str, exec_id: str, *, rows: int, columns: int) -> None:
        """Set the size of a process's terminal, in characters."""
        machine = self._alive()
        self.process(container_id, exec_id)
        await machine.guarded(machine.agent.resize(container_id, exec_id, rows=rows, columns=columns))

    async def close_stdin(self, container_id: str, exec_id: str) -> None:
        """Close the standard input of a process."""
        machine = self._alive()
        self.process(container_id, exec_id)
        await machine.guarded(machine.agent.close_stdin(container_id, exec_id))

    def pids(self, container_id: str) -> list[tuple[int, str]]:
        """Return the pids on the host of those that stand for a container's processes, each with its exec id or ""."""
        alive = (process for process in self._container(container_id).processes() if not process.exited.is_set())
        return [(process.host_pid, process.exec_id) for process in alive if process.host_pid]

    async def processes(self, container_id: str) -> list[agent_pb2.ProcessInfo]:
        """Return a container's processes, as its guest says."""
        machine = self._alive()
        self.process(container_id)
        return list((await machine.guarded(machine.agent.processes(container_id))).processes)

    async def delete(self, container_id: str, exec_id: str) -> Exit:
        """Remove a stopped or created container, or an exec process, and return how it ended."""
        container, process = self._container(container_id), self.process(container_id, exec_id)
        if container_id == self.id and not exec_id and len(self._containers) > 1:
            others = ", ".join(sorted(self._containers.keys() - {container_id}))
            raise InvalidState(f"cannot delete {container_id}: its VM is shared by {others[:256]}")
        async with container.lock:
            # Another call may have removed it, and a third have made one of the same name.
            if self._containers.get(container_id) is not container:
                raise NotFound(f"container {container_id} does not exist")
            process.require([Status.STOPPED, Status.CREATED], "delete")
            # What never ran has written nothing.
            if process.status is Status.STOPPED:
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.released.wait(), _DRAIN_DEADLINE)
            if exec_id:
                process.close()
                container.execs.pop(exec_id, None)
                container.exec_specs.pop(exec_id, None)
            else:
                await self._forget(container)
        return process.exit or Exit.now(_KILLED)

    def announced(self, process: GuestProcess, pid: int) -> None:
        """Note the host process that stands in for ``process``."""
        process.host_pid = pid
        if not process.exec_id:
            self._container(process.container_id).record.announced(pid)
        process.announced.set()

    async def close(self) -> None:
        """End the VM and everything in it, and remove what the pod has on the host. Idempotent."""
        self._closing = True
        if self._creating:
            for task in self._creating:
                # Once: another cancellation would interrupt the undoing that the first one began.
                if not task.cancelling():
                    task.cancel()
            await asyncio.wait(set(self._creating))
        machine, self._machine = self._machine, None
        if machine is not None and machine.failed_with() is None:
            # All containers at once. The guest writes back what it has cached; one that does not answer loses it.
            with suppress(KatapyError), phase("remove all from the guest"):
                await machine.guarded(machine.agent.destroy_sandbox(deadline=_DESTROY_DEADLINE))
        await self._signals.close()
        for container_id, container in list(self._containers.items()):
            if self._containers.get(container_id) is container:
                await self._forget(container)
        await asyncio.gather(*self._removals.values(), return_exceptions=True)
        await _ended(*self._watches)
        if self._failure_watch is not None:
            if machine is not None and machine.failed_with() is not None:
                # It is taking apart what is left of the machine; half of that done would be worse than all.
                await asyncio.wait([self._failure_watch])
            self._failure_watch.cancel()
        with phase("end the VM"):
            await self._stack.aclose()
        cgroup, self._cgroup = self._cgroup, None
        with phase("remove the cgroup"):
            await remove_cgroup(cgroup)

    def remove(self) -> None:
        """Remove the pod's own directory, as the very last thing."""
        self._record.remove()

    def _container(self, container_id: str) -> Container:
        if container_id not in self._containers:
            raise NotFound(f"container {container_id!r} does not exist")
        return self._containers[container_id]

    def _alive(self) -> Machine:
        if self._machine is None:
            raise InvalidState(f"the VM of {self.id} is not running")
        if (failure := self._machine.failed_with()) is not None:
            raise failure
        return self._machine

    async def _running_machine(self, container: Container, hooks: asyncio.Task[None]) -> Machine:
        async with self._starting:
            if self._machine is None:
                machine, network = await self._start_machine(container, hooks)
                self._machine, self._network = machine, network
                self._failure_watch = asyncio.create_task(self._on_failure(machine), name="watch the machine")
                self._watches = [
                    asyncio.create_task(self._on_events(machine), name="watch the guest's events"),
                    asyncio.create_task(network.follow(machine), name="watch the network"),
                ]
                if silence := self._config.runtime.agent_timeout:
                    watch = asyncio.create_task(watch_agent(machine, silence), name="watch the agent")
                    self._watches.append(watch)
        return self._alive()

    async def _start_machine(self, container: Container, hooks: asyncio.Task[None]) -> tuple[Machine, SandboxNetwork]:
        size = self._size(container)
        network = SandboxNetwork(self._config, container, vcpus=size.vcpus)
        # Left last: the taps end with the VM.
        self._stack.push_async_callback(network.close)
        nics = asyncio.create_task(network.connect(asyncio.shield(hooks)), name="connect the network")
        try:
            path = container.bundle.spec.root_disk
            disk = self._stack.enter_context(open_root_disk(path)) if path else None
            starting = start_machine(self.id, self.directory, self._config, size, container.record.helpers, nics, disk)
            machine = await self._stack.enter_async_context(starting)
        finally:
            await _ended(nics)
        network.plugged()
        hostname = container.bundle.spec.hostname or os.uname().nodename
        tag = TAG if machine.parts.tree is not None else ""
        with phase("make the VM the pod's own"):
            await machine.guarded(
                machine.agent.create_sandbox(self.id, hostname=hostname, shared_tag=tag, network=network.network)
            )
        await network.resolve(machine)
        network.forward(machine)
        return machine, network

    def _size(self, container: Container) -> Size:
        return vm_size(self._config, container.bundle.spec, host_cpus=os.cpu_count() or 1)

    async def _watch(self, process: GuestProcess) -> None:
        try:
            machine = self._alive()
            end = await machine.guarded(machine.agent.wait(process.container_id, process.exec_id))
        except KatapyError as error:
            process.lose(error)
        else:
            if end.oom_killed and not process.exec_id and (container := self._containers.get(process.container_id)):
                # Whoever hears of the end looks for it at once.
                self._host.tell_oom(container)
            process.finish(end.status, oom_killed=end.oom_killed, signal=end.signal)
        if not process.exec_id and (container := self._containers.get(process.container_id)):
            container.record.stopped(process.exit.status if process.exit else _KILLED)
            container.changed()

    async def _on_failure(self, machine: Machine) -> None:
        error = await machine.failure()
        if self._cgroup is not None and self._cgroup.oom_kills():
            error = Unavailable(f"{error}\nthe host ran out of memory for the pod, and killed it")
        log.error("%s", error)
        for container in self._containers.values():
            for process in container.processes():
                process.lose(error)
            container.record.stopped(_KILLED)
            container.changed()
        await _ended(*self._watches)
        # What is left of the machine is of no use, and may hold memory.
        await self._stack.aclose()

    async def _on_events(self, machine: Machine) -> None:
        """Count what the guest tells; it may tell anything, and no more than a number grows by it."""
        try:
            async for event in machine.agent.events():
                container = self._containers.get(event.oom.container_id) if event.HasField("oom") else None
                if container is not None:
                    container.ooms += 1
                    container.changed()
        except KatapyError as error:
            log.debug("%s: no more events: %s", self.id, error)

    async def _forget(self, container: Container) -> None:
        """Remove every trace of a container; what is begun is done, also when whoever waits for it is cancelled."""
        if container not in self._removals:
            removal = asyncio.create_task(self._remove_container(container), name=f"remove {container.id}")
            self._removals[container] = removal
            removal.add_done_callback(lambda _: self._removals.pop(container))
        await asyncio.shield(self._removals[container])

    async def _remove_container(self, container: Container) -> None:
        """Remove a container in the guest as far as that answers, on the host in any case."""
        container_id, machine = container.init.container_id, self._machine
        for process in container.processes():
            process.close()
            if process.exit is None and process.lost is None:
                process.lose(NotFound(f"container {container_id!r} was deleted"))
        container.changed()
        if machine is not None and machine.failed_with() is None:
            with suppress(KatapyError), phase("remove the container from the guest"):
                await machine.guarded(machine.agent.remove_container(container_id, deadline=_REMOVE_DEADLINE))
        try:
            if machine is not None and machine.failed_with() is None and (tree := machine.parts.tree) is not None:
                await asyncio.to_thread(tree.remove, container_id, container.binds)
        finally:
            self._containers.pop(container_id, None)
            await self._host.run_poststop_hooks(container)
            # In that of the pod is still the VM.
            if container_id != self.id:
                await remove_cgroup(container.cgroup)
                container.record.remove()


async def _ended(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what has not ended, and wait for the end of it."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # whoever needed the task has been told
