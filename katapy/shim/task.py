"""containerd's Task service, translated to the sandbox and back. No logic of its own.

Source: containerd, api/runtime/task/v2 (package containerd.task.v2; v3 differs in its package name only).
"""

from __future__ import annotations

import asyncio
import os
from datetime import datetime
from typing import Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from katapy.errors import InvalidArgument, Unsupported
from katapy.oci.process import parse_process
from katapy.proto import task_pb2 as pb
from katapy.sandbox.process import Exit, GuestProcess, StdioRequest
from katapy.sandbox.sandbox import Sandbox
from katapy.shim.metrics import metrics_of
from katapy.state import Status

_STATUS: Final = {
    Status.CREATING: pb.CREATED,
    Status.CREATED: pb.CREATED,
    Status.RUNNING: pb.RUNNING,
    Status.PAUSED: pb.PAUSED,
    Status.STOPPED: pb.STOPPED,
}
# What a process reports whose end nobody saw, because the VM died.
_LOST: Final = 137


class TaskService:
    """The Task service of one sandbox; ``done`` is set when the shim shall end."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.done = asyncio.Event()

    async def create(self, request: pb.CreateTaskRequest) -> pb.CreateTaskResponse:
        """Create a container; when the first one fails there is no pod, and the shim ends."""
        if request.rootfs:
            raise Unsupported(f"cannot mount the root file system of {request.id}: mounts in Create are not served")
        if request.checkpoint:
            raise Unsupported(f"cannot create {request.id} from a checkpoint")
        stdio = StdioRequest(request.terminal, request.stdin, request.stdout, request.stderr)
        try:
            process = await self._sandbox.create(request.id, request.bundle, stdio)
        except BaseException:
            if self._sandbox.empty:
                self.done.set()
            raise
        return pb.CreateTaskResponse(pid=process.host_pid)

    async def start(self, request: pb.StartRequest) -> pb.StartResponse:
        """Start a created container or process."""
        process = await self._sandbox.start(request.id, request.exec_id)
        return pb.StartResponse(pid=process.host_pid)

    async def state(self, request: pb.StateRequest) -> pb.StateResponse:
        """Answer from memory, whatever the VM does."""
        process = self._sandbox.process(request.id, request.exec_id)
        end = _end_of(process)
        return pb.StateResponse(
            id=request.id,
            exec_id=request.exec_id,
            bundle=self._sandbox.bundle(request.id),
            pid=process.host_pid,
            status=_STATUS[process.status],
            stdin=process.stdio.stdin,
            stdout=process.stdio.stdout,
            stderr=process.stdio.stderr,
            terminal=process.stdio.terminal,
            exit_status=end.status if end else 0,
            exited_at=_timestamp(end.at) if end else None,
        )

    async def exec(self, request: pb.ExecProcessRequest) -> Empty:
        """Note a process to start."""
        if not request.exec_id:
            raise InvalidArgument("cannot execute a process without an exec id")
        process = parse_process(request.spec.value, what=f"process {request.exec_id}")
        stdio = StdioRequest(request.terminal, request.stdin, request.stdout, request.stderr)
        if process.terminal != request.terminal:
            raise InvalidArgument("process.terminal and the request's terminal differ")
        self._sandbox.add_exec(request.id, request.exec_id, process.to_guest(), stdio)
        return Empty()

    async def kill(self, request: pb.KillRequest) -> Empty:
        """Send a signal."""
        await self._sandbox.kill(request.id, request.exec_id, request.signal, everyone=request.all)
        return Empty()

    async def pause(self, request: pb.PauseRequest) -> Empty:
        """Freeze a container."""
        await self._sandbox.pause(request.id)
        return Empty()

    async def resume(self, request: pb.ResumeRequest) -> Empty:
        """Let a frozen container go on."""
        await self._sandbox.resume(request.id)
        return Empty()

    async def wait(self, request: pb.WaitRequest) -> pb.WaitResponse:
        """Answer when the process has ended."""
        process = self._sandbox.process(request.id, request.exec_id)
        await process.exited.wait()
        end = _end_of(process)
        assert end is not None
        return pb.WaitResponse(exit_status=end.status, exited_at=_timestamp(end.at))

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Remove a container or a process that has ended."""
        pid = self._sandbox.process(request.id, request.exec_id).host_pid
        end = await self._sandbox.delete(request.id, request.exec_id)
        return pb.DeleteResponse(pid=pid, exit_status=end.status, exited_at=_timestamp(end.at))

    async def resize_pty(self, request: pb.ResizePtyRequest) -> Empty:
        """Set the size of a terminal."""
        await self._sandbox.resize(request.id, request.exec_id, rows=request.height, columns=request.width)
        return Empty()

    async def close_io(self, request: pb.CloseIORequest) -> Empty:
        """Close standard input."""
        if request.stdin:
            await self._sandbox.close_stdin(request.id, request.exec_id)
        return Empty()

    async def update(self, request: pb.UpdateTaskRequest) -> Empty:
        """Change limits."""
        await self._sandbox.update(request.id, request.resources.value)
        return Empty()

    async def stats(self, request: pb.StatsRequest) -> pb.StatsResponse:
        """Return what a container uses."""
        metrics = metrics_of(await self._sandbox.stats(request.id))
        response = pb.StatsResponse()
        response.stats.type_url = metrics.DESCRIPTOR.full_name
        response.stats.value = metrics.SerializeToString()
        return response

    async def pids(self, request: pb.PidsRequest) -> pb.PidsResponse:
        """List the processes of a container by the pids of those that stand for them on the host."""
        processes = []
        for pid, exec_id in self._sandbox.pids(request.id):
            info = pb.ProcessInfo(pid=pid)
            if exec_id:
                info.info.type_url = "containerd.runc.v1.ProcessDetails"
                info.info.value = pb.ProcessDetails(exec_id=exec_id).SerializeToString()
            processes.append(info)
        return pb.PidsResponse(processes=processes)

    async def connect(self, request: pb.ConnectRequest) -> pb.ConnectResponse:
        """Say who serves."""
        process = self._sandbox.process(request.id)
        return pb.ConnectResponse(shim_pid=os.getpid(), task_pid=process.host_pid, version="v2")

    async def shutdown(self, request: pb.ShutdownRequest) -> Empty:
        """End the shim if no container is left, with ``now`` in any case."""
        if request.now or self._sandbox.empty:
            self.done.set()
        return Empty()


def _end_of(process: GuestProcess) -> Exit | None:
    if process.lost is not None:
        assert process.lost_at is not None
        return Exit(_LOST, process.lost_at)
    return process.exit


def _timestamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp
