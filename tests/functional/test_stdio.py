"""Standard streams: every byte, in both directions, and the ends of them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import select
import shlex
import struct
import subprocess
import termios
import threading
import time
from typing import IO, Any

from harness import DEADLINE, SLOWNESS, Katapy, MakeBundle

MIB = 1 << 20
MANY = int(256 / SLOWNESS)  # MiB: in an emulated host it is the same with less


def _digest(stream: IO[bytes]) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(MIB):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def test_much_through_cat(katapy: Katapy, bundle: MakeBundle) -> None:
    block = os.urandom(MIB)
    digest = hashlib.sha256()
    pipe = subprocess.PIPE

    def write(stdin: IO[bytes]) -> None:
        for number in range(MANY):
            chunk = number.to_bytes(8) + block[8:]
            digest.update(chunk)
            stdin.write(chunk)
        stdin.close()

    with katapy.start("run", "--bundle", bundle(["cat"]), "c1", stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        writer = threading.Thread(target=write, args=[process.stdin])
        writer.start()
        received, size = _digest(process.stdout)
        writer.join()
        assert process.wait(DEADLINE) == 0
    assert size == MANY * MIB
    assert received == digest.hexdigest()


def test_100_mb_on_both_outputs(katapy: Katapy, bundle: MakeBundle) -> None:
    size = 100_000_000
    # Made once and printed often: what makes them must not be what takes the time.
    script = """
        for name in out err; do yes $name | head -c 1000000 >/dev/shm/$name; done
        print() { for _ in $(seq 100); do cat /dev/shm/$1; done; }
        print out & print err >&2; wait
    """
    pipe = subprocess.PIPE
    found: dict[str, tuple[str, int]] = {}
    with katapy.start("run", "--bundle", bundle(["sh", "-c", script]), "c1", stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        error = threading.Thread(target=lambda stream: found.update(err=_digest(stream)), args=[process.stderr])
        error.start()
        found["out"] = _digest(process.stdout)
        error.join()
        assert process.wait(DEADLINE) == 0
    for name in ("out", "err"):
        expected = (f"{name}\n".encode() * (size // 4))[:size]
        assert found[name] == (hashlib.sha256(expected).hexdigest(), size)


def test_reader_that_leaves_ends_the_writer(katapy: Katapy, bundle: MakeBundle) -> None:
    """`katapy run … yes | head -1`: the container's writer gets SIGPIPE, as it would from a pipe."""
    with katapy.start("run", "--bundle", bundle(["yes"]), "c1", stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        # As pid 1, `yes` is not killed by SIGPIPE: its write fails, and it exits with an error.
        assert process.wait(DEADLINE) != 0


def test_container_that_leaves_ends_the_command(katapy: Katapy, bundle: MakeBundle) -> None:
    """`yes | katapy run … head -1`."""
    yes = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    process = katapy.start("run", "--bundle", bundle(["head", "-1"]), "c1", stdin=yes.stdout, stdout=subprocess.PIPE)
    assert yes.stdout
    yes.stdout.close()
    output, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, output) == (0, b"y\n")
    yes.wait(DEADLINE)


def test_end_of_stdin_ends_cat(katapy: Katapy, bundle: MakeBundle) -> None:
    assert katapy("run", "--bundle", bundle(["cat"]), "c1", stdin=b"").returncode == 0
    assert katapy("run", "--bundle", bundle(["cat"]), "c1", stdin=b"last words").stdout == b"last words"


def test_streams_are_pipes_that_can_be_reopened(katapy: Katapy, bundle: MakeBundle) -> None:
    """/dev/stdout must open: on a socket it would fail with ENXIO, which breaks nginx and many others."""
    done = katapy("run", "--bundle", bundle(["sh", "-c", "echo a > /dev/stdout; echo b > /dev/stderr"]), "c1")
    assert (done.stdout, done.stderr) == (b"a\n", b"b\n")


def test_delete_waits_for_output_on_its_way(katapy: Katapy, bundle: MakeBundle) -> None:
    """A container that has ended may have written what a slow reader has not yet taken: `delete` cut it off."""
    size = 1_000_000  # more than a pipe and a stand-in hold, less than everything on the way
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        argv = katapy.argv("run", "--detach", "--bundle", bundle(["head", "-c", str(size), "/dev/zero"]), "c1")
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=file, check=True, timeout=DEADLINE)
    deadline = time.monotonic() + DEADLINE
    while katapy.state("c1")["status"] != "stopped":
        assert time.monotonic() < deadline
    with katapy.start("delete", "c1") as deleting, os.fdopen(reader, "rb") as file:
        pidfd = os.pidfd_open(deleting.pid)
        assert not select.select([pidfd], [], [], 1)[0], "it did not wait"
        os.close(pidfd)
        assert len(file.read()) == size
        assert deleting.wait(DEADLINE) == 0


def test_closed_standard_streams_are_empty_ones(katapy: Katapy, bundle: MakeBundle) -> None:
    """`katapy run … <&- >&- 2>&-`: a socket of the command took the place of the stream that was missing."""
    directory = bundle(["sh", "-c", "cat; echo out; echo err >&2; exit 5"])
    for number, closed in enumerate(("<&-", ">&-", "2>&-", "<&- >&- 2>&-")):
        argv = katapy.argv("run", "--bundle", directory, f"c{number}")
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *argv], input=b"", capture_output=True, timeout=DEADLINE
        )
        assert done.returncode == 5, done.stderr
        assert done.stdout == (b"" if ">&-" in closed.split() else b"out\n")
        assert done.stderr == (b"" if "2>&-" in closed else b"err\n")


class Terminal:
    """A person at a terminal."""

    def __init__(self, argv: list[str], *, rows: int = 31, columns: int = 97) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        self.seen = b""

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def expect(self, text: bytes) -> None:
        while text not in self.seen:
            assert select.select([self.master], [], [], DEADLINE)[0], f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.master, 65536)
        self.seen = self.seen.partition(text)[2]

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process.send_signal(28)  # SIGWINCH: a session without a foreground group gets none from the kernel

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


def test_interactive_shell(katapy: Katapy, bundle: MakeBundle) -> None:
    """A shell on a terminal: echo, window size, Ctrl-C, exit status, and the caller's terminal as it was."""

    def edit(spec: dict[str, Any]) -> None:
        spec["process"]["terminal"] = True
        spec["process"]["env"].append("PS1=ready> ")

    terminal = Terminal(
        katapy.argv("run", "--bundle", bundle(["sh", "-c", "echo [$(stty size)]; exec sh -i"], edit=edit), "c1")
    )
    try:
        terminal.expect(b"[31 97]")  # at once, before the first key
        terminal.expect(b"ready> ")
        terminal.type(b"stty size; tty\r")
        terminal.expect(b"31 97")
        terminal.expect(b"/dev/pts/0")
        terminal.expect(b"ready> ")
        terminal.resize(20, 60)
        terminal.type(b"until stty size | grep '^20 6'0; do sleep 0.1; done\r")
        terminal.expect(b"20 60")
        terminal.expect(b"ready> ")
        terminal.type(b"sh -c 'echo started; sleep 1000'\r")
        terminal.expect(b"\r\nstarted")
        terminal.type(b"\x03")
        terminal.expect(b"ready> ")
        terminal.type(b"echo $?\r")
        terminal.expect(b"130")
        terminal.type(b"exit 42\r")
        assert terminal.process.wait(DEADLINE) == 42
        assert termios.tcgetattr(terminal.slave) == terminal.before
    finally:
        terminal.close()


def test_a_detached_container_leaves_the_terminal_alone(katapy: Katapy, bundle: MakeBundle) -> None:
    """`katapy run --detach` in a shell: what was typed next went to the container."""
    command = shlex.join(katapy.argv("run", "--detach", "--bundle", bundle(["cat"]), "c1"))
    terminal = Terminal(["/bin/sh", "-c", f"{command}; read line; echo got-$line; read line; echo again-$line"])
    try:
        terminal.type(b"first\rsecond\r")
        terminal.expect(b"got-first")
        terminal.expect(b"again-second")
        assert terminal.process.wait(DEADLINE) == 0
    finally:
        terminal.close()
        katapy("delete", "--force", "c1", check=True)


def test_exec_on_a_terminal(katapy: Katapy, bundle: MakeBundle) -> None:
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    terminal = Terminal(katapy.argv("exec", "-t", "c1", "sh", "-c", "tty; stty size; read line; echo got-$line"))
    try:
        terminal.expect(b"/dev/pts/")
        terminal.expect(b"31 97")
        terminal.type(b"word\r")
        terminal.expect(b"got-word")
        assert terminal.process.wait(DEADLINE) == 0
    finally:
        terminal.close()
        katapy("delete", "--force", "c1", check=True)
