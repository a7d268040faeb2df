"""Shared memory of a pod: what engines mount at /dev/shm, which must be memory of the guest's.

An engine makes a tmpfs on the host for a pod's containers to share. As a directory of virtio-fs it would be slow, and
none of the containers would see what another has mapped: each has it as a file system of its own. So the guest is given
a tmpfs that is like the host's, and the containers that are given the same one by the engine share that.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from katapy.devices import SharedMemory
from katapy.oci.spec import BindMount

GUEST_MEMORY: Final = "/run/katapy/memory"
_PLACE: Final = "/dev/shm"


def find_shared_memory(bind: BindMount) -> SharedMemory | None:
    """Return what the guest is given for a bind mount; None for one that shares files of the host.

    It is a file system of its own in memory, nothing is in it yet, and it is not the host's own /dev/shm.
    """
    if os.path.normpath(bind.destination) != _PLACE:
        return None
    try:
        found = os.stat(bind.source)
        if not _is_own_memory(bind.source, found) or os.listdir(bind.source):
            return None
        size = os.statvfs(bind.source)
    except OSError:
        return None
    name = f"{os.major(found.st_dev)}-{os.minor(found.st_dev)}"
    return SharedMemory(name, size.f_blocks * size.f_frsize, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)


def _is_own_memory(path: str, found: os.stat_result) -> bool:
    device = found.st_dev
    if not stat.S_ISDIR(found.st_mode) or device in (os.stat(f"{path}/..").st_dev, os.stat(_PLACE).st_dev):
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}".encode()
    with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123 - bytes, and short
        lines = [line.split(b" - ", 1) for line in file]
    return any(mount.split()[2] == wanted and kind.startswith(b"tmpfs ") for mount, kind in lines)
