"""Emptying a directory that others, a guest among them, have written into.

Nothing here follows a symbolic link or enters a mount. Whose directory it is, is the caller's business.
"""

from __future__ import annotations

import os
import re
import stat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


def mounts_below(path: str) -> list[str]:
    """Return the mount points at and below the resolved ``path``, deepest first (proc(5), mountinfo)."""
    with open("/proc/self/mountinfo", "rb") as file:  # noqa: PTH123 - pathlib is slow to import
        points = [os.fsdecode(_unescape(line.split(b" ")[4])) for line in file]
    return sorted((point for point in points if f"{point}/".startswith(f"{path}/")), reverse=True)


def empty_directory(top_fd: int, *, keep: str | None = None) -> None:
    """Remove all that is in the directory ``top_fd`` but its file ``keep``.

    Directories are first moved up to the top, so that the depth of what a guest wrote costs neither stack nor
    descriptors, and so that the kernel refuses (EBUSY) to touch a mount. Raises OSError.
    """
    pending: list[str] = []
    _clear(top_fd, top_fd, pending, keep)
    while pending:
        name = pending.pop()
        fd = os.open(name, _DIRECTORY, dir_fd=top_fd)
        try:
            _clear(fd, top_fd, pending, None)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=top_fd)


def _clear(fd: int, top_fd: int, pending: list[str], keep: str | None) -> None:
    for name in os.listdir(fd):
        if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
            moved = f"~{os.urandom(8).hex()}"
            os.rename(name, moved, src_dir_fd=fd, dst_dir_fd=top_fd)
            pending.append(moved)
        elif name != keep:
            os.unlink(name, dir_fd=fd)


def _unescape(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
