"""Starts QEMU for one VM and ends it: processes, descriptors, privileges.

The kernel, the initramfs and the disks are opened here and passed by descriptor, the sockets are pairs: QEMU gets no
path, and runs as a user of its own that owns nothing. What the arguments mean is ``cmdline``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import run
from katapy.console import Console
from katapy.devices import Disk, KernelVsock, Nic, RootDisk, SharedDir, UserVsock
from katapy.errors import InvalidArgument, KatapyError, NotFound, PermissionDenied, Timeout, Unavailable
from katapy.hypervisor import VmConfig, qmp
from katapy.hypervisor.accel import KVM_DEVICE, Acceleration, Kind
from katapy.hypervisor.cmdline import (
    NIC_PORTS,
    Descriptors,
    build_argv,
    nic_options,
    pluggable,
    port_backend,
    port_device,
)
from katapy.hypervisor.kvm_node import own_node
from katapy.hypervisor.snapshot import Run, Snapshot, load_ram, make_ram, save_ram
from katapy.timing import phase

_ELF: Final = b"\x7fELF"
# The kernel's Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header".
_BZIMAGE: Final = b"HdrS"
_BZIMAGE_OFFSET: Final = 0x202
_KERNEL_HEADER: Final = _BZIMAGE_OFFSET + len(_BZIMAGE)
QEMU: Final = "QEMU"  # what its process is called
_READY: Final = b"ready"
_READY_MAX: Final = 64
_GREETING_DEADLINE: Final = 30.0
_QUIT_DEADLINE: Final = 1.0
_TERM_GRACE: Final = 2.0
_EXIT_DEADLINE: Final = 2.0
# One QMP command, and the device states of a VM: milliseconds, on a machine that has nothing else to do.
_COMMAND_DEADLINE: Final = 60.0
_UNPLUG_DEADLINE: Final = 30.0
_CONSOLE_LINES: Final = 80  # the first of a kernel that panics says why, and 35 or more follow it
# systemd's UIDS-GIDS.md marks 0x70000000 to 0x7fffffff as unused: no user, no container has these. A random one for
# each VM keeps a QEMU that was taken over away from all the others. The first 2^22, one for each pid, are those of
# vsock_process.
_UID_FIRST: Final = 0x7040_0000
_UID_COUNT: Final = 0x8000_0000 - _UID_FIRST


class QemuVm:
    """A running VM; see ``start_vm``."""

    def __init__(
        self, name: str, process: run.Process, ram: int, console: Console, stderr: Console, ready: socket.socket
    ) -> None:
        self.name = name
        self.process = process
        self._ram = ram
        self.console = console
        self._stderr = stderr
        self._ready = ready
        self._qmp: qmp.Qmp | None = None
        self._nics: dict[str, str] = {}  # ports by the NICs' hardware addresses

    async def connect_qmp(self, ours: socket.socket) -> None:
        """Take QEMU's greeting, which shows that it accepted its arguments.

        Raises Unavailable with what QEMU printed when it did not.
        """
        try:
            self._qmp = await qmp.connect(ours, name=self.name, timeout=_GREETING_DEADLINE)
        except Unavailable as error:
            raise await self._death("QEMU start", cause=error) from error

    async def heard_out(self) -> None:
        """Wait until all has been heard of a QEMU that has ended."""
        if self._qmp is not None:
            await self._qmp.ended()

    def shutdown_reason(self) -> str | None:
        """Return why QEMU says that the guest stopped (ShutdownCause in qapi/run-state.json), if it has."""
        return self._qmp.shutdown_reason() if self._qmp is not None else None

    async def wait_ready(self, timeout: float) -> None:
        """Wait until the guest writes ``ready`` to its second serial port.

        Raises Timeout after ``timeout`` seconds, Unavailable when the VM ends first or says something else; with
        the last lines of the guest's console.
        """
        try:
            async with asyncio.timeout(timeout):
                said = await self._first_line()
        except TimeoutError as error:
            text = f"VM {self.name} did not get ready within {timeout:g} s: the guest is still booting or hangs"
            raise Timeout(self._with_console(text)) from error
        if said is None:
            raise await self._death("guest boot")
        if said != _READY:
            raise Unavailable(self._with_console(f"VM {self.name} said {said!r} where {_READY!r} was expected"))
        # The guest gets no more answer on this port, and what it still writes there goes nowhere.
        self._ready.close()

    async def save(self, ram: Path, state: Path) -> tuple[Run, ...]:
        """Stop the VM for good and write it to two new files; return which parts of the memory are in ``ram``.

        It must have no device but disks. Raises Unavailable or Timeout.
        """
        await self._execute("stop")
        await self._migrate("migrate", os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return await asyncio.to_thread(save_ram, self._ram, ram)

    async def copy_memory(self, snapshot: Snapshot) -> None:
        """Copy the memory of a VM that was saved. Raises Unavailable."""
        with phase("copy the memory"):
            await asyncio.to_thread(load_ram, self._ram, snapshot)

    async def restore(self, config: VmConfig, snapshot: Snapshot) -> None:
        """Be where the VM was that ``snapshot`` is of, with the devices of ``config`` plugged in, until ``resume``.

        It had the same configuration but for these. The VM was started with both.

        Raises Unavailable or Timeout; NotFound where a file of the snapshot has gone.
        """
        with phase("load the devices"), ExitStack() as stack:
            await self._migrate("migrate-incoming", os.dup(_open(snapshot.state, "template", stack)))
        # While it stands still, so that it finds all of them at once when it goes on.
        with phase("plug in the pod's devices"):
            for device in pluggable(config.devices):
                await self._execute("device_add", device)

    async def resume(self) -> None:
        """Let a restored VM go on. Raises Unavailable or Timeout."""
        await self._execute("cont")

    async def plug(self, nics: Sequence[Nic]) -> None:
        """Plug in NICs; their descriptors stay the caller's. Raises Unavailable, Timeout, InvalidArgument."""
        for nic in nics:
            with phase("plug in a NIC"):
                await self._plug(nic)

    async def _plug(self, nic: Nic) -> None:
        assert self._qmp is not None
        free = [port for port in NIC_PORTS if port not in self._nics.values()]
        if not free:
            raise InvalidArgument(f"cannot give a VM more than {len(NIC_PORTS)} NICs")
        port = self._nics[nic.device] = free[0]
        names: dict[str, list[str]] = {"tap": [], "vhost": []}
        for kind, fds in (("tap", nic.tap_fds), ("vhost", nic.vhost_fds)):
            for number, fd in enumerate(fds):
                names[kind].append(f"{port}-{kind}{number}")
                await self._qmp.send(fd, names[kind][-1], timeout=_COMMAND_DEADLINE)
        backend, device = nic_options(nic, port, names["tap"], names["vhost"])
        await self._execute("netdev_add", backend)
        await self._execute("device_add", device)

    async def unplug(self, device: str) -> None:
        """Take out the NIC with this permanent hardware address, if it is there.

        It is cut off, whatever the guest does about it.
        Raises Timeout where the guest does not let go of it, Unavailable.
        """
        assert self._qmp is not None
        port = self._nics.get(device)
        if port is None:
            return  # it could not be plugged in
        await self._execute("netdev_del", {"id": port_backend(port)})
        await self._qmp.unplug(port_device(port), timeout=_UNPLUG_DEADLINE)
        del self._nics[device]

    async def _migrate(self, command: str, fd: int) -> None:
        """Save to, or restore from, ``fd``, which is closed: all but the guest's memory."""
        assert self._qmp is not None
        try:
            wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
            await self._execute("migrate-set-capabilities", {"capabilities": wanted})
            await self._qmp.send(fd, "state", timeout=_COMMAND_DEADLINE)
        finally:
            os.close(fd)
        await self._execute(command, {"uri": "fd:state"})
        ending = asyncio.create_task(self._qmp.migrated())
        dying = asyncio.create_task(self.process.wait())
        done, _ = await asyncio.wait([ending, dying], timeout=_COMMAND_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
        for task in (ending, dying):
            task.cancel()
        if dying in done:
            raise await self._death(command)
        if ending not in done:
            raise Timeout(f"QEMU of {self.name} did not end {command} within {_COMMAND_DEADLINE:g} s")
        if (status := ending.result()) != "completed":
            # A QEMU that waits for a state ends when it gets none that it understands.
            raise await self._death(command, cause=Unavailable(f"QEMU of {self.name}: {command} {status}"))

    async def _execute(self, command: str, arguments: Mapping[str, object] | None = None) -> None:
        assert self._qmp is not None
        try:
            await self._qmp.execute(command, arguments, timeout=_COMMAND_DEADLINE)
        except Unavailable as error:
            if self.process.poll() is None:
                raise
            raise await self._death(command, cause=error) from error

    async def stop(self) -> None:
        """End the VM: QMP quit, then SIGTERM, then SIGKILL; idempotent."""
        if self._qmp is not None:
            with contextlib.suppress(KatapyError):
                await self._qmp.execute("quit", timeout=_QUIT_DEADLINE)
            await self._qmp.close()
            self._qmp = None
        await self.process.stop(grace=_TERM_GRACE)

    async def _first_line(self) -> bytes | None:
        """Return what the guest wrote up to the first newline, None if QEMU closed the port before."""
        loop = asyncio.get_running_loop()
        said = b""
        while b"\n" not in said and len(said) < _READY_MAX:
            try:
                data = await loop.sock_recv(self._ready, _READY_MAX)
            except OSError:
                return None
            if not data:
                return None
            said += data
        return said.partition(b"\n")[0].rstrip(b"\r")

    async def _death(self, stage: str, cause: KatapyError | None = None) -> KatapyError:
        """Return the error for a QEMU that closed its sockets: it has ended, or is about to."""
        try:
            async with asyncio.timeout(_EXIT_DEADLINE):
                status = await self.process.wait()
        except TimeoutError:
            return cause or Unavailable(self._with_console(f"VM {self.name} hung up during {stage}"))
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        reason = self.shutdown_reason()
        said = f" ({reason})" if reason is not None else ""
        # What was wrong, and, of a state that it could not read, what that led to.
        complaint = "; ".join(self._stderr.tail(2).splitlines())
        text = f"VM {self.name} failed during {stage}: QEMU {how}{said}" + (f": {complaint}" if complaint else "")
        return Unavailable(self._with_console(text))

    def _with_console(self, text: str) -> str:
        tail = self.console.tail(_CONSOLE_LINES)
        return f"{text}\nlast lines of the guest console:\n{tail}" if tail else text


@asynccontextmanager
async def start_vm(
    config: VmConfig,
    *,
    name: str,
    console_path: Path,
    snapshot: Snapshot | None = None,
    memory: int | None = None,
    started: Callable[[run.Process], None] = lambda _process: None,
) -> AsyncIterator[QemuVm]:
    """Start a VM and end it with the context; the guest boots already when this yields.

    ``name`` is the sandbox's id, ``console_path`` a file for the guest's console (at most 1 MiB) in its directory.
    With ``snapshot`` it does not, but waits for ``restore``, with the memory that was saved: a copy of it, unless
    ``memory`` is a descriptor of that, which QEMU then maps privately. No device may be a process of its own then.
    ``started`` is told of QEMU's process as soon as there is one.
    With KVM the caller needs a mount namespace of its own; see ``kvm_node``.
    Raises NotFound, PermissionDenied or InvalidArgument for a file of ``config`` that cannot be used, Unavailable
    with QEMU's own words when it does not start.
    """
    async with AsyncExitStack() as stack:
        with phase("launch QEMU"):
            vm, control = _launch(config, name, console_path, stack, restored=snapshot is not None, memory=memory)
        started(vm.process)
        stack.push_async_callback(vm.stop)
        copied = snapshot if memory is None else None
        copying = asyncio.ensure_future(vm.copy_memory(copied) if copied else _nothing())
        stack.push_async_callback(asyncio.wait, [copying])
        with phase("greet QEMU"):
            await vm.connect_qmp(control)
        await copying
        yield vm


async def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Channels:
    """One socket of every pair between katapy and a QEMU: katapy's, or QEMU's."""

    qmp: socket.socket
    console: socket.socket
    ready: socket.socket
    stderr: socket.socket


def _launch(
    config: VmConfig, name: str, console_path: Path, stack: AsyncExitStack, *, restored: bool, memory: int | None
) -> tuple[QemuVm, socket.socket]:
    """Return the VM whose QEMU was just started, and our end of its control socket."""
    ours, theirs = (_Channels(*ends) for ends in zip(*(socket.socketpair() for _ in range(4)), strict=True))
    for end in vars(ours).values():
        stack.callback(end.close)
    ram = make_ram(config.memory_bytes) if memory is None else os.dup(memory)
    stack.callback(os.close, ram)
    with ExitStack() as inherited:
        for end in vars(theirs).values():
            inherited.callback(end.close)
        fds = Descriptors(
            ram=ram,
            qmp=theirs.qmp.fileno(),
            console=theirs.console.fileno(),
            ready=theirs.ready.fileno(),
            kernel=_open_kernel(config.kernel, inherited),
            initramfs=open_boot_file(config.initramfs, "initramfs", inherited) if config.initramfs else None,
            disks=tuple(_open(disk.path, "disk", inherited) for disk in config.devices if isinstance(disk, Disk)),
        )
        argv = build_argv(config, fds, name=name, restored=restored, private=memory is not None)
        console = _open_console(ours.console, console_path)
        stack.callback(console.close)
        stderr = Console(ours.stderr)
        stack.callback(stderr.close)
        process = run.start(
            argv,
            name=QEMU,
            fds=_inherited(fds, config),
            stderr=theirs.stderr.fileno(),
            identity=_identity(config.acceleration, console_path.parent, stack),
        )
        # Should the orderly stop be cut short.
        stack.callback(process.kill)
    ours.ready.setblocking(False)
    return QemuVm(name, process, ram, console, stderr, ours.ready), ours.qmp


def _inherited(fds: Descriptors, config: VmConfig) -> list[int]:
    numbers = [fds.qmp, fds.console, fds.ready, fds.ram, fds.kernel, *fds.disks]
    numbers += [fds.initramfs] if fds.initramfs is not None else []
    for device in config.devices:
        match device:
            case SharedDir() | UserVsock():
                numbers.append(device.socket_fd)
            case KernelVsock():
                numbers.append(device.vhost_fd)
            case RootDisk():
                numbers.append(device.fd)
    return numbers


def _open(path: Path, what: str, stack: ExitStack) -> int:
    """Return a read-only descriptor of a regular file, closed with ``stack``."""
    try:
        # O_NONBLOCK: a FIFO in the file's place must be refused, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"cannot open {what} {path}: no such file") from error
    except OSError as error:
        raise PermissionDenied(f"cannot open {what} {path}: {(error.strerror or str(error)).lower()}") from error
    stack.callback(os.close, fd)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise InvalidArgument(f"cannot use {what} {path}: not a regular file")
    if found.st_size == 0:
        raise InvalidArgument(f"cannot use {what} {path}: the file is empty")
    return fd


def open_boot_file(path: Path, what: str, stack: ExitStack) -> int:
    """Return a descriptor that any user may open again by /proc/self/fd, which is how QEMU reads kernels.

    A file that only its owner may read (Ubuntu's kernels) is copied to memory. ``what`` names it in errors.
    """
    fd = _open(path, what, stack)
    if os.fstat(fd).st_mode & stat.S_IROTH:
        return fd
    copy = os.memfd_create(what, os.MFD_CLOEXEC)
    stack.callback(os.close, copy)
    while os.sendfile(copy, fd, None, 1 << 30):
        pass
    return copy


def _open_kernel(path: Path, stack: ExitStack) -> int:
    """Return a descriptor of a kernel; what is none would not fail in QEMU, but hang the guest."""
    fd = open_boot_file(path, "kernel", stack)
    start = os.pread(fd, _KERNEL_HEADER, 0)
    if not start.startswith(_ELF) and start[_BZIMAGE_OFFSET:] != _BZIMAGE:
        raise InvalidArgument(f"cannot use kernel {path}: neither a bzImage nor an ELF vmlinux")
    return fd


def _open_console(source: socket.socket, path: Path) -> Console:
    try:
        return Console(source, path)
    except OSError as error:
        raise Unavailable(f"cannot write the console log {path}: {(error.strerror or str(error)).lower()}") from error


def _identity(acceleration: Acceleration, directory: Path, stack: AsyncExitStack) -> run.Identity | None:
    """Return a user that owns nothing, in the group of /dev/kvm where that is needed; None if we are not root.

    Where only root may open /dev/kvm, this user may until ``stack`` unwinds.
    """
    if os.geteuid() != 0:
        return None
    uid = _UID_FIRST + secrets.randbelow(_UID_COUNT)
    if acceleration.kind is Kind.TCG:
        return run.Identity(uid, uid)
    found = KVM_DEVICE.stat()
    if found.st_mode & 0o006 == 0o006:
        return run.Identity(uid, uid)
    if found.st_mode & 0o060 == 0o060 and found.st_gid != 0:
        return run.Identity(uid, uid, (found.st_gid,))
    stack.enter_context(own_node(KVM_DEVICE, uid, directory))
    return run.Identity(uid, uid)
