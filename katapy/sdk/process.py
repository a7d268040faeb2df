"""One run: its streams, and its limits as the host enforces them.

A thread of its own carries the streams and holds the clock. Whatever limit is passed first ends the run: the shim kills
all that is in its container, and where the guest does not do that in time, the VM itself is killed.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple, Protocol

from katapy.client import attach
from katapy.client.observe import Usage
from katapy.client.pod import Pod
from katapy.errors import InvalidState, KatapyError, OutcomeUnknown, Timeout, Unavailable
from katapy.verdict import KilledBy, Verdict

# A timeout is to be over half a second after the limit, whatever the guest does. Nothing else is as urgent, and a guest
# that is only slow keeps its VM.
_GRACE: Final = 0.3
_PATIENCE: Final = 5.0
# For a shim that is to notice that its VM has gone.
_LOST_SECONDS: Final = 10.0
# What a process has left in its streams, after its end.
_DRAIN_SECONDS: Final = 10.0
_USAGE_SECONDS: Final = 5.0
_CHUNK: Final = 65536
# Of output that nobody has taken yet, where it is taken piece by piece; and of input that was not read yet.
_WINDOW: Final = 1 << 20
_CPU_STEP: Final = 0.02


class Machine(Protocol):
    """What a run needs of the VM that it is in."""

    accelerator: str

    def cpu_seconds(self) -> float | None:
        """Return the CPU time that the VM has taken of the host; None where it has ended."""

    def alive(self) -> bool:
        """Tell whether the VM runs."""

    def kill(self) -> None:
        """End the VM at once."""

    def await_end(self, seconds: float) -> bool:
        """Tell whether the VM has ended, or does within so many seconds."""

    def is_full(self) -> bool:
        """Tell whether nothing more can be written."""


class Bounds(NamedTuple):
    """Of one run: seconds of wall and CPU time, None for any; bytes of output; how many CPUs there are to use."""

    wall: float | None
    cpu: float | None
    output: int
    cpus: float


class Chunk(NamedTuple):
    """A piece of output; ``stream`` is "stdout" or "stderr"."""

    stream: str
    data: bytes


class Process:
    """A command that runs in a sandbox. ``wait`` for it or ``kill`` it; a context manager that kills."""

    def __init__(
        self,
        pod: Pod,
        attachment: attach.Attachment,
        machine: Machine,
        bounds: Bounds,
        *,
        name: str,
        stdin: bytes | None,
        held: bool,
        connect: Callable[[], Pod],
        ended: Callable[[Process], None],
    ) -> None:
        """Start the created container of ``pod``, and own both; ``connect`` makes another connection to it.

        ``stdin`` is all of its input, or None where ``write`` gives it. ``held`` output waits for whoever reads it, as
        it would in a pipe; else all of it is kept. ``ended`` is called when all is over. Raises what the start raises.
        """
        self._attachment, self._machine, self._bounds = attachment, machine, bounds
        self._name, self._held, self._connect, self._on_end = name, held, connect, ended
        self._condition = threading.Condition()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._input = bytearray(stdin or b"")
        self._input_ends = stdin is not None
        self._chunks: deque[tuple[str, bytearray]] = deque()
        self._waiting = 0  # bytes in _chunks
        self._printed = 0
        self.truncated = False
        self._cause: KilledBy | None = None
        self._give_up_at: float | None = None
        self._status: int | None = None
        self._signal = 0
        self._lost: KatapyError | None = None
        self._shim_lost = False
        self._usage: Usage | None = None
        self._verdict: Verdict | None = None
        self._error: KatapyError | None = None
        self._finished = False
        self._was_full = machine.is_full()
        self._cpu_before = machine.cpu_seconds()
        self._cpu_used: float | None = None
        self._began = self._next_cpu = time.monotonic()
        self._ended_at = self._began
        self._thread = threading.Thread(target=self._run, name=f"carry {name}", daemon=True)
        self._thread.start()
        try:
            with pod:
                pod.start()
        except KatapyError as error:
            # One whose limit was passed meanwhile has a verdict.
            if self._cause is None:
                # It may have run. Where its VM has ended, that is a verdict, too.
                unknown = isinstance(error, Unavailable | Timeout)
                self._abandon(OutcomeUnknown(f"what became of {name} is not known: {error}") if unknown else error)
                self._thread.join()
                if self._error is not None:
                    raise self._error from error

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        with suppress(KatapyError):
            self.wait()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._finished

    def write(self, data: bytes) -> None:
        """Give it input, waiting while it does not read what it was given. Raises InvalidState once it has ended."""
        with self._condition:
            self._condition.wait_for(lambda: len(self._input) < _WINDOW or self._finished or self._input_ends)
            if self._finished or self._input_ends:
                raise InvalidState(f"{self._name} takes no more input")
            self._input += data
        self._wake()

    def close_stdin(self) -> None:
        """End its input. Idempotent."""
        with self._condition:
            self._input_ends = True
        self._wake()

    def resize(self, *, columns: int, rows: int) -> None:
        """Set the size of its terminal, in characters."""
        attach.send_size(self._attachment.control, columns, rows)

    def send_signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        with suppress(OSError):
            attach.send_signal(self._attachment.control, number)

    def kill(self) -> None:
        """End it, and all that it has started. Does nothing where it has ended."""
        with self._condition:
            if not self._finished and self._cause is None:
                self._strike(KilledBy.SIGNAL)
        self._wake()

    def read(self, timeout: float | None = None) -> Chunk | None:
        """Return the next piece of output, None at the end. Raises Timeout after ``timeout`` seconds."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._chunks or self._finished, timeout):
                raise Timeout(f"{self._name} has printed nothing for {timeout:g} s")
            if not self._chunks:
                return None
            name, data = self._chunks.popleft()
            self._waiting -= len(data)
        self._wake()
        return Chunk(name, bytes(data))

    def __iter__(self) -> Iterator[Chunk]:
        while (chunk := self.read()) is not None:
            yield chunk

    def wait(self, timeout: float | None = None) -> Verdict:
        """Wait for the end and return what became of it. Output that nobody reads is kept, up to its limit.

        Raises Timeout after ``timeout`` seconds, OutcomeUnknown where what runs the sandbox was lost.
        """
        with self._condition:
            # Who waits reads no more.
            self._held = False
        self._wake()
        with self._condition:
            if not self._condition.wait_for(lambda: self._finished, timeout):
                raise Timeout(f"{self._name} has not ended after {timeout:g} s")
        if self._error is not None:
            raise self._error
        assert self._verdict is not None
        return self._verdict

    # In the thread.

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                stack.callback(self._attachment.close)
                selector = stack.enter_context(selectors.DefaultSelector())
                self._carry(selector)
                self._ended_at = time.monotonic()
                self._drain(selector)
            self._verdict = self._judge()
        except KatapyError as error:
            self._error = error
        finally:
            # Whoever waits is told before what is left is removed: the container has ended by then.
            with self._condition:
                self._finished = True
                self._condition.notify_all()
                self._wake_writer.close()
                self._wake_reader.close()
            self._on_end(self)

    def _carry(self, selector: selectors.BaseSelector) -> None:
        """Carry the streams until the end is told."""
        attachment = self._attachment
        selector.register(self._wake_reader, selectors.EVENT_READ)
        selector.register(attachment.control, selectors.EVENT_READ)
        for stream in attachment.streams.values():
            stream.setblocking(False)
        while True:
            self._choose(selector)
            ready = selector.select(self._due())
            for key, events in ready:
                if key.fileobj is attachment.control:
                    self._hear()
                    return
                self._serve(selector, key, events)
            if self._lost is not None:
                return
            self._check()

    def _serve(self, selector: selectors.BaseSelector, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._wake_reader:
            with suppress(BlockingIOError):
                self._wake_reader.recv(4096)
            return
        if events & selectors.EVENT_READ and not self._receive(key.data, key.fileobj):  # type: ignore[arg-type]
            self._close_stream(selector, key.data)
        elif events & selectors.EVENT_WRITE and not self._feed(key.fileobj) and key.data == "stdin":  # type: ignore[arg-type]
            self._close_stream(selector, "stdin")

    def _choose(self, selector: selectors.BaseSelector) -> None:
        """Wait for those streams that have something to do."""
        with self._condition:
            full = self._held and self._waiting >= _WINDOW
            input_due = bool(self._input) or (self._input_ends and "stdin" in self._attachment.streams)
        for name, stream in self._attachment.streams.items():
            wanted = 0
            if name != "stdin" and not full:
                wanted |= selectors.EVENT_READ
            if input_due and name == self._input_stream:
                wanted |= selectors.EVENT_WRITE
            current = selector.get_map().get(stream)
            if current is None and wanted:
                selector.register(stream, wanted, name)
            elif current is not None and not wanted:
                selector.unregister(stream)
            elif current is not None and current.events != wanted:
                selector.modify(stream, wanted, name)

    @property
    def _input_stream(self) -> str:
        return "stdout" if self._attachment.terminal else "stdin"

    def _close_stream(self, selector: selectors.BaseSelector, name: str) -> None:
        stream = self._attachment.streams.pop(name)
        with suppress(KeyError):
            selector.unregister(stream)
        stream.close()

    def _receive(self, name: str, stream: socket.socket) -> bool:
        """Take a piece of output; False at the end of it."""
        try:
            data = stream.recv(_CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        with self._condition:
            taken = data[: max(self._bounds.output - self._printed, 0)]
            self._printed += len(taken)
            if taken:
                # Many small pieces would take more memory than what is in them.
                if self._chunks and self._chunks[-1][0] == name and len(self._chunks[-1][1]) < _CHUNK:
                    self._chunks[-1][1].extend(taken)
                else:
                    self._chunks.append((name, bytearray(taken)))
                self._waiting += len(taken)
                self._condition.notify_all()
            if len(taken) < len(data):
                self.truncated = True
                if self._cause is None and self._status is None:
                    self._strike(KilledBy.OUTPUT)
                elif self._cause is None:
                    # It has ended before anybody could end it.
                    self._cause = KilledBy.OUTPUT
        return True

    def _feed(self, stream: socket.socket) -> bool:
        """Give a piece of input; False where there is no more, or nobody takes it."""
        with self._condition:
            if not self._input:
                if self._input_ends and not self._attachment.terminal:
                    with suppress(OSError):
                        stream.shutdown(socket.SHUT_WR)
                return not self._input_ends
            try:
                count = stream.send(memoryview(self._input)[:_CHUNK].tobytes())
            except BlockingIOError:
                return True
            except OSError:
                self._input.clear()
                self._input_ends = True
                return False
            del self._input[:count]
            self._condition.notify_all()
        return True

    def _hear(self) -> None:
        try:
            self._status, self._signal = attach.receive_end(self._attachment.control)
        except attach.ShimDied:
            self._shim_lost = True
            self._lost = OutcomeUnknown(f"what became of {self._name} is not known: its shim died")
        except attach.AttachError as error:
            # The container was lost, with its VM; or it was removed under our hands.
            self._lost = OutcomeUnknown(f"what became of {self._name} is not known: {error}")

    def _due(self) -> float | None:
        """Return in how many seconds a limit may be passed."""
        now, times = time.monotonic(), []
        if self._give_up_at is not None:
            times.append(self._give_up_at)
        elif self._cause is None:
            if self._bounds.wall is not None:
                times.append(self._began + self._bounds.wall)
            if self._bounds.cpu is not None:
                times.append(self._next_cpu)
        return max(min(times) - now, 0.0) if times else None

    def _check(self) -> None:
        now = time.monotonic()
        with self._condition:
            if self._cause is None:
                if self._bounds.wall is not None and now >= self._began + self._bounds.wall:
                    self._strike(KilledBy.WALL)
                elif self._bounds.cpu is not None and now >= self._next_cpu:
                    self._check_cpu(now, self._bounds.cpu)
                return
        if self._give_up_at is None or now < self._give_up_at:
            return
        if self._machine.alive():
            self._cpu_used = self._used()
            self._machine.kill()
            self._give_up_at = now + _LOST_SECONDS
        else:
            self._lost = OutcomeUnknown(f"what became of {self._name} is not known: its shim does not answer")

    def _check_cpu(self, now: float, limit: float) -> None:
        used = self._used()
        if used is None:
            self._next_cpu = now + 1
        elif used >= limit:
            self._strike(KilledBy.CPU)
        else:
            # No sooner can it be used up: QEMU's own thread comes on top of the vCPUs.
            self._next_cpu = now + max(_CPU_STEP, (limit - used) / (self._bounds.cpus + 1))

    def _used(self) -> float | None:
        now = self._machine.cpu_seconds()
        return self._cpu_used if now is None or self._cpu_before is None else now - self._cpu_before

    def _strike(self, cause: KilledBy) -> None:
        """Begin to end the run. The caller holds the condition."""
        self._cause = cause
        self._give_up_at = time.monotonic() + (_GRACE if cause is KilledBy.WALL else _PATIENCE)
        # The answer may take its time; the clock goes on here.
        threading.Thread(target=self._send_kill, name=f"kill {self._name}", daemon=True).start()

    def _send_kill(self) -> None:
        with suppress(KatapyError), self._connect() as pod:
            pod.kill(signal.SIGKILL, everyone=True)

    def _abandon(self, error: KatapyError) -> None:
        with self._condition:
            self._lost = self._lost or error
        self._wake()

    def _wake(self) -> None:
        with self._condition, suppress(OSError):
            if not self._finished:
                self._wake_writer.send(b"!")

    def _drain(self, selector: selectors.BaseSelector) -> None:
        """Take what is left in the streams: the shim tells the end when all of it is on its way."""
        deadline = time.monotonic() + (_GRACE / 3 if self._cause is KilledBy.WALL else _DRAIN_SECONDS)
        for name in list(self._attachment.streams):
            if name == "stdin":
                self._close_stream(selector, name)
        empty = False
        while self._attachment.streams:
            with self._condition:
                self._input.clear()
                self._input_ends = False
                full = self._held and self._waiting >= _WINDOW and self._cause is None
            if full:
                # It is the reader who takes time.
                deadline = time.monotonic() + _DRAIN_SECONDS
            left = deadline - time.monotonic()
            # What is there is taken, on a machine that is slower than that, too; it is what is not that is given up.
            if left <= 0 and not full and (empty or self.truncated or self._cause is KilledBy.WALL):
                return
            self._choose(selector)
            ready = selector.select(min(max(left, 0.0), 1.0))
            empty = not ready and not full
            for key, events in ready:
                if key.fileobj is not self._attachment.control:
                    self._serve(selector, key, events)
                else:
                    selector.unregister(key.fileobj)

    def _judge(self) -> Verdict:
        """Say what became of it. What the host has seen comes first; what only the guest says is marked."""
        cause, status = self._cause, self._status
        # What the shim says of its VM comes before the VM has quite gone.
        if status is None and (cause is None or self._machine.alive()):
            told = isinstance(self._lost, OutcomeUnknown) and not self._shim_lost
            if not told or not self._machine.await_end(_LOST_SECONDS):
                raise self._lost or OutcomeUnknown(f"what became of {self._name} is not known")
        usage = None
        if status is not None and self._machine.alive():
            usage = self._ask_usage()
        by, trusted = self._reason(cause, status, usage)
        ended_by_us = cause is not None and by in (KilledBy.WALL, KilledBy.CPU, KilledBy.OUTPUT)
        number = self._signal or None
        return Verdict(
            exit_code=None if ended_by_us or number is not None else status,
            signal=None if ended_by_us else number,
            killed_by=by,
            trusted=trusted,
            wall_seconds=self._ended_at - self._began,
            cpu_seconds=None if usage is None else usage.cpu_usec / 1e6,
            peak_memory_bytes=(usage.peak_bytes or None) if usage is not None else None,
            host_cpu_seconds=self._used(),
            accelerator=self._machine.accelerator,
        )

    def _ask_usage(self) -> Usage | None:
        seconds = _GRACE / 3 if self._cause is KilledBy.WALL else _USAGE_SECONDS
        with suppress(KatapyError), self._connect() as pod:
            return pod.usage(timeout=seconds)
        return None

    def _reason(self, cause: KilledBy | None, status: int | None, usage: Usage | None) -> tuple[KilledBy, bool]:
        if cause is not None and cause is not KilledBy.SIGNAL:
            return cause, True
        if status is None:
            return (KilledBy.SIGNAL, True) if cause is KilledBy.SIGNAL else (KilledBy.VM_DIED, True)
        if cause is KilledBy.SIGNAL and self._signal == signal.SIGKILL:
            return KilledBy.SIGNAL, True
        if status != 0 and usage is not None and usage.oom_kills:
            return KilledBy.MEMORY, False
        if status != 0 and usage is not None and usage.pid_failures:
            return KilledBy.PIDS, False
        # A program that a signal ended may have filled the disk; of a disk that was full before, it says something.
        if status != 0 and not (self._signal and self._was_full) and self._machine.is_full():
            return KilledBy.DISK, True
        if self._signal:
            return KilledBy.SIGNAL, False
        return KilledBy.NONE, True


def host_cpu_seconds(pid: int) -> float | None:
    """Return the CPU time of a process of the host, in seconds; None where it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            # The name in it may hold anything, also blanks and brackets.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
