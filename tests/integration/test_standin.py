"""The stand-in and the launcher as processes: real pipes, a real pty, a real shim socket in a long directory."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import pytest

from katapy import preload
from katapy.client import attach, launch
from katapy.client.task import TaskClient
from katapy.errors import AlreadyExists, NotFound, Unavailable
from katapy.shim.attach import Attached, AttachServer
from katapy.transport import unix

ALL = ["stdin", "stdout", "stderr"]
CHUNK = os.urandom(1 << 20)


class StandIn:
    """attach.py as a program, with the test as its shim."""

    def __init__(self, names: list[str], stdin: int, stdout: int, stderr: int, *, terminal: bool = False) -> None:
        mine, self.control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ready, report = os.pipe()
        argv = [sys.executable, "-I", "-S", attach.__file__, "--socket-fd", str(mine.fileno()), "--id", "c1"]
        argv += ["--ready-fd", str(report)]
        fds = mine.fileno(), report
        self.process = subprocess.Popen(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=fds, start_new_session=True
        )
        mine.close()
        os.close(report)
        self.control.settimeout(60)
        assert self.hear() == {"attach": "c1", "exec": ""}
        pairs = {name: socket.socketpair() for name in names}
        answer = json.dumps({"terminal": terminal, "streams": names}).encode()
        socket.send_fds(self.control, [answer], [near.fileno() for near, _ in pairs.values()])
        for near, far in pairs.values():
            near.close()
            far.settimeout(60)
        self.streams = {name: far for name, (_, far) in pairs.items()}
        with os.fdopen(ready, "rb") as file:
            assert file.read() == b"!+"

    def hear(self) -> Any:
        return json.loads(self.control.recv(65536))

    def exit(self, status: int) -> int:
        """End the container; returns the stand-in's own status."""
        for stream in self.streams.values():
            stream.close()
        self.control.send(json.dumps({"exit": status}).encode())
        own: int = self.process.wait(60)
        return own

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for sock in (self.control, *self.streams.values()):
            sock.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def standing_in(
    names: list[str], stdin: int = PIPE, stdout: int = PIPE, stderr: int = PIPE, *, terminal: bool = False
) -> Iterator[StandIn]:
    standin = StandIn(names, stdin, stdout, stderr, terminal=terminal)
    try:
        yield standin
    finally:
        standin.close()


def test_no_byte_is_lost_in_either_stream() -> None:
    """100 MB on stdout and 100 MB on stderr at once, and the exit right behind them."""
    with standing_in(ALL, stdin=DEVNULL) as standin:
        sums: dict[str, str] = {}

        def send(name: str) -> None:
            digest = hashlib.sha256()
            for number in range(96):
                data = bytes([number]) + CHUNK
                digest.update(data)
                standin.streams[name].sendall(data)
            sums[f"sent {name}"] = digest.hexdigest()
            standin.streams[name].close()

        def receive(name: str, file: Any) -> None:
            digest = hashlib.sha256()
            while data := file.read(1 << 18):
                digest.update(data)
            sums[f"received {name}"] = digest.hexdigest()

        process = standin.process
        threads = [threading.Thread(target=send, args=(name,)) for name in ("stdout", "stderr")]
        threads += [threading.Thread(target=receive, args=("stdout", process.stdout))]
        threads += [threading.Thread(target=receive, args=("stderr", process.stderr))]
        for thread in threads:
            thread.start()
        for thread in threads[:2]:
            thread.join()
        assert standin.exit(7) == 7
        for thread in threads[2:]:
            thread.join()
    assert sums["received stdout"] == sums["sent stdout"]
    assert sums["received stderr"] == sums["sent stderr"]


def test_signals_reach_the_container_and_not_the_stand_in() -> None:
    with standing_in(ALL) as standin:
        own = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGWINCH, signal.SIGCONT}
        own |= {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE}
        own |= {signal.SIGILL, signal.SIGXFSZ}
        for number in sorted(signal.valid_signals() - own):
            standin.process.send_signal(number)
            assert standin.hear() == {"signal": number}
        assert standin.exit(143) == 143


def test_it_ends_as_killed_when_the_shim_dies() -> None:
    with standing_in(ALL) as standin:
        standin.streams["stdout"].sendall(b"last words")
        for sock in (*standin.streams.values(), standin.control):
            sock.close()
        out, err = standin.process.communicate(timeout=60)
        assert (out, err) == (b"last words", b"katapy: the shim died\n")
        assert standin.process.returncode == 137


def test_a_terminal_is_raw_meanwhile_and_tells_its_size() -> None:
    """The pty is the stand-in's controlling terminal, as an engine's console socket gives it."""
    master, slave = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        before = termios.tcgetattr(slave)
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        standin = stack.enter_context(standing_in(["stdout"], terminal=True, stdin=slave, stdout=slave, stderr=slave))
        assert standin.hear() == {"resize": [80, 24]}
        assert not termios.tcgetattr(slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 132, 0, 0))
        assert standin.hear() == {"resize": [132, 50]}
        os.write(master, b"\x03\x1a\r")  # Ctrl-C, Ctrl-Z, Return: keys, not signals, and not translated
        assert standin.streams["stdout"].recv(9) == b"\x03\x1a\r"
        standin.streams["stdout"].sendall(b"line\n")
        assert os.read(master, 99) == b"line\n"  # no \r added: the guest's pty does that
        assert standin.exit(0) == 0
        assert termios.tcgetattr(slave) == before


def test_a_terminal_is_given_back_when_the_shim_dies() -> None:
    master, slave = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        before = termios.tcgetattr(slave)
        standin = stack.enter_context(standing_in(["stdout"], terminal=True, stdin=slave, stdout=slave, stderr=DEVNULL))
        standin.process.send_signal(signal.SIGTERM)
        assert standin.hear() == {"signal": 15}
        assert termios.tcgetattr(slave) != before
        standin.streams["stdout"].close()
        standin.control.close()
        assert standin.process.wait(60) == 137
        assert termios.tcgetattr(slave) == before


class Sandbox:
    """A shim's handler that gives one stream and ends when it is signalled."""

    def __init__(self) -> None:
        self.pid = 0
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def attach(self, container_id: str, exec_id: str, pid: int) -> Attached:
        if container_id != "c1":
            raise NotFound(f'container "{container_id}" does not exist')
        self.pid = pid
        near, far = socket.socketpair()
        with far:
            far.send(b"hello")
        return Attached(False, [("stdout", near)])

    async def signal(self, container_id: str, exec_id: str, number: int) -> None:
        self.ended.set_result(128 + number)

    async def resize(self, container_id: str, exec_id: str, columns: int, rows: int) -> None: ...

    async def wait(self, container_id: str, exec_id: str) -> tuple[int, int]:
        return await self.ended, 0

    async def detached(self, container_id: str, exec_id: str) -> None: ...


async def test_start_standin(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    directory.mkdir()
    sandbox = Sandbox()
    async with AttachServer(unix.listen(directory / launch.ATTACH_SOCKET, socket.SOCK_SEQPACKET), sandbox):
        out, stdout = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        streams = (null, stdout, null)
        missing = await asyncio.to_thread(launch.start_standin, directory, "c2", "", streams)
        with pytest.raises(NotFound, match='container "c2" does not exist'):
            await asyncio.to_thread(missing.attached)
        standin = await asyncio.to_thread(launch.start_standin, directory, "c1", "", streams)
        assert await asyncio.to_thread(standin.attached) == standin.pid
        os.close(stdout)
        os.close(null)
        assert sandbox.pid == standin.pid
        with os.fdopen(out, "rb") as file:
            assert await asyncio.to_thread(file.read, 5) == b"hello"
            os.kill(standin.pid, signal.SIGUSR1)
            _, status = await asyncio.to_thread(os.waitpid, standin.pid, 0)
            assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGUSR1
            assert await asyncio.to_thread(file.read) == b""


def test_a_stand_in_that_dies_at_once(tmp_path: Path) -> None:
    """One whose network namespace was not there: its container waited a minute for somebody to come for its streams."""
    listening = unix.listen(tmp_path / launch.ATTACH_SOCKET, socket.SOCK_SEQPACKET)
    with listening, pytest.raises(Unavailable, match="the stand-in of c1 died at once"):
        launch.start_standin(tmp_path, "c1", "", (0, 1, 2), prefix=["/bin/false"])
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# What the launcher is tested with instead of the shim: an interpreter that ignores the program it is told to run.
FAKE_PYTHON = """#!{python} -I
import json, os, socket, sys
sys.path[:0] = {path}
assert sys.argv[1:3] == ["-I", "-c"], sys.argv
from katapy import preload
arguments, fds = preload.await_arguments()
for stream in (1, 2):
    os.dup2(fds[2], stream)
os.close(fds[2])
"""


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    script = tmp_path / "python"
    script.write_text(FAKE_PYTHON.format(python=sys.executable, path=sys.path) + body)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def test_start_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim gets its arguments and two listening sockets, and a session of its own; its words go to its log."""
    root = tmp_path / ("r" * 100)
    (root / "s1").mkdir(parents=True)
    fake_python(
        tmp_path,
        monkeypatch,
        """
import asyncio
from katapy.proto import task_pb2 as pb
from katapy.transport.ttrpc_server import handler_table, serve

class Service:
    async def connect(self, request):
        return pb.ConnectResponse(shim_pid=os.getpid(), task_pid=os.getsid(0), version=json.dumps(arguments))
    async def shutdown(self, request):
        done.set()
        return pb.google_dot_protobuf_dot_empty__pb2.Empty()

async def main():
    global done
    done = asyncio.Event()
    shim, attach = (socket.socket(fileno=fd) for fd in fds[:2])
    assert attach.type == socket.SOCK_SEQPACKET
    table = handler_table(pb.DESCRIPTOR.services_by_name["Task"], Service())
    async with serve(shim, {"containerd.task.v2.Task": table}):
        print("served", flush=True)
        await done.wait()

asyncio.run(main())
""",
    )
    client, pid = launch.start_shim(root, "s1", debug=True, config=Path("/etc/k.toml"))
    with client:
        serving = TaskClient(client).connect("s1")
        assert (serving.shim_pid, serving.task_pid) == (pid, pid)
        assert json.loads(serving.version) == {
            "root": str(root),
            "id": "s1",
            "config": "/etc/k.toml",
            "debug": True,
            "foreground": False,
            "systemd_cgroup": False,
        }
        with pytest.raises(AlreadyExists):
            launch.start_shim(root, "s1", debug=False, config=None)
        with launch.connect(root / "s1") as other:
            TaskClient(other).shutdown("s1")
    assert os.waitpid(pid, 0)[1] == 0
    log = root / "s1" / launch.LOG
    assert log.read_text() == "served\n"
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_shim_that_dies_at_once_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection waits in a backlog that dies with the last holder of the socket: no timeout is involved."""
    (tmp_path / "s1").mkdir()
    fake_python(tmp_path, monkeypatch, "sys.exit('no such configuration')")
    client, pid = launch.start_shim(tmp_path, "s1", debug=False, config=None)
    with client, pytest.raises(Unavailable, match="the shim died during Task"):
        TaskClient(client).create("s1", "/b", timeout=None)
    os.waitpid(pid, 0)
    assert (tmp_path / "s1" / launch.LOG).read_text() == "no such configuration\n"


def test_a_shim_that_dies_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation, say. Whoever asks next is told, and it leaves neither a zombie nor a socket."""
    (tmp_path / "s1").mkdir()
    script = tmp_path / "python"
    script.write_text("#!/bin/false\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    preload.begin()
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    with pytest.raises(Unavailable, match="cannot start the shim: it died while it was loaded"):
        launch.start_shim(tmp_path, "s1", debug=False, config=None)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_shim_that_nobody_needs_ends() -> None:
    """Two of them: one whose command says so, and one whose command was killed."""
    preload.begin()
    preload.drop()
    waiting = preload.take()
    waiting.control.close()
    assert os.waitstatus_to_exitcode(os.waitpid(waiting.pid, 0)[1]) == 0
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.root
def test_another_user_is_refused(tmp_path: Path) -> None:
    """Whoever gets at the socket in spite of its mode is still told apart by the kernel's word (SO_PEERCRED)."""
    path = tmp_path / "attach.sock"
    code = f"""
import os, socket
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.setresuid(65534, 65534, 65534)
sock.connect({path.name!r})
sock.send(b"{{}}")
print(sock.recv(99))
"""

    async def run() -> bytes:
        async with AttachServer(unix.listen(path, socket.SOCK_SEQPACKET), Sandbox()):
            path.chmod(0o666)
            for directory in (tmp_path, *tmp_path.parents[:2]):
                directory.chmod(0o755)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-c", code, stdout=PIPE, stderr=PIPE, cwd=tmp_path
            )
            out, err = await process.communicate()
            return out or err

    # Nothing is answered: not even that the message was wrong.
    answer = asyncio.run(run())
    assert answer == b"b''\n" or b"ConnectionResetError" in answer or b"BrokenPipeError" in answer


def test_an_idle_stand_in_sleeps() -> None:
    """A stand-in that has nothing to do does nothing: it is not woken once."""
    with standing_in(ALL) as standin:
        status = Path(f"/proc/{standin.process.pid}/task")

        def switches() -> list[str]:
            return [
                line
                for task in sorted(status.iterdir())
                for line in (task / "status").read_text().splitlines()
                if line.startswith("voluntary_ctxt_switches")
            ]

        def awake() -> bool:
            before = switches()
            select.select([], [], [], 0.3)
            return switches() != before

        # It may still be on its way to sleep; one that is woken time and again never gets there.
        assert not all(awake() for _ in range(20))
        assert standin.exit(0) == 0


def test_a_shim_that_cannot_be_begun_is_no_traceback(tmp_path: Path) -> None:
    """It is begun before the command line is read, where nobody prints an error."""
    code = (
        "import sys; from katapy import entry, preload\n"
        "def refuse(_stderr): raise OSError(11, 'Resource temporarily unavailable')\n"
        "preload._start = refuse; sys.argv = ['katapy', 'run', '--nonsense']; entry.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "No such option" in done.stderr


def test_a_message_that_a_shim_cannot_take_ends_it(tmp_path: Path) -> None:
    """It was waited for while it waited for its message: for ever."""
    waiting = preload.take()
    with pytest.raises(Unavailable, match="cannot start the shim"):
        waiting.give({"root": "x" * (8 << 20)}, [])
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
