"""One cgroup v2 leaf per container: limits, device program, processes, statistics, end.

It owns /sys/fs/cgroup/katapy and everything below it, and says the specification's v1 words in v2 (the conversions
are runc's, so that a number means the same there and here). The cgroup hierarchy itself is mounted by init.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import select
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy_agent import devices, linux
from katapy_agent.errors import InvalidArgument, InvalidState, Timeout, Unsupported, doing
from katapy_agent.resources import CPU, BlockIO, Memory, Resources, ThrottleDevice

ROOT: Final = Path("/sys/fs/cgroup")
NO_LIMIT: Final = 2**64 - 1
_PARENT: Final = "katapy"
# Of a file of a cgroup that is removed: before it is opened, and after that.
_GONE: Final = (errno.ENOENT, errno.ENODEV)
# A container may be called cgroup.procs.
_PREFIX: Final = "container-"
_NAME: Final = re.compile(r"[A-Za-z0-9_.+-]{1,200}")
_REMOVE_SECONDS: Final = 10.0
_FREEZE_SECONDS: Final = 10.0  # a process in the middle of a slow read is frozen after that
# Of the cgroups that a container makes itself: room for an init system or for containers in it.
_NESTED: Final = (("cgroup.max.depth", "32"), ("cgroup.max.descendants", "1024"))
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class CpuStats:
    """Microseconds of CPU time, and how often the quota was hit."""

    usage_usec: int = 0
    user_usec: int = 0
    system_usec: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled_usec: int = 0


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of memory; a limit of 2^64-1 is none, a peak of 0 is not told by the kernel."""

    usage_bytes: int
    limit_bytes: int
    peak_bytes: int
    swap_bytes: int
    stat: dict[str, int]
    oom_events: int
    oom_kills: int
    swap_limit_bytes: int


@dataclass(frozen=True)
class PidsStats:
    """Number of tasks; a limit of 2^64-1 is none. ``failures`` is how often one was refused for the limit."""

    current: int
    limit: int
    failures: int


@dataclass(frozen=True)
class IoStats:
    """Bytes and operations of one block device."""

    major: int
    minor: int
    read_bytes: int
    write_bytes: int
    reads: int
    writes: int


@dataclass(frozen=True)
class HugetlbStats:
    """Bytes in huge pages of one size."""

    page_size: str
    usage_bytes: int
    limit_bytes: int
    failures: int


@dataclass(frozen=True)
class Stats:
    """What a container has used; mirrors StatsContainerResponse of agent.proto."""

    cpu: CpuStats
    memory: MemoryStats
    pids: PidsStats
    io: tuple[IoStats, ...]
    hugetlb: tuple[HugetlbStats, ...]


def plan_limits(resources: Resources) -> list[tuple[str, str]]:
    """Return what is written into which file of the leaf, in order. Raises InvalidArgument and Unsupported."""
    return [
        *_plan_cpu(resources.cpu),
        *_plan_memory(resources.memory),
        *([("pids.max", _limit(resources.pids.limit))] if resources.pids.limit else []),
        *_plan_io(resources.block_io),
        *((f"hugetlb.{each.page_size}.max", str(each.limit)) for each in resources.hugepage_limits),
        *((name, line) for name, value in resources.unified.items() for line in value.splitlines()),
    ]


def _plan_cpu(cpu: CPU) -> Iterator[tuple[str, str]]:
    if cpu.idle is not None:
        yield "cpu.idle", str(cpu.idle)
    if cpu.shares:
        shares = min(max(cpu.shares, 2), 262144)
        yield "cpu.weight", str(1 + (shares - 2) * 9999 // 262142)
    if cpu.quota or cpu.period:
        yield "cpu.max", f"{cpu.quota if cpu.quota > 0 else 'max'} {cpu.period or 100000}"
    if cpu.burst is not None:
        yield "cpu.max.burst", str(cpu.burst)
    if cpu.cpus:
        yield "cpuset.cpus", cpu.cpus
    if cpu.mems:
        yield "cpuset.mems", cpu.mems


def _plan_memory(memory: Memory) -> Iterator[tuple[str, str]]:
    swap = _swap(memory)
    if swap is not None:
        yield "memory.swap.max", _limit(swap)
    if memory.limit:
        yield "memory.max", _limit(memory.limit)
    if memory.reservation:
        yield "memory.low", _limit(memory.reservation)


def _swap(memory: Memory) -> int | None:
    """Return the limit of swap alone: the specification's counts memory and swap together, and 0 is unset."""
    if memory.swap == 0:
        return -1 if memory.limit == -1 else None
    if memory.swap == -1:
        return -1
    if memory.limit <= 0:
        raise InvalidArgument("linux.resources.memory.swap needs a memory limit")
    if memory.swap < memory.limit:
        raise InvalidArgument("linux.resources.memory.swap is below the memory limit, which it includes")
    return memory.swap - memory.limit


def _plan_io(block_io: BlockIO) -> Iterator[tuple[str, str]]:
    if block_io.weight:
        yield "io.bfq.weight", str(block_io.weight)
    for device in block_io.weight_device:
        yield "io.bfq.weight", f"{device.major}:{device.minor} {device.weight}"
    throttles: tuple[tuple[str, tuple[ThrottleDevice, ...]], ...] = (
        ("rbps", block_io.throttle_read_bps_device),
        ("wbps", block_io.throttle_write_bps_device),
        ("riops", block_io.throttle_read_iops_device),
        ("wiops", block_io.throttle_write_iops_device),
    )
    for key, limits in throttles:
        for limit in limits:
            yield "io.max", f"{limit.major}:{limit.minor} {key}={limit.rate or 'max'}"


def _limit(value: int) -> str:
    return "max" if value < 0 else str(value)


class Cgroup:
    """The leaf of one container."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, name: str, resources: Resources, *, root: Path = ROOT) -> Cgroup:
        """Make a leaf with all its limits and its device program, before any process is in it.

        ``root`` is where cgroup v2 is mounted. Nothing is left when it fails. Raises InvalidArgument for a name that
        is none or a limit that the kernel refuses, AlreadyExists, Unsupported where the kernel lacks a limit's file.
        """
        if not _NAME.fullmatch(name):
            raise InvalidArgument(f"cgroup name {name[:64]!r} is invalid")
        limits = plan_limits(resources)
        program = devices.assemble(resources.devices)
        parent = root / _PARENT
        with doing(f"make cgroup {name}"):
            parent.mkdir(mode=0o755, exist_ok=True)
            _enable_controllers(root)
            _enable_controllers(parent)
            path = parent / f"{_PREFIX}{name}"
            path.mkdir(mode=0o755)
        cgroup = cls(path)
        with contextlib.ExitStack() as undo:
            undo.callback(cgroup.remove)
            for file, value in (*_NESTED, *limits):
                cgroup._set(file, value)
            cgroup._attach(program)
            undo.pop_all()
        return cgroup

    @property
    def memory_events(self) -> Path:
        """The file that the kernel marks as modified at every out-of-memory event."""
        return self.path / "memory.events"

    def oom_kills(self) -> int:
        """Return how many processes of the container the kernel has killed for want of memory."""
        return self._table("memory.events").get("oom_kill", 0)

    def pids(self) -> list[int]:
        """Return the processes in the leaf and in cgroups that the container made below it."""
        found: set[int] = set()
        for parent, name in self._walk():
            # A cgroup may go away between the listing and the reading, and a threaded one has no such list.
            with contextlib.suppress(OSError):
                fd = os.open(f"{name}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=parent)
                with os.fdopen(fd) as procs:
                    found.update(map(int, procs.read().split()))
        return sorted(found)

    def limit_pids(self, number: int) -> None:
        """Let so many processes be in it, and in those below it."""
        self._set("pids.max", str(number))

    def kill(self) -> None:
        """Send SIGKILL to every process in the leaf and below it, at once. Does nothing when it is gone."""
        with doing(f"kill what is in cgroup {self.path.name}"):
            try:
                _write(self.path / "cgroup.kill", "1")
            except OSError as error:
                if error.errno not in _GONE:
                    raise

    def update(self, resources: Resources) -> None:
        """Change the limits that ``resources`` names; when one cannot be changed, none is.

        Raises InvalidArgument, Unsupported, and InvalidState for a memory limit that ``check_before_update`` forbids.
        """
        resources = self._completed(resources)
        memory = resources.memory
        if memory.check_before_update and 0 < memory.limit <= (usage := self._number("memory.current")):
            raise InvalidState(f"memory limit {memory.limit} is not above what is in use: {usage}")
        limits = plan_limits(resources)
        if resources.cpu.burst is not None:
            # The kernel wants it below the quota, the old one as well as the new one.
            limits.insert(0, ("cpu.max.burst", "0"))
        with contextlib.ExitStack() as undo:
            for file, value in limits:
                before = self._before(file, value)
                self._set(file, value)
                undo.callback(self._set, *before)
            undo.pop_all()

    def freeze(self, *, timeout: float = _FREEZE_SECONDS) -> None:
        """Stop every process in the leaf and below it, and return when all have stopped.

        Where one has not after ``timeout`` seconds all go on, and Timeout is raised.
        """
        try:
            self._set_frozen(True, timeout)
        except BaseException:
            _write(self.path / "cgroup.freeze", "0")
            raise

    def thaw(self, *, timeout: float = _FREEZE_SECONDS) -> None:
        """Let every process in the leaf and below it go on. Raises Timeout."""
        self._set_frozen(False, timeout)

    def remove(self, *, timeout: float = _REMOVE_SECONDS) -> None:
        """Wait until the leaf is empty (``timeout`` in seconds) and remove it. Does nothing when it is gone.

        Raises Timeout when processes stay in it.
        """
        if not self.path.exists():
            return
        if not self._wait_event("populated 0", timeout):
            raise Timeout(f"cgroup {self.path.name} still holds processes after {timeout:g} s")
        with doing(f"remove cgroup {self.path.name}"):
            for parent, name in self._walk():
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(name, dir_fd=parent)

    def stats(self) -> Stats:
        """Return what the container has used."""
        return Stats(self._cpu(), self._memory(), self._pids_stats(), self._io(), self._hugetlb())

    def _set(self, file: str, value: str) -> None:
        path = self.path / file
        if file == "io.bfq.weight" and not path.exists():
            path, value = self.path / "io.weight", _io_weight(value)
        if file.startswith("memory.swap.") and value in ("0", "max") and not path.exists():
            return  # no swap at all is both
        if not path.exists():
            raise Unsupported(f"cannot set {path.name} of cgroup {self.path.name}: the guest's kernel has no such file")
        with doing(f"set {path.name} of cgroup {self.path.name} to {value[:64]!r}"):
            _write(path, value)
        if file.startswith("hugetlb."):
            reserved = path.with_suffix(".rsvd.max")
            if reserved.exists():
                with doing(f"set {reserved.name} of cgroup {self.path.name}"):
                    _write(reserved, value)

    def _completed(self, resources: Resources) -> Resources:
        """Return ``resources`` with the other half, as it is now, of what is given by half in one file."""
        cpu, memory = resources.cpu, resources.memory
        quota, _, period = self._read("cpu.max").strip().partition(" ")
        if cpu.quota and not cpu.period and period:
            cpu = dataclasses.replace(cpu, period=int(period))
        elif cpu.period and not cpu.quota and quota:
            cpu = dataclasses.replace(cpu, quota=-1 if quota == "max" else int(quota))
        if memory.swap > 0 and not memory.limit and (limit := self._number("memory.max")) != NO_LIMIT:
            memory = dataclasses.replace(memory, limit=limit)
        return dataclasses.replace(resources, cpu=cpu, memory=memory)

    def _before(self, file: str, value: str) -> tuple[str, str]:
        """Return the file, and what has to be written to it to undo that ``value`` is written to ``file``."""
        if file == "io.bfq.weight" and not (self.path / file).exists():
            file = "io.weight"
        text = self._read(file)
        if not file.startswith("io."):
            return file, text.strip() or "\n"
        # One line for each device, of which a write changes one.
        key = value.split(maxsplit=1)[0] if ":" in value else "default"
        unset = "rbps=max wbps=max riops=max wiops=max" if file == "io.max" else "default"
        return file, next((line for line in text.splitlines() if line.split()[0] == key), f"{key} {unset}")

    def _attach(self, program: bytes) -> None:
        with doing(f"attach the device program to cgroup {self.path.name}"), contextlib.ExitStack() as stack:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, directory)
            loaded = linux.bpf_load_device_program(program)
            stack.callback(os.close, loaded)
            linux.bpf_attach_device_program(directory, loaded)

    def _set_frozen(self, frozen: bool, timeout: float) -> None:
        verb = "freeze" if frozen else "thaw"
        with doing(f"{verb} cgroup {self.path.name}"):
            _write(self.path / "cgroup.freeze", str(int(frozen)))
        if not self._wait_event(f"frozen {int(frozen)}", timeout):
            raise Timeout(f"cannot {verb} cgroup {self.path.name}: it takes more than {timeout:g} s")

    def _wait_event(self, wanted: str, timeout: float) -> bool:
        """Wait until cgroup.events has the line ``wanted``; False where it has not after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with doing(f"watch cgroup {self.path.name}"), (self.path / "cgroup.events").open() as events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while wanted not in events.read().splitlines():
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
                events.seek(0)
        return True

    def _walk(self) -> Iterator[tuple[int, str]]:
        """Yield all cgroups below the leaf and then itself, children first: a descriptor of the parent, and the name.

        Neither recursive nor by paths: how deep a container nests its cgroups, and how it calls them, is its choice.
        """
        # From the leaf's parent down: an open directory, and the names in it that are still to come.
        way = [(os.open(self.path.parent, _DIRECTORY), [self.path.name])]
        try:
            while way:
                directory, names = way[-1]
                if not names:
                    os.close(way.pop()[0])
                    if way:
                        yield way[-1][0], way[-1][1].pop()
                elif below := _open_cgroup(directory, names[-1]):
                    way.append(below)
                else:
                    names.pop()
        finally:
            for directory, _ in way:
                os.close(directory)

    def _cpu(self) -> CpuStats:
        table = self._table("cpu.stat")
        keys = ("usage_usec", "user_usec", "system_usec", "nr_periods", "nr_throttled", "throttled_usec")
        return CpuStats(*(table.get(key, 0) for key in keys))

    def _memory(self) -> MemoryStats:
        events = self._table("memory.events")
        return MemoryStats(
            usage_bytes=self._number("memory.current"),
            limit_bytes=self._number("memory.max", missing=NO_LIMIT),
            peak_bytes=self._number("memory.peak"),
            swap_bytes=self._number("memory.swap.current"),
            stat=self._table("memory.stat"),
            oom_events=events.get("oom", 0),
            oom_kills=events.get("oom_kill", 0),
            swap_limit_bytes=self._number("memory.swap.max", missing=NO_LIMIT),
        )

    def _pids_stats(self) -> PidsStats:
        failures = self._table("pids.events").get("max", 0)
        return PidsStats(self._number("pids.current"), self._number("pids.max", missing=NO_LIMIT), failures)

    def _io(self) -> tuple[IoStats, ...]:
        found = []
        for line in self._read("io.stat").splitlines():
            device, *pairs = line.split()
            major, _, minor = device.partition(":")
            # A line without figures, or the figures of some I/O controllers alone, is legal.
            table = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs) if value.isdigit()}
            keys = ("rbytes", "wbytes", "rios", "wios")
            found.append(IoStats(int(major), int(minor), *(table.get(key, 0) for key in keys)))
        return tuple(found)

    def _hugetlb(self) -> tuple[HugetlbStats, ...]:
        found = []
        paths: list[Path] = []
        with contextlib.suppress(FileNotFoundError):
            paths = sorted(self.path.glob("hugetlb.*.current"))
        for path in paths:
            if path.name.count(".") == 2:  # not hugetlb.2MB.rsvd.current
                prefix = path.name.removesuffix(".current")
                usage, limit = self._number(path.name), self._number(f"{prefix}.max", missing=NO_LIMIT)
                failures = self._table(f"{prefix}.events").get("max", 0)
                found.append(HugetlbStats(prefix.removeprefix("hugetlb."), usage, limit, failures))
        return tuple(found)

    def _read(self, file: str) -> str:
        try:
            return (self.path / file).read_text()
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return ""

    def _number(self, file: str, *, missing: int = 0) -> int:
        text = self._read(file).strip()
        return NO_LIMIT if text == "max" else int(text or missing)

    def _table(self, file: str) -> dict[str, int]:
        return {key: int(value) for key, _, value in (line.partition(" ") for line in self._read(file).splitlines())}


def enter(leaf: str, *, beside: int | None = None) -> None:
    """Move this process into the cgroup ``leaf``, or into the one below it that the process ``beside`` is in.

    The latter where the container has given controllers to cgroups of its own: then the kernel lets no process into
    the leaf itself (cgroups(7), "no internal processes"). So does runc. Raises KatapyError.
    """
    with doing(f"enter cgroup {leaf}"), contextlib.ExitStack() as stack:
        directory = os.open(leaf, _DIRECTORY)
        stack.callback(os.close, directory)
        try:
            _enter(directory, "cgroup.procs")
        except OSError as error:
            if beside is None or error.errno != errno.EBUSY:
                raise
            membership = os.fsdecode(Path(f"/proc/{beside}/cgroup").read_bytes())
            _enter(directory, f"{find_below(leaf, membership)}/cgroup.procs")


def find_below(leaf: str, membership: str) -> str:
    """Return where below ``leaf`` the process is whose /proc/<pid>/cgroup reads ``membership``; "." is the leaf itself.

    The names are the container's choice. Raises InvalidState when it is somewhere else.
    """
    prefix = f"0::/{_PARENT}/{os.path.basename(leaf)}"
    for line in membership.split("\n"):
        if line == prefix or line.startswith(f"{prefix}/"):
            return line.removeprefix(prefix).removeprefix("/") or "."
    raise InvalidState(f"the container's init is not below cgroup {leaf}")


def _enter(leaf: int, procs: str) -> None:
    resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV
    fd = linux.openat2(leaf, procs, os.O_WRONLY, resolve=resolve)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def _open_cgroup(parent: int, name: str) -> tuple[int, list[str]] | None:
    """Open a cgroup and return it with the names of those in it; None when it is gone."""
    with contextlib.ExitStack() as undo, contextlib.suppress(FileNotFoundError):
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
        undo.callback(os.close, directory)
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        undo.pop_all()
        return directory, names
    return None


def _io_weight(value: str) -> str:
    """Convert a weight of 10 to 1000, after a device or alone, to io.weight's 1 to 10000."""
    *device, weight = value.split()
    return " ".join([*device, str(1 + (int(weight) - 10) * 9999 // 990)])


def _enable_controllers(directory: Path) -> None:
    available = (directory / "cgroup.controllers").read_text().split()
    enabled = (directory / "cgroup.subtree_control").read_text().split()
    if missing := sorted({*available} - {*enabled}):
        _write(directory / "cgroup.subtree_control", " ".join(f"+{name}" for name in missing))


def _write(path: Path, value: str) -> None:
    # One write, and never a new file: a cgroup file's value is what one write(2) carries.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
