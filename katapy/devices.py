"""Plain descriptions of what a virtual machine is given; layers hand them to each other.

``storage`` and ``transport`` make them, ``sandbox`` passes them on, ``hypervisor`` turns them into QEMU's arguments.
A descriptor in one of them belongs to whoever made it; QEMU gets a duplicate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class SharedDir:
    """A directory shared by virtio-fs: ``socket_fd`` is connected to its virtiofsd (vhost-user)."""

    tag: str
    socket_fd: int


@dataclass(frozen=True)
class Disk:
    """A raw disk image, seen by the guest as virtio-blk."""

    path: Path
    serial: str
    read_only: bool = True


@dataclass(frozen=True)
class RootDisk:
    """A raw image, or a block device, with a container's root file system: virtio-blk. ``fd`` can only read."""

    fd: int
    serial: str
    is_block_device: bool = False


@dataclass(frozen=True)
class KernelVsock:
    """vhost-vsock: ``cid`` is the guest's address, ``vhost_fd`` an open /dev/vhost-vsock."""

    cid: int
    vhost_fd: int


@dataclass(frozen=True)
class UserVsock:
    """The userspace vsock device: ``socket_fd`` is connected to its process (vhost-user)."""

    socket_fd: int


@dataclass(frozen=True)
class Nic:
    """A network device of the guest: a descriptor for each queue of its tap.

    ``device`` is its permanent hardware address; ``vhost_fds`` are of /dev/vhost-net, one for each queue or none.
    """

    device: str
    tap_fds: tuple[int, ...]
    vhost_fds: tuple[int, ...] = ()


class SharedMemory(NamedTuple):
    """A tmpfs in the guest's memory that containers of the pod share under a ``name``.

    ``size_bytes`` 0 is the kernel's own limit; ``mode``, ``uid`` and ``gid`` are of its root.
    """

    name: str
    size_bytes: int
    mode: int
    uid: int
    gid: int


Device = SharedDir | Disk | RootDisk | KernelVsock | UserVsock
