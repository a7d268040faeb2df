"""One function per Linux system call or ioctl that Python does not offer, and nothing else.

Every function raises OSError with the kernel's errno. Constants carry the kernel's names. All descriptors that are
returned are close-on-exec and belong to the caller.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Final

CLONE_NEWTIME: Final = 0x00000080
CLONE_NEWNS: Final = 0x00020000
CLONE_NEWCGROUP: Final = 0x02000000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000

MS_UNBINDABLE: Final = 0x20000
MS_PRIVATE: Final = 0x40000
MS_SLAVE: Final = 0x80000
MS_SHARED: Final = 0x100000

MNT_DETACH: Final = 0x2
UMOUNT_NOFOLLOW: Final = 0x8

AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000
AT_FDCWD: Final = -100
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_STATX_FORCE_SYNC: Final = 0x2000
_STATX_BASIC_STATS: Final = 0x7FF

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8
MOUNT_ATTR_NOATIME: Final = 0x10
MOUNT_ATTR_STRICTATIME: Final = 0x20
MOUNT_ATTR__ATIME: Final = 0x70
MOUNT_ATTR_NODIRATIME: Final = 0x80
MOUNT_ATTR_NOSYMFOLLOW: Final = 0x200000

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4

SECCOMP_FILTER_FLAG_TSYNC: Final = 1
SECCOMP_FILTER_FLAG_LOG: Final = 2
SECCOMP_FILTER_FLAG_SPEC_ALLOW: Final = 4

DEVPTS_SUPER_MAGIC: Final = 0x1CD1
PROC_SUPER_MAGIC: Final = 0x9FA0

_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x4
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_FSOPEN_CLOEXEC: Final = 1
_FSMOUNT_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG: Final = 0
_FSCONFIG_SET_STRING: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_CLOSE_RANGE_CLOEXEC: Final = 4
_TIOCSPTLCK: Final = 0x40045431
_TIOCGPTPEER: Final = 0x5441
_BPF_PROG_LOAD: Final = 5
_BPF_PROG_ATTACH: Final = 8
_BPF_PROG_TYPE_CGROUP_DEVICE: Final = 15
_BPF_CGROUP_DEVICE: Final = 6
_BPF_F_ALLOW_MULTI: Final = 2
_SECCOMP_SET_MODE_FILTER: Final = 1
_CAPABILITY_VERSION_3: Final = 0x20080522

# All architectures agree on the numbers above 424.
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_SYS_CLOSE_RANGE: Final = 436
_SYS_OPENAT2: Final = 437
_SYS_MOUNT_SETATTR: Final = 442
_SYS_BPF, _SYS_SECCOMP, _SYS_SCHED_SETATTR, _SYS_IOPRIO_SET, _SYS_STATX = {
    "x86_64": (321, 317, 314, 251, 332),
    "aarch64": (280, 277, 274, 30, 291),
}[os.uname().machine]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_NULL: Final = ctypes.c_void_p(None)


def _check(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


def _syscall(number: int, what: str, *arguments: object) -> int:
    # A bare int would be passed as 32 bits, and the rest of its register is not defined.
    wide = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(_check(_libc.syscall(ctypes.c_long(number), *wide), what))


def umount(target: str, flags: int = 0) -> None:
    """Unmount (umount2(2))."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def pivot_root(new_root: str, put_old: str) -> None:
    """Change the root mount (pivot_root(2))."""
    _check(_libc.pivot_root(os.fsencode(new_root), os.fsencode(put_old)), new_root)


def unshare(flags: int) -> None:
    """Leave shared namespaces (unshare(2))."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    """Join the namespace behind ``fd``, or those of a process where it is a pidfd (setns(2))."""
    _check(_libc.setns(fd, flags), "setns")


def prctl(option: int, *values: int) -> int:
    """Operate on the calling process (prctl(2))."""
    padded = (*values, 0, 0, 0, 0)[:4]
    return _check(_libc.prctl(option, *(ctypes.c_ulong(value) for value in padded)), "prctl")


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the capability sets, given as bit masks, of the calling thread (capset(2))."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    low, high = ([mask >> shift & 0xFFFFFFFF for mask in (effective, permitted, inheritable)] for shift in (0, 32))
    _check(_libc.capset(header, struct.pack("=6I", *low, *high)), "capset")


def personality(persona: int) -> None:
    """Set the execution domain (personality(2))."""
    _check(_libc.personality(ctypes.c_ulong(persona)), "personality")


def setdomainname(name: str) -> None:
    """Set the NIS domain name of the UTS namespace (setdomainname(2))."""
    encoded = os.fsencode(name)
    _check(_libc.setdomainname(encoded, ctypes.c_size_t(len(encoded))), name)


def fstatfs_type(fd: int) -> int:
    """Return the magic number of the file system that holds ``fd`` (fstatfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    _check(_libc.fstatfs(fd, buffer), "fstatfs")
    return int(struct.unpack_from("@l", buffer)[0])


def fetch_attributes(path: str) -> None:
    """Have the file system of ``path`` ask its server for the attributes, though it may have some (statx(2))."""
    flags = _AT_STATX_FORCE_SYNC | _AT_SYMLINK_NOFOLLOW
    found = ctypes.create_string_buffer(256)
    _syscall(_SYS_STATX, path, AT_FDCWD, os.fsencode(path), flags, _STATX_BASIC_STATS, found)


def open_tree(dirfd: int, path: str, *, recursive: bool) -> int:
    """Return a detached bind copy of the tree at ``path``, "" being ``dirfd`` itself (open_tree(2))."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    return _syscall(_SYS_OPEN_TREE, path, dirfd, os.fsencode(path), flags)


def move_mount(tree: int, target: int) -> None:
    """Attach the detached mount ``tree`` on the file or directory ``target`` (move_mount(2))."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_SYS_MOVE_MOUNT, "move_mount", tree, b"", target, b"", flags)


def mount_setattr(tree: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, recursive: bool = False) -> None:
    """Set and clear MOUNT_ATTR_* flags, or set MS_* propagation, of the mount ``tree`` (mount_setattr(2))."""
    attr = struct.pack("=QQQQ", set_, clear, propagation, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _syscall(_SYS_MOUNT_SETATTR, "mount_setattr", tree, b"", flags, attr, len(attr))


def fsopen(fstype: str) -> int:
    """Begin to make a file system of type ``fstype`` (fsopen(2))."""
    return _syscall(_SYS_FSOPEN, fstype, os.fsencode(fstype), _FSOPEN_CLOEXEC)


def fsconfig_set(context: int, key: str, value: str | None) -> None:
    """Give an option to a file system that is being made; None is an option without a value (fsconfig(2))."""
    encoded = os.fsencode(key)
    if value is None:
        _syscall(_SYS_FSCONFIG, key, context, _FSCONFIG_SET_FLAG, encoded, _NULL, 0)
    else:
        _syscall(_SYS_FSCONFIG, key, context, _FSCONFIG_SET_STRING, encoded, os.fsencode(value), 0)


def fsconfig_create(context: int) -> None:
    """Make the file system (fsconfig(2), FSCONFIG_CMD_CREATE)."""
    _syscall(_SYS_FSCONFIG, "create", context, _FSCONFIG_CMD_CREATE, _NULL, _NULL, 0)


def fsmount(context: int, attributes: int) -> int:
    """Return a detached mount, with MOUNT_ATTR_* ``attributes``, of the file system that was made (fsmount(2))."""
    return _syscall(_SYS_FSMOUNT, "fsmount", context, _FSMOUNT_CLOEXEC, attributes)


def openat2(dirfd: int, path: str, flags: int, *, mode: int = 0, resolve: int) -> int:
    """Open ``path`` under ``dirfd`` with RESOLVE_* restrictions (openat2(2)).

    The kernel gives up with EAGAIN when something is renamed or mounted meanwhile; after 64 times so does this.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(64):
        try:
            return _syscall(_SYS_OPENAT2, path, dirfd, os.fsencode(path), how, len(how))
        except BlockingIOError:
            continue
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


def close_range_cloexec(first: int) -> None:
    """Mark every descriptor from ``first`` on close-on-exec (close_range(2))."""
    _syscall(_SYS_CLOSE_RANGE, "close_range", first, 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)


def open_pty_peer(master: int) -> int:
    """Unlock a pty master and open its slave without a path (TIOCSPTLCK, TIOCGPTPEER; ioctl_tty(2))."""
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("=i", 0))
    return fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)


def sched_setattr(policy: int, flags: int, nice: int, priority: int, times: tuple[int, int, int]) -> None:
    """Set the scheduling of the calling thread; ``times``: runtime, deadline, period in ns (sched_setattr(2))."""
    attr = struct.pack("=IIQiIQQQ", 48, policy, flags, nice, priority, *times)
    _syscall(_SYS_SCHED_SETATTR, "sched_setattr", 0, attr, 0)


def ioprio_set(class_: int, priority: int) -> None:
    """Set the I/O class (1 real time, 2 best effort, 3 idle) and priority (0 to 7) of the process (ioprio_set(2))."""
    _syscall(_SYS_IOPRIO_SET, "ioprio_set", 1, 0, class_ << 13 | priority)


def seccomp_load(program: bytes, flags: int) -> None:
    """Install a seccomp filter, an array of struct sock_filter, with SECCOMP_FILTER_FLAG_* (seccomp(2))."""
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _syscall(_SYS_SECCOMP, "seccomp", _SECCOMP_SET_MODE_FILTER, flags, fprog)


def bpf_load_device_program(program: bytes) -> int:
    """Verify and load a cgroup device program, an array of struct bpf_insn; returns its descriptor (bpf(2))."""
    code = ctypes.create_string_buffer(program, len(program))
    name = ctypes.create_string_buffer(b"Apache-2.0")
    head = (_BPF_PROG_TYPE_CGROUP_DEVICE, len(program) // 8, ctypes.addressof(code), ctypes.addressof(name))
    # log_level, log_size, log_buf, kern_version, prog_flags
    attr = struct.pack("=IIQQIIQII", *head, 0, 0, 0, 0, 0)
    return _syscall(_SYS_BPF, "bpf", _BPF_PROG_LOAD, attr, len(attr))


def bpf_attach_device_program(cgroup: int, program: int) -> None:
    """Attach a loaded device program to the cgroup directory ``cgroup`` (bpf(2))."""
    attr = struct.pack("=IIII", cgroup, program, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI)
    _syscall(_SYS_BPF, "bpf", _BPF_PROG_ATTACH, attr, len(attr))
