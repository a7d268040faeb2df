"""A client of the shim's own service, and what its answers and the Task API's metrics become for users of runc."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from katapy.client.task import TaskClient
from katapy.errors import Internal
from katapy.proto import metrics_pb2
from katapy.proto import shim_pb2 as pb
from katapy.timing import Phase
from katapy.transport.ttrpc import TtrpcClient

SERVICE: Final = "katapy.shim.v1.Shim"
METRICS_TYPE: Final = "io.containerd.cgroups.v2.Metrics"
# In excess of what the shim was told to wait.
_ANSWER_SECONDS: Final = 60.0
_NO_LIMIT: Final = (1 << 64) - 1

M = TypeVar("M", bound=Message)


class News(NamedTuple):
    """How often memory has run out in a container, and whether it has ended."""

    ooms: int
    ended: bool


class GuestProcess(NamedTuple):
    """A process by its pid in the container; ``exec_id`` is "" unless an exec started it."""

    pid: int
    uid: int
    command: str
    exec_id: str


class Usage(NamedTuple):
    """What a container has used, as its guest says: microseconds of CPU, bytes of memory at most.

    ``oom_kills`` counts processes that were killed for want of memory, ``pid_failures`` those refused for their number.
    """

    cpu_usec: int
    peak_bytes: int
    oom_kills: int
    pid_failures: int


class ShimClient:
    """The shim's own service. Every method raises what the shim answered, or as TtrpcClient.call."""

    def __init__(self, client: TtrpcClient) -> None:
        """Call over ``client``, which stays the caller's to close."""
        self._client = client

    def wait_resumed(self, id: str) -> None:  # noqa: A002
        """Wait, for as long as it takes, until a container is not paused."""
        self._call("WaitResumed", pb.WaitResumedRequest(id=id), Empty, None)

    def next_event(self, id: str, ooms: int = 0, *, wait: float) -> News:  # noqa: A002
        """Return when memory has run out another number of times than ``ooms``, at the end, or after ``wait`` s."""
        request = pb.NextEventRequest(id=id, ooms=ooms, wait_nano=int(wait * 1e9))
        answer = self._call("NextEvent", request, pb.NextEventResponse, wait + _ANSWER_SECONDS)
        return News(answer.ooms, answer.ended)

    def processes(self, id: str) -> list[GuestProcess]:  # noqa: A002
        """List the processes of a container."""
        answer = self._call("Processes", pb.ProcessesRequest(id=id), pb.ProcessesResponse, _ANSWER_SECONDS)
        return [GuestProcess(each.pid, each.uid, each.command, each.exec_id) for each in answer.processes]

    def usage(self, id: str, *, timeout: float) -> Usage:  # noqa: A002
        """Return what a container has used so far; also when it has ended, until it is deleted."""
        answer = self._call("Usage", pb.UsageRequest(id=id), pb.UsageResponse, timeout)
        return Usage(answer.cpu_usec, answer.peak_bytes, answer.oom_kills, answer.pid_failures)

    def timing(self) -> list[Phase]:
        """List the phases of the pod's start."""
        answer = self._call("Timing", Empty(), pb.TimingResponse, _ANSWER_SECONDS)
        return [Phase(each.name, each.start, each.end) for each in answer.phases]

    def _call(self, method: str, request: Message, response: type[M], timeout: float | None) -> M:
        return self._client.call(SERVICE, method, request, response, timeout=timeout)


def follow(client: TtrpcClient, container_id: str, interval: float) -> Iterator[dict[str, Any]]:
    """Give runc's events of a container until it ends: what it uses, every ``interval`` seconds, and each OOM."""
    shim, task = ShimClient(client), TaskClient(client)
    news = shim.next_event(container_id, wait=0)
    while not news.ended:
        yield stats_event(task, container_id)
        due = time.monotonic() + interval
        while not news.ended and (left := due - time.monotonic()) > 0:
            seen, news = news.ooms, shim.next_event(container_id, news.ooms, wait=left)
            for _ in range(news.ooms - seen):
                yield {"type": "oom", "id": container_id}


def stats_event(task: TaskClient, container_id: str) -> dict[str, Any]:
    """Return runc's event that says what a container uses."""
    stats = task.stats(container_id)
    if stats.type_url != METRICS_TYPE:
        raise Internal(f"the shim of {container_id} answers with metrics of another kind: {stats.type_url[:64]}")
    return {"type": "stats", "id": container_id, "data": runc_stats(metrics_pb2.Metrics.FromString(stats.value))}


def runc_stats(metrics: metrics_pb2.Metrics) -> dict[str, Any]:
    """Return metrics in the form of runc's events, as runc fills it in on cgroup v2: nanoseconds and bytes."""
    cpu, memory = metrics.cpu, metrics.memory
    # runc's swap counts memory and swap together, as cgroup v1 does.
    swap_limit = memory.swap_limit if memory.swap_limit == _NO_LIMIT else memory.swap_limit + memory.usage_limit
    return {
        "cpu": {
            "usage": _set({"total": cpu.usage_usec * 1000})
            | {"kernel": cpu.system_usec * 1000, "user": cpu.user_usec * 1000},
            "throttling": _set(
                {
                    "periods": cpu.nr_periods,
                    "throttledPeriods": cpu.nr_throttled,
                    "throttledTime": cpu.throttled_usec * 1000,
                }
            ),
        },
        "memory": {
            **_set({"cache": memory.file}),
            "usage": _entry(memory.usage_limit, memory.usage, memory.max_usage),
            "swap": _entry(min(swap_limit, _NO_LIMIT), min(memory.swap_usage + memory.usage, _NO_LIMIT)),
            "kernel": _entry(0, 0),
            "kernelTCP": _entry(0, 0),
            "raw": {field.name: getattr(memory, field.name) for field in memory.DESCRIPTOR.fields if field.number < 32},
        },
        "pids": _set({"current": metrics.pids.current, "limit": metrics.pids.limit % _NO_LIMIT}),
        "blkio": _set({
            "ioServiceBytesRecursive": _block_io(metrics, (("Read", "rbytes"), ("Write", "wbytes"))),
            "ioServicedRecursive": _block_io(metrics, (("Read", "rios"), ("Write", "wios"))),
        }),
        "hugetlb": {each.pagesize: _set({"usage": each.current}) | {"failcnt": 0} for each in metrics.hugetlb},
        "intel_rdt": {},
        "network_interfaces": None,
    }  # fmt: skip


def _set(members: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is zero or empty, as runc does."""
    return {name: value for name, value in members.items() if value}


def _entry(limit: int, usage: int, maximum: int = 0) -> dict[str, int]:
    return {"limit": limit, **_set({"usage": usage, "max": maximum}), "failcnt": 0}


def _block_io(metrics: metrics_pb2.Metrics, columns: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    return [
        _set({"major": each.major, "minor": each.minor}) | {"op": op} | _set({"value": getattr(each, column)})
        for each in metrics.io.usage
        for op, column in columns
    ]
