"""The client's side of the attach protocol against a shim played by the test, over socketpairs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from katapy.client import attach
from katapy.client.attach import AttachError, Attachment, ShimDied, Signals, pump

ALL = ["stdin", "stdout", "stderr"]


class Shim:
    """The shim's end: the control connection, and the far end of each stream."""

    def __init__(self, names: list[str], *, terminal: bool = False) -> None:
        self._stack = contextlib.ExitStack()
        mine, self.control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pairs = {name: socket.socketpair() for name in names}
        self.streams = {name: far for name, (_, far) in pairs.items()}
        for sock in (self.control, *self.streams.values()):
            sock.settimeout(60)
            self._stack.enter_context(sock)
        self.attachment = Attachment(mine, terminal, {name: near for name, (near, _) in pairs.items()})

    def __enter__(self) -> Shim:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def exit(self, status: int, *names: str) -> None:
        """End the process: its output streams, then its status."""
        for name in names or self.streams:
            self.streams[name].close()
        self.control.send(json.dumps({"exit": status}).encode())


class Pipes:
    """The caller's stdio: three pipes."""

    def __init__(self) -> None:
        self.stdin, self.feed = os.pipe()
        self.out, self.stdout = os.pipe()
        self.err, self.stderr = os.pipe()

    def close(self, *names: str) -> None:
        for name in names or list(vars(self)):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
            setattr(self, name, -1)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close()


@contextlib.contextmanager
def playing(shim: Shim, target: Callable[[], object]) -> Iterator[None]:
    """Run the shim's part in a thread; its failure is the test's, and ends the pump, which would wait for more."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)
            shim.control.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        if errors:
            raise errors[0]


def run_pump(shim: Shim, pipes: Pipes, signals: Signals | None = None) -> int:
    return pump(shim.attachment, pipes.stdin, pipes.stdout, pipes.stderr, signals)


def test_streams_signals_and_the_exit_status(pipes: Pipes) -> None:
    with Shim(ALL) as shim:

        def play() -> None:
            os.write(pipes.feed, b"typed")
            assert shim.streams["stdin"].recv(99) == b"typed"
            pipes.close("feed")
            assert shim.streams["stdin"].recv(99) == b""  # EOF is a half-close
            shim.streams["stdout"].sendall(b"to out")
            shim.streams["stderr"].sendall(b"to err")
            os.kill(os.getpid(), signal.SIGTERM)
            assert json.loads(shim.control.recv(99)) == {"signal": 15}
            os.kill(os.getpid(), signal.SIGRTMIN)
            assert json.loads(shim.control.recv(99)) == {"signal": 34}
            shim.exit(42)

        with playing(shim, play):
            assert run_pump(shim, pipes) == 42
    assert (os.read(pipes.out, 99), os.read(pipes.err, 99)) == (b"to out", b"to err")


def test_output_written_before_the_exit_is_not_lost(pipes: Pipes) -> None:
    """The exit may overtake output that is still in the streams: the pump reads on to their end."""
    data = os.urandom(150_000)
    with Shim(["stdout"]) as shim:
        got = bytearray()

        def play() -> None:
            shim.streams["stdout"].sendall(data)
            shim.exit(0)
            while len(got) < len(data):
                got.extend(os.read(pipes.out, 65536))

        with playing(shim, play):
            assert run_pump(shim, pipes) == 0
    assert got == data


def test_a_reader_that_is_gone_closes_that_stream_only(pipes: Pipes) -> None:
    with Shim(ALL) as shim:
        pipes.close("out")

        def play() -> None:
            stdout = shim.streams["stdout"]
            # Closed over what has not been read it is reset, for who is about to send at that moment.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    stdout.sendall(bytes(4096))
            shim.streams["stderr"].sendall(b"still here")
            assert os.read(pipes.err, 99) == b"still here"
            shim.exit(141)

        with playing(shim, play):
            assert run_pump(shim, pipes) == 141


def test_input_that_nobody_reads_is_left_to_the_next(pipes: Pipes) -> None:
    """The guest closed stdin: what is typed afterwards is for whoever reads the terminal next."""
    with Shim(ALL) as shim:

        def play() -> None:
            shim.streams["stdin"].close()
            shim.streams["stdout"].sendall(b"x")
            assert os.read(pipes.out, 9) == b"x"
            os.write(pipes.feed, b"for the shell")
            shim.exit(0, "stdout", "stderr")

        with playing(shim, play):
            assert run_pump(shim, pipes) == 0
    assert os.read(pipes.stdin, 99) == b"for the shell"


def test_the_end_does_not_wait_for_input_nor_steal_it(pipes: Pipes) -> None:
    with Shim(ALL) as shim:
        shim.exit(3, "stdout", "stderr")
        assert run_pump(shim, pipes) == 3
        assert shim.streams["stdin"].recv(9) == b""  # the reading thread is told to end
        os.write(pipes.feed, b"later")
        assert select.select([pipes.stdin], [], [], 0)[0]
        assert os.read(pipes.stdin, 99) == b"later"


def test_the_caller_s_descriptors_stay_as_they_are(pipes: Pipes) -> None:
    """stdio is shared with the caller, who would be surprised by O_NONBLOCK; and may itself have set it."""
    os.set_blocking(pipes.stdout, False)
    data = os.urandom(200_000)  # more than a pipe holds, less than that and the stream
    got = bytearray()
    with Shim(ALL) as shim:

        def play() -> None:
            shim.streams["stdout"].sendall(data)
            shim.exit(0)
            while len(got) < len(data):
                got.extend(os.read(pipes.out, 65536))

        with playing(shim, play):
            assert run_pump(shim, pipes) == 0
    assert got == data
    assert [os.get_blocking(fd) for fd in (pipes.stdin, pipes.stdout, pipes.stderr)] == [True, False, True]


def test_a_closed_stdin_is_an_empty_one(pipes: Pipes) -> None:
    with Shim(ALL) as shim:

        def play() -> None:
            assert shim.streams["stdin"].recv(9) == b""
            shim.exit(0)

        with playing(shim, play):
            assert pump(shim.attachment, 9999, pipes.stdout, pipes.stderr) == 0


@pytest.mark.parametrize(
    ("datagram", "kind", "text"),
    [
        (None, "Unavailable", "the shim died"),
        ({"error": "the VM died", "kind": "Unavailable", "code": 14}, "Unavailable", "the VM died"),
        ({"exit": 256}, "Internal", "protocol"),
        ({"exit": -1}, "Internal", "protocol"),
        ({"exit": True}, "Internal", "protocol"),
        ({"exit": "0"}, "Internal", "protocol"),
        ({"exit": 0, "more": 1}, "Internal", "protocol"),
        ({"exit": 137, "signal": 65}, "Internal", "protocol"),
        ({"exit": 129, "signal": True}, "Internal", "protocol"),
        ([1], "Internal", "protocol"),
        ("[" * 60000, "Internal", "protocol"),
    ],
)
def test_an_end_that_is_no_exit(pipes: Pipes, datagram: Any, kind: str, text: str) -> None:
    """The output that came before is still written, then the reason is raised."""
    with Shim(ALL) as shim:
        shim.streams["stdout"].sendall(b"last words")
        for stream in shim.streams.values():
            stream.close()
        if datagram is not None:
            shim.control.send(datagram.encode() if isinstance(datagram, str) else json.dumps(datagram).encode())
        shim.control.close()
        with pytest.raises(AttachError, match=text) as caught:
            run_pump(shim, pipes)
    assert caught.value.kind == kind
    assert isinstance(caught.value, ShimDied) == (datagram is None)
    assert os.read(pipes.out, 99) == b"last words"


def test_an_exit_behind_unread_signals_is_found(pipes: Pipes) -> None:
    """A shim that closes with signals unread resets the connection; the exit that it had sent still counts."""
    with Shim([]) as shim:
        shim.attachment.control.send(b'{"signal": 1}')
        shim.exit(9)
        shim.control.close()
        assert run_pump(shim, pipes) == 9


def test_silence_after_the_exit_is_bounded(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "_DRAIN_SECONDS", 0.05)
    with Shim(["stdout"]) as shim:
        shim.control.send(b'{"exit": 5}')  # and stdout never ends
        assert run_pump(shim, pipes) == 5


def test_a_slow_reader_after_the_exit_is_waited_for(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `katapy run … | less`: the pause between two screens may be long; Ctrl-C ends it."""
    monkeypatch.setattr(attach, "_DRAIN_SECONDS", 0.5)
    data = os.urandom(200_000)  # more than a pipe holds, less than that and the stream
    with Shim(["stdout"]) as shim:
        got = bytearray()

        def play() -> None:
            shim.streams["stdout"].sendall(data)
            shim.exit(0)
            threading.Event().wait(1.5)  # three times the bound
            while len(got) < len(data):
                got.extend(os.read(pipes.out, 65536))

        with playing(shim, play):
            assert run_pump(shim, pipes) == 0
            assert len(data) - len(got) <= 131_072  # all but what the pipe holds had been written
    assert got == data


def test_output_that_cannot_be_written_is_told(pipes: Pipes) -> None:
    """`katapy run … > file` on a full disk ended with the container's status and not a word."""
    with Shim(["stdout"]) as shim, Path("/dev/full").open("wb", buffering=0) as full:
        shim.streams["stdout"].sendall(b"lost")
        shim.exit(0)
        with pytest.raises(attach.OutputLost, match="cannot write standard output: no space left on device") as caught:
            pump(shim.attachment, pipes.stdin, full.fileno(), pipes.stderr)
    assert caught.value.status == 0


def test_a_fatal_signal_ends_the_drain(pipes: Pipes) -> None:
    """Nobody reads the output, and the container that Ctrl-C was for is gone."""
    ended = threading.Event()
    size = 150_000  # more than a pipe holds
    with Shim(["stdout"]) as shim, Signals() as signals:
        shim.streams["stdout"].sendall(bytes(size))
        shim.control.send(b'{"exit": 0}')

        def play() -> None:
            while not ended.wait(0.02):  # the first ones may still be the container's
                os.kill(os.getpid(), signal.SIGINT)

        with playing(shim, play):
            assert run_pump(shim, pipes, signals) == 0
            ended.set()
    # The thread that is in write(2) ends when it is done there; not later, when the descriptor is another's.
    while size := size - len(os.read(pipes.out, size)):
        pass


def test_signals_are_given_back() -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)  # no KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGUSR1)  # ignored before, as nohup would: stays so
            assert signals.take() == [signal.SIGINT]
            assert signals.take() == []
            assert signal.getsignal(signal.SIGTSTP) == before[signal.SIGTSTP]
            assert signal.getsignal(signal.SIGCHLD) == before[signal.SIGCHLD]
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before


def answer(message: object, *fds: int) -> Attachment:
    """Attach to a shim that answers this."""
    mine, shim = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with shim:
        socket.send_fds(shim, [json.dumps(message).encode()], fds)
        try:
            attach.announce(mine, "c1", "e")
            attachment = attach.attach(mine)
        except BaseException:
            mine.close()
            raise
        assert json.loads(shim.recv(999)) == {"attach": "c1", "exec": "e"}
        return attachment


def test_attach_takes_the_streams() -> None:
    near, far = socket.socketpair()
    near.setblocking(False)  # as an event loop leaves it
    with far:
        with near:
            attachment = answer({"terminal": True, "streams": ["stdout"]}, near.fileno())
        assert attachment.terminal
        attachment.streams["stdout"].send(b"x")
        assert far.recv(9) == b"x"
        assert os.get_blocking(attachment.streams["stdout"].fileno())
        assert not os.get_inheritable(attachment.streams["stdout"].fileno())
        attachment.close()


@pytest.mark.parametrize(
    "message",
    [
        {"terminal": False, "streams": ["stdin", "stdout"]},  # two names, one descriptor
        {"terminal": False, "streams": ["other"]},
        {"terminal": True, "streams": ["stdin"]},
        {"terminal": 1, "streams": ["stdout"]},
        {"terminal": False, "streams": ["stdout"], "more": 1},
        {"exit": 0},
        17,
    ],
)
def test_attach_refuses_another_answer_and_keeps_nothing(message: object) -> None:
    near, far = socket.socketpair()
    with far, near:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(AttachError, match="broke the attach protocol"):
            answer(message, near.fileno())
        assert len(os.listdir("/proc/self/fd")) == before


def test_attach_raises_what_the_shim_says() -> None:
    with pytest.raises(AttachError, match="no such container") as caught:
        answer({"error": "no such container", "kind": "NotFound", "code": 5})
    assert (caught.value.kind, caught.value.code) == ("NotFound", 5)
