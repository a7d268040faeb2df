"""What the guest says that a container uses, in containerd's words (proto/metrics.proto)."""

from __future__ import annotations

from typing import Final

from katapy.proto import agent_pb2, metrics_pb2

# Lines of memory.stat, by the number that the field has in containerd's message.
_STAT_FIELDS: Final = [field.name for field in metrics_pb2.MemoryStat.DESCRIPTOR.fields if field.number < 32]


def metrics_of(stats: agent_pb2.StatsContainerResponse) -> metrics_pb2.Metrics:
    """Translate; a line of memory.stat that containerd does not know is left out."""
    cpu, memory = stats.cpu, stats.memory
    return metrics_pb2.Metrics(
        pids=metrics_pb2.PidsStat(current=stats.pids.current, limit=stats.pids.limit),
        cpu=metrics_pb2.CPUStat(
            usage_usec=cpu.usage_usec,
            user_usec=cpu.user_usec,
            system_usec=cpu.system_usec,
            nr_periods=cpu.periods,
            nr_throttled=cpu.throttled_periods,
            throttled_usec=cpu.throttled_usec,
        ),
        memory=metrics_pb2.MemoryStat(
            **{name: memory.stat[name] for name in _STAT_FIELDS if name in memory.stat},
            usage=memory.usage_bytes,
            usage_limit=memory.limit_bytes,
            swap_usage=memory.swap_bytes,
            swap_limit=memory.swap_limit_bytes,
            max_usage=memory.peak_bytes,
        ),
        io=metrics_pb2.IOStat(
            usage=[
                metrics_pb2.IOEntry(
                    major=each.major,
                    minor=each.minor,
                    rbytes=each.read_bytes,
                    wbytes=each.write_bytes,
                    rios=each.reads,
                    wios=each.writes,
                )
                for each in stats.io
            ]
        ),
        hugetlb=[
            metrics_pb2.HugeTlbStat(current=each.usage_bytes, max=each.limit_bytes, pagesize=each.page_size)
            for each in stats.hugetlb
        ],
        memory_events=metrics_pb2.MemoryEvents(oom=memory.oom_events, oom_kill=memory.oom_kills),
    )
