"""Carries a container's standard streams and signals for whoever runs it: the stand-in, and the foreground command.

Client side of the attach protocol, over a SOCK_SEQPACKET connection to the shim's attach.sock (server side:
shim/attach.py). Every message is one datagram of JSON, at most DATAGRAM_MAX bytes, unknown keys refused:

    client  {"attach": container, "exec": exec or ""}, which may come before the container is created;
            with "only": "streams" the client does not stand for the process, and engines see no pid
    shim    {"terminal": bool, "streams": [names]} with the connected stream sockets in that order (SCM_RIGHTS)
    client  {"signal": number} and {"resize": [columns, rows]}, any number of times
    shim    {"exit": 0..255}, and "signal": number where one ended the process: the status is 128 + its number then
    shim    instead of either of its messages: {"error": text, "kind": class name, "code": google.rpc.Code}

The streams that exist are named "stdin", "stdout", "stderr"; a terminal has "stdout" only, in both directions.
The end of the connection without an exit or an error means that the shim died.

Also a program, started by launch.start_standin: one stand-in lives as long as its container. So this file imports the
standard library's lightest modules and nothing of katapy: it starts in half the time that click takes, in under 10 MiB.
"""

from __future__ import annotations

import _socket  # socket without its enumerations: 0.8 MiB and 7 ms of every stand-in
import _thread
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import sys
import termios
import tty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Control = _socket.socket
DATAGRAM_MAX = 65536  # bytes
SHIM_DIED = 137  # as if killed: what engines expect of a container whose supervisor is gone
_CHUNK = 256 << 10  # bytes; larger than any socket or pipe buffer, so one call empties it
_DRAIN_SECONDS = 10.0
_NAMES = ["stdin", "stdout", "stderr"]
_WORDS = {"stdout": "output", "stderr": "error"}
# Not the container's: our own children and pipes, our job control, and faults, which cannot be returned from.
_OWN_SIGNALS = {
    signal.SIGCHLD, signal.SIGPIPE,
    signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
    signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL,
    signal.SIGKILL, signal.SIGSTOP,
}  # fmt: skip
_FATAL_SIGNALS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}


class AttachError(Exception):
    """What the shim answered, or that it died: ``errors.from_wire(error.code, error.kind, str(error))`` rebuilds it."""

    def __init__(self, message: str, kind: str = "Unavailable", code: int = 14) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code


class ShimDied(AttachError):
    """The connection ended without a word."""

    def __init__(self) -> None:
        super().__init__("the shim died")


class OutputLost(AttachError):
    """What the process wrote could not be passed on; ``status`` is the process's exit status."""

    def __init__(self, name: str, error: OSError, status: int) -> None:
        super().__init__(f"cannot write standard {_WORDS[name]}: {(error.strerror or str(error)).lower()}")
        self.status = status


class Attachment:
    """The connection to the shim and the streams of one process; they are closed when pump() has used them."""

    def __init__(self, control: _socket.socket, terminal: bool, streams: dict[str, _socket.socket]) -> None:
        self.control = control
        self.terminal = terminal
        self.streams = streams

    def close(self) -> None:
        """Close everything; the shim is told by that if the process was not yet attached to its end."""
        self.control.close()
        for stream in self.streams.values():
            stream.close()


def announce(control: _socket.socket, container_id: str, exec_id: str, *, stand: bool = True) -> None:
    """Tell the shim, over a connection to attach.sock, that this process stands for a process of a container.

    ``exec_id`` is "" for the container's init. The process may be one that is yet to be created. Without ``stand``
    this process wants its streams, and is nobody's stand-in.
    """
    # Whoever attaches is the stand-in, not whoever made the connection (SO_PEERCRED): the kernel vouches for the pid.
    own = b"".join(number.to_bytes(4, sys.byteorder) for number in (os.getpid(), os.getuid(), os.getgid()))
    hello = json.dumps({"attach": container_id, "exec": exec_id, **({} if stand else {"only": "streams"})}).encode()
    with contextlib.suppress(OSError):  # as in _send()
        control.sendmsg([hello], [(_socket.SOL_SOCKET, _socket.SCM_CREDENTIALS, own)])


def attach(control: _socket.socket) -> Attachment:
    """Wait for the streams of the process that was announced; ``control`` is then the result's. Raises AttachError."""
    message, fds = _receive(control)
    streams = [_socket.socket(fileno=fd) for fd in fds]
    match message:
        case {"terminal": bool(terminal), "streams": list(names)} if (
            len(message) == 2
            and len(names) == len(fds)
            and names == (["stdout"] if terminal else [name for name in _NAMES if name in names])
        ):
            for stream in streams:
                stream.setblocking(True)  # O_NONBLOCK travels with a socket
            return Attachment(control, terminal, dict(zip(names, streams, strict=True)))
    for stream in streams:
        stream.close()
    raise _error(message)


def _send(control: _socket.socket, message: dict[str, object]) -> None:
    # When the shim is dead, what it said last is still to be read: that tells more than EPIPE.
    with contextlib.suppress(OSError):
        control.send(json.dumps(message).encode())


def _receive(control: _socket.socket) -> tuple[dict[str, object], list[int]]:
    for _ in range(2):
        try:
            data, control_data, flags, _ = control.recvmsg(
                DATAGRAM_MAX, _socket.CMSG_SPACE(4 * len(_NAMES)), _socket.MSG_CMSG_CLOEXEC
            )
            break
        except ConnectionResetError:
            # The shim closed without reading all that we sent. Its last message is still queued behind the error.
            continue
    else:
        data = b""
    if not data:
        raise ShimDied
    fds = [fd for _, _, item in control_data for fd in memoryview(item).cast("i")]
    try:
        message = json.loads(data)
        if isinstance(message, dict) and not flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
            return message, fds
    except (ValueError, RecursionError):
        pass
    for fd in fds:
        os.close(fd)
    raise _error({})


def _error(message: dict[str, object]) -> AttachError:
    match message:
        case {"error": str(text), "kind": str(kind), "code": int(code)} if len(message) == 3:
            return AttachError(text, kind, code)
    return AttachError("the shim broke the attach protocol", "Internal", 13)


def _end(message: dict[str, object]) -> tuple[int, int]:
    match {"signal": 0, **message}:
        case {"exit": int(status), "signal": int(number), **others} if (
            not others and status in range(256) and number in range(65) and bool not in (type(status), type(number))
        ):
            return status, number
    raise _error(message)


class Signals:
    """While entered, the signals that are the container's are collected instead of acting on this process.

    Main thread only. A signal that was ignored stays ignored (nohup). Threads of the pump ring here when they end.
    """

    def __enter__(self) -> Signals:
        self._lock = _thread.allocate_lock()
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {}
        for number in signal.valid_signals() - _OWN_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._previous[number] = signal.signal(number, lambda _number, _frame: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        with self._lock:
            os.close(self._reader)
            os.close(self._writer)
            self._writer = -1

    def fileno(self) -> int:
        """Return the descriptor that is readable when take() has something."""
        return self._reader

    def ring(self) -> None:
        """Make the descriptor readable; from any thread, at any time."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._writer >= 0:
                os.write(self._writer, b"\0")

    def take(self) -> list[int]:
        """Return the signals that came since the last call."""
        with contextlib.suppress(BlockingIOError):
            return [number for number in os.read(self._reader, 4096) if number and number not in _OWN_SIGNALS]
        return []


def pump(
    attachment: Attachment,
    stdin_fd: int,
    stdout_fd: int,
    stderr_fd: int,
    signals: Signals | None = None,
    *,
    gate: int = -1,
) -> int:
    """Carry streams and signals until the process ends; return its exit status, 0 to 255.

    The descriptors are the caller's: they stay open, and as blocking or not as they were. With a terminal, a tty on
    ``stdin_fd`` is in raw mode meanwhile. After the exit all output is written, for as long as its reader takes, but
    a stream that stays open and silent for 10 s is given up, and so is everything on SIGHUP, SIGINT, SIGQUIT or
    SIGTERM. With ``gate``, a unix socket, standard input is the descriptor that comes over it, however late.
    Main thread only. Raises AttachError when the sandbox or the shim died, once the output is written, and OutputLost
    when it could not be written for another reason than that its reader has left.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(attachment.close)
        if signals is None:
            signals = stack.enter_context(Signals())
        terminal = stack.enter_context(_Terminal(stdin_fd, stdout_fd)) if attachment.terminal else None
        streams = attachment.streams
        attachment.streams = {}  # from here on each is its thread's
        source = _socket.socket(fileno=_socket.dup(streams["stdout"].fileno())) if terminal else streams.get("stdin")
        sinks = [("stdout", stdout_fd), ("stderr", stderr_fd)]
        outputs = [_Output(name, streams[name], fd, signals.ring) for name, fd in sinks if name in streams]
        if source is not None:
            _thread.start_new_thread(_copy_input, (stdin_fd, source, gate))
            stack.callback(_hang_up, source)
        try:
            status = _relay(attachment.control, signals, terminal)
        finally:
            _drain(outputs, signals)
        for output in outputs:
            if output.error is not None:
                raise OutputLost(output.name, output.error, status)
        return status


def _relay(control: _socket.socket, signals: Signals, terminal: _Terminal | None) -> int:
    """Pass signals and window sizes on until the shim tells the end."""
    if terminal:
        _send_size(control, terminal)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(signals, select.POLLIN)
    while control.fileno() not in [fd for fd, _ in poll.poll()]:
        for number in signals.take():
            if number not in (signal.SIGWINCH, signal.SIGCONT):
                _send(control, {"signal": number})
            elif terminal:
                if number == signal.SIGCONT:
                    terminal.make_raw()  # the shell that stopped us took it back
                _send_size(control, terminal)
    return receive_end(control)[0]


def receive_end(control: _socket.socket) -> tuple[int, int]:
    """Wait for the end of the process; return its exit status, 0 to 255, and the signal that ended it, 0 for none.

    Raises AttachError where it was lost.
    """
    message, fds = _receive(control)
    for fd in fds:
        os.close(fd)
    return _end(message)


def send_signal(control: _socket.socket, number: int) -> None:
    """Have the shim send a signal to the process."""
    _send(control, {"signal": number})


def send_size(control: _socket.socket, columns: int, rows: int) -> None:
    """Tell the size of the window that the process's terminal is in."""
    _send(control, {"resize": [columns, rows]})


def _send_size(control: _socket.socket, terminal: _Terminal) -> None:
    if size := terminal.size():
        _send(control, {"resize": size})


def _drain(outputs: list[_Output], signals: Signals) -> None:
    """Wait until everything that the process wrote has been passed on, as pump() says."""
    poll = select.poll()
    poll.register(signals, select.POLLIN)
    signals.take()  # those came before the end and were meant for the process
    while any(not output.done for output in outputs):
        moved = sum(output.moved for output in outputs)
        if poll.poll(_DRAIN_SECONDS * 1000):
            if not _FATAL_SIGNALS.isdisjoint(signals.take()):
                break
        elif not any(output.writing for output in outputs) and moved == sum(output.moved for output in outputs):
            break
    for output in outputs:
        output.give_up()


class _Output:
    """Copies a stream to a descriptor in a thread, which owns the stream."""

    def __init__(self, name: str, stream: _socket.socket, fd: int, ended: Callable[[], None]) -> None:
        self.name = name
        self.error: OSError | None = None
        self.moved = 0
        self.writing = False
        self.done = False
        self._stream = stream
        self._fd = fd
        self._ended = ended
        _thread.start_new_thread(self._run, ())

    def give_up(self) -> None:
        """Let the thread end as soon as it is not in write(2); of no effect when it has ended."""
        _hang_up(self._stream)

    def _run(self) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        with contextlib.suppress(OSError):
            while (count := self._stream.recv_into(buffer)) and self._write(buffer[:count]):
                self.moved += count
        with contextlib.suppress(OSError):
            self._stream.shutdown(_socket.SHUT_RD)
        self._stream.close()
        self.done = True
        self._ended()

    def _write(self, data: memoryview) -> bool:
        self.writing = True
        try:
            write_all(self._fd, data)
        except OSError as error:
            # The process gets EPIPE too, from the stream that is closed then. That its reader has left it knows.
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.error = error
            return False
        finally:
            self.writing = False
        return True


def write_all(fd: int, data: memoryview) -> None:
    """Write all of ``data``, waiting where the descriptor does not block. Raises OSError."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            # Whoever shares the descriptor made it non-blocking; it is not ours to change that.
            wait_for(fd, select.POLLOUT)


def _copy_input(fd: int, stream: _socket.socket, gate: int) -> None:
    """Copy ``fd``, or what comes over ``gate``, to the stream, which this thread owns, until either ends."""
    buffer = memoryview(bytearray(_CHUNK))
    with contextlib.suppress(OSError):
        if gate >= 0:
            fd = _given_input(gate)
        while _next_input(fd, stream, buffer):
            pass
        stream.shutdown(_socket.SHUT_WR)
        # Kept open until the other side hangs up: closing at once could cost what it has not yet read.
        wait_for(stream, 0)
    stream.close()


def _given_input(gate: int) -> int:
    """Wait for a descriptor. Raises ConnectionResetError where none comes any more."""
    _, control, _, _ = _socket.socket(fileno=gate).recvmsg(1, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
    for _, _, item in control:
        return int(memoryview(item).cast("i")[0])
    raise ConnectionResetError


def _next_input(fd: int, stream: _socket.socket, buffer: memoryview) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(stream, 0)  # POLLHUP and POLLERR only
    if any(ready == stream.fileno() for ready, _ in poll.poll()):
        raise ConnectionResetError  # nobody reads any more; what is typed now is for whoever reads the terminal next
    try:
        count = os.readv(fd, [buffer])
    except BlockingIOError:
        return True
    except OSError:
        count = 0  # closed, a directory, a terminal that hung up: no more input
    stream.sendall(buffer[:count])
    return count > 0


def wait_for(file: int | _socket.socket, events: int) -> None:
    """Wait for one of ``events`` (poll(2)) at a file, or for its end."""
    poll = select.poll()
    poll.register(file, events)
    poll.poll()


def _hang_up(stream: _socket.socket) -> None:
    with contextlib.suppress(OSError):
        stream.shutdown(_socket.SHUT_RDWR)


class _Terminal:
    """The caller's terminal, raw while entered: every key is the container's."""

    def __init__(self, stdin_fd: int, stdout_fd: int) -> None:
        self._fds = (stdin_fd, stdout_fd)
        self._is_tty = os.isatty(stdin_fd)

    def __enter__(self) -> _Terminal:
        if self._is_tty:
            self._saved = termios.tcgetattr(self._fds[0])
            self.make_raw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_tty:
            # In the background, tcsetattr(3) would stop us unless this is blocked.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fds[0], termios.TCSANOW, self._saved)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTTOU])

    def make_raw(self) -> None:
        """Enter raw mode; typed-ahead input stays."""
        with contextlib.suppress(termios.error):
            tty.setraw(self._fds[0], termios.TCSANOW)

    def size(self) -> list[int] | None:
        """Return columns and rows of the window, or None where there is none."""
        for fd in self._fds:
            with contextlib.suppress(OSError):
                size = os.get_terminal_size(fd)
                if size.columns and size.lines:
                    return [size.columns, size.lines]
        return None


def main(arguments: Iterable[str]) -> int:
    """Be the stand-in: ``--socket-fd N --id C [--exec E] [--ready-fd M] [--gate-fd G]``, with the stdio as 0, 1 and 2.

    ``--view-fd`` was for who executed this program, and is closed.

    Writes "!" to the ready descriptor when it has announced itself, then "+" once attached, or "-" and the error as
    JSON, and closes it. Returns the exit status of the process, SHIM_DIED when the sandbox was lost, 1 when attaching
    failed.
    """
    options = iter(arguments)
    given = dict(zip(options, options, strict=True))
    ready_fd = int(given.get("--ready-fd", -1))
    if "--view-fd" in given:
        os.close(int(given["--view-fd"]))
    _leave_files()
    with Signals() as signals:
        try:
            control = _socket.socket(fileno=int(given["--socket-fd"]))
            announce(control, given["--id"], given.get("--exec", ""))
            if ready_fd >= 0:
                os.write(ready_fd, b"!")
            attachment = attach(control)
        except AttachError as error:
            _report(ready_fd, b"-" + json.dumps({"error": str(error), "kind": error.kind, "code": error.code}).encode())
            return 1
        if attachment.terminal:
            # Makes the window's changes ours to hear of; refused when it is another session's already.
            with contextlib.suppress(OSError):
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        _report(ready_fd, b"+")
        try:
            return pump(attachment, 0, 1, 2, signals, gate=int(given.get("--gate-fd", -1)))
        except AttachError as error:
            # That the container was removed is news to nobody.
            if error.kind != "NotFound":
                with contextlib.suppress(OSError):
                    os.write(2, f"katapy: {error}\n".encode())
            return error.status if isinstance(error, OutputLost) else SHIM_DIED


def _leave_files() -> None:
    """Have an empty directory as the root of this process, which has loaded all that it needs.

    Engines look for a container's files at the root of its pid (nerdctl cp): the host's must not be there.
    """
    with contextlib.suppress(OSError):
        os.chroot("/proc/self/fdinfo")
        os.chdir("/")


def _report(fd: int, data: bytes) -> None:
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.write(fd, data)
        os.close(fd)


if __name__ == "__main__":
    # Without the interpreter's farewell: a thread may be in read(2) on a stdin that never ends.
    os._exit(main(sys.argv[1:]))
