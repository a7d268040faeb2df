"""containerd with katapy as its runtime, by its shim API: Debian's containerd and ctr, one VM for each container."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import tempfile
import termios
from concurrent.futures import ThreadPoolExecutor
from fcntl import ioctl
from pathlib import Path

import pytest
from containerd_daemon import CTR, IMAGE, RUNTIME, SHIM, Containerd, start_containerd
from ctr import SLEEP, execute, listening, remove, running, status, task
from engine import Done
from harness import DEADLINE, await_true

from katapy import __version__
from katapy.errors import InvalidState, NotFound, Unsupported
from katapy.proto.shim_pb2 import RuntimeInfo
from katapy.proto.task_pb2 import DeleteResponse

pytestmark = pytest.mark.skipif(not CTR.exists(), reason="containerd is not installed")
SOURCE = Path(__file__).resolve().parents[2]


def test_output_and_exit_status(containerd: Containerd) -> None:
    done = containerd.run("--rm", IMAGE, "c1", "sh", "-c", "echo out; echo err >&2; exit 7", check=False)
    assert done == Done(7, "out\n", "err\n")
    big = containerd.run("--rm", IMAGE, "c1", "sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x")
    assert big.out == "x" * 3000000


def test_standard_input(containerd: Containerd) -> None:
    """ctr says that it has ended, but only where it does not wait for Create any more: what came before then hung."""
    text = "".join(f"line {number}\n" for number in range(20000))
    assert containerd.run("--rm", IMAGE, "c1", "cat", stdin=text).out == text
    with running(containerd, "c1"):
        assert execute(containerd, "c1", "cat", stdin=text).out == text


def test_a_task_s_life(containerd: Containerd) -> None:
    with running(containerd, "c1"):
        assert status(containerd, "c1") == "RUNNING"
        pid = int(containerd("task", "ps", "c1").out.splitlines()[1].split()[0])
        # Who looks for the container's network finds it by this process.
        assert os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
        assert execute(containerd, "c1", "sh", "-c", "echo in; exit 3", check=False) == Done(3, "in\n", "")
        containerd("task", "pause", "c1")
        assert status(containerd, "c1") == "PAUSED"
        containerd("task", "resume", "c1")
        assert status(containerd, "c1") == "RUNNING"
        metrics = containerd("task", "metrics", "c1").out
        assert int(re.findall(r"memory.usage +(\d+)", metrics)[0]) > 1 << 16
        assert re.search(r"pids.current +1\b", metrics)
        containerd("task", "kill", "--signal", "TERM", "c1")
        containerd("task", "kill", "--signal", "KILL", "c1")
        await_true(lambda: status(containerd, "c1") == "STOPPED")
        assert containerd("task", "rm", "c1", check=False).status == 0
        assert status(containerd, "c1") == ""


def test_an_exec_that_is_left_behind(containerd: Containerd) -> None:
    with running(containerd, "c1"):
        containerd("task", "exec", "--detach", "--exec-id", "e1", "c1", "sleep", "1000")
        assert "e1" in containerd("task", "ps", "c1").out
        with task(containerd, "c1") as client:
            assert client.state("c1", "e1").status == "running"
            client.kill("c1", signal.SIGKILL, "e1")
            assert client.wait("c1", "e1", timeout=DEADLINE).status == 137
            # It is known until it is deleted, and is so by the engine alone.
            assert client.state("c1", "e1").exit_status == 137
            with pytest.raises(NotFound, match="process already finished"):
                client.kill("c1", signal.SIGKILL, "e1")
            assert client.delete("c1", "e1").status == 137
            with pytest.raises(NotFound):
                client.state("c1", "e1")


def test_codes(containerd: Containerd) -> None:
    """What containerd goes on by."""
    with running(containerd, "c1"), task(containerd, "c1") as client:
        with pytest.raises(Unsupported, match="cannot checkpoint"):
            client.checkpoint("c1", "/tmp")
        with pytest.raises(InvalidState):
            client.delete("c1")
        with pytest.raises(NotFound):
            client.state("c2")
        serving = client.connect("c1")
        assert serving.shim_pid == containerd.shim("c1")
        assert [process.pid for process in client.pids("c1")] == [serving.task_pid]
        client.shutdown("c1")
        client.update("c1", json.dumps({"memory": {"limit": 64 << 20}}).encode())
        assert re.search(rf"memory.usage_limit +{64 << 20}\b", containerd("task", "metrics", "c1").out)
        refused = containerd("task", "checkpoint", "c1", check=False)
        assert (refused.status, "not implemented" in refused.err) == (1, True)


def test_waits_beside_other_calls(containerd: Containerd) -> None:
    """Each has an answer, and State's does not wait for anything."""
    with running(containerd, "c1"), ThreadPoolExecutor(8) as threads:

        def wait() -> int:
            with task(containerd, "c1") as client:
                return client.wait("c1", timeout=DEADLINE).status

        waits = [threads.submit(wait) for _ in range(8)]
        containerd("task", "pause", "c1")
        with task(containerd, "c1") as client:
            assert client.state("c1").status == "paused"
        containerd("task", "resume", "c1")
        containerd("task", "kill", "--signal", "INT", "c1")
        containerd("task", "kill", "--signal", "KILL", "c1")
        assert {wait.result() for wait in waits} == {137}


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, containerd: Containerd, *args: str, rows: int, columns: int) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(
            [CTR, *args], stdin=slave, stdout=slave, stderr=slave, env=containerd.env, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the window."""
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, pattern: str) -> None:
        """Read until ``pattern`` has come."""
        while not re.search(pattern, self.text):
            assert select.select([self.master], [], [], DEADLINE)[0], self.text
            try:
                self.text += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(self.text) from None

    def send(self, text: str) -> None:
        """Type."""
        os.write(self.master, text.encode())


def test_a_terminal(containerd: Containerd) -> None:
    terminal = Terminal(
        containerd, "run", "--rm", "--tty", "--runtime", RUNTIME, IMAGE, "c1", "sh", rows=33, columns=111
    )
    terminal.expect("# ")
    terminal.send("tty; stty size\n")
    terminal.expect(r"/dev/pts/0\s+33 111\s")
    terminal.resize(22, 99)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.send("until stty size | grep '^22 99'; do sleep 0.1; done; exit 5\n")
    terminal.expect(r"\s22 99\s")
    assert terminal.process.wait(DEADLINE) == 5
    os.close(terminal.master)


def test_a_terminal_of_an_exec(containerd: Containerd) -> None:
    with running(containerd, "c1"):
        terminal = Terminal(containerd, "task", "exec", "-t", "--exec-id", "e1", "c1", "sh", rows=30, columns=80)
        terminal.expect("# ")
        terminal.send("stty size; exit 4\n")
        terminal.expect(r"\s30 80\s")
        assert terminal.process.wait(DEADLINE) == 4
        os.close(terminal.master)


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
def test_snapshots(containerd: Containerd, snapshotter: str) -> None:
    """Mounted where the host does not see it; what a container writes is its snapshot's, and stays in that."""
    options = ("--snapshotter", snapshotter)
    with running(containerd, "c1", options=options):
        execute(containerd, "c1", "sh", "-c", "echo written > /file; rm /etc/group")
        bundle = containerd.bundles / "c1"
        assert list((bundle / "rootfs").iterdir()) == []
        written = list((containerd.directory / "root").glob(f"io.containerd.snapshotter.v1.{snapshotter}/**/file"))
        assert [path.read_text() for path in written] == ["written\n"]
        fresh = containerd.run("--rm", *options, IMAGE, "c2", "sh", "-c", "ls /file; cat /etc/group", check=False)
        assert fresh.out.startswith("root:")
    containerd.run("--rm", "--read-only", *options, IMAGE, "c1", "sh", "-c", "! touch /file 2>/dev/null")


def test_a_root_file_system_without_mounts(containerd: Containerd, busybox: Path) -> None:
    """It is used where it is; Create then has no mounts."""
    done = containerd.run("--rm", "--read-only", "--rootfs", str(busybox), "c1", "/bin/cat", "/etc/passwd")
    assert done.out == (busybox / "etc/passwd").read_text()


def test_events(containerd: Containerd) -> None:
    """In their order, however quickly a process ends."""
    with listening(containerd) as hear:
        containerd.run("--detach", IMAGE, "c1", *SLEEP)
        execute(containerd, "c1", "true")
        # Without a start there is no end.
        execute(containerd, "c1", "nonesuch", check=False)
        containerd("task", "pause", "c1")
        containerd("task", "resume", "c1")
        remove(containerd, "c1")
        seen = hear("c1", "/containers/delete")
    topics = [topic.removeprefix("/tasks/") for topic, _ in seen if topic.startswith("/tasks/")]
    assert topics == [
        *("create", "start", "exec-added", "exec-started", "exit", "exec-added"),
        *("paused", "resumed", "exit", "delete"),
    ]
    exits = [event for topic, event in seen if topic == "/tasks/exit"]
    assert exits[-1]["id"] == "c1"
    assert exits[-1]["exit_status"] == 137


def test_a_program_that_does_not_exist(containerd: Containerd) -> None:
    """The user reads why."""
    done = containerd.run("--rm", IMAGE, "c1", "nothing", check=False)
    assert done.status == 1
    assert "nothing" in done.err
    with running(containerd, "c2"):
        done = execute(containerd, "c2", "nothing", check=False)
        assert "nothing" in done.err


def test_an_option_that_cannot_be_honoured(containerd: Containerd) -> None:
    """Create fails, and of the container and its shim nothing is left."""
    done = containerd.run(
        "--rm", "--mount", "type=bind,src=/nowhere,dst=/x,options=rbind", IMAGE, "c1", "true", check=False
    )
    assert done.status == 1
    assert "/nowhere" in done.err
    await_true(lambda: not list(containerd.root.iterdir()))


def test_output_that_nobody_reads(containerd: Containerd) -> None:
    """ctr has left, and the fifo is full: the end does not wait for it."""
    containerd.run("--detach", IMAGE, "c1", "yes")
    containerd("task", "kill", "--signal", "KILL", "c1")
    await_true(lambda: status(containerd, "c1") == "STOPPED")
    assert "137" in containerd("task", "rm", "c1").err
    containerd("containers", "rm", "c1")


def test_many_at_once(containerd: Containerd) -> None:
    def run(name: str) -> str:
        return containerd.run("--rm", IMAGE, name, "echo", name).out

    names = [f"c{number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as threads:
        assert list(threads.map(run, names)) == [f"{name}\n" for name in names]


def test_two_at_once(containerd: Containerd) -> None:
    """Each in its own VM, and one's end is not the other's."""
    boot = "cat /proc/sys/kernel/random/boot_id"
    with ThreadPoolExecutor(2) as threads:
        ids = list(threads.map(lambda name: containerd.run("--rm", IMAGE, name, *boot.split()).out, ("c1", "c2")))
    assert len(set(ids)) == 2
    with running(containerd, "c1"):
        with running(containerd, "c2"):
            os.kill(containerd.shim("c2"), signal.SIGKILL)
            # containerd removes it in its own time.
            await_true(lambda: not (containerd.bundles / "c2").exists())
        assert execute(containerd, "c1", "echo", "alive").out == "alive\n"


def test_containerd_is_started_again(busybox: Path, host: None) -> None:
    """Containers run on meanwhile, also one that writes, and are there afterwards."""
    count = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.05; done"
    with (
        tempfile.TemporaryDirectory(prefix="katapy-") as name,
        start_containerd(Path(name), busybox) as containerd,
    ):
        log = containerd.directory / "c1.log"
        with running(containerd, "c1", "sh", "-c", count, options=("--log-uri", f"file://{log}")):
            containerd.stop(signal.SIGKILL)
            lines = len(log.read_text().splitlines())
            await_true(lambda: len(log.read_text().splitlines()) > lines + 5)
            containerd.start()
            assert status(containerd, "c1") == "RUNNING"
            assert execute(containerd, "c1", "echo", "alive").out == "alive\n"
        written = log.read_text().splitlines()
        assert written == [str(number + 1) for number in range(len(written))]


LOGGER = """#!/bin/sh
echo "$CONTAINER_ID $CONTAINER_NAMESPACE $1 $(ls /proc/$$/fd | wc -l)" > "$2.who"
exec 5>&-
cat <&3 > "$2.out" &
cat <&4 > "$2.err"
wait
sleep 0.3
echo done >> "$2.who"
"""


def test_a_logging_program(containerd: Containerd, tmp_path: Path) -> None:
    """It has all of what was written when the task is removed, and has ended by then."""
    logger = tmp_path / "logger"
    logger.write_text(LOGGER)
    logger.chmod(0o755)
    uri = f"binary://{logger}?to={tmp_path}/c1"
    lines = "i=0; while [ $i -lt 5000 ]; do i=$((i+1)); echo $i; done"
    with running(containerd, "c1", "sh", "-c", f"{lines}; echo err >&2; sleep 1000", options=("--log-uri", uri)):
        await_true(lambda: (tmp_path / "c1.err").exists() and (tmp_path / "c1.err").read_text() == "err\n")
    assert (tmp_path / "c1.out").read_text() == "".join(f"{number + 1}\n" for number in range(5000))
    # Its streams, three, and the shell's own script; it is done.
    assert re.fullmatch(rf"c1 {containerd.namespace} to [789]\ndone\n", (tmp_path / "c1.who").read_text())
    refused = containerd.run("--detach", "--log-uri", f"binary://{tmp_path}/nothing", IMAGE, "c1", "true", check=False)
    assert "is missing or not executable" in refused.err
    await_true(lambda: not list(containerd.root.iterdir()))
    containerd("containers", "rm", "c1", check=False)


def shim(*args: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the shim's program as engines do."""
    flags = ["-namespace", "default", "-address", f"{cwd}/containerd.sock", "-publish-binary", "/bin/true"]
    return subprocess.run([SHIM, *flags, *args], input=stdin, capture_output=True, cwd=cwd, timeout=DEADLINE)


def test_delete_of_nothing(tmp_path: Path, host: None) -> None:
    """Engines call it after each task, also when nothing is left."""
    for _ in range(2):
        done = shim("-id", "c1", "-bundle", str(tmp_path), "delete", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")
        assert DeleteResponse.FromString(done.stdout).exit_status == 137


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    """CRI-O asks for the version, containerd from 2.0 on for what is honoured of a configuration."""
    assert __version__ in shim("-v", cwd=tmp_path).stdout.decode()
    info = RuntimeInfo.FromString(shim("-info", cwd=tmp_path, stdin=b"").stdout)
    assert (info.name, info.version.version) == (RUNTIME, __version__)
    assert json.loads(info.features.value)["ociVersionMin"] == "1.0.0"


def test_the_readme_s_command(containerd: Containerd, busybox: Path, tmp_path: Path) -> None:
    """As written, but for the installation."""
    block = (
        (SOURCE / "README.md").read_text().partition("## With containerd")[2].split("```sh\n")[1].partition("```")[0]
    )
    installs, links, run = block.splitlines()
    assert installs.startswith("apt-get install ")
    assert links.startswith("ln -sfn $PWD/.venv/bin/containerd-shim-katapy-v2 ")
    (tmp_path / "examples/hello").mkdir(parents=True)
    (tmp_path / "examples/hello/rootfs").symlink_to(busybox)
    done = subprocess.run(
        ["sh", "-euc", run], capture_output=True, text=True, cwd=tmp_path, env=containerd.env, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d+\S+\n", done.stdout)


def test_a_bundle_that_is_none(tmp_path: Path, host: None) -> None:
    done = shim("-id", "c1", "start", cwd=tmp_path)
    assert done.returncode == 1
    assert b"config.json" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_shim_that_is_asked_for_nothing(tmp_path: Path, host: None) -> None:
    """An engine that dies after `start` leaves a shim; `delete` ends it."""
    (tmp_path / "config.json").write_text('{"ociVersion": "1.0.0"}')
    done = shim("-id", "c1", "start", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    address = done.stdout.decode()
    assert address == (tmp_path / "address").read_text()
    assert Path(address.removeprefix("unix://")).is_socket()
    assert shim("-id", "c1", "-bundle", str(tmp_path), "delete", cwd=tmp_path).returncode == 0
    assert not Path(address.removeprefix("unix://")).is_symlink()
    assert list((tmp_path / "katapy/default").iterdir()) == []
