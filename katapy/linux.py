"""One function per Linux system call or ioctl that Python does not offer, and nothing else.

Every function raises OSError with the kernel's errno. Constants carry the kernel's names.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWNET: Final = 0x40000000

MS_RDONLY: Final = 0x1
MS_NOSUID: Final = 0x2
MS_NODEV: Final = 0x4
MS_NOEXEC: Final = 0x8
MS_SYNCHRONOUS: Final = 0x10
MS_REMOUNT: Final = 0x20
MS_DIRSYNC: Final = 0x80
MS_NOATIME: Final = 0x400
MS_NODIRATIME: Final = 0x800
MS_BIND: Final = 0x1000
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MS_SLAVE: Final = 0x80000
MS_SHARED: Final = 0x100000
MS_RELATIME: Final = 0x200000
MS_STRICTATIME: Final = 0x1000000

MNT_DETACH: Final = 0x2
UMOUNT_NOFOLLOW: Final = 0x8

AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
AT_FDCWD: Final = -100

OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

PR_SET_PDEATHSIG: Final = 1

_RENAME_EXCHANGE: Final = 2
_SYS_BPF: Final = 321  # of x86-64
# x86-64 and the generic table agree on all numbers above 424.
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_OPENAT2: Final = 437
_SYS_PIDFD_GETFD: Final = 438
_SYS_MOUNT_SETATTR: Final = 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """Mount (mount(2))."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, fstype, data)]
    src, dst, kind, options = encoded
    _check(_libc.mount(src, dst, kind, ctypes.c_ulong(flags), options), target)


def umount(target: str, flags: int = 0) -> None:
    """Unmount (umount2(2))."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def pivot_root(new_root: str, put_old: str) -> None:
    """Change the root mount (pivot_root(2))."""
    _check(_libc.pivot_root(os.fsencode(new_root), os.fsencode(put_old)), new_root)


def unshare(flags: int) -> None:
    """Leave shared namespaces (unshare(2)); the calling thread only."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Enter the namespace behind ``fd``, of the CLONE_NEW* ``kind`` (setns(2))."""
    _check(_libc.setns(fd, kind), "setns")


def prctl(option: int, value: int = 0) -> int:
    """Operate on the calling process (prctl(2))."""
    return _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


def exchange(one: str, other: str) -> None:
    """Let two files or directories of one file system have each other's name, at once (renameat2(2))."""
    args = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    _check(_libc.renameat2(*args), one)


def syncfs(fd: int) -> None:
    """Write the file system of ``fd`` to its disk (syncfs(2))."""
    _check(_libc.syncfs(fd), "syncfs")


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Return a duplicate, close-on-exec, of descriptor ``number`` of the process behind ``pidfd`` (pidfd_getfd(2))."""
    return int(_check(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0), "pidfd_getfd"))


def bpf(command: int, attributes: bytes) -> int:
    """Do a BPF_* ``command`` and return what it returns, a descriptor (close-on-exec) or 0 (bpf(2)).

    ``attributes`` is the command's part of union bpf_attr; what it points to is the caller's, and must last.
    """
    return int(_check(_libc.syscall(_SYS_BPF, command, attributes, len(attributes)), "bpf"))


def open_tree(dirfd: int, path: str, flags: int) -> int:
    """Return a descriptor of a mount tree (open_tree(2)); with OPEN_TREE_CLONE a detached bind copy."""
    return int(_check(_libc.syscall(_SYS_OPEN_TREE, dirfd, os.fsencode(path), flags), path))


def move_mount(tree: int, target_fd: int) -> None:
    """Attach the detached mount ``tree`` on the file or directory ``target_fd`` (move_mount(2))."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _check(_libc.syscall(_SYS_MOVE_MOUNT, tree, b"", target_fd, b"", flags), "move_mount")


def mount_setattr(tree: int, *, set_: int, propagation: int = 0, recursive: bool) -> None:
    """Set MOUNT_ATTR_* flags, and MS_* propagation unless 0, of the mount behind ``tree`` (mount_setattr(2))."""
    attr = struct.pack("=QQQQ", set_, 0, propagation, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, tree, b"", flags, attr, len(attr)), "mount_setattr")


def openat2(dirfd: int, path: str, flags: int, *, mode: int = 0, resolve: int) -> int:
    """Open ``path`` under ``dirfd`` with RESOLVE_* restrictions (openat2(2)); close-on-exec."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return int(_check(_libc.syscall(_SYS_OPENAT2, dirfd, os.fsencode(path), how, len(how)), path))
