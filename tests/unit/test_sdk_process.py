"""How a run is carried and judged, against a shim and a VM that are played."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from katapy.client.attach import Attachment
from katapy.client.observe import Usage
from katapy.errors import CommandNotFound, InvalidState, KatapyError, OutcomeUnknown, Timeout, Unavailable
from katapy.sdk import process as module
from katapy.sdk.process import Bounds, Chunk, Process, host_cpu_seconds
from katapy.verdict import KilledBy, Verdict

SECONDS = 10.0
NOTHING = Usage(cpu_usec=5, peak_bytes=4096, oom_kills=0, pid_failures=0)


class Machine:
    """A VM; ``full`` is asked for, ``ends`` says whether it dies when it is killed, ``cpu`` is what it has used."""

    accelerator = "tcg"

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.full = [False]
        self.ends = True
        self.cpu = 1.0

    def cpu_seconds(self) -> float | None:
        return None if self.ended.is_set() else self.cpu

    def alive(self) -> bool:
        return not self.ended.is_set()

    def kill(self) -> None:
        if self.ends:
            self.ended.set()

    def await_end(self, seconds: float) -> bool:
        return self.ended.wait(seconds)

    def is_full(self) -> bool:
        return self.full.pop(0) if len(self.full) > 1 else self.full[0]


class Shim:
    """A shim with one container; also the connection to it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pairs = {name: socket.socketpair() for name in ("stdin", "stdout", "stderr")}
        self.streams = {name: pair[0] for name, pair in pairs.items()}
        self.attachment = Attachment(theirs, False, {name: pair[1] for name, pair in pairs.items()})
        self.start_error: KatapyError | None = None
        self.usage_now: Usage | None = NOTHING
        self.killed = threading.Event()
        self.ended = threading.Event()
        self.obeys = True

    def __enter__(self) -> Shim:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error

    def kill(self, number: int, *, everyone: bool) -> None:
        assert (number, everyone) == (signal.SIGKILL, True)
        self.killed.set()
        if self.obeys:
            self.exit(137, 9)

    def usage(self, *, timeout: float) -> Usage:
        if self.usage_now is None:
            raise Timeout("no answer")
        return self.usage_now

    def exit(self, status: int, number: int = 0) -> None:
        """End the container."""
        self.control.send(json.dumps({"exit": status, **({"signal": number} if number else {})}).encode())
        self.close_streams()

    def lose(self) -> None:
        """Say that the VM has gone."""
        self.control.send(json.dumps({"error": "the VM died", "kind": "Unavailable", "code": 14}).encode())

    def close_streams(self) -> None:
        for stream in self.streams.values():
            stream.close()

    def begin(self, *, stdin: bytes | None = b"", held: bool = False, **bounds: Any) -> Process:
        """Start the container."""
        connection: Any = self
        return Process(
            connection,
            self.attachment,
            self.machine,
            Bounds(**{"wall": None, "cpu": None, "output": 1000, "cpus": 1.0, **bounds}),
            name="c1",
            stdin=stdin,
            held=held,
            connect=lambda: connection,
            ended=lambda _: self.ended.set(),
        )


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in earnest takes a part of one."""
    for name in ("_LOST_SECONDS", "_DRAIN_SECONDS", "_GRACE", "_PATIENCE"):
        monkeypatch.setattr(module, name, 0.2)


@pytest.fixture
def shim() -> Iterator[Shim]:
    playing = Shim(Machine())
    yield playing
    playing.control.close()
    playing.close_streams()


def ended(process: Process) -> tuple[KilledBy, bool, int | None, int | None]:
    """Return what became of it."""
    verdict: Verdict = process.wait(SECONDS)
    return verdict.killed_by, verdict.trusted, verdict.exit_code, verdict.signal


@pytest.mark.parametrize(
    ("status", "number", "usage", "full", "expected"),
    [
        (0, 0, NOTHING, [False], (KilledBy.NONE, True, 0, None)),
        (3, 0, NOTHING, [False], (KilledBy.NONE, True, 3, None)),
        (137, 0, NOTHING, [False], (KilledBy.NONE, True, 137, None)),
        (137, 9, NOTHING, [False], (KilledBy.SIGNAL, False, None, 9)),
        (137, 9, None, [False], (KilledBy.SIGNAL, False, None, 9)),
        (137, 9, NOTHING._replace(oom_kills=1), [True], (KilledBy.MEMORY, False, None, 9)),
        (0, 0, NOTHING._replace(oom_kills=1, pid_failures=1), [True], (KilledBy.NONE, True, 0, None)),
        (1, 0, NOTHING._replace(pid_failures=1), [True], (KilledBy.PIDS, False, 1, None)),
        (1, 0, NOTHING, [False, True], (KilledBy.DISK, True, 1, None)),
        (1, 0, NOTHING, [True], (KilledBy.DISK, True, 1, None)),
        (134, 6, NOTHING, [False, True], (KilledBy.DISK, True, None, 6)),
        (139, 11, NOTHING, [True], (KilledBy.SIGNAL, False, None, 11)),
    ],
)
def test_ends(
    shim: Shim, status: int, number: int, usage: Usage | None, full: list[bool], expected: tuple[object, ...]
) -> None:
    """What the host knows counts before what the guest says; a success is one, whatever happened on the way."""
    shim.usage_now, shim.machine.full = usage, full
    process = shim.begin()
    shim.exit(status, number)
    assert ended(process) == expected
    verdict = process.wait()
    assert verdict.cpu_seconds == (None if usage is None else 5e-6)
    assert verdict.accelerator == "tcg"
    assert shim.ended.wait(SECONDS)


def test_wall_time(shim: Shim) -> None:
    process = shim.begin(wall=0.05)
    assert ended(process) == (KilledBy.WALL, True, None, None)
    assert shim.killed.is_set()
    assert process.wait().wall_seconds >= 0.05


def test_cpu_time(shim: Shim) -> None:
    process = shim.begin(cpu=2.0)
    shim.machine.cpu = 3.0
    assert ended(process) == (KilledBy.CPU, True, None, None)
    assert process.wait().host_cpu_seconds == 2.0


@pytest.mark.parametrize("ends", [True, False])
def test_a_guest_that_does_not_answer(shim: Shim, ends: bool) -> None:
    """Its VM is killed, and what that has used is still known; one that cannot even be killed is given up."""
    shim.obeys, shim.machine.ends, shim.machine.cpu = False, ends, 1.0
    process = shim.begin(wall=0.05)
    shim.machine.cpu = 4.0
    if ends:
        assert ended(process) == (KilledBy.WALL, True, None, None)
        assert process.wait().host_cpu_seconds == 3.0
    else:
        # Its shim says nothing either.
        threading.Timer(0.5, shim.machine.ended.set).start()
        assert ended(process) == (KilledBy.WALL, True, None, None)


def test_a_kill(shim: Shim) -> None:
    """Is told apart from an end that came before it, and is no error afterwards."""
    process = shim.begin()
    process.kill()
    assert ended(process) == (KilledBy.SIGNAL, True, None, 9)
    process.kill()
    assert not process.running


def test_a_kill_that_comes_late(shim: Shim) -> None:
    shim.obeys = False
    process = shim.begin()
    process.kill()
    shim.exit(0)
    assert ended(process) == (KilledBy.NONE, True, 0, None)


@pytest.mark.parametrize("count", [1000, 1001])
def test_output_up_to_its_limit(shim: Shim, count: int) -> None:
    """Also where it has come with the end."""
    shim.obeys = False
    shim.streams["stdout"].send(bytes(count))
    process = shim.begin()
    shim.exit(0)
    if count == 1000:
        assert ended(process) == (KilledBy.NONE, True, 0, None)
    else:
        assert ended(process) == (KilledBy.OUTPUT, True, None, None)
    assert process.truncated == (count > 1000)
    assert sum(len(chunk.data) for chunk in process) == 1000


def test_output_of_both_streams_counts(shim: Shim) -> None:
    process = shim.begin()
    shim.streams["stdout"].send(bytes(600))
    shim.streams["stderr"].send(bytes(600))
    assert ended(process) == (KilledBy.OUTPUT, True, None, None)
    assert shim.killed.is_set()


def test_input(shim: Shim) -> None:
    """Goes in as it is taken, and ends."""
    data = bytes(range(256)) * 8192
    process = shim.begin(stdin=data)
    taken = b""
    while piece := shim.streams["stdin"].recv(1 << 20):
        taken += piece
    assert taken == data
    shim.exit(0)
    assert ended(process) == (KilledBy.NONE, True, 0, None)
    with pytest.raises(InvalidState):
        process.write(b"x")


def test_a_conversation(shim: Shim) -> None:
    process = shim.begin(stdin=None, held=True)
    process.write(b"question")
    assert shim.streams["stdin"].recv(100) == b"question"
    with pytest.raises(Timeout):
        process.read(0.01)
    shim.streams["stderr"].send(b"answer")
    assert process.read(SECONDS) == Chunk("stderr", b"answer")
    process.close_stdin()
    assert shim.streams["stdin"].recv(100) == b""
    shim.exit(0)
    assert process.read(SECONDS) is None
    assert ended(process) == (KilledBy.NONE, True, 0, None)


def test_output_waits_for_a_slow_reader(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at a pipe; also when the command has ended, however long its streams may stay open else."""
    monkeypatch.setattr(module, "_WINDOW", 1000)
    monkeypatch.setattr(module, "_DRAIN_SECONDS", 0)
    process = shim.begin(held=True, output=1 << 20)
    shim.streams["stdout"].setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while sent < 1 << 20:
            sent += shim.streams["stdout"].send(bytes(4096))
    assert sent < 1 << 20
    shim.exit(0)
    assert not shim.ended.wait(0.2)
    assert sum(len(chunk.data) for chunk in process) == sent
    assert ended(process) == (KilledBy.NONE, True, 0, None)


def test_a_stream_that_stays_open(shim: Shim) -> None:
    """After the end of the command it is given up."""
    process = shim.begin()
    shim.streams["stdout"].send(b"said")
    shim.control.send(b'{"exit": 0}')
    assert ended(process) == (KilledBy.NONE, True, 0, None)
    assert process.read() == Chunk("stdout", b"said")


def test_a_vm_that_dies(shim: Shim) -> None:
    """Which the shim tells before it has quite ended."""
    process = shim.begin()
    shim.lose()
    threading.Timer(0.05, shim.machine.ended.set).start()
    assert ended(process) == (KilledBy.VM_DIED, True, None, None)


@pytest.mark.parametrize("alive", [True, False])
def test_a_shim_that_dies(shim: Shim, alive: bool) -> None:
    """What has become of the command nobody knows, whether or not the VM has gone already."""
    process = shim.begin()
    if not alive:
        shim.machine.ended.set()
    shim.control.close()
    with pytest.raises(OutcomeUnknown, match="its shim died"):
        process.wait(SECONDS)


def test_what_the_shim_says_of_a_vm_that_lives(shim: Shim) -> None:
    process = shim.begin()
    shim.lose()
    with pytest.raises(OutcomeUnknown, match="the VM died"):
        process.wait(SECONDS)


def test_a_command_that_cannot_start(shim: Shim) -> None:
    shim.start_error = CommandNotFound("no such command")
    with pytest.raises(CommandNotFound, match="no such command"):
        shim.begin()
    assert shim.ended.is_set()


def _dies(shim: Shim) -> None:
    shim.machine.ended.set()


@pytest.mark.parametrize("meanwhile", [None, _dies])
def test_a_start_without_an_answer(shim: Shim, meanwhile: Callable[[Shim], None] | None) -> None:
    """The command may have run; where its VM has ended by that, it is a verdict."""
    shim.start_error = Unavailable("the connection was lost")
    if meanwhile is None:
        with pytest.raises(OutcomeUnknown, match="the connection was lost"):
            shim.begin()
    else:
        meanwhile(shim)
        assert ended(shim.begin()) == (KilledBy.VM_DIED, True, None, None)


def test_cpu_time_of_a_process_that_has_gone() -> None:
    assert host_cpu_seconds(2**22 + 1) is None
