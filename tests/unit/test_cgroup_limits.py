"""Which value goes into which file, for v1 and v2."""

from __future__ import annotations

from typing import Any

import pytest

from katapy.cgroups.layout import Hierarchy, Layout
from katapy.cgroups.limits import NO_LIMIT, DeviceValue, HostLimits, plan_limits, pod_memory
from katapy.errors import InvalidArgument, Unsupported

MIB = 1 << 20
NAMES = ("memory", "cpu", "cpuset", "pids", "hugetlb")
V1 = Layout(tuple(Hierarchy(1, f"/c/{name}", "/", (name,), writable=True) for name in (*NAMES, "blkio")))
V2 = Layout((Hierarchy(2, "/c", "/", (*NAMES, "io"), writable=True),))


def planned(layout: Layout, limits: dict[str, Any]) -> list[tuple[str, str]]:
    return [(setting.file, setting.value) for setting in plan_limits(layout, HostLimits(**limits))]


@pytest.mark.parametrize(
    ("limits", "v1", "v2"),
    [
        ({}, [], []),
        (
            {"memory_bytes": 64 * MIB, "memory_swap_bytes": 96 * MIB},
            [("memory.memsw.limit_in_bytes", str(96 * MIB)), ("memory.limit_in_bytes", str(64 * MIB))],
            [("memory.swap.max", str(32 * MIB)), ("memory.max", str(64 * MIB))],
        ),
        (
            {"memory_bytes": NO_LIMIT},
            [("memory.memsw.limit_in_bytes", "-1"), ("memory.limit_in_bytes", "-1")],
            [("memory.swap.max", "max"), ("memory.max", "max")],
        ),
        ({"cpu_shares": 2}, [("cpu.shares", "2")], [("cpu.weight", "1")]),
        ({"cpu_shares": 1024}, [("cpu.shares", "1024")], [("cpu.weight", "39")]),
        ({"cpu_shares": 10**9}, [("cpu.shares", "262144")], [("cpu.weight", "10000")]),
        (
            {"cpu_quota": 50_000, "cpu_period": 100_000},
            [("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "50000")],
            [("cpu.max", "50000 100000")],
        ),
        ({"cpu_quota": 50_000}, [("cpu.cfs_quota_us", "50000")], [("cpu.max", "50000")]),
        ({"cpu_quota": NO_LIMIT}, [("cpu.cfs_quota_us", "-1")], [("cpu.max", "max")]),
        (
            {"cpuset_cpus": "0-1", "cpuset_mems": "0"},
            [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")],
            [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")],
        ),
        ({"pids": 100}, [("pids.max", "100")], [("pids.max", "100")]),
        ({"pids": NO_LIMIT}, [("pids.max", "max")], [("pids.max", "max")]),
        ({"io_weight": 10}, [("blkio.weight", "10")], [("io.bfq.weight", "10")]),
        (
            {"io_weight_devices": (DeviceValue(8, 0, 1000),)},
            [("blkio.weight_device", "8:0 1000")],
            [("io.bfq.weight", "8:0 1000")],
        ),
        (
            {"read_bps": (DeviceValue(8, 0, MIB),), "write_iops": (DeviceValue(8, 16, 0),)},
            [
                ("blkio.throttle.read_bps_device", "8:0 1048576"),
                ("blkio.throttle.write_iops_device", "8:16 0"),
            ],
            [("io.max", "8:0 rbps=1048576"), ("io.max", "8:16 wiops=max")],
        ),
        (
            {"hugetlb": (("2MB", 4 * MIB),)},
            [("hugetlb.2MB.limit_in_bytes", "4194304"), ("hugetlb.2MB.rsvd.limit_in_bytes", "4194304")],
            [("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304")],
        ),
    ],
)
def test_plan(limits: dict[str, Any], v1: list[tuple[str, str]], v2: list[tuple[str, str]]) -> None:
    assert (planned(V1, limits), planned(V2, limits)) == (v1, v2)


def test_weights_have_another_file_where_the_scheduler_is_another() -> None:
    limits = HostLimits(io_weight=1000, io_weight_devices=(DeviceValue(8, 0, 10),))
    assert [each.otherwise for each in plan_limits(V1, limits)] == [
        ("blkio.bfq.weight", "1000"),
        ("blkio.bfq.weight_device", "8:0 10"),
    ]
    assert [each.otherwise for each in plan_limits(V2, limits)] == [("io.weight", "10000"), ("io.weight", "8:0 1")]


def test_each_controller_by_its_own_version() -> None:
    layout = Layout((V1.hierarchies[0], Hierarchy(2, "/c/unified", "/", ("hugetlb",), writable=True)))
    limits = {"memory_bytes": MIB, "hugetlb": (("2MB", 0),)}
    assert [file for file, _ in planned(layout, limits)][:2] == ["memory.limit_in_bytes", "hugetlb.2MB.max"]


@pytest.mark.parametrize("layout", [V1, V2])
def test_swap_includes_memory(layout: Layout) -> None:
    with pytest.raises(InvalidArgument, match="less than memory alone"):
        planned(layout, {"memory_bytes": 2 * MIB, "memory_swap_bytes": MIB})


def test_v2_cannot_limit_the_sum_alone() -> None:
    with pytest.raises(InvalidArgument, match="without a limit of memory"):
        planned(V2, {"memory_swap_bytes": MIB})


def test_a_limit_without_its_controller_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="cannot limit pids on this host: no mounted"):
        planned(Layout(V1.hierarchies[:1]), {"pids": 1})
    with pytest.raises(Unsupported, match="cannot limit block I/O on this host: no mounted"):
        planned(Layout(()), {"io_weight": 10})
    locked = Layout((V2.hierarchies[0]._replace(writable=False),))
    with pytest.raises(Unsupported, match="cannot limit memory on this host: /c is read-only"):
        planned(locked, {"memory_bytes": MIB})
    assert planned(Layout(()), {}) == []


def test_the_overhead_grows_with_page_tables_and_emulation() -> None:
    assert pod_memory(256 * MIB, emulated=False) == (256 + 1 + 128) * MIB
    assert pod_memory(256 * MIB, emulated=True) == (256 + 1 + 128 + 160) * MIB
    assert pod_memory(64 << 30, emulated=False) - (64 << 30) == (256 + 128) * MIB
