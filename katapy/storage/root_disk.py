"""A disk image that is a container's root file system: opened and judged on the host, mounted by the guest alone.

The guest's kernel reads what is in it, the host's never does: no more than the mark of its type is looked at.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from katapy.devices import RootDisk
from katapy.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable, Unsupported
from katapy.jsonfile import printable

SERIAL: Final = "container-root"
# Where each type has its mark. Of them erofs is what each guest kernel has.
_EROFS: Final = (1024, b"\xe2\xe1\xf5\xe0")  # linux/fs/erofs/erofs_fs.h
_OTHERS: Final = {
    "squashfs": (0, b"hsqs"),
    "ext4": (0x438, b"\x53\xef"),
    "xfs": (0, b"XFSB"),
    "btrfs": (0x10040, b"_BHRfS_M"),
    "iso9660": (0x8001, b"CD001"),
    "qcow2": (0, b"QFI\xfb"),
}


@contextmanager
def open_root_disk(path: str) -> Iterator[RootDisk]:
    """Open the image or block device ``path``, which is not followed where it is a symbolic link.

    Raises NotFound, PermissionDenied, InvalidArgument, Unavailable where it cannot be read, and Unsupported for what is
    no erofs.
    """
    what = f"root disk {printable(path)}"
    try:
        # O_NONBLOCK: a FIFO in its place must be refused, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"cannot open {what}: no such file") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InvalidArgument(f"cannot open {what}: it is a symbolic link; name what it leads to") from error
        raise PermissionDenied(f"cannot open {what}: {(error.strerror or str(error)).lower()}") from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise InvalidArgument(f"cannot use {what}: neither a regular file nor a block device")
        try:
            _check_type(fd, what)
        except OSError as error:
            raise Unavailable(f"cannot read {what}: {(error.strerror or str(error)).lower()}") from error
        yield RootDisk(fd, SERIAL, is_block_device=stat.S_ISBLK(mode))
    finally:
        os.close(fd)


def _check_type(fd: int, what: str) -> None:
    if _has(fd, *_EROFS):
        return
    found = next((name for name, mark in _OTHERS.items() if _has(fd, *mark)), "something else")
    raise Unsupported(f"cannot use {what}: it holds {found}, and must be a raw image of erofs; see mkfs.erofs(1)")


def _has(fd: int, offset: int, mark: bytes) -> bool:
    return os.pread(fd, len(mark), offset) == mark
