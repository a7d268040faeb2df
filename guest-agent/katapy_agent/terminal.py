"""The pty of a process: made in the container's own devpts, and taken as its controlling terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from typing import Final

from katapy_agent import linux
from katapy_agent.errors import InvalidArgument, doing
from katapy_agent.mounts import IN_ROOT, closing

_PTMX: Final = "/dev/pts/ptmx"
_PTMX_DEVICE: Final = os.makedev(5, 2)


def open_pty(root: int, rows: int, columns: int) -> tuple[int, int]:
    """Open a new pty in the devpts of the container whose root directory is ``root``; return master and slave.

    Rows and columns of 0 leave the size to the kernel. Raises KatapyError.
    """
    with contextlib.ExitStack() as undo, doing(f"open a terminal at {_PTMX}"):
        master = linux.openat2(root, _PTMX, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK, resolve=IN_ROOT)
        undo.callback(os.close, master)
        if os.fstat(master).st_rdev != _PTMX_DEVICE or linux.fstatfs_type(master) != linux.DEVPTS_SUPER_MAGIC:
            raise InvalidArgument(f"cannot open a terminal: {_PTMX} of the container is not that of a devpts mount")
        os.set_blocking(master, True)
        slave = linux.open_pty_peer(master)
        undo.callback(os.close, slave)
        if rows and columns:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("=4H", rows, columns, 0, 0))
        undo.pop_all()
        return master, slave


def bind_console(root: int, slave: int) -> None:
    """Put the terminal at /dev/console of the container."""
    with doing("mount /dev/console"), contextlib.ExitStack() as stack:
        console = stack.enter_context(closing(_open_console(root)))
        tree = stack.enter_context(closing(linux.open_tree(slave, "", recursive=False)))
        linux.move_mount(tree, console)


def _open_console(root: int) -> int:
    with closing(linux.openat2(root, "/dev", os.O_PATH | os.O_DIRECTORY, resolve=IN_ROOT)) as dev:
        with contextlib.suppress(FileExistsError):
            os.close(os.open("console", os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dev))
        return linux.openat2(dev, "console", os.O_PATH, resolve=linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_SYMLINKS)


def adopt(slave: int) -> None:
    """Make ``slave`` the controlling terminal and the standard streams of this process, a session leader."""
    with doing("take the terminal"):
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
