"""The agent's core against real processes: its server in private namespaces on this machine, called over gRPC."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from container_lab import find_hierarchy
from google.protobuf.message_factory import GetMessageClass
from katapy_agent import agent_pb2 as pb

pytestmark = pytest.mark.root
AGENT = Path(__file__).with_name("agent_on_host.py")
CGROUP = f"katapy-agent-{os.getpid()}"
BUSYBOX = Path("/bin/busybox")


class Agent:
    """A client of the agent under test, as the host is one."""

    def __init__(self, directory: Path, rootfs: Path) -> None:
        self._stdio = directory / "stdio"
        self._rootfs = rootfs
        self._channel = grpc.insecure_channel(f"unix:{directory / 'control'}")
        self._streams = 0
        service = pb.DESCRIPTOR.services_by_name["Agent"]
        self._methods = {method.name: method for method in service.methods}

    def call(self, name: str, *, timeout: float = 20, **fields: Any) -> Any:
        method = self._methods[name]
        call = (self._channel.unary_stream if method.server_streaming else self._channel.unary_unary)(
            f"/{method.containing_service.full_name}/{name}",
            GetMessageClass(method.input_type).SerializeToString,
            GetMessageClass(method.output_type).FromString,
        )
        return call(GetMessageClass(method.input_type)(**fields), timeout=timeout)

    def connect(self, name: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(self._stdio))
        connection.sendall(bytes([len(name)]) + name.encode())
        connection.settimeout(20)
        return connection

    def streams(self, *roles: str, terminal: bool = False) -> tuple[pb.Stdio, dict[str, socket.socket]]:
        self._streams += 1
        names = {role: f"{role}-{self._streams}" for role in roles}
        stdio = pb.Stdio(terminal=terminal)
        for role, name in names.items():
            setattr(stdio, role, name)
        return stdio, {role: self.connect(name) for role, name in names.items()}

    def spec(self, *args: str, terminal: bool = False, **linux: Any) -> bytes:
        process = {"cwd": "/", "args": args, "env": ["PATH=/bin"], "terminal": terminal, "user": {"uid": 0, "gid": 0}}
        return json.dumps(
            {
                "ociVersion": "1.0.2",
                "process": process,
                "root": {"path": str(self._rootfs)},
                "mounts": [
                    {"destination": "/proc", "type": "proc", "source": "proc"},
                    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                    {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
                ],
                "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "uts", "ipc")], **linux},
            }
        ).encode()

    def process(self, *args: str, terminal: bool = False) -> bytes:
        return json.dumps({"cwd": "/", "args": args, "env": ["PATH=/bin"], "terminal": terminal}).encode()

    def create(self, name: str, *args: str, stdio: pb.Stdio | None = None) -> None:
        terminal = stdio is not None and stdio.terminal
        self.call("CreateContainer", container_id=name, spec=self.spec(*args, terminal=terminal), stdio=stdio)

    def run(self, name: str, *args: str, stdio: pb.Stdio | None = None) -> None:
        self.create(name, *args, stdio=stdio)
        self.call("StartContainer", container_id=name)

    def wait(self, name: str, exec_id: str = "") -> int:
        return int(self.call("WaitProcess", container_id=name, exec_id=exec_id).exit_status)

    def close(self) -> None:
        self._channel.close()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    directory, rootfs = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("rootfs")
    for name in ("bin", "proc", "dev", "sys", "tmp"):
        (rootfs / name).mkdir()
    (rootfs / "bin" / "busybox").write_bytes(BUSYBOX.read_bytes())
    (rootfs / "bin" / "busybox").chmod(0o755)
    for name in ("sh", "cat", "sleep", "true", "head", "tty", "yes", "echo", "stty", "kill", "printf", "ls", "test"):
        (rootfs / "bin" / name).symlink_to("busybox")
    (rootfs / "bin" / "nc").symlink_to("busybox")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-B", str(AGENT), str(directory), CGROUP], stdout=subprocess.PIPE, env=environment
    ) as served:
        assert served.stdout is not None
        assert served.stdout.readline() == b"ready\n"
        client = Agent(directory, rootfs)
        client.call("CreateSandbox", hostname="pod")
        yield client
        client.call("DestroySandbox")
        client.close()
        served.kill()
    (find_hierarchy() / CGROUP).rmdir()


def await_processes(agent: Agent, name: str, expected: set[tuple[str, str]]) -> None:
    """Wait until these are a container's processes, by command and exec id: what ends or begins is in between."""
    deadline = time.monotonic() + 60
    while (found := _processes(agent, name)) != sorted(expected):
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def _processes(agent: Agent, name: str) -> list[tuple[str, str]]:
    listed = agent.call("ListProcesses", container_id=name)
    return sorted((each.command, each.exec_id) for each in listed.processes)


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def send_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"x" * 65536)


def status_of(error: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[grpc.StatusCode, str, str]:
    call: Any = error.value
    return call.code(), dict(call.trailing_metadata()).get("katapy-error", ""), call.details()


def test_output_and_exit_code(agent: Agent) -> None:
    stdio, streams = agent.streams("stdout", "stderr")
    agent.run("out", "/bin/sh", "-c", "echo to-out; echo to-err >&2; exit 7", stdio=stdio)
    assert agent.wait("out") == 7
    assert read_all(streams["stdout"]) == b"to-out\n"
    assert read_all(streams["stderr"]) == b"to-err\n"
    assert agent.wait("out") == 7
    agent.call("RemoveContainer", container_id="out")
    agent.call("RemoveContainer", container_id="out")


def test_stream_may_come_after_the_call(agent: Agent) -> None:
    made: list[socket.socket] = []
    late = threading.Timer(0.2, lambda: made.append(agent.connect("late")))
    late.start()
    agent.run("late", "/bin/echo", "x", stdio=pb.Stdio(stdout="late"))
    late.join()
    assert read_all(made[0]) == b"x\n"
    agent.call("RemoveContainer", container_id="late")


def test_much_data_through_cat_arrives_whole(agent: Agent) -> None:
    stdio, streams = agent.streams("stdin", "stdout")
    agent.run("cat", "/bin/cat", stdio=stdio)
    block = os.urandom(1 << 20)
    sent, received = hashlib.sha256(), hashlib.sha256()

    def feed() -> None:
        for _ in range(64):
            streams["stdin"].sendall(block)
            sent.update(block)
        streams["stdin"].shutdown(socket.SHUT_WR)

    feeder = threading.Thread(target=feed)
    feeder.start()
    while data := streams["stdout"].recv(1 << 20):
        received.update(data)
    feeder.join()
    assert agent.wait("cat") == 0
    assert sent.digest() == received.digest()
    agent.call("RemoveContainer", container_id="cat")
    for connection in streams.values():
        connection.close()


def test_much_output_on_both_streams_at_once(agent: Agent) -> None:
    stdio, streams = agent.streams("stdout", "stderr")
    half = "/bin/head -c 8388608 /dev/zero"
    agent.run("both", "/bin/sh", "-c", f"{half} & {half} >&2; wait", stdio=stdio)
    counts: dict[str, int] = {}
    readers = [
        threading.Thread(target=lambda role=role: counts.update({role: len(read_all(streams[role]))}))
        for role in ("stdout", "stderr")
    ]
    for reader in readers:
        reader.start()
    assert agent.wait("both") == 0
    for reader in readers:
        reader.join()
    assert counts == {"stdout": 8 << 20, "stderr": 8 << 20}
    agent.call("RemoveContainer", container_id="both")


def test_host_that_closes_stdout_ends_the_writer(agent: Agent) -> None:
    stdio, streams = agent.streams("stdout")
    agent.run("yes", "/bin/yes", stdio=stdio)
    assert streams["stdout"].recv(2) == b"y\n"
    streams["stdout"].close()
    assert agent.wait("yes") in (1, 128 + signal.SIGPIPE)
    agent.call("RemoveContainer", container_id="yes")


def test_container_that_closes_stdin_is_told_to_the_host(agent: Agent) -> None:
    stdio, streams = agent.streams("stdin")
    agent.run("deaf", "/bin/sh", "-c", "exec <&-; exec /bin/sleep 1000", stdio=stdio)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        send_for_ever(streams["stdin"])
    agent.call("RemoveContainer", container_id="deaf")
    streams["stdin"].close()


def test_close_stdin_delivers_what_has_come(agent: Agent) -> None:
    stdio, streams = agent.streams("stdin", "stdout")
    agent.run("closed", "/bin/cat", stdio=stdio)
    streams["stdin"].sendall(b"last words")
    assert streams["stdout"].recv(100) == b"last words"
    agent.call("CloseStdin", container_id="closed")
    assert read_all(streams["stdout"]) == b""
    assert agent.wait("closed") == 0
    agent.call("RemoveContainer", container_id="closed")
    streams["stdin"].close()


def test_child_that_keeps_the_pipe_does_not_keep_the_stream(agent: Agent) -> None:
    agent.run("host", "/bin/sleep", "1000")
    stdio, streams = agent.streams("stdout")
    process = agent.process("/bin/sh", "-c", "echo said; /bin/sleep 1000 &")
    agent.call("ExecProcess", container_id="host", exec_id="bg", process=process, stdio=stdio)
    assert agent.wait("host", "bg") == 0
    assert read_all(streams["stdout"]) == b"said\n"
    agent.call("RemoveContainer", container_id="host")


def test_terminal(agent: Agent) -> None:
    stdio, streams = agent.streams("stdout", terminal=True)
    stdio.rows, stdio.columns = 33, 77
    terminal = streams["stdout"].makefile("rb")
    agent.run("tty", "/bin/sh", "-c", "stty size; read line; stty size; echo got $line", stdio=stdio)
    assert terminal.readline().split() == [b"33", b"77"]
    agent.call("TtyWinResize", container_id="tty", rows=40, columns=100)
    streams["stdout"].sendall(b"hello\n")
    streams["stdout"].shutdown(socket.SHUT_WR)
    assert terminal.read().split() == [b"hello", b"40", b"100", b"got", b"hello"]
    assert agent.wait("tty") == 0
    agent.call("RemoveContainer", container_id="tty")
    terminal.close()
    streams["stdout"].close()


def test_forwarded_connection(agent: Agent) -> None:
    agent.run("server", "/bin/nc", "-l", "-p", "9000", "-e", "/bin/cat")
    deadline = time.monotonic() + 20
    for number in range(1000):
        stream = agent.connect(f"forward-{number}")
        try:
            agent.call("ForwardConnection", port=9000, stream=f"forward-{number}")
            break
        except grpc.RpcError:  # it does not listen yet
            stream.close()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with stream:
        stream.sendall(b"\0\0\0\5there\0\0\0\0")
        received = b"".join(iter(lambda: stream.recv(100), b""))
    assert received == b"\0\0\0\5there\0\0\0\0"
    assert agent.wait("server") == 0
    agent.call("RemoveContainer", container_id="server")


def test_forwarded_connection_that_nobody_takes(agent: Agent) -> None:
    stream = agent.connect("refused")
    with pytest.raises(grpc.RpcError) as raised:
        agent.call("ForwardConnection", port=9, stream="refused")
    refused = "cannot connect to port 9 of the loopback: connection refused"
    assert status_of(raised) == (grpc.StatusCode.NOT_FOUND, "NotFound", refused)
    assert read_all(stream) == b""


def test_signals(agent: Agent) -> None:
    agent.run("sig", "/bin/sleep", "1000")
    agent.call("ExecProcess", container_id="sig", exec_id="e", process=agent.process("/bin/sleep", "1000"))
    agent.call("SignalProcess", container_id="sig", exec_id="e", signal=signal.SIGTERM)
    assert agent.wait("sig", "e") == 143
    with pytest.raises(grpc.RpcError) as error:
        agent.call("SignalProcess", container_id="sig", exec_id="e", signal=signal.SIGTERM)
    assert status_of(error) == (grpc.StatusCode.NOT_FOUND, "NotFound", "os: process already finished")
    agent.call("SignalProcess", container_id="sig", signal=signal.SIGKILL)
    assert agent.wait("sig") == 137
    agent.call("SignalProcess", container_id="sig", signal=signal.SIGKILL, all=True)
    agent.call("RemoveContainer", container_id="sig")


def test_program_below_an_init(agent: Agent) -> None:
    """It is not pid 1, so that signals end it as they end any other; that one goes with it, and all others."""

    def ended(script: str) -> tuple[int, int, bytes]:
        document = json.loads(agent.spec("/bin/sh", "-c", script))
        document["annotations"] = {"io.katapy.init": "true"}
        stdio, streams = agent.streams("stdout")
        agent.call("CreateContainer", container_id="below", spec=json.dumps(document).encode(), stdio=stdio)
        agent.call("StartContainer", container_id="below")
        output = read_all(streams["stdout"])
        end = agent.call("WaitProcess", container_id="below")
        agent.call("RemoveContainer", container_id="below")
        return end.exit_status, end.signal, output

    assert ended("kill -15 $$") == (143, signal.SIGTERM, b"")
    assert ended("exit 143") == (143, 0, b"")
    # Its Python has handlers for some, as that of the guest has for faults.
    caught = "while read -r name value; do test $name != SigCgt: || echo $value; done < /proc/1/status"
    assert ended(caught) == (0, 0, b"0000000000000000\n")
    assert ended("for n in 1 2 3 6 9 15; do kill -$n 1; done; (sleep 0 &); echo $$") == (0, 0, b"2\n")
    assert ended("sleep 1000 & sleep 1001 & echo on") == (0, 0, b"on\n")


def test_processes_and_events(agent: Agent) -> None:
    events = agent.call("Events", timeout=30)
    agent.run("ps", "/bin/sleep", "1000")
    # The subscription exists once an event has come.
    agent.call("ExecProcess", container_id="ps", exec_id="one", process=agent.process("/bin/sleep", "999"))
    await_processes(agent, "ps", {("/bin/sleep 1000", ""), ("/bin/sleep 999", "one")})
    agent.call("SignalProcess", container_id="ps", signal=9, all=True)
    ends = {(each.exit.container_id, each.exit.exec_id, each.exit.exit_status) for each in (next(events), next(events))}
    assert ends == {("ps", "", 137), ("ps", "one", 137)}
    assert agent.call("StatsContainer", container_id="ps").pids.current == 0
    agent.call("RemoveContainer", container_id="ps")
    events.cancel()


def test_exec_while_the_container_ends(agent: Agent) -> None:
    """Whatever it has come to by then, the container's end is why it fails, and no bug of anybody's."""
    refused = set()
    for _ in range(10):
        agent.run("ending", "/bin/sleep", "1000")
        with ThreadPoolExecutor(4) as threads:
            execs = [threads.submit(_exec_until_refused, agent, "ending", f"e{number}") for number in range(4)]
            agent.call("SignalProcess", container_id="ending", signal=9)
            refused |= {each.result() for each in execs}
        agent.call("RemoveContainer", container_id="ending")
    assert refused == {"InvalidState"}


def _exec_until_refused(agent: Agent, name: str, exec_id: str) -> str:
    while True:
        try:
            agent.call("ExecProcess", container_id=name, exec_id=exec_id, process=agent.process("/bin/true"))
            agent.wait(name, exec_id)
        except grpc.RpcError as error:
            call: Any = error
            return str(dict(call.trailing_metadata())["katapy-error"])


def test_states(agent: Agent) -> None:
    agent.create("st", "/bin/sleep", "1000")
    for name, fields, expected in (
        ("CreateContainer", {"container_id": "st", "spec": b"{}"}, "AlreadyExists"),
        ("ExecProcess", {"container_id": "st", "exec_id": "x", "process": agent.process("/bin/true")}, "InvalidState"),
        ("StartContainer", {"container_id": "nobody"}, "NotFound"),
        ("WaitProcess", {"container_id": "st", "exec_id": "nothing"}, "NotFound"),
        ("SignalProcess", {"container_id": "st", "signal": 65}, "InvalidArgument"),
        ("TtyWinResize", {"container_id": "st", "rows": 1, "columns": 1}, "InvalidState"),
        ("CreateSandbox", {}, "AlreadyExists"),
        ("CreateContainer", {"container_id": "../x", "spec": b"{}"}, "InvalidArgument"),
        ("CreateContainer", {"container_id": "bad", "spec": b"{"}, "InvalidArgument"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            agent.call(name, **fields)
        assert status_of(error)[1] == expected, name
    agent.call("StartContainer", container_id="st")
    with pytest.raises(grpc.RpcError) as error:
        agent.call("StartContainer", container_id="st")
    assert status_of(error)[1] == "InvalidState"
    agent.call("RemoveContainer", container_id="st")


def test_missing_program_is_named_and_leaves_nothing(agent: Agent) -> None:
    with pytest.raises(grpc.RpcError) as error:
        agent.run("none", "/bin/no-such-program")
    assert status_of(error)[:2] == (grpc.StatusCode.NOT_FOUND, "CommandNotFound")
    agent.call("RemoveContainer", container_id="none")
    agent.run("none", "/bin/true")
    assert agent.wait("none") == 0
    with pytest.raises(grpc.RpcError):
        agent.call("ExecProcess", container_id="none", exec_id="x", process=agent.process("/bin/true"))
    agent.call("RemoveContainer", container_id="none")


def test_pause_and_resume(agent: Agent) -> None:
    agent.create("frozen", "/bin/sh", "-c", "while :; do :; done")
    with pytest.raises(grpc.RpcError) as error:
        agent.call("PauseContainer", container_id="frozen")
    assert status_of(error)[1:] == ("InvalidState", "container frozen is created, not running")
    agent.call("StartContainer", container_id="frozen")
    agent.call("PauseContainer", container_id="frozen")
    directory = find_hierarchy() / CGROUP / "container-frozen"
    assert "frozen 1" in (directory / "cgroup.events").read_text()
    refused: tuple[tuple[str, dict[str, Any]], ...] = (
        ("PauseContainer", {}),
        ("StartContainer", {}),
        ("ExecProcess", {"exec_id": "x", "process": agent.process("/bin/true")}),
    )
    for method, fields in refused:
        with pytest.raises(grpc.RpcError) as error:
            agent.call(method, container_id="frozen", **fields)
        assert status_of(error)[1] == "InvalidState", method
    agent.call("ResumeContainer", container_id="frozen")
    assert "frozen 0" in (directory / "cgroup.events").read_text()
    with pytest.raises(grpc.RpcError) as error:
        agent.call("ResumeContainer", container_id="frozen")
    assert status_of(error)[1:] == ("InvalidState", "container frozen is running, not paused")
    agent.call("PauseContainer", container_id="frozen")
    agent.call("SignalProcess", container_id="frozen", signal=signal.SIGKILL)
    assert agent.wait("frozen") == 137
    agent.call("RemoveContainer", container_id="frozen")
    # One that is removed as it is.
    agent.run("frozen", "/bin/sleep", "1000")
    agent.call("PauseContainer", container_id="frozen")
    agent.call("RemoveContainer", container_id="frozen")


def test_update_refuses_devices_and_what_the_kernel_lacks(agent: Agent) -> None:
    agent.run("limits", "/bin/sleep", "1000")
    for change, kind, text in (
        ({"devices": [{"allow": True}]}, "Unsupported", "devices cannot be changed"),
        ({"unified": {"memory.nonsense": "1"}}, "Unsupported", "memory.nonsense"),
        ({"pids": {"limit": "x"}}, "InvalidArgument", "pids.limit"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            agent.call("UpdateContainer", container_id="limits", resources=json.dumps(change).encode())
        assert status_of(error)[1] == kind
        assert text in status_of(error)[2]
    agent.call("UpdateContainer", container_id="limits", resources=b'{"devices": [], "cpu": {"shares": 0}}')
    agent.call("SignalProcess", container_id="limits", signal=9)
    agent.wait("limits")
    with pytest.raises(grpc.RpcError) as error:
        agent.call("UpdateContainer", container_id="limits", resources=b"{}")
    assert status_of(error)[1] == "InvalidState"
    agent.call("RemoveContainer", container_id="limits")


def test_start_container_hooks(agent: Agent) -> None:
    def create(*hooks: dict[str, Any]) -> dict[str, socket.socket]:
        document = json.loads(agent.spec("/bin/echo", "program")) | {"hooks": {"startContainer": hooks}}
        stdio, streams = agent.streams("stdout")
        agent.call(
            "CreateContainer", container_id="hooked", spec=json.dumps(document).encode(), stdio=stdio, bundle="/on/host"
        )
        return streams

    state = {"ociVersion": "1.0.2", "id": "hooked", "status": "created", "bundle": "/on/host", "annotations": {}}
    expected = json.dumps({**state, "pid": 1})
    compare = {"path": "/bin/sh", "args": ["sh", "-c", 'test "$(cat)" = "$0"', expected]}
    streams = create(compare, {"path": "/bin/sh", "args": ["sh", "-c", "sleep 1000 & exit 0"], "timeout": 20})
    agent.call("StartContainer", container_id="hooked")
    assert read_all(streams["stdout"]) == b"program\n"
    assert agent.wait("hooked") == 0
    agent.call("RemoveContainer", container_id="hooked")
    for hook, kind, text in (
        ({"path": "/bin/sh", "args": ["sh", "-c", "echo a; echo b >&2; exit 5"]}, "Unavailable", "status 5: a | b"),
        ({"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $$"]}, "Unavailable", "was killed by signal 9"),
        ({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}, "Timeout", "did not end within 1 s"),
        ({"path": "/bin/absent"}, "Unavailable", "status 127: no such file or directory"),
    ):
        streams = create({"path": "/bin/true"}, hook)
        with pytest.raises(grpc.RpcError) as error:
            agent.call("StartContainer", container_id="hooked")
        assert status_of(error)[1] == kind
        assert status_of(error)[2].startswith(f"hooks.startContainer[1]: {hook['path']}: ")
        assert status_of(error)[2].endswith(text)
        assert read_all(streams["stdout"]) == b""
        assert agent.wait("hooked") == 1
        agent.call("RemoveContainer", container_id="hooked")


def test_joined_namespaces(agent: Agent) -> None:
    def join(name: str, *types: str, of: str = "first", script: str = "exec /bin/sleep 1000") -> None:
        document = agent.spec("/bin/sh", "-c", script)
        agent.call("CreateContainer", container_id=name, spec=document, joined_container_id=of, joined_namespaces=types)
        agent.call("StartContainer", container_id=name)

    def namespaces(name: str) -> dict[str, str]:
        stdio, streams = agent.streams("stdout")
        process = agent.process(
            "/bin/sh", "-c", "for n in ipc uts pid mnt cgroup; do /bin/ls -l /proc/self/ns/$n; done"
        )
        agent.call("ExecProcess", container_id=name, exec_id="look", process=process, stdio=stdio)
        lines = read_all(streams["stdout"]).decode().splitlines()
        agent.wait(name, "look")
        return dict(line.rpartition(" ")[2].split(":") for line in lines)

    for refused, target, type_ in (("NotFound", "nobody", "pid"), ("Unsupported", "first", "mount")):
        with pytest.raises(grpc.RpcError) as error:
            join("x", type_, of=target)
        assert status_of(error)[1] == refused
    agent.run("first", "/bin/sh", "-c", "trap '' CHLD; while :; do /bin/sleep 0.1; done")
    join("some", "ipc", "uts")
    join("none")
    # The children that it leaves behind are the first one's to reap, and its cgroup's to kill.
    join("all", "ipc", "uts", "pid", script="/bin/sleep 999 & /bin/sleep 998 & exec /bin/sleep 997")
    first, some, everything = namespaces("first"), namespaces("some"), namespaces("all")
    assert first.items().isdisjoint(namespaces("none").items())
    assert {kind for kind in first if first[kind] == some[kind]} == {"ipc", "uts"}
    assert {kind for kind in first if first[kind] == everything[kind]} == {"ipc", "uts", "pid"}
    assert [each.container_pid for each in agent.call("ListProcesses", container_id="some").processes] == [1]
    await_processes(agent, "all", {(f"/bin/sleep {number}", "") for number in (997, 998, 999)})
    agent.call("SignalProcess", container_id="all", signal=9)
    assert agent.wait("all") == 137
    await_processes(agent, "all", set())
    agent.call("RemoveContainer", container_id="all")
    assert namespaces("first") == first
    join("all", "pid")
    agent.call("SignalProcess", container_id="first", signal=9)
    assert agent.wait("first") == 137
    assert agent.wait("all") == 137
    with pytest.raises(grpc.RpcError) as error:
        join("late", "ipc")
    assert status_of(error)[1:] == ("InvalidState", "container first is stopped: its namespaces cannot be joined")
    for name in ("all", "some", "none", "first"):
        agent.call("RemoveContainer", container_id=name)
