"""Engines that Debian does not have, played as they are recorded: CRI-O with ``runtime_type = "vm"``, containerd 2.3.

The shim and its VMs are real; player.py says what is played. What Debian's containerd shows is in test_containerd.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from harness import await_true, descendants, make_bundle
from player import (
    ADDRESS,
    FAILED_PRECONDITION,
    NOT_FOUND,
    STATE_SECONDS,
    TASK_V2,
    TASK_V3,
    Closed,
    Connection,
    Events,
    Program,
    Refused,
    Streams,
    namespaces,
)

from katapy import __version__
from katapy.proto import events_pb2 as events
from katapy.proto import metrics_pb2
from katapy.proto import task_pb2 as pb
from katapy.proto.shim_pb2 import RuntimeInfo
from katapy.shim.engine import socket_link, state_root

PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
SLEEP = ["sleep", "1000"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def directory(host: None) -> Iterator[Path]:
    """A directory of the engine's with a short name: sockets are bound in it. The pods' cgroups go with it."""
    with tempfile.TemporaryDirectory(prefix="katapy-") as name:
        yield Path(name)
        for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
            with contextlib.suppress(OSError):
                (top / Path(name).name).rmdir()


class Task:
    """The Task service as an engine calls it, over one connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.call = connection, connection.call

    def create(self, container: str, bundle: Path, streams: Streams | None = None, **fields: Any) -> int:
        given = dict(streams.fields) if streams else {}
        request = pb.CreateTaskRequest(id=container, bundle=str(bundle), **given, **fields)
        return self.call("Create", request, pb.CreateTaskResponse).pid

    def start(self, container: str, exec_id: str = "") -> int:
        return self.call("Start", pb.StartRequest(id=container, exec_id=exec_id), pb.StartResponse).pid

    def begin_wait(self, container: str, exec_id: str = "") -> Callable[[], int]:
        """Wait beside other calls; what is returned gives the exit status."""
        answer = self.connection.begin("Wait", pb.WaitRequest(id=container, exec_id=exec_id))
        return lambda: Connection.take(answer, pb.WaitResponse).exit_status

    def state(self, container: str, exec_id: str = "") -> pb.StateResponse:
        request = pb.StateRequest(id=container, exec_id=exec_id)
        return self.call("State", request, pb.StateResponse, STATE_SECONDS)

    def kill(self, container: str, number: int, exec_id: str = "", *, everyone: bool = False) -> None:
        self.call("Kill", pb.KillRequest(id=container, exec_id=exec_id, signal=number, all=everyone), Empty)

    def exec(self, container: str, exec_id: str, spec: dict[str, Any], streams: Streams, *args: str) -> None:
        """Add a process: the container's own, with other arguments."""
        process = {**spec["process"], "args": args, "terminal": streams.fields["terminal"]}
        described = AnyMessage(type_url=PROCESS_TYPE, value=json.dumps(process).encode())
        request = pb.ExecProcessRequest(id=container, exec_id=exec_id, spec=described, **streams.fields)
        self.call("Exec", request, Empty)

    def execute(
        self, container: str, spec: dict[str, Any], directory: Path, *args: str, stdin: bytes | None = None
    ) -> tuple[int, str, str]:
        """Run a process to its end, as ExecSync does; return its exit status and what it has written."""
        exec_id = os.urandom(32).hex()
        streams = Streams(directory / exec_id, stdin=stdin)
        self.exec(container, exec_id, spec, streams, *args)
        self.start(container, exec_id)
        if stdin is not None:
            streams.close_stdin()
            self.close_stdin(container, exec_id)
        status = self.begin_wait(container, exec_id)()
        self.delete(container, exec_id)
        return status, *streams.end()

    def close_stdin(self, container: str, exec_id: str = "") -> None:
        self.call("CloseIO", pb.CloseIORequest(id=container, exec_id=exec_id, stdin=True), Empty)

    def delete(self, container: str, exec_id: str = "") -> pb.DeleteResponse:
        return self.call("Delete", pb.DeleteRequest(id=container, exec_id=exec_id), pb.DeleteResponse)

    def shutdown(self, container: str) -> None:
        """As engines do, to whom it is no error that there is nobody left to answer."""
        with contextlib.suppress(Closed):
            self.call("Shutdown", pb.ShutdownRequest(id=container), Empty)


def refusal(call: Callable[[], object]) -> int:
    """Return the code with which a call is refused."""
    with pytest.raises(Refused) as refused:
        call()
    return refused.value.code


def field(number: int, value: bytes | int) -> bytes:
    """Encode a field of a protobuf message: katapy has no message for what containerd says at a start."""

    def varint(number: int) -> bytes:
        return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def runtime_options(file: Path) -> AnyMessage:
    """Return the options of a runtime that is not runc: runtimeoptions.v1.Options, with a configuration file."""
    return AnyMessage(type_url="runtimeoptions.v1.Options", value=field(1, b"toml") + field(2, os.fsencode(file)))


# CRI-O


@pytest.fixture
def crio(directory: Path) -> Iterator[Program]:
    """CRI-O: it has no address and takes no events, so its own program must never be called.

    It never calls `delete` either, so of what it has removed nothing must be left.
    """
    publisher = directory / "crio"
    publisher.write_text(f"#!/bin/sh\ntouch {directory}/published\n")
    publisher.chmod(0o755)
    env = {"PATH": PATH, "GOMAXPROCS": "2", "MAX_SHIM_VERSION": "2", "TTRPC_ADDRESS": ""}
    program = Program("default", "", str(publisher), env, debug=True)
    yield program
    program.close()
    left = [name for name in program.started if (state_root("", "default") / name).exists()]
    for name in left:
        program.run(*program.flags(name), "-bundle", str(directory), "delete", cwd=directory)
    assert not left, "state left behind"
    assert not (directory / "published").exists()


class Pod:
    """What CRI-O keeps of a pod: its namespaces on the host, and for each container a bundle and fifos."""

    def __init__(self, directory: Path, rootfs: Path, crio: Program, paths: dict[str, Path]) -> None:
        self.id, self.directory, self.program = os.urandom(32).hex(), directory, crio
        self.paths, self._rootfs, self._pid = paths, rootfs, 0

    def config(self, container: str, spec: dict[str, Any], memory: int) -> None:
        """Turn a configuration into one of CRI-O's, whose containers use the namespaces that are kept on the host."""
        kind = "sandbox" if container == self.id else "container"
        spec["annotations"] = {
            "io.container.manager": "cri-o",
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": self.id,
            "io.kubernetes.cri-o.ContainerID": container,
            "io.kubernetes.pod.name": "played",
        }
        spec["hostname"] = "played"
        spec["linux"]["cgroupsPath"] = f"/{self.directory.name}/crio-{container}"
        names = {"network": "net", "ipc": "ipc", "uts": "uts"}
        kept = [{"type": kind, "path": str(self.paths[name])} for kind, name in names.items()]
        # The processes' is nobody's to keep: it is that of the sandbox's process.
        processes = {"type": "pid", **({"path": f"/proc/{self._pid}/ns/pid"} if self._pid else {})}
        spec["linux"]["namespaces"] = [processes, *kept, {"type": "mount"}, {"type": "cgroup"}]
        if memory:
            spec["linux"]["resources"]["memory"] = {"limit": memory, "swap": memory}

    def create(
        self, container: str, *args: str, memory: int = 0, configuration: Path | None = None
    ) -> tuple[Task, Path, Streams, dict[str, Any]]:
        """Create a container; CRI-O talks to the shim by the connection of the latest one. Returns what it has."""
        top = self.directory / "overlay-containers" / container
        top.mkdir(parents=True)
        bundle = make_bundle(
            top / "userdata",
            self._rootfs,
            args,
            edit=lambda spec: self.config(container, spec, memory),
            readonly=container == self.id,
        )
        address = self.program.start(container, bundle)
        assert (bundle / "address").read_text() == address
        streams = Streams(self.directory / "fifo" / container)
        task = Task(self.program.connect(address))
        # Its start has nothing on standard input.
        options = runtime_options(configuration) if configuration else None
        pid = task.create(container, bundle, streams, options=options)
        if container == self.id:
            self._pid = pid
        return task, bundle, streams, json.loads((bundle / "config.json").read_text())


def test_a_pod_of_crio_s(directory: Path, crio: Program, busybox: Path) -> None:
    """Its sandbox, a container that is used in every way, one that its memory limit kills, and their removal."""
    version = crio.run("-v", cwd=directory)
    assert (version.returncode, __version__ in version.stdout.decode()) == (0, True)
    with namespaces(directory, "ipc", "uts") as paths:
        pod = Pod(directory, busybox, crio, paths)
        sandbox, bundle, streams, _ = pod.create(pod.id, *SLEEP)
        sandbox.start(pod.id)
        ended = sandbox.begin_wait(pod.id)
        assert sandbox.state(pod.id).status == pb.RUNNING

        _use(pod, sandbox)
        _run_out_of_memory(pod)

        # CRI-O that was started again reads where the shim is.
        again = Task(crio.connect((bundle / "address").read_text()))
        state = again.state(pod.id)
        assert (state.status, state.stdout) == (pb.RUNNING, streams.fields["stdout"])
        # The sandbox's process is pid 1 and has no handler for it: CRI-O waits ten seconds, and goes on.
        sandbox.kill(pod.id, signal.SIGTERM)
        assert sandbox.state(pod.id).status == pb.RUNNING
        sandbox.kill(pod.id, signal.SIGKILL)
        assert ended() == 137
        again.delete(pod.id)
        again.shutdown(pod.id)
        assert sandbox.connection.wait_closed()
        streams.end()
    # The last that it says; its connections are closed before.
    crio.await_log(b"is gone")
    assert not socket_link(state_root("", "default"), pod.id).is_symlink()


def test_a_configuration_of_crio_s(directory: Path, crio: Program, busybox: Path) -> None:
    """`runtime_config_path` comes with Create only. One that is wrong is an error, and of its pod nothing is left."""
    file = directory / "katapy.toml"
    file.write_text("[nonsense]\n")
    with namespaces(directory, "ipc", "uts") as paths:
        pod = Pod(directory, busybox, crio, paths)
        with pytest.raises(Refused, match="nonsense"):
            pod.create(pod.id, *SLEEP, configuration=file)
        crio.await_log(b"is gone")


def _use(pod: Pod, sandbox: Task) -> None:
    """Create, start, execute, resize, count, change, pause, stop and delete a container."""
    name = os.urandom(32).hex()
    script = "trap 'echo bye; exit 5' TERM; echo out; echo err >&2; while true; do sleep 0.1; done"
    task, bundle, streams, spec = pod.create(name, "sh", "-c", script)
    task.start(name)
    ended = task.begin_wait(name)
    state = task.state(name)
    assert (state.id, state.bundle, state.status) == (name, str(bundle), pb.RUNNING)
    # Who looks for the pod's network finds it by this process.
    assert os.stat(f"/proc/{state.pid}/ns/net").st_ino == os.stat(pod.paths["net"]).st_ino
    task.kill(name, 0)
    streams.expect(b"out\n")

    look = "hostname; ip -o -4 addr show eth0 | grep -o 'inet [0-9.]*'; ps -o args | grep -c '^sleep 1000'; exit 7"
    assert task.execute(name, spec, pod.directory, "sh", "-c", look) == (7, f"played\ninet {ADDRESS}\n1\n", "")
    shared = "for each in pid ipc uts net mnt; do readlink /proc/1/ns/$each; readlink /proc/self/ns/$each; done"
    links = task.execute(name, spec, pod.directory, "sh", "-c", shared)[1].split()
    assert [one == other for one, other in zip(links[::2], links[1::2], strict=True)] == [True] * 4 + [False]
    task.execute(name, spec, pod.directory, "httpd", "-p", "80", "-h", "/etc")
    fetch = ["nsenter", f"--net={pod.paths['host']}", "--", "busybox", "wget", "-q", "-O-", f"http://{ADDRESS}/group"]
    assert subprocess.check_output(fetch, text=True).startswith("root:")
    text = b"line\n" * 20000
    assert task.execute(name, spec, pod.directory, "cat", stdin=text) == (0, text.decode(), "")
    _use_terminal(task, name, spec, pod.directory)

    stats = task.call("Stats", pb.StatsRequest(id=name), pb.StatsResponse).stats
    assert stats.type_url == "io.containerd.cgroups.v2.Metrics"
    metrics = metrics_pb2.Metrics.FromString(stats.value)
    assert metrics.memory.usage > 1 << 16
    assert metrics.pids.current >= 2
    limits = AnyMessage(type_url=RESOURCES_TYPE, value=json.dumps({"memory": {"limit": 48 << 20}}).encode())
    task.call("Update", pb.UpdateTaskRequest(id=name, resources=limits), Empty)
    limit = task.execute(name, spec, pod.directory, "cat", "/sys/fs/cgroup/memory.max")[1]
    assert limit == f"{48 << 20}\n"
    task.call("Pause", pb.PauseRequest(id=name), Empty)
    assert task.state(name).status == pb.PAUSED
    task.call("Resume", pb.ResumeRequest(id=name), Empty)

    task.kill(name, signal.SIGTERM)
    assert ended() == 5
    state = task.state(name)
    assert (state.status, state.exit_status) == (pb.STOPPED, 5)
    assert state.exited_at.seconds > 0
    assert not (bundle / "oom").exists()
    assert refusal(lambda: task.kill(name, 0)) == NOT_FOUND
    task.delete(name)
    task.shutdown(name)
    assert streams.end() == ("out\nbye\n", "err\n")
    assert sandbox.state(pod.id).status == pb.RUNNING


def _use_terminal(task: Task, name: str, spec: dict[str, Any], directory: Path) -> None:
    """`kubectl exec -it`: what is typed is read, and the window has the size that it was given."""
    streams = Streams(directory / "terminal", stdin=b"", terminal=True)
    task.exec(name, "terminal", spec, streams, "sh")
    task.start(name, "terminal")
    ended = task.begin_wait(name, "terminal")
    streams.expect(b"# ")
    task.call("ResizePty", pb.ResizePtyRequest(id=name, exec_id="terminal", width=99, height=22), Empty)
    streams.type(b"until stty size | grep '^22 99'; do sleep 0.1; done; exit 4\n")
    streams.expect(b"22 99")
    assert ended() == 4
    streams.close_stdin()
    task.close_stdin(name, "terminal")
    task.delete(name, "terminal")
    streams.end()


def _run_out_of_memory(pod: Pod) -> None:
    """CRI-O has no events: it looks for a file when Wait has answered."""
    name = os.urandom(32).hex()
    task, bundle, streams, _ = pod.create(name, "tail", "/dev/zero", memory=16 << 20)
    task.start(name)
    assert task.begin_wait(name)() == 137
    assert (bundle / "oom").exists()
    task.delete(name)
    task.shutdown(name)
    streams.end()


# containerd 2.3


class Containerd:
    """containerd 2.3 below a directory: its sockets, its events, its bundles."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.namespace = directory, "played"
        self.events = Events(directory / "containerd.sock.ttrpc")
        self.config = directory / "katapy.toml"
        self.config.write_text(_CONFIG)
        address = str(directory / "containerd.sock")
        env = {
            "PATH": PATH,
            "GOMAXPROCS": "2",
            "MAX_SHIM_VERSION": "2",
            "TTRPC_ADDRESS": f"{address}.ttrpc",
            "GRPC_ADDRESS": address,
            "NAMESPACE": self.namespace,
        }
        self.program = Program(self.namespace, address, "/usr/bin/containerd", env)
        self.root = state_root(address, self.namespace)

    @property
    def options(self) -> AnyMessage:
        """The runtime's options, which name a configuration file for katapy."""
        return runtime_options(self.config)

    def parameters(self, container: str) -> bytes:
        """Return BootstrapParams, which `start` reads from standard input."""
        address = self.program.address.encode()
        said = field(1, container.encode()) + field(2, self.namespace.encode()) + field(3, 0) + field(4, b"2.3.4")
        said += field(5, address + b".ttrpc") + field(6, address) + field(7, self.program.publisher.encode())
        return said + field(8, field(1, self.options.SerializeToString()))

    def begin(self, container: str, *args: str, **config: Any) -> tuple[Path, str]:
        """Make a bundle whose root is to be mounted, and start the shim or find the pod's; return its address, too."""
        bundle = self.directory / "io.containerd.runtime.v2.task" / self.namespace / container
        bundle.parent.mkdir(parents=True, exist_ok=True)

        def edit(spec: dict[str, Any]) -> None:
            spec["root"] = {"path": "rootfs"}
            spec["annotations"] = config.get("annotations", {})
            spec["hooks"] = config.get("hooks", {})
            spec["linux"]["namespaces"] = config["namespaces"]
            spec["linux"]["cgroupsPath"] = f"/{self.directory.name}/{container}"

        make_bundle(bundle, bundle / "rootfs", args, edit=edit)
        (bundle / "rootfs").mkdir(mode=0o711)
        address = self.program.start(container, bundle, self.parameters(container))
        assert (bundle / "address").read_text() == address
        return bundle, address

    def create(
        self, container: str, rootfs: Path, *args: str, service: str, streams: Streams | None = None, **config: Any
    ) -> tuple[Task, Path]:
        """Make a bundle, start the shim or find the pod's, and create a container."""
        bundle, address = self.begin(container, *args, **config)
        layers = {name: self.directory / container / name for name in ("upper", "work")}
        for path in layers.values():
            path.mkdir(parents=True)
        options = [f"lowerdir={rootfs}", *(f"{name}dir={path}" for name, path in layers.items())]
        task = Task(self.program.connect(address, service))
        mounts = [pb.Mount(type="overlay", source="overlay", options=options)]
        task.create(container, bundle, streams, rootfs=mounts, options=self.options)
        return task, bundle

    def clean_up(self, container: str, bundle: Path) -> pb.DeleteResponse:
        """Call `delete`, as after each task, also one that has ended as it should."""
        flags = [*self.program.flags(container), "-bundle", str(bundle), "delete"]
        done = self.program.run(*flags, cwd=bundle)
        assert done.returncode == 0
        return pb.DeleteResponse.FromString(done.stdout)


_CONFIG = '[network]\nmodel = "none"\n'


@pytest.fixture
def containerd(directory: Path) -> Iterator[Containerd]:
    """containerd 2.3; afterwards the shims have left nothing."""
    played = Containerd(directory)
    yield played
    played.program.close()
    played.events.close()
    left = list(played.root.iterdir()) if played.root.exists() else []
    for each in left:
        played.clean_up(each.name, directory)
    assert not left, "state left behind"


def test_what_the_shim_says_of_itself_to_containerd(containerd: Containerd) -> None:
    """containerd asks when it starts, without a bundle, and gives the options of the handler."""
    done = containerd.program.run("-info", cwd=Path("/"), stdin=containerd.options.SerializeToString())
    info = RuntimeInfo.FromString(done.stdout)
    assert (info.name, info.version.version) == ("io.containerd.katapy.v2", __version__)


def test_a_container_of_containerd_s(containerd: Containerd, busybox: Path) -> None:
    """`ctr run`: what it says is in a message of 2.3's, and the options in it are read."""
    with namespaces(containerd.directory) as paths:
        network = {"type": "network", "path": str(paths["net"])}
        streams = Streams(containerd.directory / "fifo", stdin=b"in\n")
        script = "cat; ls /sys/class/net; echo made > /made; echo err >&2; exit 3"
        task, bundle = containerd.create(
            "c1",
            busybox,
            *("sh", "-c", script),
            service=TASK_V2,
            streams=streams,
            namespaces=[*({"type": kind} for kind in ("pid", "ipc", "uts", "mount")), network],
        )
        assert task.state("c1").status == pb.CREATED
        served = task.call("Connect", pb.ConnectRequest(id="c1"), pb.ConnectResponse)
        assert served.task_pid == task.state("c1").pid
        # nerdctl cp goes there.
        assert not Path(f"/proc/{served.task_pid}/root/etc").exists()
        ended = task.begin_wait("c1")
        pid = task.start("c1")
        assert pid == served.task_pid
        streams.close_stdin()
        task.close_stdin("c1")
        assert ended() == 3
        # Its configuration file wants no network for it.
        assert streams.end() == ("in\nlo\n", "err\n")
        assert (containerd.directory / "c1/upper/made").read_text() == "made\n"
        assert list((bundle / "rootfs").iterdir()) == []
        assert task.state("c1").exit_status == 3
        gone = task.delete("c1")
        assert (gone.pid, gone.exit_status) == (pid, 3)
        task.shutdown("c1")
        assert task.connection.wait_closed()
        assert containerd.clean_up("c1", bundle).exit_status == 137
    containerd.events.find("delete", events.TaskDelete, container_id="c1", exit_status=3)
    assert containerd.events.topics("c1") == ["create", "start", "exit", "delete"]
    created = containerd.events.find("create", events.TaskCreate, container_id="c1", pid=pid)
    assert (created.bundle, created.io.stdin) == (str(bundle), streams.fields["stdin"])
    exit_ = containerd.events.find("exit", events.TaskExit, container_id="c1", id="c1")
    assert (exit_.pid, exit_.exit_status) == (pid, 3)
    assert {each.namespace for each in containerd.events.seen} == {containerd.namespace}


def test_a_pod_of_containerd_s(containerd: Containerd, busybox: Path) -> None:
    """A sandbox and a container by version 3 of the Task service, stopped in the CRI plugin's order; a killed shim."""
    kinds = ["pid", "ipc", "uts", "mount", "network"]

    def annotations(kind: str) -> dict[str, str]:
        return {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "p1"}

    sandbox, bundle = containerd.create(
        "p1",
        busybox,
        *SLEEP,
        service=TASK_V3,
        annotations=annotations("sandbox"),
        namespaces=[{"type": kind} for kind in kinds],
    )
    pid = sandbox.start("p1")
    joined = [
        {"type": kind, **({"path": f"/proc/{pid}/ns/{name}"} if name else {})}
        for kind, name in zip(kinds, ("", "ipc", "uts", "", "net"), strict=True)
    ]
    streams = Streams(containerd.directory / "fifo")
    task, inner = containerd.create(
        "c1",
        busybox,
        *SLEEP,
        service=TASK_V3,
        streams=streams,
        annotations=annotations("container"),
        namespaces=joined,
    )
    task.start("c1")
    ended = task.begin_wait("c1")
    spec = json.loads((inner / "config.json").read_text())
    assert task.execute("c1", spec, containerd.directory, "echo", "here") == (0, "here\n", "")
    details = task.call("Pids", pb.PidsRequest(id="c1"), pb.PidsResponse).processes
    assert [each.pid for each in details] == [task.state("c1").pid]
    assert refusal(lambda: task.delete("c1")) == FAILED_PRECONDITION
    task.kill("c1", signal.SIGKILL)
    assert ended() == 137
    assert refusal(lambda: task.kill("c1", signal.SIGKILL, everyone=True)) == NOT_FOUND
    assert task.begin_wait("c1")() == 137
    task.delete("c1")
    task.shutdown("c1")
    assert sandbox.state("p1").status == pb.RUNNING
    assert containerd.clean_up("c1", inner).exit_status == 137
    assert sandbox.state("p1").status == pb.RUNNING
    streams.end()
    containerd.events.find("delete", events.TaskDelete, container_id="c1")
    seen = [topic for topic in containerd.events.topics("c1") if topic != "paused"]
    assert seen == ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"]

    late = make_bundle(
        containerd.directory / "c2", busybox, SLEEP, edit=lambda spec: spec.update(annotations=annotations("container"))
    )
    # The shim dies before the daemon can connect: of c2 it asks for nothing any more, and nothing may be left.
    containerd.program.start("c2", late, containerd.parameters("c2"))
    shim = sandbox.call("Connect", pb.ConnectRequest(id="p1"), pb.ConnectResponse).shim_pid
    waiting = sandbox.begin_wait("p1")
    os.kill(shim, signal.SIGKILL)
    with pytest.raises(Closed):
        waiting()
    assert containerd.clean_up("p1", bundle).exit_status == 137


def test_killed_in_a_create(containerd: Containerd, busybox: Path) -> None:
    """A daemon that is started again finds no task that it was killed in the middle of creating: it is being undone.

    One that was "created", and could neither be killed nor deleted, kept its pod from being stopped.
    """
    directory = containerd.directory

    def hook(name: str) -> list[dict[str, object]]:
        os.mkfifo(directory / name)
        script = f"touch {directory}/in-{name}; read _ < {directory}/{name}"
        return [{"path": "/bin/sh", "args": ["sh", "-c", script]}]

    calls: dict[str, tuple[Message, type[Message]]] = {
        "Connect": (pb.ConnectRequest(id="c1"), pb.ConnectResponse),
        "State": (pb.StateRequest(id="c1"), pb.StateResponse),
        "Pids": (pb.PidsRequest(id="c1"), pb.PidsResponse),
        "Wait": (pb.WaitRequest(id="c1"), pb.WaitResponse),
        "Kill": (pb.KillRequest(id="c1", signal=signal.SIGKILL), Empty),
        "Delete": (pb.DeleteRequest(id="c1"), pb.DeleteResponse),
    }

    def assert_not_there(task: Task) -> None:
        for method, (request, response) in calls.items():
            assert refusal(lambda: task.call(method, request, response)) == NOT_FOUND, method  # noqa: B023

    hooks = {point: hook(point) for point in ("createRuntime", "poststop")}
    kinds = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
    with ThreadPoolExecutor(1) as threads, (directory / "poststop").open("r+b", buffering=0) as gate:
        creating = threads.submit(
            containerd.create, "c1", busybox, *SLEEP, service=TASK_V2, namespaces=kinds, hooks=hooks
        )
        await_true((directory / "in-createRuntime").exists)
        (first,) = containerd.program.connections
        bundle = directory / "io.containerd.runtime.v2.task" / containerd.namespace / "c1"
        task = Task(containerd.program.connect((bundle / "address").read_text()))
        assert_not_there(task)
        first.close()
        await_true((directory / "in-poststop").exists)
        assert_not_there(task)
        gate.write(b"\n")
        with pytest.raises(Closed):
            creating.result()
    assert task.connection.wait_closed()
    assert containerd.clean_up("c1", bundle).exit_status == 137


def test_killed_before_the_engine_has_connected(containerd: Containerd) -> None:
    """containerd then removes the bundle and asks for no `delete`: what was there stayed until the host was restarted.

    The next start removes it, and nothing of containers whose bundle is there, or whose shim.
    """
    namespaces = [{"type": "pid"}]
    bundles = {name: containerd.begin(name, *SLEEP, namespaces=namespaces)[0] for name in ("c1", "c2", "c3")}

    def kept_by(name: str) -> Any:
        return json.loads((containerd.root / name / "state.json").read_text())["shim"]

    for name in bundles:
        # It serves before it has said so.
        await_true(lambda name=name: kept_by(name)["name"] == "shim")  # type: ignore[misc]
    for name in ("c1", "c2"):
        pid = kept_by(name)["pid"]
        os.kill(pid, signal.SIGKILL)
        await_true(lambda pid=pid: pid not in descendants())  # type: ignore[misc]
    shutil.rmtree(bundles["c1"])
    shutil.rmtree(bundles["c3"])
    bundles["c4"], _ = containerd.begin("c4", *SLEEP, namespaces=namespaces)
    assert {path.name for path in containerd.root.iterdir()} == {"c2", "c3", "c4"}
    links = {name: socket_link(containerd.root, name).is_symlink() for name in ("c1", "c2", "c3", "c4")}
    assert links == {"c1": False, "c2": True, "c3": True, "c4": True}
    for name in ("c2", "c3", "c4"):
        containerd.clean_up(name, containerd.directory)


def test_a_pod_that_ends_while_a_create_fails(containerd: Containerd, busybox: Path) -> None:
    """As where a part of the VM is killed in a Create: the plugin removes the sandbox when it hears of the VM's end.

    The undoing of the Create was interrupted by the end of the pod, and the container's state was left.
    """
    directory = containerd.directory
    os.mkfifo(directory / "gate")
    script = f"touch {directory}/undoing; read _ < {directory}/gate; touch {directory}/undone"
    hooks = {
        "createRuntime": [{"path": "/bin/false", "args": ["false"]}],
        "poststop": [{"path": "/bin/sh", "args": ["sh", "-c", script]}],
    }

    def settings(kind: str) -> dict[str, Any]:
        annotations = {"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "p1"}
        return {"annotations": annotations, "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]}

    sandbox, bundle = containerd.create("p1", busybox, *SLEEP, service=TASK_V2, **settings("sandbox"))
    sandbox.start("p1")
    with ThreadPoolExecutor(1) as threads, (directory / "gate").open("r+b", buffering=0) as gate:
        config = settings("container")
        creating = threads.submit(containerd.create, "c1", busybox, *SLEEP, service=TASK_V2, hooks=hooks, **config)
        await_true((directory / "undoing").exists)
        sandbox.kill("p1", signal.SIGKILL)
        assert sandbox.begin_wait("p1")() == 137
        sandbox.delete("p1")
        sandbox.shutdown("p1")
        assert (containerd.root / "c1").exists()
        gate.write(b"\n")
        with pytest.raises((Refused, Closed)):
            creating.result()
    assert sandbox.connection.wait_closed()
    assert (directory / "undone").exists()
    await_true(lambda: not list(containerd.root.iterdir()))
    for container in ("p1", "c1"):
        containerd.clean_up(container, bundle)


def test_signals_while_the_vm_dies(containerd: Containerd, busybox: Path) -> None:
    """What cannot be signalled because its VM has died has ended: any other error is one of the engine's stop."""
    kinds = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
    task, bundle = containerd.create("c1", busybox, *SLEEP, service=TASK_V2, namespaces=kinds)
    task.start("c1")
    saved = json.loads((containerd.root / "c1" / "state.json").read_text())
    pids = {each["name"]: each["pid"] for each in saved["helpers"]}
    os.kill(pids["QEMU"], signal.SIGSTOP)
    killed = task.connection.begin("Kill", pb.KillRequest(id="c1", signal=signal.SIGTERM))
    # What was sent before is under way when this is answered.
    assert task.state("c1").status == pb.RUNNING
    os.kill(pids["virtiofsd"], signal.SIGKILL)
    assert refusal(lambda: Connection.take(killed, Empty)) == NOT_FOUND
    state = task.state("c1")
    assert (state.status, state.exit_status) == (pb.STOPPED, 137)
    task.delete("c1")
    task.shutdown("c1")
    assert task.connection.wait_closed()
    containerd.clean_up("c1", bundle)


def test_a_network_that_comes_before_the_start(containerd: Containerd, busybox: Path) -> None:
    """As docker's does from version 26 on: a program that looked at once found none."""
    containerd.config.write_text("")
    with namespaces(containerd.directory) as paths:
        streams = Streams(containerd.directory / "fifo")
        kinds = ("pid", "ipc", "uts", "mount", "network")
        task, bundle = containerd.create(
            "c1",
            busybox,
            *("ip", "-o", "-4", "address", "show", "eth0"),
            service=TASK_V2,
            streams=streams,
            namespaces=[{"type": kind} for kind in kinds],
        )
        inside = ["nsenter", f"--net=/proc/{task.state('c1').pid}/ns/net", "--", "ip"]
        give = [*inside, "link", "add", "eth0", "type", "veth", "peer", "name", "pod1", "netns", str(paths["host"])]
        for argv in (give, [*inside, "address", "add", "10.85.1.7/24", "dev", "eth0"]):
            subprocess.run(argv, check=True)
        subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)
        ended = task.begin_wait("c1")
        task.start("c1")
        assert ended() == 0
        assert "inet 10.85.1.7/24" in streams.end()[0]
        task.delete("c1")
        task.shutdown("c1")
        assert task.connection.wait_closed()
        containerd.clean_up("c1", bundle)


def test_a_pod_whose_sandbox_has_gone(containerd: Containerd, busybox: Path) -> None:
    """What `start` prints is the reason that the user reads, and nothing is left of it."""
    bundle = make_bundle(
        containerd.directory / "c1",
        busybox,
        SLEEP,
        edit=lambda spec: spec.update(
            annotations={"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p1"}
        ),
    )
    with pytest.raises(Refused, match="p1 does not run"):
        containerd.program.start("c1", bundle, containerd.parameters("c1"))
