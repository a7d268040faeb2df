"""Streams to the guest over vsock, whichever device the virtual machine has.

Two devices behind one interface: the kernel's vhost-vsock, and katapy's own userspace device, a process of its own
(``vsock_process``) for hosts without /dev/vhost-vsock. Owns the device and its process; gives the description of it
to whoever starts QEMU, and connected sockets to whoever talks to the guest. Every connection comes from a source port
below 1024, which on the host only root can have: the agent accepts no other.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Final

import katapy
from katapy import run
from katapy.console import Console
from katapy.devices import KernelVsock, UserVsock
from katapy.errors import InvalidArgument, KatapyError, Timeout, Unavailable
from katapy.transport.vsock_device import CONNECTED, EXHAUSTED, FIRST_PORT, LAST_PORT
from katapy.transport.vsock_process import ANSWER, CONNECT

_VHOST_VSOCK: Final = "/dev/vhost-vsock"
_VHOST_VSOCK_SET_GUEST_CID: Final = 0x4008_AF60
_FIRST_CID: Final = 3
_LAST_CID: Final = 0xFFFF_FFFE
_CID_ATTEMPTS: Final = 16
_REFUSED: Final = "refused by the guest"

# Isolated and without site: the interpreter finds nothing but its own library and katapy.
_BOOT: Final = (
    "import sys; sys.path.append(sys.argv.pop(1)); from katapy.transport.vsock_process import main; sys.exit(main())"
)


class VsockKind(StrEnum):
    """Which device a virtual machine gets."""

    KERNEL = "kernel"
    USER = "user"


class Vsock(ABC):
    """A running device: ``device`` is for QEMU, ``process`` (if it has one) is to be watched by the owner.

    ``output`` is what the process prints: why it ends, which a guest may provoke.
    """

    device: KernelVsock | UserVsock
    process: run.Process | None
    output: Console | None

    async def connect(self, port: int, *, timeout: float) -> socket.socket:
        """Connect to a port of the guest, within ``timeout`` seconds.

        Returns a connected stream socket, non-blocking and close-on-exec, which is the caller's to close. Half-close
        is shutdown(2). Raises Unavailable when nobody listens there or the device has gone, Timeout when the guest
        does not answer, InvalidArgument for a number that is no port.
        """
        if not 0 <= port < 0xFFFF_FFFF:
            raise InvalidArgument(f"cannot connect to vsock port {port}: not a port")
        try:
            async with asyncio.timeout(timeout):
                return await self._connect(port)
        except TimeoutError as error:
            raise Timeout(f"cannot connect to vsock port {port}: the guest did not answer in {timeout:g} s") from error

    @abstractmethod
    async def _connect(self, port: int) -> socket.socket: ...


def find_kind(requested: str) -> VsockKind:
    """Return the device for ``requested``: "auto", "kernel" or "user"; auto is the kernel's where it can be opened.

    Raises Unavailable when the kernel's is demanded and missing, InvalidArgument for any other word.
    """
    if requested == VsockKind.USER:
        return VsockKind.USER
    if requested not in ("auto", VsockKind.KERNEL):
        raise InvalidArgument(f"vsock device {requested!r} is not one of auto, kernel, user")
    try:
        os.close(_open_vhost())
    except Unavailable:
        if requested == VsockKind.KERNEL:
            raise
        return VsockKind.USER
    return VsockKind.KERNEL


@asynccontextmanager
async def start_vsock(kind: VsockKind) -> AsyncIterator[Vsock]:
    """Run a vsock device. Raises Unavailable when it cannot be had."""
    if kind is VsockKind.KERNEL:
        with _kernel_vsock() as kernel:
            yield kernel
    else:
        async with _user_vsock() as user:
            yield user


# -- the kernel's device


class _KernelVsock(Vsock):
    process = None
    output = None

    def __init__(self, device: KernelVsock) -> None:
        self.device = device
        self._cid = device.cid

    async def _connect(self, port: int) -> socket.socket:
        while True:
            with ExitStack() as stack:
                sock = stack.enter_context(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
                sock.setblocking(False)
                _bind_privileged(sock)
                try:
                    await asyncio.get_running_loop().sock_connect(sock, (self._cid, port))
                except TimeoutError:
                    continue  # the kernel gives up after 2 s; the deadline is the caller's
                except OSError as error:
                    refused = error.errno == errno.ECONNRESET
                    raise _unavailable(port, _REFUSED if refused else os.strerror(error.errno or 0)) from error
                stack.pop_all()
                return sock


@contextmanager
def _kernel_vsock() -> Iterator[_KernelVsock]:
    fd = _open_vhost()
    try:
        yield _KernelVsock(KernelVsock(_claim_cid(fd), fd))
    finally:
        os.close(fd)


def _open_vhost() -> int:
    try:
        return os.open(_VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"cannot open {_VHOST_VSOCK}: {error.strerror}") from error


def _claim_cid(fd: int) -> int:
    """Claim a free CID for ``fd``, until its last copy is closed: a QEMU that lingers keeps its CID."""
    for _ in range(_CID_ATTEMPTS):
        cid = _FIRST_CID + secrets.randbelow(_LAST_CID - _FIRST_CID + 1)
        try:
            fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Unavailable(f"cannot claim a CID of {_VHOST_VSOCK}: {error.strerror}") from error
        else:
            return cid
    raise Unavailable(f"cannot claim a CID of {_VHOST_VSOCK}: {_CID_ATTEMPTS} were taken")


def _bind_privileged(sock: socket.socket) -> None:
    """Bind to a free source port below 1024; they are the host's, shared by all virtual machines."""
    ports = LAST_PORT - FIRST_PORT + 1
    first = secrets.randbelow(ports)
    for offset in range(ports):
        try:
            sock.bind((socket.VMADDR_CID_ANY, FIRST_PORT + (first + offset) % ports))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Unavailable(f"cannot bind a vsock source port: {error.strerror}") from error
        else:
            return
    raise Unavailable(f"all vsock source ports from {FIRST_PORT} to {LAST_PORT} are in use")


# -- the userspace device


class _UserVsock(Vsock):
    process: run.Process
    output: Console

    def __init__(self, process: run.Process, output: Console, device: UserVsock, control: socket.socket) -> None:
        self.process = process
        self.output = output
        self.device = device
        self._control = control
        self._requests = count()
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._ended = False

    async def _connect(self, port: int) -> socket.socket:
        with ExitStack() as stack:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            with theirs:
                answer = self._request(port, theirs)
            ours.setblocking(False)
            status = await answer
            if status != CONNECTED:
                raise _unavailable(port, "too many connections" if status == EXHAUSTED else _REFUSED)
            stack.pop_all()
            return ours

    def _request(self, port: int, theirs: socket.socket) -> asyncio.Future[int]:
        if self._ended:
            raise _unavailable(port, "the vsock device has ended")
        number = next(self._requests) & 0xFFFF_FFFF
        try:
            socket.send_fds(self._control, [CONNECT.pack(number, port)], [theirs.fileno()])
        except OSError as error:
            raise _unavailable(port, f"the vsock device does not listen: {error.strerror}") from error
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        future.add_done_callback(lambda _future: self._waiting.pop(number))
        return future

    def on_answer(self) -> None:
        """Read one answer of the device, or its end."""
        try:
            data = self._control.recv(ANSWER.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        number, status = ANSWER.unpack(data)
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_result(status)

    def _end(self) -> None:
        self._ended = True
        asyncio.get_running_loop().remove_reader(self._control)
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(Unavailable("cannot connect to the guest: the vsock device has ended"))


@asynccontextmanager
async def _user_vsock() -> AsyncIterator[_UserVsock]:
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        qemu, vhost = socket.socketpair()
        stack.enter_context(qemu)
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(control)
        control.setblocking(False)
        read, write = socket.socketpair()
        stack.enter_context(read)
        with vhost, theirs, write:
            process = _start_process(vhost, theirs, write)
        output = Console(read)
        stack.callback(output.close)
        vsock = _UserVsock(process, output, UserVsock(qemu.fileno()), control)
        loop.add_reader(control, vsock.on_answer)
        try:
            yield vsock
        finally:
            loop.remove_reader(control)
            await vsock.process.stop(grace=0)


def _start_process(vhost: socket.socket, control: socket.socket, stderr: socket.socket) -> run.Process:
    library = Path(katapy.__file__).parent.parent
    fds = vhost.fileno(), control.fileno()
    argv = [sys.executable, "-I", "-S", "-c", _BOOT, str(library), *map(str, fds)]
    return run.start(argv, name="vsock device", fds=fds, stderr=stderr.fileno())


def _unavailable(port: int, reason: str) -> KatapyError:
    return Unavailable(f"cannot connect to vsock port {port}: {reason}")
