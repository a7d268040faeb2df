"""A stopped VM on disk, and the memory that it is written from and read into.

The memory of every VM is an unnamed file in memory (memfd_create(2)) that QEMU maps and shares with the helpers of
its devices. A snapshot keeps the pages of it that hold anything but zeros, one after the other.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy.errors import Unavailable

_PAGE: Final = 4096
_ZEROS: Final = bytes(_PAGE)
_CHUNK: Final = 1 << 20
# Zeros in between that are cheaper to copy than to skip.
_GAP: Final = 4 * _PAGE
# linux/fcntl.h
_F_ADD_SEALS: Final = 1033
_F_SEAL_SEAL_SHRINK_GROW: Final = 0x1 | 0x2 | 0x4

Run = tuple[int, int]


@dataclass(frozen=True)
class Snapshot:
    """``ram`` holds the ``runs`` (offset and length in bytes) of the guest's memory, ``state`` that of the devices.

    ``content`` is a hash of all three.
    """

    ram: Path
    runs: tuple[Run, ...]
    state: Path
    content: str = ""


def make_ram(size: int) -> int:
    """Return a descriptor of ``size`` bytes of zeros, which nobody can make shorter or longer. Raises Unavailable."""
    try:
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL_SHRINK_GROW)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise Unavailable(f"cannot make {size} bytes of guest memory: {error.strerror}") from error
    return fd


def load_ram(fd: int, snapshot: Snapshot) -> None:
    """Copy a snapshot's memory into the zeros of ``fd``. Raises Unavailable."""
    try:
        source = os.open(snapshot.ram, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            for offset, length in snapshot.runs:
                os.lseek(fd, offset, os.SEEK_SET)
                _send(source, fd, length)
        finally:
            os.close(source)
    except OSError as error:
        raise Unavailable(f"cannot read the template's memory {snapshot.ram}: {error.strerror}") from error


def _send(source: int, target: int, length: int) -> None:
    while length:
        sent = os.sendfile(target, source, None, length)
        if not sent:
            raise OSError(0, "the file is too short")
        length -= sent


def save_ram(fd: int, path: Path) -> tuple[Run, ...]:
    """Write what is not zero in ``fd`` to the new file ``path``, and return the runs that it holds.

    Raises Unavailable.
    """
    runs: list[Run] = []
    try:
        with path.open("xb", buffering=0) as file:
            for offset, length in _runs(fd):
                data = memoryview(os.pread(fd, length, offset))
                while data:  # a disk that is nearly full takes a part
                    data = data[file.write(data) :]
                runs.append((offset, length))
    except OSError as error:
        raise Unavailable(f"cannot write a template to {path}: {error.strerror}") from error
    return tuple(runs)


def _runs(fd: int) -> Iterator[Run]:
    """Give the parts of ``fd`` that hold anything but zeros, in order and none larger than a chunk."""
    for start, end in _extents(fd):
        for offset in range(start, end, _CHUNK):
            yield from _used(os.pread(fd, min(_CHUNK, end - offset), offset), offset)


def _extents(fd: int) -> Iterator[Run]:
    """Give where each part that was ever written begins and ends; to read the rest would give it memory."""
    size, end = os.fstat(fd).st_size, 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing more
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def _used(chunk: bytes, offset: int) -> Iterator[Run]:
    start = end = -1
    for place in range(0, len(chunk), _PAGE):
        if chunk[place : place + _PAGE] == _ZEROS:
            continue
        if start < 0:
            start = place
        elif place - end >= _GAP:
            yield offset + start, end - start
            start = place
        end = place + _PAGE
    if start >= 0:
        yield offset + start, end - start
