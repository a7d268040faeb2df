"""Directories that some processes use while others may remove them: users hold them, removers claim them.

Both are locks on the directory itself (flock(2)), so that whatever ends a process lets go of what it held.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from katapy.errors import NotFound

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


@contextmanager
def hold(directory: Path) -> Iterator[int]:
    """Keep ``directory`` from being claimed, and give a descriptor of it. Raises NotFound when it is gone."""
    try:
        fd = os.open(directory, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{directory}: no such directory") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        # Who removes it has it claimed, and was waited for.
        if not _is_still(fd, directory):
            raise NotFound(f"{directory}: no such directory")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def claim(directory: Path) -> Iterator[bool]:
    """Have ``directory`` for oneself, to remove it; gives whether it is: not where others hold it, or it is gone."""
    try:
        fd = os.open(directory, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield _is_still(fd, directory)
    finally:
        os.close(fd)


def _is_still(fd: int, directory: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), directory.lstat())
    except FileNotFoundError:
        return False
