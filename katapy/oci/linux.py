"""The ``linux`` section of config.json as frozen dataclasses (runtime-spec 1.2, config-linux.md).

Only what can be judged from the document alone is checked here: types, ranges, forms, duplicates. What the guest's
kernel can honour is for the guest agent to say. In resources, the zero and -1 that engines write for "no limit" are
read as None.
"""

from __future__ import annotations

import itertools
from typing import Final, NamedTuple

from katapy.errors import Unsupported
from katapy.jsonfile import shown
from katapy.oci.node import (
    ID_MAX,
    INT64_MAX,
    Node,
    absolute_path,
    boolean,
    identity,
    int64,
    integer,
    mapping,
    matching,
    one_of,
    required_text,
    text,
    uint32,
    uint64,
)

NAMESPACES: Final = ("cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts")
# The kernel's upper bound for NR_CPUS and for memory nodes is 8192.
_LAST_CPU: Final = 8191
_PROPAGATIONS: Final = ("", *(r + kind for r in ("", "r") for kind in ("private", "shared", "slave", "unbindable")))
_DEVICE_MAX: Final = (1 << 31) - 1


class Namespace(NamedTuple):
    """A namespace: a new one, or with ``path`` the one that is there on the host."""

    type: str
    path: str = ""


class IdMapping(NamedTuple):
    """``size`` ids, from ``container_id`` in the container on, are ``host_id`` and following outside."""

    container_id: int
    host_id: int
    size: int


class TimeOffset(NamedTuple):
    """Offset of a clock in a time namespace."""

    seconds: int
    nanoseconds: int


class Device(NamedTuple):
    """A device node to create; ``type`` is c, b, u or p."""

    path: str
    type: str
    major: int
    minor: int
    file_mode: int | None
    uid: int | None
    gid: int | None


class DeviceRule(NamedTuple):
    """A rule of the device controller; a number of None is every one."""

    allow: bool
    type: str
    major: int | None
    minor: int | None
    access: str


class Memory(NamedTuple):
    """Memory limits in bytes; None is no limit."""

    limit: int | None
    reservation: int | None
    swap: int | None
    kernel: int | None
    kernel_tcp: int | None
    swappiness: int | None
    disable_oom_killer: bool
    use_hierarchy: bool
    check_before_update: bool


class Cpu(NamedTuple):
    """CPU limits; times in microseconds, None is unset."""

    shares: int | None
    quota: int | None
    period: int | None
    burst: int | None
    realtime_runtime: int | None
    realtime_period: int | None
    cpus: str
    mems: str
    idle: int | None

    @property
    def vcpus(self) -> float | None:
        """How many CPUs the quota is worth; None without one. The kernel's default period is 100 ms."""
        return None if self.quota is None else self.quota / (self.period or 100_000)


class WeightDevice(NamedTuple):
    """Weight of one block device."""

    major: int
    minor: int
    weight: int


class ThrottleDevice(NamedTuple):
    """Rate of one block device, bytes or operations a second."""

    major: int
    minor: int
    rate: int


class BlockIo(NamedTuple):
    """Weights and rates of block devices."""

    weight: int | None
    weight_devices: tuple[WeightDevice, ...]
    read_bps: tuple[ThrottleDevice, ...]
    write_bps: tuple[ThrottleDevice, ...]
    read_iops: tuple[ThrottleDevice, ...]
    write_iops: tuple[ThrottleDevice, ...]


class HugepageLimit(NamedTuple):
    """Limit in bytes of one huge page size."""

    page_size: str
    limit: int


class Network(NamedTuple):
    """Class and priorities of the container's packets."""

    class_id: int | None
    priorities: tuple[tuple[str, int], ...]


class Rdma(NamedTuple):
    """Limits of one RDMA device."""

    hca_handles: int | None
    hca_objects: int | None


class Resources(NamedTuple):
    """Limits of the container (cgroup v1 terms, as the runtime-spec has them); an absent controller is None."""

    devices: tuple[DeviceRule, ...]
    memory: Memory | None
    cpu: Cpu | None
    pids_limit: int | None
    block_io: BlockIo | None
    hugepage_limits: tuple[HugepageLimit, ...]
    network: Network | None
    rdma: dict[str, Rdma]
    unified: dict[str, str]


class Personality(NamedTuple):
    """Execution domain of the process."""

    domain: str
    flags: tuple[str, ...]


class IntelRdt(NamedTuple):
    """Cache and memory bandwidth allocation."""

    clos_id: str
    l3_cache_schema: str
    mem_bw_schema: str
    enable_cmt: bool
    enable_mbm: bool


def parse_namespaces(node: Node) -> tuple[Namespace, ...]:
    """Parse ``linux.namespaces``; a type may come once."""
    namespaces = tuple(_namespace(item) for item in node.items())
    _refuse_duplicates(node, [namespace.type for namespace in namespaces])
    return namespaces


def _namespace(node: Node) -> Namespace:
    kind = node.need("type", one_of(NAMESPACES))
    return Namespace(kind, node.get("path", absolute_path, "") if node.child("path").value else "")


def parse_id_mappings(node: Node) -> tuple[IdMapping, ...]:
    """Parse ``uidMappings`` or ``gidMappings``; no container id may be mapped twice."""
    mappings = tuple(_id_mapping(item) for item in node.items())
    ordered = sorted(mappings, key=lambda mapping: mapping.container_id)
    for first, second in itertools.pairwise(ordered):
        if first.container_id + first.size > second.container_id:
            node.fail(f"container id {second.container_id} is mapped twice")
    return mappings


def _id_mapping(node: Node) -> IdMapping:
    found = IdMapping(
        node.need("containerID", identity), node.need("hostID", identity), node.need("size", integer(1, ID_MAX + 1))
    )
    if max(found.container_id, found.host_id) + found.size - 1 > ID_MAX:
        node.fail(f"reaches beyond id {ID_MAX}")
    return found


def parse_time_offsets(node: Node) -> dict[str, TimeOffset]:
    """Parse ``linux.timeOffsets``."""
    for clock in node.members():
        if clock not in ("monotonic", "boottime"):
            node.fail(f"unknown clock {shown(clock)}")
    return {clock: node.need(clock, _time_offset) for clock in node.members()}


def _time_offset(node: Node) -> TimeOffset:
    return TimeOffset(node.get("secs", int64, 0), node.get("nanosecs", integer(0, 999_999_999), 0))


def parse_device(node: Node) -> Device:
    """Parse one of ``linux.devices``."""
    kind = node.need("type", one_of(("b", "c", "p", "u")))
    number = integer(0, _DEVICE_MAX)
    # A FIFO has no numbers; every other node needs them.
    read = node.need if kind != "p" else lambda key, parse: node.get(key, parse, 0)
    return Device(
        path=node.need("path", absolute_path),
        type=kind,
        major=read("major", number),
        minor=read("minor", number),
        file_mode=node.find("fileMode", uint32),
        uid=node.find("uid", identity),
        gid=node.find("gid", identity),
    )


def parse_sysctl(node: Node) -> dict[str, str]:
    """Parse ``linux.sysctl``: names in dots or slashes, never a path out of /proc/sys."""
    for name in node.members():
        parts = name.replace("/", ".").split(".")
        if not all(parts):
            node.fail(f"{shown(name)} is not a sysctl")
    return mapping(node)


def parse_personality(node: Node) -> Personality:
    """Parse ``linux.personality``."""
    return Personality(node.need("domain", one_of(("LINUX", "LINUX32"))), node.each("flags", text))


def parse_intel_rdt(node: Node) -> IntelRdt:
    """Parse ``linux.intelRdt``."""
    return IntelRdt(
        clos_id=node.get("closID", text, ""),
        l3_cache_schema=node.get("l3CacheSchema", text, ""),
        mem_bw_schema=node.get("memBwSchema", text, ""),
        enable_cmt=node.get("enableCMT", boolean, False),
        enable_mbm=node.get("enableMBM", boolean, False),
    )


parse_propagation: Final = one_of(_PROPAGATIONS)


def parse_resources(node: Node) -> Resources:
    """Parse ``linux.resources``."""
    return Resources(
        devices=node.each("devices", _device_rule),
        memory=node.find("memory", _memory),
        cpu=node.find("cpu", _cpu),
        pids_limit=node.find("pids", lambda pids: pids.get("limit", _limit, None)),
        block_io=node.find("blockIO", _block_io),
        hugepage_limits=node.get("hugepageLimits", _hugepage_limits, ()),
        network=node.find("network", _network),
        rdma=node.get("rdma", lambda rdma: {name: rdma.need(name, _rdma) for name in rdma.members()}, {}),
        unified=node.get("unified", _unified, {}),
    )


def _limit(node: Node) -> int | None:
    """A limit where 0 and -1 are the engines' ways to say that there is none."""
    value = integer(-1, INT64_MAX)(node)
    return value if value > 0 else None


def _device_rule(node: Node) -> DeviceRule:
    major, minor = (node.get(key, integer(-1, _DEVICE_MAX), -1) for key in ("major", "minor"))
    return DeviceRule(
        allow=node.need("allow", boolean),
        type=node.get("type", one_of(("", "a", "b", "c", "u")), "") or "a",
        major=None if major < 0 else major,
        minor=None if minor < 0 else minor,
        access=node.get("access", matching("[rwm]{0,3}", "of the letters r, w and m"), "") or "rwm",
    )


def _memory(node: Node) -> Memory:
    return Memory(
        limit=node.get("limit", _limit, None),
        reservation=node.get("reservation", _limit, None),
        swap=node.get("swap", _limit, None),
        kernel=node.get("kernel", _limit, None),
        kernel_tcp=node.get("kernelTCP", _limit, None),
        swappiness=node.find("swappiness", integer(0, 100)),
        disable_oom_killer=node.get("disableOOMKiller", boolean, False),
        use_hierarchy=node.get("useHierarchy", boolean, False),
        check_before_update=node.get("checkBeforeUpdate", boolean, False),
    )


def _cpu(node: Node) -> Cpu:
    quota = node.get("quota", _quota, None)
    return Cpu(
        shares=node.get("shares", integer(2, 262_144, unset=0), 0) or None,
        quota=quota,
        period=node.get("period", integer(1_000, 1_000_000, unset=0), 0) or None,
        burst=node.find("burst", uint64),
        realtime_runtime=node.get("realtimeRuntime", integer(-1, INT64_MAX), 0) or None,
        realtime_period=node.get("realtimePeriod", integer(0, INT64_MAX), 0) or None,
        cpus=node.get("cpus", _cpu_list, ""),
        mems=node.get("mems", _cpu_list, ""),
        idle=node.find("idle", integer(0, 1)),
    )


def _quota(node: Node) -> int | None:
    # Below one millisecond the kernel refuses; the upper bound is its max_cfs_quota in microseconds.
    value = integer(-1, (1 << 44) - 1)(node)
    if 0 < value < 1_000:
        node.fail(f"{value} is less than 1000 microseconds")
    return value if value > 0 else None


def _cpu_list(node: Node) -> str:
    """A list such as ``0-3,8``, as the kernel's cpuset files take it."""
    value = matching(r"|\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", "a list such as 0-3,8")(node)
    for part in filter(None, value.split(",")):
        first, _, last = part.partition("-")
        if int(first) > int(last or first):
            node.fail(f"{shown(part)} runs backwards")
        if int(last or first) > _LAST_CPU:
            node.fail(f"{shown(part)} is beyond {_LAST_CPU}")
    return value


def _block_io(node: Node) -> BlockIo:
    _refuse_leaf_weight(node)
    return BlockIo(
        weight=node.get("weight", _weight, None),
        weight_devices=node.each("weightDevice", _weight_device),
        read_bps=node.each("throttleReadBpsDevice", _throttle),
        write_bps=node.each("throttleWriteBpsDevice", _throttle),
        read_iops=node.each("throttleReadIOPSDevice", _throttle),
        write_iops=node.each("throttleWriteIOPSDevice", _throttle),
    )


def _weight(node: Node) -> int | None:
    return integer(10, 1_000, unset=0)(node) or None


def _weight_device(node: Node) -> WeightDevice:
    _refuse_leaf_weight(node)
    return WeightDevice(node.need("major", uint32), node.need("minor", uint32), node.need("weight", integer(10, 1_000)))


def _refuse_leaf_weight(node: Node) -> None:
    # Linux has none any more, and cgroup v2 never had.
    if node.get("leafWeight", _weight, None):
        node.child("leafWeight").fail("not supported", Unsupported)


def _throttle(node: Node) -> ThrottleDevice:
    return ThrottleDevice(node.need("major", uint32), node.need("minor", uint32), node.need("rate", uint64))


def _hugepage_limits(node: Node) -> tuple[HugepageLimit, ...]:
    size = matching(r"[1-9]\d{0,5}[KMG]B", "a huge page size such as 2MB")
    limits = tuple(HugepageLimit(item.need("pageSize", size), item.need("limit", uint64)) for item in node.items())
    _refuse_duplicates(node, [limit.page_size for limit in limits])
    return limits


def _network(node: Node) -> Network:
    return Network(
        node.find("classID", uint32),
        node.each("priorities", lambda item: (item.need("name", required_text), item.need("priority", uint32))),
    )


def _rdma(node: Node) -> Rdma:
    return Rdma(node.find("hcaHandles", uint32), node.find("hcaObjects", uint32))


def _unified(node: Node) -> dict[str, str]:
    for name in node.members():
        if "/" in name or name in ("", ".", ".."):
            node.fail(f"{shown(name)} is not the name of a cgroup file")
    return mapping(node)


def _refuse_duplicates(node: Node, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            node.items()[index].fail(f"{name} is given twice")
