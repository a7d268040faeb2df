"""A pod's virtual machine with all its helpers: started together, watched together, ended together.

Owns QEMU, virtiofsd, the vsock device and the connection to the guest agent. When one of the processes dies, the
machine has failed: ``failed`` is set, and everything that waits for the guest ends with the reason.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from katapy import run
from katapy.assets import guest
from katapy.config import Config
from katapy.devices import Device, Disk, KernelVsock, Nic, RootDisk
from katapy.errors import KatapyError, Unavailable
from katapy.hypervisor import GuestConsole, Vm, VmConfig
from katapy.hypervisor.accel import Acceleration, probe, require
from katapy.hypervisor.held_memory import hold_memory
from katapy.hypervisor.qemu import QEMU, start_vm
from katapy.hypervisor.snapshot import Snapshot
from katapy.sandbox import templates
from katapy.sandbox.sizing import Size
from katapy.storage.shared_dir import TAG, SharedTree
from katapy.storage.virtiofs import find_virtiofsd, start_virtiofsd
from katapy.templates import Template
from katapy.timing import phase
from katapy.transport.vsock import Vsock, find_kind, start_vsock

if TYPE_CHECKING:
    from katapy.agent.client import AgentClient

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_CONSOLE_LINES: Final = 80  # the first of a kernel that panics says why, and 35 or more follow it
_NOTICE: Final = 1.0  # seconds
_CONNECT_SECONDS: Final = 60.0


@dataclass(frozen=True)
class MachineParts:
    """What a running machine consists of. Where its root is a disk it has no ``tree``: nothing is shared with it."""

    acceleration: Acceleration
    vm: Vm
    vsock: Vsock
    tree: SharedTree | None
    agent: AgentClient
    size: Size


class Machine:
    """A running VM with a serving agent; see ``start_machine``."""

    def __init__(self, name: str, record: Callable[[list[run.Process]], None]) -> None:
        self.name, self._record = name, record
        self._failed: asyncio.Future[KatapyError] = asyncio.get_running_loop().create_future()
        self._ending = False
        self.killed = False  # one of its processes, before all of it was up
        self.processes: list[run.Process] = []
        self._outputs: dict[run.Process, GuestConsole | None] = {}
        self._parts: MachineParts | None = None

    @property
    def parts(self) -> MachineParts:
        """The parts; only once the machine is up."""
        assert self._parts is not None
        return self._parts

    @property
    def agent(self) -> AgentClient:
        """The guest agent's client."""
        return self.parts.agent

    async def failure(self) -> KatapyError:
        """Wait until the machine fails, and return why."""
        return await asyncio.shield(self._failed)

    def failed_with(self) -> KatapyError | None:
        """Return why the machine has failed, if it has."""
        return self._failed.result() if self._failed.done() else None

    def kill(self, why: KatapyError) -> None:
        """End the VM at once, for nothing can be had of it any more: whoever waits for it is told ``why``."""
        if not self._ending and not self._failed.done():
            self._failed.set_result(why)
            self.parts.vm.process.signal(signal.SIGKILL)

    async def guarded(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do ``work``, unless the machine fails first: then that is what is raised."""
        task = asyncio.ensure_future(work)
        try:
            waited: list[asyncio.Future[Any]] = [task, self._failed]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and isinstance(task.exception(), Unavailable):
                # The end of a process shows first in what talked to it. Which process it was, its pidfd tells.
                await asyncio.wait([self._failed], timeout=_NOTICE)
            if self._failed.done() and (not task.done() or task.exception() is not None):
                raise self._failed.result()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, KatapyError):
                    await task

    async def connect(self, port: int) -> Any:
        """Dial a guest port."""
        return await self.parts.vsock.connect(port, timeout=_CONNECT_SECONDS)

    def _own(self, process: run.Process) -> None:
        if process not in self.processes:
            self.processes.append(process)
            self._record(self.processes)

    def _watch(self, process: run.Process, stack: AsyncExitStack, output: GuestConsole | None = None) -> None:
        async def watch() -> None:
            await process.wait()
            if self._parts is not None and process is self._parts.vm.process:
                await self._parts.vm.heard_out()
            if not self._ending and not self._failed.done():
                self._failed.set_result(self._obituary())

        self._own(process)
        self._outputs[process] = output
        task = asyncio.create_task(watch(), name=f"watch {process.name}")
        stack.push_async_callback(_cancelled, task)

    def _obituary(self) -> KatapyError:
        """Say which process died. One takes others with it, so the one that was killed is named, else the first."""
        ended = [(process, status) for process in self.processes if (status := process.poll()) is not None]
        process, status = min(ended, key=lambda end: (end[1] >= 0, end[1] == 0))
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if process.name == QEMU and self._parts is not None and (reason := self._parts.vm.shutdown_reason()):
            how += f" ({reason})"
        text = f"{process.name} of {self.name} died: pid {process.pid} {how}"
        output = self._outputs[process]
        if output is not None:
            what = "the guest console" if process.name == QEMU else "its output"
            tail = output.tail(_CONSOLE_LINES)
            text += f"\nlast lines of {what}:\n{tail}" if tail else f"\n{what} is empty"
        return Unavailable(text)

    @contextmanager
    def _end_quietly(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._ending = True


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _settled(task: asyncio.Future[Any]) -> None:
    await asyncio.wait([task])


@asynccontextmanager
async def start_machine(
    name: str,
    directory: Path,
    config: Config,
    size: Size,
    record: Callable[[list[run.Process]], None],
    nics: asyncio.Task[Sequence[Nic]],
    disk: RootDisk | None = None,
) -> AsyncIterator[Machine]:
    """Start a VM for the sandbox ``name`` whose private directory is ``directory``, and connect to its agent.

    It is restored from the template of its shape, or booted where the configuration says so or that fails.
    ``record`` is told of the processes each time that one more runs; ``nics`` is waited for when there is nothing
    else to do without them, and their descriptors stay the caller's. With ``disk`` the machine has that one instead of
    a directory that is shared with it.
    Raises KatapyError; nothing is left behind then.
    """
    async with AsyncExitStack() as stack:
        with phase("find the template"):
            base = await _base_config(config, size)
            snapshot = await templates.find_snapshot(base, config) if config.hypervisor.template else None
        machine: Machine | None = None
        if snapshot is not None:
            machine = Machine(name, record)
            try:
                await stack.enter_async_context(_start(machine, directory, config, base, nics, disk, snapshot))
            except KatapyError as error:
                if nics.done() and not nics.cancelled() and nics.exception() is not None:
                    raise
                # That a part of it was killed is no fault of the template's.
                if machine.killed:
                    raise machine.failed_with() or error from error
                log.warning("%s: its template is of no use, booting: %s", name, error)
                machine = None
        if machine is None:
            machine = Machine(name, record)
            await stack.enter_async_context(_start(machine, directory, config, base, nics, disk, None))
        yield machine


async def make_template(config: Config, size: Size) -> Template:
    """Return the template for VMs of ``size``, made where there is none. Raises KatapyError."""
    return await templates.find_or_make(await _base_config(config, size), config)


async def _base_config(config: Config, size: Size) -> VmConfig:
    """Return a VM of ``size`` without a device of a pod."""
    hypervisor = config.hypervisor
    image = guest.find_image(config.runtime.data_dir, hypervisor.image)
    kernel = guest.find_kernel(config.runtime.data_dir, hypervisor.kernel)
    return VmConfig(
        qemu=hypervisor.qemu,
        acceleration=require(await probe(), hypervisor),
        vcpus=size.vcpus,
        memory_bytes=size.memory_bytes,
        kernel=kernel.kernel,
        initramfs=kernel.initramfs,
        kernel_params=hypervisor.kernel_params,
        devices=(Disk(image.path, "root"),),
    )


@asynccontextmanager
async def _start(
    machine: Machine,
    directory: Path,
    config: Config,
    base: VmConfig,
    nics: asyncio.Task[Sequence[Nic]],
    disk: RootDisk | None,
    snapshot: Snapshot | None,
) -> AsyncIterator[Machine]:
    async with AsyncExitStack() as stack:
        try:
            await _bring_up(machine, stack, directory, config, base, nics, disk, snapshot)
        except KatapyError:
            # Before all others are ended.
            machine.killed = any((process.poll() or 0) < 0 for process in machine.processes)
            raise
        # The first to be left: from there on, an end is what was asked for.
        stack.enter_context(machine._end_quietly())
        yield machine


async def _bring_up(
    machine: Machine,
    stack: AsyncExitStack,
    directory: Path,
    config: Config,
    base: VmConfig,
    nics: asyncio.Task[Sequence[Nic]],
    disk: RootDisk | None,
    snapshot: Snapshot | None,
) -> None:
    name, timeout = machine.name, config.runtime.boot_timeout
    # gRPC takes long to import, and nothing needs it before the guest is up.
    imported = asyncio.ensure_future(asyncio.to_thread(importlib.import_module, "katapy.agent.client"))
    stack.push_async_callback(_settled, imported)
    # It takes longest to start, and is waited for when it is plugged in.
    vsock = await stack.enter_async_context(start_vsock(find_kind(config.hypervisor.vsock)))
    if vsock.process is not None:
        machine._watch(vsock.process, stack, vsock.output)
    tree, files = (None, disk) if disk is not None else await _share_files(machine, stack, directory, config)
    vm_config = replace(base, devices=(*base.devices, vsock.device, files))
    memory: int | None = None
    if snapshot is not None and disk is not None and isinstance(vsock.device, KernelVsock):
        # Nobody but QEMU needs the guest's memory.
        with phase("hold the template's memory"):
            context = hold_memory(snapshot, base.memory_bytes, directory)
            holding = asyncio.ensure_future(asyncio.to_thread(stack.enter_context, context))
            # A thread cannot be interrupted: what it enters is left after it.
            stack.push_async_callback(_settled, holding)
            memory = await asyncio.shield(holding)
    console = directory / "console.log"
    starting = start_vm(
        vm_config, name=name, console_path=console, snapshot=snapshot, memory=memory, started=machine._own
    )
    vm = await machine.guarded(stack.enter_async_context(starting))
    machine._watch(vm.process, stack, vm.console)
    if snapshot is not None:
        await machine.guarded(vm.restore(vm_config, snapshot))
        with phase("await the network"):
            found = await nics
        await machine.guarded(vm.plug(found))
        await machine.guarded(vm.resume())
    else:
        with phase("boot the guest"):
            await machine.guarded(vm.wait_ready(timeout))
        await machine.guarded(vm.plug(await nics))
    with phase("import gRPC"):
        await imported
    from katapy.agent import client
    from katapy.agent.relay import start_relay

    with phase("connect to the guest"):
        guest = await machine.guarded(vsock.connect(client.PORT, timeout=timeout))
    address = await stack.enter_async_context(start_relay(directory, guest))
    agent = await stack.enter_async_context(client.connect(address, deadline=timeout))
    size = Size(base.vcpus, base.memory_bytes)
    machine._parts = MachineParts(base.acceleration, vm, vsock, tree, agent, size)


async def _share_files(
    machine: Machine, stack: AsyncExitStack, directory: Path, config: Config
) -> tuple[SharedTree, Device]:
    """Make the tree of what the guest is shown of the host's files, and start what serves it."""
    tree = SharedTree(directory)
    stack.callback(tree.close)
    program = find_virtiofsd(config.storage.virtiofsd_paths)
    daemon = await stack.enter_async_context(start_virtiofsd(program, tree.export, directory, TAG))
    machine._watch(daemon.process, stack, daemon.output)
    return tree, daemon.device
