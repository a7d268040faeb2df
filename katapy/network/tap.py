"""Taps: interfaces whose frames a process reads and writes, here QEMU. Source: the kernel's networking/tuntap.rst."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import ExitStack
from typing import Final

from katapy.errors import AlreadyExists, Unavailable

VHOST_NET: Final = "/dev/vhost-net"
_TUN: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFREQ: Final = struct.Struct("16sH22x")


def open_tap(name: str, *, queues: int, stack: ExitStack) -> list[int]:
    """Make a tap in the network namespace of this thread and return a descriptor for each of its queues.

    It goes with the last copy of them. ``stack`` closes these. Raises AlreadyExists, Unavailable.
    """
    return open_queues(_TUN, name, queues=queues, stack=stack)


def open_queues(path: str, name: str, *, queues: int, stack: ExitStack) -> list[int]:
    """Return descriptors of the device at ``path``, a queue each, of the interface ``name``; see ``open_tap``."""
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    found = []
    for _ in range(queues):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            hint = "; modprobe tun" if path == _TUN else ""
            raise Unavailable(f"cannot open {path}: {error.strerror}{hint}") from error
        stack.callback(os.close, fd)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise AlreadyExists(f"the tap {name} exists") from error
            raise Unavailable(f"cannot make the tap {name}: {error.strerror}") from error
        found.append(fd)
    return found


def open_vhost(queues: int, stack: ExitStack) -> list[int]:
    """Return a descriptor of the kernel's virtio-net back end for each queue; none where the kernel has none."""
    found = []
    for _ in range(queues):
        try:
            fd = os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return []
        stack.callback(os.close, fd)
        found.append(fd)
    return found
