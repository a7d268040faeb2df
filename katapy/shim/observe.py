"""katapy's own service beside the Task service (proto/shim.proto), translated to the sandbox and back."""

from __future__ import annotations

from google.protobuf.empty_pb2 import Empty

from katapy.proto import shim_pb2 as pb
from katapy.sandbox.sandbox import Sandbox
from katapy.timing import Timeline


class ShimService:
    """What the verbs need and the Task service does not have. Nothing here changes anything."""

    def __init__(self, sandbox: Sandbox, timeline: Timeline) -> None:
        self._sandbox, self._timeline = sandbox, timeline

    async def timing(self, _request: Empty) -> pb.TimingResponse:
        """List the phases of the pod's start so far."""
        return pb.TimingResponse(
            phases=[pb.Phase(name=each.name, start=each.start, end=each.end) for each in self._timeline.phases]
        )

    async def wait_resumed(self, request: pb.WaitResumedRequest) -> Empty:
        """Answer when a container is not paused."""
        await self._sandbox.wait_resumed(request.id)
        return Empty()

    async def next_event(self, request: pb.NextEventRequest) -> pb.NextEventResponse:
        """Answer when there is something new."""
        ooms, ended = await self._sandbox.next_event(request.id, request.ooms, request.wait_nano / 1e9)
        return pb.NextEventResponse(ooms=ooms, ended=ended)

    async def usage(self, request: pb.UsageRequest) -> pb.UsageResponse:
        """Say what a container has used."""
        stats = await self._sandbox.stats(request.id)
        return pb.UsageResponse(
            cpu_usec=stats.cpu.usage_usec,
            peak_bytes=stats.memory.peak_bytes,
            oom_kills=stats.memory.oom_kills,
            pid_failures=stats.pids.failures,
        )

    async def processes(self, request: pb.ProcessesRequest) -> pb.ProcessesResponse:
        """List the processes of a container."""
        return pb.ProcessesResponse(
            processes=[
                pb.Process(pid=each.container_pid, uid=each.uid, command=each.command, exec_id=each.exec_id)
                for each in await self._sandbox.processes(request.id)
            ]
        )
