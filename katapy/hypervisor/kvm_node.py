"""A /dev/kvm that a QEMU without privileges may open, where the host's is root's alone, as devtmpfs makes it.

QEMU 7.2 takes no descriptor of the device: it opens the path. So another node of the same device is bound over it. The
caller has a mount namespace of its own, as the shim has; with that the bind vanishes at the latest.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from katapy import linux
from katapy.errors import Unavailable


@contextmanager
def own_node(device: Path, uid: int, directory: Path) -> Iterator[None]:
    """While entered, only ``uid`` and root may open ``device``; for everybody in this mount namespace.

    ``directory`` is the sandbox's: for a moment something is mounted in it. Raises Unavailable.
    """
    try:
        _bind_node(device, uid, directory / "device")
    except OSError as error:
        raise Unavailable(f"cannot make {device} for uid {uid}: {(error.strerror or str(error)).lower()}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            linux.umount(str(device), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)


def _bind_node(device: Path, uid: int, scratch: Path) -> None:
    with ExitStack() as undo:
        scratch.mkdir(mode=0o700)
        undo.callback(scratch.rmdir)
        # Devices work here, unlike where the sandbox's directory may be. The bind outlives this mount of it.
        linux.mount("katapy", str(scratch), "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC, "mode=0700,size=4k,nr_inodes=2")
        undo.callback(linux.umount, str(scratch))
        node = scratch / device.name
        os.mknod(node, stat.S_IFCHR | 0o600, device.stat().st_rdev)
        os.chown(node, uid, uid)
        linux.mount(str(node), str(device), None, linux.MS_BIND)
