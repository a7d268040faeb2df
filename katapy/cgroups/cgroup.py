"""Making, filling and changing the cgroup of one pod, in every hierarchy of the host.

It owns the directories that it makes, until ``directory.remove`` takes them away. Files are written here and nowhere
else; what is written is decided in ``limits``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

from katapy.cgroups import directory
from katapy.cgroups.directory import Record
from katapy.cgroups.layout import Hierarchy, Layout, find_layout
from katapy.cgroups.limits import HostLimits, Setting, plan_limits
from katapy.cgroups.path import CgroupPath
from katapy.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    InvalidState,
    KatapyError,
    NotFound,
    Unavailable,
    Unsupported,
)
from katapy.jsonfile import printable, shown

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
# What is enabled for v2 cgroups. Engines read statistics where nothing is limited, too.
_V2_CONTROLLERS: Final = ("cpu", "cpuset", "hugetlb", "io", "memory", "pids")
_ATTEMPTS: Final = 20
_ERRORS: Final[dict[int, tuple[type[KatapyError], str]]] = {
    errno.EBUSY: (InvalidState, "more is in use"),
    errno.EINVAL: (InvalidArgument, "the kernel refuses the value"),
    errno.ERANGE: (InvalidArgument, "out of the kernel's range"),
    errno.ENODEV: (InvalidArgument, "no such device"),
    errno.ENXIO: (InvalidArgument, "no such device"),
    errno.EOPNOTSUPP: (Unsupported, "the kernel cannot do this"),
}


def plan_record(layout: Layout, path: CgroupPath) -> Record:
    """Return what ``Cgroup.create`` would make, for state.json, before anything is made."""
    paths = {_key(hierarchy): _absolute(hierarchy, path) for hierarchy in layout.hierarchies if hierarchy.writable}
    if path.unit:
        # Slices are systemd's. A scope's directory is ours alone to remove, whoever made it; but not one that exists.
        return Record(paths, tuple(each for each in paths.values() if not os.path.lexists(each)), path.unit)
    made: dict[str, None] = {}
    for hierarchy in layout.hierarchies:
        current = paths.get(_key(hierarchy), hierarchy.mount)
        while current != hierarchy.mount and not os.path.lexists(current):
            made[current] = None
            current = os.path.dirname(current)
    return Record(paths, tuple(made))


class Cgroup:
    """The cgroup of one pod. ``record`` is what state.json keeps."""

    def __init__(self, layout: Layout, record: Record) -> None:
        """Take up an existing cgroup, of which ``record`` tells; ``layout`` is this host's."""
        self.layout = layout
        self.record = record

    @classmethod
    def create(cls, path: CgroupPath, limits: HostLimits, *, layout: Layout, pid: int | None = None) -> Cgroup:
        """Make the cgroup with its limits, and put the process ``pid`` into it, which systemd needs for a scope.

        ``layout`` is found before the caller itself moves: relative paths start there, and ``leave`` returns there.
        Where the host has no cgroup that can be written, the result is empty if neither limits nor a path were asked
        for. When it fails, nothing is left and ``pid`` is where it was.
        Raises AlreadyExists where processes are in it, InvalidArgument and Unsupported for limits that cannot be set,
        Unavailable where cgroups cannot be made.
        """
        settings = plan_limits(layout, limits)
        if path.unit and pid is None:
            raise Internal(f"cannot make {path.unit}: systemd makes no scope without a process")
        needed = {setting.controller for setting in settings}
        cgroup = cls(layout, Record({}, (), path.unit))
        home = layout if pid is None else find_layout(pid)
        with contextlib.ExitStack() as undo:
            undo.callback(cgroup._undo, home, pid)
            if path.unit:
                cgroup._start_scope(path, limits, pid or 0)
            for hierarchy in filter(lambda each: each.writable, layout.hierarchies):
                cgroup._make(hierarchy, path, needed.intersection(hierarchy.controllers))
            if not cgroup.record.paths and path.asked:
                raise Unavailable(f"cannot make cgroup {printable(path.path)}: this host has none that can be written")
            cgroup._apply(settings)
            if pid is not None:
                cgroup.add(pid)
            undo.pop_all()
        return cgroup

    def add(self, pid: int) -> None:
        """Move the process ``pid``, all its threads, into the cgroup; what it starts later is born there.

        Raises NotFound where the process has ended, Unavailable.
        """
        for path in self.record.paths.values():
            try:
                directory.write(f"{path}/cgroup.procs", str(pid))
            except ProcessLookupError as error:
                raise NotFound(f"cannot add process {pid} to cgroup {printable(path)}: it has ended") from error
            except OSError as error:
                threaded = error.errno == errno.EOPNOTSUPP
                why = "a parent is threaded" if threaded else _reason(error)
                raise Unavailable(f"cannot add process {pid} to cgroup {printable(path)}: {why}") from error

    def leave(self, pid: int) -> None:
        """Move the process ``pid`` to where the caller was when ``layout`` was found, as far as that still exists."""
        _move(pid, self.layout)

    def update(self, limits: HostLimits) -> None:
        """Change the limits that are set in ``limits``.

        Raises InvalidState where more memory is in use than the new limit: nothing is killed for it.
        InvalidArgument and Unsupported are as in ``create``.
        """
        settings = plan_limits(self.layout, limits)
        self._check_memory(limits)
        if self.record.unit:
            from katapy.cgroups import systemd

            systemd.set_limits(self.record.unit, limits, version=self._memory_version())
        self._apply(settings)

    def oom_kills(self) -> int:
        """Return how many of the cgroup's processes the host's kernel has killed for want of memory."""
        memory = self._directory("memory")
        if memory is None:
            return 0
        for file in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                return _table(f"{memory}/{file}").get("oom_kill", 0)
        return 0

    def _start_scope(self, path: CgroupPath, limits: HostLimits, pid: int) -> None:
        from katapy.cgroups import systemd  # only here: the other driver does without jeepney

        systemd.start_scope(path.unit, path.slice, pid, limits, version=self._memory_version())

    def _memory_version(self) -> int:
        memory = self.layout.find("memory")
        return 2 if memory is None else memory.version

    def _make(self, hierarchy: Hierarchy, path: CgroupPath, needed: set[str]) -> None:
        """Make the cgroup in one hierarchy; one that is not needed and cannot be written is left out."""
        target = _absolute(hierarchy, path)
        try:
            problems = self._make_directories(hierarchy, target)
        except OSError as error:
            if needed or error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                what = InvalidArgument if error.errno in (errno.EINVAL, errno.ENOTDIR, errno.ELOOP) else Unavailable
                raise what(f"cannot make cgroup {printable(target)}: {_reason(error)}") from error
            return
        self.record = self.record._replace(paths={**self.record.paths, _key(hierarchy): target})
        if path.unit and target not in self.record.made:
            self.record = self.record._replace(made=(*self.record.made, target))
        if not path.unit and directory.processes(Record({"": target})):
            raise AlreadyExists(f"cannot make cgroup {printable(target)}: it exists, with processes in it")
        if hierarchy.version == 2:
            _check_v2(target, needed, problems)

    def _make_directories(self, hierarchy: Hierarchy, target: str) -> dict[str, str]:
        """Make ``target`` and its parents. Returns which v2 controllers could not be enabled, and why."""
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._descend(hierarchy, target)
            except OSError as error:
                # A parent that was there a moment ago may have gone with another pod.
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    raise
        return self._descend(hierarchy, target)

    def _descend(self, hierarchy: Hierarchy, target: str) -> dict[str, str]:
        problems: dict[str, str] = {}
        current = hierarchy.mount
        with contextlib.ExitStack() as opened:
            fd = os.open(current, _DIRECTORY)
            opened.callback(os.close, fd)
            device = os.fstat(fd).st_dev
            for name in target.removeprefix(hierarchy.mount).strip("/").split("/"):
                if hierarchy.version == 2:
                    _enable_controllers(current, problems)
                child = f"{current.rstrip('/')}/{name}"
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=fd)
                    self.record = self.record._replace(made=(*self.record.made, child))
                fd = os.open(name, _DIRECTORY, dir_fd=fd)
                opened.callback(os.close, fd)
                if os.fstat(fd).st_dev != device:
                    raise InvalidArgument(
                        f"cannot make cgroup {printable(target)}: {printable(child)} is another mount"
                    )
                if child in self.record.made:
                    directory.mark(fd)
                if "cpuset" in hierarchy.controllers and hierarchy.version == 1:
                    _inherit_cpuset(current, child)
                current = child
        return problems

    def _apply(self, settings: list[Setting]) -> None:
        """Write all settings. Some depend on others: what the kernel refuses first, it may take after the rest."""
        refused = [setting for setting in settings if not self._set(setting, final=False)]
        for setting in refused:
            self._set(setting, final=True)

    def _set(self, setting: Setting, *, final: bool) -> bool:
        """Write one setting. Returns False, where it is not ``final``, if the kernel refuses the value."""
        path = self._directory(setting.controller)
        choices = [(setting.file, setting.value), *([setting.otherwise] if setting.otherwise else [])]
        for file, value in choices:
            try:
                directory.write(f"{path}/{file}", value)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and not final:
                    return False
                kind, why = _ERRORS.get(error.errno or 0, (Unavailable, _reason(error)))
                raise kind(f"cannot set {file} of cgroup {printable(path or '')} to {shown(value)}: {why}") from error
            return True
        if setting.needless:
            return True
        raise Unsupported(f"cannot set {setting.file} of cgroup {printable(path or '')}: the kernel has no such file")

    def _directory(self, controller: str) -> str | None:
        hierarchy = self.layout.find(controller)
        return None if hierarchy is None else self.record.paths.get(_key(hierarchy))

    def _check_memory(self, limits: HostLimits) -> None:
        """Refuse a limit below what is in use: v1's kernel refuses it itself, v2's kills until it holds."""
        memory, limit = self._directory("memory"), limits.memory_bytes
        if memory is None or limit is None or limit < 0 or self._memory_version() == 1:
            return
        try:
            table = _table(f"{memory}/memory.stat")
            used = int(directory.read(f"{memory}/memory.current"))
        except OSError as error:
            raise Unavailable(
                f"cannot read the memory in use of cgroup {printable(memory)}: {_reason(error)}"
            ) from error
        # The page cache gives way. The guest's memory is shared memory, which is not in these two.
        used -= table.get("inactive_file", 0) + table.get("active_file", 0)
        if used > limit:
            raise InvalidState(f"cannot limit cgroup {printable(memory)} to {limit} bytes: {used} are in use")

    def _undo(self, home: Layout, pid: int | None) -> None:
        if pid is not None:
            _move(pid, home)
        record = self.record._replace(unit="")  # a scope without processes ends by itself; stopping it would kill
        for path in reversed(record.made):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        for path in record.paths.values():
            directory.remove_parents(path, record, self.layout)


def _move(pid: int, home: Layout) -> None:
    for hierarchy in home.hierarchies:
        path = hierarchy.own.rstrip("/")
        # Where a session has ended its cgroup is gone; one of its parents is not.
        while not _moved(pid, f"{hierarchy.mount.rstrip('/')}{path}") and path:
            path = os.path.dirname(path).rstrip("/")


def _moved(pid: int, path: str) -> bool:
    try:
        directory.write(f"{path}/cgroup.procs", str(pid))
    except OSError:
        return False
    return True


def _key(hierarchy: Hierarchy) -> str:
    return hierarchy.name or "unified"


def _absolute(hierarchy: Hierarchy, path: CgroupPath) -> str:
    return f"{hierarchy.mount.rstrip('/')}{path.within(hierarchy)}"


def _enable_controllers(path: str, problems: dict[str, str]) -> None:
    """Let the children of ``path`` have every controller that it can give; ``problems`` takes why one cannot."""
    available = directory.read(f"{path}/cgroup.controllers").split()
    enabled = directory.read(f"{path}/cgroup.subtree_control").split()
    missing = [name for name in _V2_CONTROLLERS if name in available and name not in enabled]
    busy = _is_busy(path) if missing else False
    for name in missing:
        if busy:
            problems[name] = f"{printable(path)}: has processes of its own"
            continue
        try:
            directory.write(f"{path}/cgroup.subtree_control", f"+{name}")
        except OSError as error:
            problems[name] = f"{printable(path)}: {_reason(error)}"


def _is_busy(path: str) -> bool:
    """Whether a v2 cgroup other than the root holds processes.

    The kernel would still enable cpu, cpuset and pids in it, but as a threaded domain, in which no other can be made.
    """
    try:
        return os.path.exists(f"{path}/cgroup.type") and bool(directory.read(f"{path}/cgroup.procs").strip())
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return True  # threaded already


def _check_v2(path: str, needed: set[str], problems: dict[str, str]) -> None:
    try:
        kind = directory.read(f"{path}/cgroup.type").strip()
        available = directory.read(f"{path}/cgroup.controllers").split()
    except OSError as error:
        raise Unavailable(f"cannot read cgroup {printable(path)}: {_reason(error)}") from error
    if kind != "domain":
        raise Unavailable(f"cannot use cgroup {printable(path)}: its type is {kind!r}, a parent is threaded")
    for name in sorted(needed.difference(available)):
        why = problems.get(name, "a parent does not give it")
        raise Unavailable(f"cannot limit {name} in cgroup {printable(path)}: cannot enable the controller in {why}")


def _inherit_cpuset(parent: str, child: str) -> None:
    """Fill an empty v1 cpuset from its parent's: no process can be added to an empty one."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        if not directory.read(f"{child}/{file}").strip():
            directory.write(f"{child}/{file}", directory.read(f"{parent}/{file}").strip())


def _table(path: str) -> dict[str, int]:
    pairs = (line.partition(" ") for line in directory.read(path).splitlines())
    return {key: int(value) for key, _, value in pairs}


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
