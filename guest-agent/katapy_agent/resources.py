"""The "resources" object of config.json: what a container may use, in the specification's cgroup v1 words.

It belongs to ``config`` and is refused there by the same rules; ``cgroups`` says the same to a cgroup v2. What v2
cannot do is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final

from katapy_agent.errors import InvalidArgument, Unsupported
from katapy_agent.schema import Range

_U32 = Annotated[int, Range(0, 2**32 - 1)]
_I64 = Annotated[int, Range(-(2**63), 2**63 - 1)]
_U64 = Annotated[int, Range(0, 2**64 - 1)]
_AnyOrNumber = Annotated[int, Range(-1, 2**31 - 1)]  # a device's major or minor; -1: any

_HUGEPAGE: Final = re.compile(r"[1-9]\d{0,4}[KMG]B", re.ASCII)
_CPU_LIST: Final = re.compile(r"[0-9,\n -]{0,1024}")
_UNIFIED: Final = re.compile(r"(?!cgroup\.)[a-z0-9_]+(\.[A-Za-z0-9_]+)+")


@dataclass(frozen=True)
class DeviceRule:
    """A rule of the device cgroup: the last one that matches decides. An empty type or access is all of them."""

    allow: bool
    type: str = "a"
    major: _AnyOrNumber = -1
    minor: _AnyOrNumber = -1
    access: str = "rwm"

    def __post_init__(self) -> None:
        if self.type not in ("", "a", "b", "c", "u"):
            raise InvalidArgument(f"type {self.type[:8]!r} is unknown")
        if set(self.access) - set("rwm"):
            raise InvalidArgument(f"access {self.access[:8]!r} is not made of r, w and m")


@dataclass(frozen=True)
class Memory:
    """Memory limits in bytes; -1 is none."""

    limit: _I64 = 0
    reservation: _I64 = 0
    swap: _I64 = 0
    kernel: _I64 = 0
    kernel_tcp: _I64 = 0
    swappiness: _U64 | None = None
    disable_oom_killer: bool = False
    use_hierarchy: bool = True
    check_before_update: bool = False  # a new cgroup uses nothing: there is nothing to compare

    def __post_init__(self) -> None:
        if self.kernel > 0 or self.kernel_tcp > 0:
            raise Unsupported("kernel and kernelTCP are not supported: cgroup v2 has no limit of kernel memory")
        if self.swappiness is not None:
            raise Unsupported("swappiness is not supported: cgroup v2 has no such file")
        if self.disable_oom_killer:
            raise Unsupported("disableOOMKiller is not supported: cgroup v2 cannot")
        if not self.use_hierarchy:
            raise Unsupported("useHierarchy false is not supported: cgroup v2 is a hierarchy")
        if min(self.limit, self.reservation, self.swap) < -1:
            raise InvalidArgument("a limit is below -1")


@dataclass(frozen=True)
class CPU:
    """CPU limits; times in microseconds."""

    shares: _U64 = 0
    quota: _I64 = 0
    burst: _U64 | None = None
    period: _U64 = 0
    realtime_runtime: _I64 = 0
    realtime_period: _U64 = 0
    cpus: str = ""
    mems: str = ""
    idle: Annotated[int, Range(0, 1)] | None = None

    def __post_init__(self) -> None:
        if self.realtime_runtime or self.realtime_period:
            raise Unsupported("realtimeRuntime and realtimePeriod are not supported: cgroup v2 has no such files")
        for name, value in (("cpus", self.cpus), ("mems", self.mems)):
            if not _CPU_LIST.fullmatch(value):
                raise InvalidArgument(f"{name} {value[:64]!r} is not a list of numbers and ranges")


@dataclass(frozen=True)
class Pids:
    """Limit of the number of tasks; -1 is none."""

    limit: _I64 = 0


@dataclass(frozen=True)
class WeightDevice:
    """I/O weight of one block device."""

    major: _U32
    minor: _U32
    weight: Annotated[int, Range(10, 1000)]

    REFUSED: ClassVar = ("leafWeight",)


@dataclass(frozen=True)
class ThrottleDevice:
    """I/O rate of one block device, in bytes or operations a second; 0 is none."""

    major: _U32
    minor: _U32
    rate: _U64


@dataclass(frozen=True)
class BlockIO:
    """I/O weights and rates; devices are the guest's."""

    weight: Annotated[int, Range(0, 1000)] = 0
    weight_device: tuple[WeightDevice, ...] = ()
    throttle_read_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_write_bps_device: tuple[ThrottleDevice, ...] = ()
    throttle_read_iops_device: tuple[ThrottleDevice, ...] = ()
    throttle_write_iops_device: tuple[ThrottleDevice, ...] = ()

    REFUSED: ClassVar = ("leafWeight",)

    def __post_init__(self) -> None:
        if 0 < self.weight < 10:
            raise InvalidArgument("weight is not between 10 and 1000")


@dataclass(frozen=True)
class HugepageLimit:
    """Limit in bytes of huge pages of one size, written as 2MB or 1GB."""

    page_size: str
    limit: _U64

    def __post_init__(self) -> None:
        if not _HUGEPAGE.fullmatch(self.page_size):
            raise InvalidArgument(f"pageSize {self.page_size[:32]!r} is no page size such as 2MB")


@dataclass(frozen=True)
class Resources:
    """Limits of a container, in the specification's cgroup v1 words."""

    devices: tuple[DeviceRule, ...] = ()
    memory: Memory = Memory()
    cpu: CPU = CPU()
    pids: Pids = Pids()
    block_io: BlockIO = BlockIO()
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    unified: Mapping[str, str] = field(default_factory=dict)

    REFUSED: ClassVar = ("network", "rdma")

    def __post_init__(self) -> None:
        for name in self.unified:
            if not _UNIFIED.fullmatch(name):
                raise InvalidArgument(f"unified {name[:64]!r} is no file of a cgroup controller")
