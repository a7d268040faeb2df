"""What a run is given, what it gives back, and what it does not share with others."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from arena import TIGHT, Arena, assert_ended, helpers, python
from harness import DEADLINE

from katapy import KilledBy, Sandbox
from katapy.errors import CommandNotExecutable, CommandNotFound, InvalidArgument, InvalidState, Timeout
from katapy.sdk.process import Chunk

pytestmark = [pytest.mark.root, pytest.mark.vm]

_RANDOM = """
import os, random, uuid
print(os.urandom(16).hex(), uuid.uuid4(), random.random(), id(object()), open("/proc/sys/kernel/random/uuid").read())
"""


def test_files_outlast_a_run_and_not_a_sandbox(victim: Sandbox) -> None:
    """A fresh run sees nothing of what others wrote, anywhere, and leaves nothing."""
    write = [
        "sh",
        "-c",
        "for each in /kept /tmp/kept /home/kept /var/tmp/kept /dev/shm/kept; do echo 1 >> $each; done; cat /kept",
    ]
    assert victim.run(write).check().stdout == "1\n"
    assert victim.run(write).check().stdout == "1\n1\n"
    assert victim.run(write, fresh=True).check().stdout == "1\n"
    assert victim.run(["ls", "/dev/shm"]).check().stdout == ""
    assert victim.run(write).check().stdout == "1\n1\n1\n"
    victim.run(["sh", "-c", "rm /kept /tmp/kept /home/kept /var/tmp/kept"]).check()


def test_sandboxes_share_no_randomness(victim: Sandbox) -> None:
    """Restored from one template, they differ in every kind of it, and so do the runs of one."""
    seen = [victim.run(python(_RANDOM), fresh=fresh).check().stdout.split() for fresh in (False, False, True, True)]
    assert [len(set(kind)) for kind in zip(*seen, strict=True)] == [len(seen)] * 5


def test_what_it_is_told(victim: Sandbox) -> None:
    """Environment, directory, user and input; the home is the user's."""
    script = 'echo "$A$B" "$PWD" "$HOME" $(id -u):$(id -g); cat'
    result = victim.run(["sh", "-c", script], env={"A": "ä ", "B": "2"}, cwd="/tmp", user="1000:100", input="in ü")
    assert result.check().stdout == "ä 2 /tmp /home/sandbox 1000:100\nin ü"
    assert victim.run(["id", "-g"], user=1000).check().stdout == "1000\n"
    assert victim.run(["cat"]).check().stdout == ""
    large = os.urandom(1 << 19)
    assert victim.run(["cat"], input=large, text=False).check().stdout == large


def test_a_user_is_no_root(victim: Sandbox) -> None:
    result = victim.run(["sh", "-c", "echo x > /etc/passwd; kill -9 1; cat /proc/1/environ"], user=1000)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 3


def test_text_and_bytes(victim: Sandbox) -> None:
    """What is not UTF-8 is replaced in a text, and is what it was in bytes; the two streams are two."""
    command = ["sh", "-c", r"printf 'a\377b'; printf 'c\376' >&2; exit 5"]
    result = victim.run(command)
    assert (result.stdout, result.stderr, result.exit_code, result.ok) == ("a\ufffdb", "c\ufffd", 5, False)
    raw = victim.run(command, text=False)
    assert (raw.stdout, raw.stderr, raw.exit_code) == (b"a\xffb", b"c\xfe", 5)


def test_callbacks(victim: Sandbox) -> None:
    """Text comes in whole characters, however it was written."""
    out: list[str] = []
    err: list[str] = []
    command = python(
        """
import os, time
for byte in "äöü".encode():
    os.write(1, bytes((byte,)))
    time.sleep(0.02)
os.write(2, b"e")
"""
    )
    result = victim.run(command, on_stdout=out.append, on_stderr=err.append)
    assert (result.check().stdout, result.stderr) == ("äöü", "e")
    assert ("".join(out), "".join(err)) == ("äöü", "e")


def test_a_callback_that_raises(victim: Sandbox) -> None:
    """It ends the run, and the caller gets to know."""

    def refuse(_: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        victim.run(["sh", "-c", "while :; do echo x >> /raised; echo y; sleep 0.05; done"], on_stdout=refuse)
    _assert_still(victim, "/raised")


def test_a_stream_that_is_left(victim: Sandbox) -> None:
    """The command has ended by then."""
    stream = victim.stream(["sh", "-c", "while :; do echo x >> /left; echo y; sleep 0.05; done"])
    first = next(stream)
    assert (first.stream, first.data[:2]) == ("stdout", b"y\n")
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    _assert_still(victim, "/left")


def test_many_runs_leave_nothing_in_the_guest(victim: Sandbox) -> None:
    """Each kept the buffers of its streams in the agent, and its container's watch: 0.8 MiB, until the VM's end."""

    def available() -> int:
        lines = victim.run(["cat", "/proc/meminfo"]).check().stdout.splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) << 10

    for _ in range(5):
        victim.run(["true"]).check()
    before = available()
    for _ in range(40):
        victim.run(["true"]).check()
    assert before - available() < 8 << 20


def _assert_still(sandbox: Sandbox, path: str) -> None:
    """Assert that nobody writes to a file any more, for as long as twenty times would take; and remove it."""
    before = sandbox.files.read(path)
    sandbox.run(["sleep", "1"]).check()
    assert sandbox.files.read(path) == before
    sandbox.files.remove(path)


def test_a_conversation(victim: Sandbox) -> None:
    """Started, written to, read from, and ended by the end of its input."""
    with victim.start(["cat"]) as process:
        for line in (b"one\n", b"two\n"):
            process.write(line)
            assert process.read(DEADLINE) == Chunk("stdout", line)
        with pytest.raises(Timeout):
            process.read(0.1)
        with pytest.raises(Timeout):
            process.wait(0.1)
        process.close_stdin()
        verdict = process.wait(DEADLINE)
        assert (verdict.exit_code, verdict.killed_by) == (0, KilledBy.NONE)
        assert process.read() is None
        with pytest.raises(InvalidState):
            process.write(b"more")


def test_signals_and_kill(victim: Sandbox) -> None:
    script = "trap 'echo heard' USR1; echo ready; while :; do sleep 0.1; done"
    with victim.start(["sh", "-c", script]) as process:
        assert process.read(DEADLINE) == Chunk("stdout", b"ready\n")
        process.send_signal(10)
        assert process.read(DEADLINE) == Chunk("stdout", b"heard\n")
        process.kill()
        verdict = process.wait(DEADLINE)
    assert (verdict.killed_by, verdict.trusted, verdict.signal) == (KilledBy.SIGNAL, True, 9)
    process.kill()


def test_a_terminal(victim: Sandbox) -> None:
    with victim.start(
        [
            "sh",
            "-c",
            "stty -echo; echo ready; read line; until stty size 2>/dev/null; do sleep 0.1; done; echo $line >&2; tty",
        ],
        tty=True,
    ) as process:
        shown = b""
        # A terminal passes on what it is given as that comes.
        while shown != b"ready\r\n":
            piece = process.read(DEADLINE)
            assert piece is not None
            shown += piece.data
        process.resize(columns=100, rows=30)
        process.write(b"typed\n")
        printed = b"".join(chunk.data for chunk in process)
        assert process.wait(DEADLINE).exit_code == 0
    assert printed == b"30 100\r\ntyped\r\n/dev/pts/0\r\n"


def test_a_slow_reader(victim: Sandbox) -> None:
    """What a command has printed waits for it, also after the command's end."""
    with victim.start(["dd", "if=/dev/zero", "bs=1M", "count=3"], output="1G") as process:
        count = 0
        while (chunk := process.read()) is not None:
            count += len(chunk.data) if chunk.stream == "stdout" else 0
            if count < 1 << 20:
                time.sleep(0.01)
    assert count == 3 << 20


def test_runs_at_once(victim: Sandbox) -> None:
    """Each has its own processes and its own name for them, and the files of all."""
    with victim.start(["cat"]) as one, victim.start(["cat"]) as other:
        for process in (one, other):
            process.write(b"x")
            assert process.read(DEADLINE) == Chunk("stdout", b"x")
        assert victim.run(["sh", "-c", "kill -9 -1; ls /proc | grep -c '^[0-9]'"]).stdout.strip() in ("3", "4")
        for process in (one, other):
            process.write(b"y")
            assert process.read(DEADLINE) == Chunk("stdout", b"y")
            process.close_stdin()
            assert process.wait(DEADLINE).exit_code == 0


def test_commands_that_cannot_run(victim: Sandbox) -> None:
    """Bad arguments and commands are errors of the caller's; what a command does is none."""
    for command, error in (
        (["no-such-program"], CommandNotFound),
        (["/etc/passwd"], CommandNotExecutable),
        (["/etc"], CommandNotExecutable),
        ("ls -l", InvalidArgument),
        ([], InvalidArgument),
        (["a\0b"], InvalidArgument),
    ):
        with pytest.raises(error):
            victim.run(command)
    for options in (
        {"timeout": 0},
        {"output": "much"},
        {"user": "me"},
        {"env": {"A=B": ""}},
        {"cpu_time": float("nan")},
    ):
        with pytest.raises(InvalidArgument):
            victim.run(["true"], **options)
    assert victim.run(["sh", "-c", "exit 127"]).exit_code == 127


def test_limits_of_a_process(arena: Arena, host: None) -> None:
    """Descriptors and the size of a file; neither can be raised."""
    options = {**TIGHT, "file_size": "64K", "open_files": 32, "state_dir": arena.state}
    with Sandbox(**options) as sandbox:
        opening = """
import os
fds = []
try:
    while True:
        fds.append(os.open("/", 0))
except OSError as error:
    print(error.errno, fds[-1])
"""
        assert sandbox.run(python(opening)).check().stdout == "24 31\n"
        raising = """
import resource
for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
    try:
        resource.setrlimit(limit, (1 << 20, 1 << 20))
    except ValueError:
        print("refused")
"""
        assert sandbox.run(python(raising)).check().stdout == "refused\nrefused\n"
        result = sandbox.run(["dd", "if=/dev/zero", "of=/large", "bs=4K", "count=100"])
        assert_ended(result, KilledBy.SIGNAL, trusted=False, signal=25)
        assert sandbox.run(["stat", "-c", "%s", "/large"]).check().stdout == "65536\n"


def test_no_network(arena: Arena, victim: Sandbox) -> None:
    """The guest has nothing but its loopback, and its VM no NIC that could be somebody's."""
    interfaces = socket.if_nameindex
    script = """
import socket
print(socket.if_nameindex())
for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(family, kind) as end:
            end.settimeout(1)
            print(end.connect_ex((address, 53)))
for family, kind in ((socket.AF_PACKET, socket.SOCK_RAW), (socket.AF_INET, socket.SOCK_RAW)):
    try:
        socket.socket(family, kind, 1)
    except PermissionError:
        print("refused")
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect((2, 1024))
except OSError:
    print("no host")
"""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        printed = victim.run(python(script)).check().stdout
        assert printed == "[(1, 'lo')]\n101\n101\n101\n101\nrefused\nrefused\nno host\n"
        # The loopback is its own.
        assert victim.run(["nc", "127.0.0.1", str(port)], input=b"").exit_code == 1
    qemu = helpers(arena.state, victim.id)["QEMU"]
    links = [os.readlink(f"/proc/{qemu}/fd/{fd}") for fd in os.listdir(f"/proc/{qemu}/fd")]
    assert links
    assert not [link for link in links if "tun" in link or "vhost-net" in link]
    assert interfaces() == socket.if_nameindex()


def test_shared_directories(arena: Arena, host: None, tmp_path: Path) -> None:
    """What is read-only stays as it is; a link in what may be written leads nowhere on the host."""
    ro, rw = tmp_path / "ro", tmp_path / "rw"
    for each in (ro, rw):
        each.mkdir()
    (ro / "in").write_text("in\n")
    (tmp_path / "secret").write_text("secret\n")
    options = {**TIGHT, "state_dir": arena.state, "ro": {ro: "/ro"}, "rw": {rw: "/rw"}}
    with Sandbox(**options) as sandbox:
        script = (
            "cat /ro/in; echo x > /ro/in; rm /ro/in; chmod 777 /ro; echo out > /rw/out; "
            f"ln -s {tmp_path}/secret /rw/link; cat /rw/link; cat /rw/../../secret; mknod /rw/null c 1 3"
        )
        result = sandbox.run(["sh", "-c", script])
    assert result.stdout == "in\n"
    assert len(result.stderr.splitlines()) == 6
    assert [(each.name, each.read_text()) for each in ro.iterdir()] == [("in", "in\n")]
    assert sorted(each.name for each in rw.iterdir()) == ["link", "out"]
    assert (rw / "out").read_text() == "out\n"
