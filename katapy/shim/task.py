"""containerd's Task service, translated to the sandbox and back, whoever calls: an engine, or katapy's command line.

What an engine needs beside a sandbox is done here: its mounts, stand-ins for processes that it names paths for, and
events, in the order that containerd demands: create, start, exit, delete.
Source: containerd, api/runtime/task/v2 (package containerd.task.v2; v3 differs in its package name only), and
docs/runtime-v2.md, "Events".
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from katapy.client.namespace import network_command
from katapy.config import Config
from katapy.errors import InvalidArgument, KatapyError, NotFound, Unsupported
from katapy.oci.process import parse_process
from katapy.proto import events_pb2 as events
from katapy.proto import task_pb2 as pb
from katapy.sandbox.container import Container
from katapy.sandbox.process import Exit, GuestProcess, StdioRequest
from katapy.sandbox.sandbox import Sandbox
from katapy.shim.events import Publisher
from katapy.shim.metrics import metrics_of
from katapy.shim.standin import StandIns
from katapy.shim.wire import parse_bootstrap
from katapy.state import Status
from katapy.storage.rootfs import RootMount, mount_rootfs, unmount_rootfs
from katapy.timing import phase

_STATUS: Final = {
    Status.CREATING: pb.CREATED,
    Status.CREATED: pb.CREATED,
    Status.RUNNING: pb.RUNNING,
    Status.PAUSED: pb.PAUSED,
    Status.STOPPED: pb.STOPPED,
}
# What a process reports whose end nobody saw, because the VM died.
_LOST: Final = 137


# How long a watch of a container's memory lasts before it is begun again, in seconds.
_EVENT_SECONDS: Final = 3600.0


@dataclass(eq=False)
class _Followed:
    """A process whose end is told: ``starting`` keeps that from being told before its start.

    That of an exec which was never started is not told. docker 26 took it for the exec's own, and forgot why it failed.
    """

    process: GuestProcess
    started: bool = False
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class TaskService:
    """The Task service of one sandbox; ``done`` is set when the shim shall end."""

    def __init__(self, sandbox: Sandbox, stand_ins: StandIns, publisher: Publisher) -> None:
        self._sandbox, self._stand_ins, self._publisher = sandbox, stand_ins, publisher
        self._followed: dict[tuple[str, str], _Followed] = {}
        self._mounted: dict[str, int] = {}
        self.done = asyncio.Event()

    async def create(self, request: pb.CreateTaskRequest) -> pb.CreateTaskResponse:
        """Create a container; when the first one fails there is no pod, and the shim ends."""
        if request.checkpoint:
            raise Unsupported(f"cannot create {request.id} from a checkpoint")
        stdio = StdioRequest(request.terminal, request.stdin, request.stdout, request.stderr)
        try:
            if self._sandbox.empty and (file := parse_bootstrap(request.options.SerializeToString()).config):
                # CRI-O names it here; containerd has done so at the start, and does it again.
                self._sandbox.configure(await asyncio.to_thread(Config.load, Path(file)))
            # Of the command line's own time this is nearly all, and it says so itself.
            with nullcontext() if stdio.attached else phase("answer Create"):
                process = await self._create(request, stdio)
        except BaseException:
            if self._sandbox.empty:
                self.done.set()
            raise
        if not stdio.attached:
            self._publisher.publish(_creation(request, process.host_pid))
            self._follow(process)
        return pb.CreateTaskResponse(pid=process.host_pid)

    async def _create(self, request: pb.CreateTaskRequest, stdio: StdioRequest) -> GuestProcess:
        async with AsyncExitStack() as undo:
            mounts = [RootMount(mount.type, mount.source, tuple(mount.options)) for mount in request.rootfs]
            if mounts:
                target = _rootfs(request.bundle)
                await asyncio.to_thread(mount_rootfs, mounts, target)
                undo.callback(unmount_rootfs, target, len(mounts))

            async def stand_in(container: Container) -> None:
                undo.push_async_callback(self._stand_ins.remove, container.init)
                await self._stand_ins.start(container.init, network_command(container.bundle.spec))

            process = await self._sandbox.create(
                request.id, request.bundle, stdio, stand_in=None if stdio.attached else stand_in
            )
            undo.pop_all()
        self._mounted[request.id] = len(mounts)
        return process

    async def start(self, request: pb.StartRequest) -> pb.StartResponse:
        """Start a created container or process."""
        process = self._sandbox.process(request.id, request.exec_id)
        followed = self._followed.get((request.id, request.exec_id))
        if followed is None:
            await self._start(process)
            return pb.StartResponse(pid=process.host_pid)
        async with followed.starting:
            with phase("answer Start"):
                await self._start(process)
            followed.started = True
            if request.exec_id:
                self._publisher.publish(
                    events.TaskExecStarted(container_id=request.id, exec_id=request.exec_id, pid=process.host_pid)
                )
            else:
                self._publisher.publish(events.TaskStart(container_id=request.id, pid=process.host_pid))
        return pb.StartResponse(pid=process.host_pid)

    async def _start(self, process: GuestProcess) -> None:
        bring = process.exec_id and not process.stdio.attached and process.status is Status.CREATED
        if bring:
            await self._stand_ins.start(process)
        try:
            self._stand_ins.open_stdin(process)
            await self._sandbox.start(process.container_id, process.exec_id)
        except BaseException:
            if bring:
                await self._stand_ins.remove(process)
            raise

    async def state(self, request: pb.StateRequest) -> pb.StateResponse:
        """Answer from memory, whatever the VM does."""
        process = self._process(request.id, request.exec_id)
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
        if not stdio.attached:
            self._publisher.publish(events.TaskExecAdded(container_id=request.id, exec_id=request.exec_id))
            self._follow(self._sandbox.process(request.id, request.exec_id))
        return Empty()

    async def kill(self, request: pb.KillRequest) -> Empty:
        """Send a signal."""
        self._process(request.id, request.exec_id)
        await self._sandbox.kill(request.id, request.exec_id, request.signal, everyone=request.all)
        return Empty()

    async def pause(self, request: pb.PauseRequest) -> Empty:
        """Freeze a container."""
        await self._sandbox.pause(request.id)
        self._publisher.publish(events.TaskPaused(container_id=request.id))
        return Empty()

    async def resume(self, request: pb.ResumeRequest) -> Empty:
        """Let a frozen container go on."""
        await self._sandbox.resume(request.id)
        self._publisher.publish(events.TaskResumed(container_id=request.id))
        return Empty()

    async def checkpoint(self, request: pb.CheckpointTaskRequest) -> Empty:
        """Refuse: what is in the memory of a VM cannot be handed to another."""
        raise Unsupported(f"cannot checkpoint {request.id}: katapy does not save containers")

    async def wait(self, request: pb.WaitRequest) -> pb.WaitResponse:
        """Answer when the process has ended."""
        process = self._process(request.id, request.exec_id)
        await process.exited.wait()
        end = _end_of(process)
        assert end is not None
        return pb.WaitResponse(exit_status=end.status, exited_at=_timestamp(end.at))

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Remove a container or a process that has ended."""
        process = self._process(request.id, request.exec_id)
        bundle = self._sandbox.bundle(request.id)
        if process.exited.is_set():
            await self._stand_ins.drain(process)
        await self._sandbox.delete(request.id, request.exec_id)
        end = _end_of(process) or Exit.now(_LOST)
        execs = [key for key in self._followed if key[0] == request.id and key[1]] if not request.exec_id else []
        for key in [*execs, (request.id, request.exec_id)]:
            await self._unfollow(*key)
        await self._stand_ins.remove(process)
        if not request.exec_id:
            if count := self._mounted.pop(request.id, 0):
                await asyncio.to_thread(unmount_rootfs, _rootfs(bundle), count)
            self._publisher.publish(
                events.TaskDelete(
                    container_id=request.id, pid=process.host_pid, exit_status=end.status, exited_at=_timestamp(end.at)
                )
            )
        return pb.DeleteResponse(pid=process.host_pid, exit_status=end.status, exited_at=_timestamp(end.at))

    async def resize_pty(self, request: pb.ResizePtyRequest) -> Empty:
        """Set the size of a terminal."""
        await self._sandbox.resize(request.id, request.exec_id, rows=request.height, columns=request.width)
        return Empty()

    async def close_io(self, request: pb.CloseIORequest) -> Empty:
        """Close standard input."""
        if request.stdin and not self._stand_ins.close_stdin(self._sandbox.process(request.id, request.exec_id)):
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
        self._process(request.id)
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
        process = self._process(request.id)
        return pb.ConnectResponse(shim_pid=os.getpid(), task_pid=process.host_pid, version="v2")

    async def shutdown(self, request: pb.ShutdownRequest) -> Empty:
        """End the shim if no container is left, with ``now`` in any case."""
        if request.now or self._sandbox.empty:
            self.done.set()
        return Empty()

    async def close(self) -> None:
        """Tell the ends that are known by now, and let go of what is held, once the sandbox is closed."""
        for key in list(self._followed):
            await self._unfollow(*key)
        await self._stand_ins.close()

    def _process(self, container_id: str, exec_id: str = "") -> GuestProcess:
        """Return a process. Raises NotFound, to an engine also until Create has answered.

        One that was killed meanwhile comes back, and what it finds then is being undone: it must not count on it.
        """
        process = self._sandbox.process(container_id, exec_id)
        if container_id not in self._mounted and not process.stdio.attached:
            raise NotFound(f"container {container_id!r} does not exist: it was not created")
        return process

    def _follow(self, process: GuestProcess) -> None:
        """Tell the engine of the end of a process that it has asked for; of the command line's it knows nothing."""
        followed = self._followed[process.container_id, process.exec_id] = _Followed(process)
        followed.tasks.append(asyncio.create_task(self._tell_exit(followed), name=f"tell of {process.name}"))
        if not process.exec_id:
            watch = self._tell_ooms(process.container_id)
            followed.tasks.append(asyncio.create_task(watch, name=f"tell of the memory of {process.name}"))

    async def _unfollow(self, container_id: str, exec_id: str) -> None:
        """Wait until the end of a process was told, if it has ended."""
        followed = self._followed.pop((container_id, exec_id), None)
        if followed is None:
            return
        if followed.process.exited.is_set():
            await asyncio.wait(followed.tasks[:1])
        for task in followed.tasks:
            task.cancel()
        await asyncio.wait(followed.tasks)

    async def _tell_exit(self, followed: _Followed) -> None:
        process = followed.process
        await process.exited.wait()
        async with followed.starting:
            if process.exec_id and not followed.started:
                return
            end = _end_of(process)
            assert end is not None
            self._publisher.publish(
                events.TaskExit(
                    container_id=process.container_id,
                    id=process.exec_id or process.container_id,
                    pid=process.host_pid,
                    exit_status=end.status,
                    exited_at=_timestamp(end.at),
                )
            )

    async def _tell_ooms(self, container_id: str) -> None:
        ooms, ended = 0, False
        with suppress(KatapyError):
            while not ended:
                before = ooms
                ooms, ended = await self._sandbox.next_event(container_id, ooms, _EVENT_SECONDS)
                for _ in range(before, ooms):
                    self._publisher.publish(events.TaskOOM(container_id=container_id))


def _creation(request: pb.CreateTaskRequest, pid: int) -> events.TaskCreate:
    return events.TaskCreate(
        container_id=request.id,
        bundle=request.bundle,
        rootfs=[events.Mount.FromString(mount.SerializeToString()) for mount in request.rootfs],
        io=events.TaskIO(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, terminal=request.terminal),
        pid=pid,
    )


def _rootfs(bundle: str) -> str:
    return os.path.join(bundle, "rootfs")


def _end_of(process: GuestProcess) -> Exit | None:
    if process.lost is not None:
        assert process.lost_at is not None
        return Exit(_LOST, process.lost_at)
    return process.exit


def _timestamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp
