"""What the host enforces on a pod's processes, and which value in which file that is. Pure: nothing is written here.

The numbers are the runtime specification's (cgroup v1 terms); the conversions to v2 are runc's, so that a number
means the same there and here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from katapy.cgroups.layout import Layout
from katapy.errors import InvalidArgument, Unsupported

_SHARES: Final = (2, 262144)  # the kernel's bounds
NO_LIMIT: Final = -1
_MIB: Final = 1 << 20
# What the pod's processes use beside the guest's memory; docs/cgroups.md has the measurement.
_OVERHEAD: Final = 128 * _MIB
_EMULATION: Final = 160 * _MIB


class DeviceValue(NamedTuple):
    """A weight, or a rate in bytes or operations a second, of one block device; a rate of 0 is no limit."""

    major: int
    minor: int
    value: int


@dataclass(frozen=True)
class HostLimits:
    """Limits of QEMU and its helpers together. None is unset and left as it is, -1 takes a limit away.

    ``memory_bytes`` is the VM's RAM with the overhead of QEMU and its helpers; ``memory_swap_bytes`` is memory and
    swap together, and so includes the overhead as well. Times are microseconds, weights 10 to 1000. ``pids`` counts
    the threads of QEMU and its helpers. ``hugetlb`` is bytes by page size ("2MB").
    """

    memory_bytes: int | None = None
    memory_swap_bytes: int | None = None
    cpu_shares: int | None = None
    cpu_quota: int | None = None
    cpu_period: int | None = None
    cpu_burst: int | None = None
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    pids: int | None = None
    io_weight: int | None = None
    io_weight_devices: tuple[DeviceValue, ...] = ()
    read_bps: tuple[DeviceValue, ...] = ()
    write_bps: tuple[DeviceValue, ...] = ()
    read_iops: tuple[DeviceValue, ...] = ()
    write_iops: tuple[DeviceValue, ...] = ()
    hugetlb: tuple[tuple[str, int], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is limited."""
        return self == HostLimits()


class Setting(NamedTuple):
    """``value`` goes into ``file`` of ``controller``'s directory.

    Where the kernel has no such file, ``otherwise`` is another file and value; a ``needless`` setting is then skipped.
    """

    controller: str
    file: str
    value: str
    otherwise: tuple[str, str] | None = None
    needless: bool = False


def pod_memory(vm_bytes: int, *, emulated: bool) -> int:
    """Return the ``memory_bytes`` for a VM of ``vm_bytes``: room for QEMU, virtiofsd, the vsock device and the shim.

    ``emulated`` is without hardware virtualization: QEMU then keeps up to 128 MiB of translated code.
    """
    # QEMU and virtiofsd both map the guest's memory: 8 bytes of page table for 4096 each.
    return vm_bytes + 2 * (vm_bytes >> 9) + _OVERHEAD + (_EMULATION if emulated else 0)


def plan_limits(layout: Layout, limits: HostLimits) -> list[Setting]:
    """Return what is written where, in order. Raises InvalidArgument, and Unsupported where no controller has it."""
    settings = [
        *_memory(limits, _version(layout, "memory")),
        *_cpu(limits, _version(layout, "cpu")),
        *_cpuset(limits),
        *_pids(limits),
        *(_io_v2(limits) if _version(layout, "io") == 2 else _io_v1(limits)),
        *_hugetlb(limits, _version(layout, "hugetlb")),
    ]
    for setting in settings:
        hierarchy = layout.find(setting.controller)
        if hierarchy is None:
            what = "block I/O" if setting.controller == "blkio" else setting.controller
            raise Unsupported(f"cannot limit {what} on this host: no mounted cgroup hierarchy has its controller")
        if not hierarchy.writable:
            raise Unsupported(f"cannot limit {setting.controller} on this host: {hierarchy.mount} is read-only")
    return settings


def _version(layout: Layout, controller: str) -> int:
    hierarchy = layout.find(controller)
    return 1 if hierarchy is None else hierarchy.version


def _memory(limits: HostLimits, version: int) -> Iterator[Setting]:
    limit, swap = limits.memory_bytes, limits.memory_swap_bytes
    if limit == NO_LIMIT and swap is None:
        swap = NO_LIMIT
    if limit is not None and limit > 0 and swap is not None and 0 <= swap < limit:
        raise InvalidArgument("cannot limit memory and swap to less than memory alone")
    if swap is not None:
        if version == 1:
            yield Setting("memory", "memory.memsw.limit_in_bytes", str(swap), needless=swap == NO_LIMIT)
        else:
            alone = _swap_alone(limit, swap)
            yield Setting("memory", "memory.swap.max", _max(alone), needless=alone in (0, NO_LIMIT))
    if limit is not None:
        file = "memory.limit_in_bytes" if version == 1 else "memory.max"
        yield Setting("memory", file, str(limit) if version == 1 else _max(limit))


def _swap_alone(limit: int | None, swap: int) -> int:
    """Return v2's limit of swap; the specification's counts memory with it."""
    if swap == NO_LIMIT:
        return NO_LIMIT
    if limit is None or limit == NO_LIMIT:
        raise InvalidArgument("cannot limit memory and swap together without a limit of memory")
    return swap - limit


def _cpu(limits: HostLimits, version: int) -> Iterator[Setting]:
    if limits.cpu_shares is not None:
        shares = min(max(limits.cpu_shares, _SHARES[0]), _SHARES[1])
        yield Setting(
            "cpu", *(("cpu.shares", str(shares)) if version == 1 else ("cpu.weight", str(cpu_weight(shares))))
        )
    quota, period = limits.cpu_quota, limits.cpu_period
    if version == 1:
        if limits.cpu_burst == 0:
            yield Setting("cpu", "cpu.cfs_burst_us", "0", needless=True)
        if period is not None:
            yield Setting("cpu", "cpu.cfs_period_us", str(period))
        if quota is not None:
            yield Setting("cpu", "cpu.cfs_quota_us", str(quota))
        if limits.cpu_burst:
            yield Setting("cpu", "cpu.cfs_burst_us", str(limits.cpu_burst))
        return
    if quota is not None or period is not None:
        # Without a period, the kernel keeps the one that it has.
        amount = "max" if quota is None else _max(quota)
        yield Setting("cpu", "cpu.max", amount if period is None else f"{amount} {period}")
    if limits.cpu_burst is not None:
        yield Setting("cpu", "cpu.max.burst", str(limits.cpu_burst), needless=limits.cpu_burst == 0)


def cpu_weight(shares: int) -> int:
    """Convert v1's shares, 2 to 262144, to v2's weight, 1 to 10000."""
    return 1 + (shares - 2) * 9999 // 262142


def _cpuset(limits: HostLimits) -> Iterator[Setting]:
    if limits.cpuset_cpus:
        yield Setting("cpuset", "cpuset.cpus", limits.cpuset_cpus)
    if limits.cpuset_mems:
        yield Setting("cpuset", "cpuset.mems", limits.cpuset_mems)


def _pids(limits: HostLimits) -> Iterator[Setting]:
    if limits.pids is not None:
        yield Setting("pids", "pids.max", _max(limits.pids))


def _io_v1(limits: HostLimits) -> Iterator[Setting]:
    if limits.io_weight is not None:
        weight = str(limits.io_weight)
        yield Setting("blkio", "blkio.weight", weight, ("blkio.bfq.weight", weight))
    for device in limits.io_weight_devices:
        line = _line(device)
        yield Setting("blkio", "blkio.weight_device", line, ("blkio.bfq.weight_device", line))
    for kind in ("read_bps", "write_bps", "read_iops", "write_iops"):
        for device in getattr(limits, kind):
            yield Setting("blkio", f"blkio.throttle.{kind}_device", _line(device))


def _io_v2(limits: HostLimits) -> Iterator[Setting]:
    if limits.io_weight is not None:
        weight = limits.io_weight
        yield Setting("io", "io.bfq.weight", str(weight), ("io.weight", str(_io_weight(weight))))
    for device in limits.io_weight_devices:
        scaled = device._replace(value=_io_weight(device.value))
        yield Setting("io", "io.bfq.weight", _line(device), ("io.weight", _line(scaled)))
    for kind, key in (("read_bps", "rbps"), ("write_bps", "wbps"), ("read_iops", "riops"), ("write_iops", "wiops")):
        for device in getattr(limits, kind):
            yield Setting("io", "io.max", f"{device.major}:{device.minor} {key}={device.value or 'max'}")


def _io_weight(weight: int) -> int:
    """Convert a weight of 10 to 1000 to io.weight's 1 to 10000."""
    return 1 + (weight - 10) * 9999 // 990


def _hugetlb(limits: HostLimits, version: int) -> Iterator[Setting]:
    for size, limit in limits.hugetlb:
        value, suffix = (str(limit), "limit_in_bytes") if version == 1 else (_max(limit), "max")
        yield Setting("hugetlb", f"hugetlb.{size}.{suffix}", value)
        # A page is reserved before it is used: without this limit too, a process would be killed instead of refused.
        yield Setting("hugetlb", f"hugetlb.{size}.rsvd.{suffix}", value, needless=True)


def _line(device: DeviceValue) -> str:
    return f"{device.major}:{device.minor} {device.value}"


def _max(value: int) -> str:
    return "max" if value < 0 else str(value)
