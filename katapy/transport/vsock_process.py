"""The process of the userspace vsock device: one virtual machine, one owner.

Its owner has one end of a SOCK_SEQPACKET pair; each request on it carries a socket to connect to a port of the guest.
QEMU has the other end of the vhost-user socket. The process ends with status 0 when either is closed, its last copy
that is, and with status 1 and one line on stderr when the guest or QEMU breaks the rules. It holds nothing but these
sockets, stderr, the connections and the guest's memory, and lets go of every privilege before it reads the first
message. Started by ``katapy.transport.vsock``; it imports little, because there is one for every virtual machine.
"""

from __future__ import annotations

import gc
import os
import resource
import select
import socket
import struct
import sys
from typing import Final

from katapy import linux
from katapy.transport.poller import Poller
from katapy.transport.vhost_user import Disconnected, VhostUser
from katapy.transport.virtqueue import ProtocolError
from katapy.transport.vsock_device import MAX_CONNECTIONS, VsockDevice

GUEST_CID: Final = 3
"""The guest's address. Every device has its own address space, so one number serves all guests."""

CONNECT: Final = struct.Struct("<II")
"""The owner's request: its number and the guest's port; one socket comes with it."""
ANSWER: Final = struct.Struct("<II")
"""The answer: the request's number and CONNECTED, REFUSED or EXHAUSTED."""

_FIRST_UID: Final = 0x7000_0000
_OTHER_FILES: Final = 128
_PR_SET_NO_NEW_PRIVS: Final = 38
_SIGKILL: Final = 9


class Server:
    """The loop: QEMU, the owner and the device on one poller."""

    def __init__(self, vhost: socket.socket, control: socket.socket) -> None:
        """Serve the two sockets, which stay the caller's."""
        control.setblocking(False)
        self._control = control
        self._poller = Poller()
        self._device = VsockDevice(GUEST_CID, self._poller, self._answer)
        self._vhost_user = VhostUser(vhost, self._poller, self._device)
        self._more = False
        self._poller.add(control.fileno(), select.EPOLLIN, self._on_control)

    def step(self, timeout: float | None = None) -> None:
        """Wait for something to do, ``timeout`` seconds at most, and do a bounded part of it.

        Raises Disconnected when QEMU or the owner has gone, ProtocolError when the guest or QEMU breaks the rules.
        """
        self._poller.wait(0 if self._more else timeout)
        self._more = self._device.run()

    def close(self) -> None:
        """Close the connections and every descriptor that came in."""
        self._device.close()
        self._vhost_user.close()
        self._poller.close()

    def _on_control(self, _events: int) -> None:
        data, fds, _flags, _address = socket.recv_fds(self._control, CONNECT.size + 1, 1)
        if not data:
            raise Disconnected
        if len(data) != CONNECT.size or len(fds) != 1:
            raise ProtocolError("the owner's request is malformed")
        request, port = CONNECT.unpack(data)
        self._device.connect(request, port, socket.socket(fileno=fds[0]))

    def _answer(self, request: int, status: int) -> None:
        try:
            self._control.send(ANSWER.pack(request, status))
        except OSError as error:
            raise Disconnected from error


def drop_privileges() -> None:
    """Keep the open descriptors and nothing else, under a user id that no other process has."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _lower_limit(resource.RLIMIT_NOFILE, MAX_CONNECTIONS + _OTHER_FILES)
    _lower_limit(resource.RLIMIT_NPROC, 0)
    linux.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if os.geteuid() == 0:
        # Devices that shared a user could signal one another.
        user = _FIRST_UID + os.getpid()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)  # clears every capability, and the parent-death signal
    linux.prctl(linux.PR_SET_PDEATHSIG, _SIGKILL)


def _lower_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(hard, value)
    resource.setrlimit(which, (value, value))


def main() -> int:
    """Serve until a peer leaves; the arguments are the descriptors of QEMU's and of the owner's socket."""
    vhost, control = (socket.socket(fileno=int(fd)) for fd in sys.argv[1:])
    drop_privileges()
    server = Server(vhost, control)
    gc.freeze()
    try:
        while True:
            server.step()
    except Disconnected:
        return 0
    except (ProtocolError, OSError) as error:
        print(f"katapy vsock device: {error}", file=sys.stderr)  # noqa: T201
        return 1
