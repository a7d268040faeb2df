"""A template's memory that several VMs map privately: one sealed file in memory, handed from shim to shim.

No VM ever writes to it: the kernel refuses that for as long as the file exists (memfd_create(2), F_SEAL_WRITE), while
a private mapping keeps for itself what is written. Whoever restores such a VM keeps a descriptor, and says so in a
file of its sandbox's directory; the next one takes a duplicate from a process that says so and still runs
(pidfd_getfd(2)), or fills a file of its own. The kernel frees the memory with its last user.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from katapy import linux
from katapy.errors import KatapyError, Unavailable
from katapy.hypervisor.snapshot import Snapshot, load_ram
from katapy.jsonfile import dump, parse, read
from katapy.state import ProcessRef

log = logging.getLogger(__name__)

RECORD: Final = "memory.json"
"""What the file in a sandbox's directory is called."""
# linux/fcntl.h
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_SEALS: Final = 0x1 | 0x2 | 0x4 | 0x8  # seal, shrink, grow, write


@contextmanager
def hold_memory(snapshot: Snapshot, size: int, directory: Path) -> Iterator[int]:
    """Yield a sealed descriptor of a snapshot's memory, ``size`` bytes: another pod's where one holds it, else a copy.

    ``directory`` is the sandbox's; those beside it are searched. Raises Unavailable.
    """
    fd = _find(snapshot, size, directory.parent)
    if fd is None:
        fd = fill_memory(snapshot, size)
    record = directory / RECORD
    try:
        _record(record, fd)
        yield fd
    finally:
        record.unlink(missing_ok=True)
        os.close(fd)


def fill_memory(snapshot: Snapshot, size: int) -> int:
    """Return a descriptor of a copy that nobody can change any more. Raises Unavailable."""
    fd = os.memfd_create(_name(snapshot), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        load_ram(fd, snapshot)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"cannot make {size} bytes of guest memory: {error.strerror}") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _find(snapshot: Snapshot, size: int, root: Path) -> int | None:
    """Return a duplicate of a descriptor that a living shim holds, of whichever has it."""
    for record in sorted(root.glob(f"*/{RECORD}")):
        with suppress(KatapyError, OSError, KeyError, TypeError, ValueError):
            document = parse(read(str(record)), what=RECORD)
            holder = ProcessRef("shim", int(document["pid"]), int(document["start_time"]))
            fd = _take(holder, int(document["fd"]))
            if _is_memory(fd, snapshot, size):
                return fd
            os.close(fd)
            log.debug("%s does not hold what is wanted", record)
    return None


def _take(holder: ProcessRef, number: int) -> int:
    """Return a duplicate of another process's descriptor. Raises OSError."""
    pidfd = holder.open()
    if pidfd is None:
        raise ProcessLookupError
    try:
        return linux.pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)


def _is_memory(fd: int, snapshot: Snapshot, size: int) -> bool:
    """Tell whether ``fd`` is the whole of a snapshot's memory: it is filled before it is sealed."""
    return (
        # Linux appends this to the name of what has no place in a directory.
        os.readlink(f"/proc/self/fd/{fd}") == f"/memfd:{_name(snapshot)} (deleted)"
        and fcntl.fcntl(fd, _F_GET_SEALS) == _SEALS
        and os.fstat(fd).st_size == size
    )


def _name(snapshot: Snapshot) -> str:
    return f"katapy-{snapshot.content}"


def _record(path: Path, fd: int) -> None:
    own = ProcessRef.of("shim", os.getpid())
    temporary = path.with_suffix(".new")
    try:
        temporary.touch(mode=0o600)
        temporary.write_bytes(dump({"pid": own.pid, "start_time": own.start_time, "fd": fd}))
        temporary.rename(path)
    except OSError as error:
        raise Unavailable(f"cannot write {path}: {error.strerror}") from error
