"""A typed client of containerd's Task API: plain values in and out, one method for each RPC.

It translates and nothing else; the connection is transport/ttrpc.py's, the meaning of a verb the shim's.
Source: containerd, api/runtime/task/v2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from katapy.proto import task_pb2 as pb
from katapy.transport.ttrpc import TtrpcClient

SERVICE: Final = "containerd.task.v2.Task"
PROCESS_TYPE: Final = "types.containerd.io/opencontainers/runtime-spec/1/Process"
DETAILS_TYPE: Final = "containerd.runc.v1.ProcessDetails"
RESOURCES_TYPE: Final = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"

M = TypeVar("M", bound=Message)


class Stdio(NamedTuple):
    """Where the streams go: URIs or paths of fifos, "" for none; with ``terminal`` there is no stderr."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


_NO_STDIO: Final = Stdio()


class TaskState(NamedTuple):
    """A process: ``status`` is created, running, stopped, paused, pausing or unknown.

    ``exit_status`` (0 to 255) and ``exited_at`` (nanoseconds since 1970) mean something when it is stopped.
    """

    id: str
    exec_id: str
    bundle: str
    pid: int
    status: str
    stdio: Stdio
    exit_status: int
    exited_at: int


class Exit(NamedTuple):
    """How a process ended: ``status`` 0 to 255, ``at`` in nanoseconds since 1970, ``pid`` 0 where it is not told."""

    pid: int
    status: int
    at: int


class Process(NamedTuple):
    """One process of a container; ``exec_id`` is "" unless an exec started it."""

    pid: int
    exec_id: str


class Typed(NamedTuple):
    """A value whose form its type_url names (google.protobuf.Any)."""

    type_url: str
    value: bytes


class Serving(NamedTuple):
    """Who serves a container."""

    shim_pid: int
    task_pid: int
    version: str


class TaskClient:
    """The Task service of a shim. Every method raises what the shim answered, or as TtrpcClient.call.

    ``timeout`` in seconds is for each call but create and wait, which say their own; None is without end.
    """

    def __init__(self, client: TtrpcClient, *, timeout: float | None = 60.0) -> None:
        """Call over ``client``, which stays the caller's to close; a Create that is under way is cancelled by that."""
        self._client = client
        self._timeout = timeout

    def state(self, id: str, exec_id: str = "") -> TaskState:  # noqa: A002
        """Return what the shim knows of a process."""
        answer = self._call("State", pb.StateRequest(id=id, exec_id=exec_id), pb.StateResponse)
        return TaskState(
            id=answer.id,
            exec_id=answer.exec_id,
            bundle=answer.bundle,
            pid=answer.pid,
            status=_status_name(answer.status),
            stdio=Stdio(answer.stdin, answer.stdout, answer.stderr, answer.terminal),
            exit_status=answer.exit_status,
            exited_at=_nanoseconds(answer.exited_at),
        )

    def create(self, id: str, bundle: str, stdio: Stdio = _NO_STDIO, *, timeout: float | None) -> int:  # noqa: A002
        """Create a container, and with the first one of a pod its VM. Returns its pid on the host, 0 without one."""
        request = pb.CreateTaskRequest(id=id, bundle=bundle, **stdio._asdict())
        return self._client.call(SERVICE, "Create", request, pb.CreateTaskResponse, timeout=timeout).pid

    def start(self, id: str, exec_id: str = "") -> int:  # noqa: A002
        """Start a created container or process. Returns its pid on the host."""
        return self._call("Start", pb.StartRequest(id=id, exec_id=exec_id), pb.StartResponse).pid

    def delete(self, id: str, exec_id: str = "") -> Exit:  # noqa: A002
        """Remove a process that has ended."""
        answer = self._call("Delete", pb.DeleteRequest(id=id, exec_id=exec_id), pb.DeleteResponse)
        return Exit(answer.pid, answer.exit_status, _nanoseconds(answer.exited_at))

    def pids(self, id: str) -> list[Process]:  # noqa: A002
        """List the processes of a container."""
        answer = self._call("Pids", pb.PidsRequest(id=id), pb.PidsResponse)
        return [Process(process.pid, _exec_id(process.info)) for process in answer.processes]

    def pause(self, id: str) -> None:  # noqa: A002
        """Freeze a container."""
        self._call("Pause", pb.PauseRequest(id=id), Empty)

    def resume(self, id: str) -> None:  # noqa: A002
        """Thaw a container."""
        self._call("Resume", pb.ResumeRequest(id=id), Empty)

    def checkpoint(self, id: str, path: str) -> None:  # noqa: A002
        """Save a container into the directory ``path``."""
        self._call("Checkpoint", pb.CheckpointTaskRequest(id=id, path=path), Empty)

    def kill(self, id: str, signal: int, exec_id: str = "", *, everyone: bool = False) -> None:  # noqa: A002
        """Send a signal to a process, or to ``everyone`` in the container."""
        self._call("Kill", pb.KillRequest(id=id, exec_id=exec_id, signal=signal, all=everyone), Empty)

    def exec(self, id: str, exec_id: str, process: bytes, stdio: Stdio = _NO_STDIO) -> None:  # noqa: A002
        """Add a process to a container, for start(). ``process`` is JSON (runtime-spec, config.md, "Process")."""
        spec = Any(type_url=PROCESS_TYPE, value=process)
        self._call("Exec", pb.ExecProcessRequest(id=id, exec_id=exec_id, spec=spec, **stdio._asdict()), Empty)

    def resize_pty(self, id: str, columns: int, rows: int, exec_id: str = "") -> None:  # noqa: A002
        """Set the window size of a terminal."""
        self._call("ResizePty", pb.ResizePtyRequest(id=id, exec_id=exec_id, width=columns, height=rows), Empty)

    def close_stdin(self, id: str, exec_id: str = "") -> None:  # noqa: A002
        """Close the standard input of a process (CloseIO)."""
        self._call("CloseIO", pb.CloseIORequest(id=id, exec_id=exec_id, stdin=True), Empty)

    def update(self, id: str, resources: bytes, annotations: Mapping[str, str] | None = None) -> None:  # noqa: A002
        """Change limits. ``resources`` is JSON (runtime-spec, config-linux.md, "Control groups")."""
        request = pb.UpdateTaskRequest(id=id, resources=Any(type_url=RESOURCES_TYPE, value=resources))
        request.annotations.update(annotations or {})
        self._call("Update", request, Empty)

    def wait(self, id: str, exec_id: str = "", *, timeout: float | None) -> Exit:  # noqa: A002
        """Wait for the end of a process; on a connection that nothing else needs meanwhile."""
        request = pb.WaitRequest(id=id, exec_id=exec_id)
        answer = self._client.call(SERVICE, "Wait", request, pb.WaitResponse, timeout=timeout)
        return Exit(0, answer.exit_status, _nanoseconds(answer.exited_at))

    def stats(self, id: str) -> Typed:  # noqa: A002
        """Return the metrics of a container (io.containerd.cgroups.v1.Metrics or v2)."""
        stats = self._call("Stats", pb.StatsRequest(id=id), pb.StatsResponse).stats
        return Typed(stats.type_url, stats.value)

    def connect(self, id: str) -> Serving:  # noqa: A002
        """Return the pids of the shim and of the container, on the host."""
        answer = self._call("Connect", pb.ConnectRequest(id=id), pb.ConnectResponse)
        return Serving(answer.shim_pid, answer.task_pid, answer.version)

    def shutdown(self, id: str, *, now: bool = False) -> None:  # noqa: A002
        """End the shim if no container is left; with ``now`` in any case."""
        self._call("Shutdown", pb.ShutdownRequest(id=id, now=now), Empty)

    def _call(self, method: str, request: Message, response: type[M]) -> M:
        return self._client.call(SERVICE, method, request, response, timeout=self._timeout)


def _exec_id(info: Any) -> str:
    return pb.ProcessDetails.FromString(info.value).exec_id if info.type_url == DETAILS_TYPE else ""


def _status_name(status: int) -> str:
    # A later containerd may know more states.
    return pb.Status.Name(status).lower() if status in pb.Status.values() else "unknown"


def _nanoseconds(at: Timestamp) -> int:
    return at.seconds * 1_000_000_000 + at.nanos
