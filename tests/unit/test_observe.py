"""`events`: what the guest tells, in containerd's words and in runc's."""

from __future__ import annotations

import pytest

from katapy.cli.observe import parse_duration
from katapy.client.observe import runc_stats
from katapy.errors import InvalidArgument
from katapy.proto import agent_pb2
from katapy.shim.metrics import metrics_of

NO_LIMIT = (1 << 64) - 1
GUEST = agent_pb2.StatsContainerResponse(
    cpu=agent_pb2.CpuStats(
        usage_usec=30, user_usec=20, system_usec=10, periods=3, throttled_periods=2, throttled_usec=9
    ),
    memory=agent_pb2.MemoryStats(
        usage_bytes=4096,
        limit_bytes=8192,
        peak_bytes=5000,
        swap_bytes=1,
        swap_limit_bytes=2,
        stat={"anon": 7, "file": 8, "pgfault": 9, "zswap": 10},
        oom_events=3,
        oom_kills=4,
    ),
    pids=agent_pb2.PidsStats(current=5, limit=64),
    io=[agent_pb2.IoStats(major=254, minor=1, read_bytes=11, write_bytes=12, reads=13, writes=0)],
    hugetlb=[agent_pb2.HugetlbStats(page_size="2MB", usage_bytes=1 << 21, limit_bytes=NO_LIMIT)],
)


def test_containerd_s_metrics() -> None:
    metrics = metrics_of(GUEST)
    assert metrics.DESCRIPTOR.full_name == "io.containerd.cgroups.v2.Metrics"
    # The wire numbers, as containerd's clients read them.
    assert metrics.pids.SerializeToString() == b"\x08\x05\x10\x40"
    memory = metrics.memory
    assert (memory.anon, memory.file, memory.pgfault, memory.max_usage) == (7, 8, 9, 5000)
    assert (metrics.memory_events.oom, metrics.memory_events.oom_kill) == (3, 4)


def test_runc_s_stats() -> None:
    stats = runc_stats(metrics_of(GUEST))
    assert stats["cpu"] == {
        "usage": {"total": 30_000, "kernel": 10_000, "user": 20_000},
        "throttling": {"periods": 3, "throttledPeriods": 2, "throttledTime": 9000},
    }
    memory = stats["memory"]
    assert memory["cache"] == 8
    assert memory["usage"] == {"limit": 8192, "usage": 4096, "max": 5000, "failcnt": 0}
    # Memory and swap together, as runc has it.
    assert memory["swap"] == {"limit": 8194, "usage": 4097, "failcnt": 0}
    assert memory["kernel"] == {"limit": 0, "failcnt": 0}
    assert (memory["raw"]["anon"], memory["raw"]["pgfault"], memory["raw"]["slab"]) == (7, 9, 0)
    assert "zswap" not in memory["raw"]
    assert stats["pids"] == {"current": 5, "limit": 64}
    assert stats["blkio"]["ioServiceBytesRecursive"] == [
        {"major": 254, "minor": 1, "op": "Read", "value": 11},
        {"major": 254, "minor": 1, "op": "Write", "value": 12},
    ]
    assert stats["blkio"]["ioServicedRecursive"][1] == {"major": 254, "minor": 1, "op": "Write"}
    assert stats["hugetlb"] == {"2MB": {"usage": 1 << 21, "failcnt": 0}}


def test_no_limits() -> None:
    none = agent_pb2.StatsContainerResponse(
        memory=agent_pb2.MemoryStats(limit_bytes=NO_LIMIT, swap_limit_bytes=5, usage_bytes=NO_LIMIT, swap_bytes=5),
        pids=agent_pb2.PidsStats(limit=NO_LIMIT),
    )
    stats = runc_stats(metrics_of(none))
    assert stats["pids"] == {}
    # A guest may say anything; an engine reads it into 64 bits.
    assert stats["memory"]["swap"] == {"limit": NO_LIMIT, "usage": NO_LIMIT, "failcnt": 0}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5s", 5), ("1m", 60), ("1m30s", 90), ("1.5h", 5400), ("200ms", 0.2), ("+1s", 1), (".5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "0s", "-1s", "s", "5 s", "1d", "99999999h", "1s\n"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a duration"):
        parse_duration(text)
