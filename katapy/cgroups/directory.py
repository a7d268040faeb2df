"""The directories of a pod's cgroup: what is remembered of them, who is in them, their end.

`katapy delete` removes by the record what a killed shim has left, so little is imported here.

A path of a record is used only while it is below a mounted hierarchy and its device is that hierarchy's: a cgroup file
system holds no symbolic links, and what is mounted over it has another device.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from typing import Any, Final, NamedTuple

from katapy.cgroups.layout import Layout, find_layout
from katapy.errors import InvalidArgument, Timeout
from katapy.jsonfile import printable, shown

_REMOVE_SECONDS: Final = 10.0
_KILL_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 0.02
_PATH_MAX: Final = 4096
# Says of a directory that katapy made it: the last of several pods below one parent removes that, whoever made it.
MARK: Final = "trusted.katapy"


class Record(NamedTuple):
    """What state.json keeps of a cgroup, as ``_asdict()``.

    ``paths`` is the absolute directory by hierarchy ("memory", "cpu,cpuacct", "unified" is v2); ``made`` are the
    directories, parents included, that katapy makes or has made; ``unit`` is systemd's scope, "" without systemd.
    """

    paths: dict[str, str] = {}  # noqa: RUF012 - never changed in place
    made: tuple[str, ...] = ()
    unit: str = ""

    @classmethod
    def parse(cls, value: Any) -> Record:
        """Check what was read from state.json. Raises InvalidArgument."""
        if not isinstance(value, dict) or value.keys() != set(cls._fields):
            raise InvalidArgument("cgroup: expected paths, made and unit")
        paths, made, unit = value["paths"], value["made"], value["unit"]
        if not isinstance(paths, dict) or not isinstance(made, list) or not isinstance(unit, str):
            raise InvalidArgument("cgroup: expected an object, an array and a string")
        for path in [*paths.values(), *made]:
            if not isinstance(path, str) or not _is_plain(path):
                raise InvalidArgument(f"cgroup: {shown(str(path))} is not a directory's plain path")
        return cls(paths, tuple(made), unit)


def _is_plain(path: str) -> bool:
    plain = path.startswith("/") and not path.startswith("//") and os.path.normpath(path) == path
    return plain and path != "/" and "\0" not in path and len(path) < _PATH_MAX


def processes(record: Record) -> list[int]:
    """Return the processes in the cgroup, of any of its hierarchies; not those in cgroups below it."""
    found: set[int] = set()
    for path in record.paths.values():
        with contextlib.suppress(OSError):
            found.update(map(int, read(f"{path}/cgroup.procs").split()))
    # 0 is a process of another PID namespace, which has no number here.
    return sorted(found - {0})


def kill(record: Record, *, timeout: float = _KILL_SECONDS) -> None:
    """Send SIGKILL to every process in the cgroup but the caller, until none is left.

    Raises Timeout where some are left after ``timeout`` seconds.
    """
    layout = find_layout()
    for path in _ours(record, layout):
        if os.getpid() not in processes(record):
            # One write reaches those that are being forked, too. Only v2 has it (Linux 5.14).
            with contextlib.suppress(OSError):
                write(f"{path}/cgroup.kill", "1")
    deadline = time.monotonic() + timeout
    while pids := [pid for pid in processes(record) if pid != os.getpid()]:
        if time.monotonic() > deadline:
            raise Timeout(f"cannot empty cgroup {_name(record)}: {_listed(pids)} after {timeout:g} s")
        for pid in pids:
            _kill_member(record, pid)
        time.sleep(_RETRY_SECONDS)


def _kill_member(record: Record, pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        # Looked up again with the descriptor open: from here on the pid cannot be another process.
        if pid in processes(record):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
    finally:
        os.close(fd)


def remove(record: Record, *, timeout: float = _REMOVE_SECONDS) -> None:
    """Wait up to ``timeout`` seconds until no process is in the cgroup and remove what katapy made of it.

    Parents that katapy made go with their last child. Kills nothing; does nothing where all has gone.
    Raises Timeout where processes stay, Unavailable where systemd does not answer.
    """
    layout = find_layout()
    deadline = time.monotonic() + timeout
    paths = _ours(record, layout)
    for path in paths:
        _wait_empty(path, deadline)
    # A scope may be systemd's alone; stopping it would kill what is still in it.
    while record.unit and (pids := processes(record)):
        if time.monotonic() > deadline:
            raise Timeout(f"cannot remove {record.unit}: {_listed(pids)} after {timeout:g} s")
        time.sleep(_RETRY_SECONDS)
    for path in paths:
        if _is_made(path, record):
            _remove_leaf(path, record, deadline, timeout)
    if record.unit:
        from katapy.cgroups import systemd  # only here: the other driver does without jeepney

        systemd.stop_unit(record.unit)
    for path in sorted(paths, key=len):
        remove_parents(path, record, layout)


def reap(record: Record, *, patience: float) -> None:
    """Remove the cgroup of a pod that has ended, and what has not ended by itself in ``patience`` seconds.

    Killed is what is in a directory that katapy made: what was there before may be somebody else's as well.
    Raises what ``kill`` and ``remove`` raise.
    """
    try:
        remove(record, timeout=patience)
    except Timeout:
        own = {key: path for key, path in record.paths.items() if path in record.made}
        kill(record._replace(paths=own), timeout=patience)
        remove(record, timeout=patience)


def remove_parents(path: str, record: Record, layout: Layout) -> None:
    """Remove the parents of ``path`` that katapy made and that are empty."""
    hierarchy = layout.holding(path)
    parent = os.path.dirname(path)
    while hierarchy is not None and parent != hierarchy.mount and _is_made(parent, record):
        try:
            os.rmdir(parent)
        except FileNotFoundError:
            pass
        except OSError:
            return  # another cgroup is in it
        parent = os.path.dirname(parent)


def mark(fd: int) -> None:
    """Mark the directory behind ``fd`` as made by katapy, where the kernel can."""
    with contextlib.suppress(OSError):
        os.setxattr(fd, MARK, b"1")


def read(path: str) -> str:
    """Return the text of a cgroup's file. Raises OSError."""
    with open(path) as file:  # noqa: PTH123 - pathlib is slow to import
        return file.read()


def write(path: str, value: str) -> None:
    """Write a cgroup's file: one write(2), never a new file. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _ours(record: Record, layout: Layout) -> list[str]:
    """Return the record's directories that are cgroups of this host."""
    found = []
    for path in record.paths.values():
        hierarchy = layout.holding(path)
        with contextlib.suppress(OSError):
            if hierarchy is not None and os.lstat(path).st_dev == os.stat(hierarchy.mount).st_dev:
                found.append(path)
    return found


def _is_made(path: str, record: Record) -> bool:
    if path in record.made:
        return True
    try:
        return os.getxattr(path, MARK) == b"1"
    except OSError:
        return False


def _wait_empty(path: str, deadline: float) -> None:
    """Wait until no process is in the v2 cgroup ``path`` or below it; v1 has no event to wait for."""
    try:
        with open(f"{path}/cgroup.events") as events:  # noqa: PTH123
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while "populated 1" in events.read() and (left := deadline - time.monotonic()) > 0:
                poll.poll(left * 1000)
                events.seek(0)
    except OSError as error:
        # Removed by somebody else, before it was opened or after that.
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def _remove_leaf(path: str, record: Record, deadline: float, timeout: float) -> None:
    # In v1 nothing tells when a cgroup is empty, and in both a process that has just ended keeps it busy for a moment.
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > deadline:
                why = _occupants(path, record) if error.errno == errno.EBUSY else (error.strerror or "").lower()
                raise Timeout(f"cannot remove cgroup {printable(path)}: {why} after {timeout:g} s") from error
        else:
            return
        time.sleep(_RETRY_SECONDS)


def _occupants(path: str, record: Record) -> str:
    if pids := processes(record):
        return _listed(pids)
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return f"cgroup {printable(entry.name)} is still in it"
    return "still busy"


def _listed(pids: list[int]) -> str:
    more = " and others" if len(pids) > 5 else ""
    return f"processes {', '.join(map(str, pids[:5]))}{more} still in it"


def _name(record: Record) -> str:
    return printable(next(iter(record.paths.values()), ""))
