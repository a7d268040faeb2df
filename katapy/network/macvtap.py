"""macvtaps: taps that take over an interface inside the kernel, with no tc in between.

In mode passthru everything that the interface receives is the macvtap's, which has its hardware address. Its character
device is found by sysfs, which shows the network namespace of whoever mounts it; so this is for a process that may have
mounts of its own. Source: the kernel's drivers/net/tap.c and linux/if_link.h.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from katapy import linux
from katapy.errors import Unavailable
from katapy.network import tap

_SYS: Final = "/sys"
_NODE: Final = Path(_SYS, "tap")


def open_macvtap(name: str, *, queues: int, stack: ExitStack) -> list[int]:
    """Return a descriptor for each queue of the macvtap called ``name``, which is up.

    This process has mounts of its own afterwards, and no sysfs. ``stack`` closes the descriptors. Raises Unavailable.
    """
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("sysfs", _SYS, "sysfs", linux.MS_RDONLY)
    try:
        devices = [each.read_text() for each in Path(_SYS, "class/net", name, "macvtap").glob("tap*/dev")]
    finally:
        linux.umount(_SYS)
    if len(devices) != 1:
        raise Unavailable(f"cannot find the device of the macvtap {name}")
    major, _, minor = devices[0].partition(":")
    linux.mount("tmpfs", _SYS, "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC)
    os.mknod(_NODE, stat.S_IFCHR | 0o600, os.makedev(int(major), int(minor)))
    try:
        return tap.open_queues(str(_NODE), name, queues=queues, stack=stack)
    finally:
        linux.umount(_SYS, linux.MNT_DETACH)  # the node is open
