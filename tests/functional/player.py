"""Plays an engine's side of the shim v2 protocol, for engines that Debian does not have: CRI-O and containerd 2.3.

What is played is what those engines do: which program is started where with which arguments, environment and standard
input; what is taken for its answer; one connection with many calls under way; fifos; a service that takes events. The
shim and the VM behind it are real.
Source: containerd 2.3, core/runtime/v2 and pkg/shim; CRI-O 1.35, internal/oci/runtime_vm.go; ttrpc, PROTOCOL.md.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from harness import DEADLINE, KATAPY

from katapy.proto import events_pb2
from katapy.proto.ttrpc_pb2 import Request, Response

SHIM = KATAPY.with_name("containerd-shim-katapy-v2")
TASK_V2 = "containerd.task.v2.Task"
TASK_V3 = "containerd.task.v3.Task"
# google.rpc.Code, as far as engines go on by it.
NOT_FOUND, FAILED_PRECONDITION = 5, 9
# How long State may take; engines ask all the time, and give it two seconds. A machine may stall for longer.
STATE_SECONDS = 15.0
# What a pod's network is to engines: the work of a CNI plugin.
ADDRESS = "10.85.0.7"
_POD = [
    "link set lo up",
    "link add eth0 type veth peer name pod0 netns {host}",
    f"address add {ADDRESS}/24 dev eth0",
    "link set eth0 up",
]
_HOST = ["address add 10.85.0.1/24 dev pod0", "link set pod0 up"]
_HEADER = struct.Struct(">IIBB")
_REQUEST, _RESPONSE = 1, 2

M = TypeVar("M", bound=Message)


class Refused(Exception):
    """What the other side answered instead of a response."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Closed(Exception):
    """The connection has ended: to an engine, that its task is no more."""


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _frame(sock: socket.socket) -> tuple[int, int, bytes]:
    """Read a frame: its stream, its type and its message. Flags are 0 in unary calls."""
    length, stream, kind, flags = _HEADER.unpack(_exactly(sock, _HEADER.size))
    assert flags == 0
    return stream, kind, _exactly(sock, length)


class Connection:
    """A ttrpc client as Go's: calls are under way side by side, and answered in any order."""

    def __init__(self, address: str, service: str) -> None:
        self._service = service
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(address.removeprefix("unix://"))
        self._stream, self._sending = -1, threading.Lock()
        self._waiting: dict[int, Future[Response]] = {}
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def begin(self, method: str, request: Message, seconds: float = 0) -> Future[Response]:
        """Send a call and return its answer to come; ``seconds`` is the deadline that the other side is told."""
        envelope = Request(
            service=self._service, method=method, payload=request.SerializeToString(), timeout_nano=int(seconds * 1e9)
        )
        data, answer = envelope.SerializeToString(), Future[Response]()
        with self._sending:
            self._stream += 2
            self._waiting[self._stream] = answer
            # Read by the thread, or ended below.
            with contextlib.suppress(OSError):
                self._socket.sendall(_HEADER.pack(len(data), self._stream, _REQUEST, 0) + data)
        if self._closed.is_set():
            self._end()
        return answer

    def call(self, method: str, request: Message, response: type[M], seconds: float = DEADLINE) -> M:
        """Make a call. Raises Refused, Closed, TimeoutError."""
        return self.take(self.begin(method, request, seconds), response, seconds)

    @staticmethod
    def take(answer: Future[Response], response: type[M], seconds: float = DEADLINE) -> M:
        """Wait for the answer to a call. Raises as ``call``."""
        said = answer.result(seconds)
        if said.status.code:
            raise Refused(said.status.code, said.status.message)
        return response.FromString(said.payload)

    def wait_closed(self) -> bool:
        """Wait until the other side has closed the connection."""
        return self._closed.wait(DEADLINE)

    def close(self) -> None:
        """Close it; what is under way ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(DEADLINE)
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                stream, kind, data = _frame(self._socket)
                assert kind == _RESPONSE
                self._waiting.pop(stream).set_result(Response.FromString(data))
        self._closed.set()
        self._end()

    def _end(self) -> None:
        with self._sending:
            left, self._waiting = self._waiting, {}
        for answer in left.values():
            answer.set_exception(Closed())


class Events:
    """The engine's service for events: it notes what it is told, by topic, with the event's type and bytes."""

    def __init__(self, path: Path) -> None:
        self.seen: list[events_pb2.Envelope] = []
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen()
        self._news = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def topics(self, container: str) -> list[str]:
        """Return the topics of what was told of a container."""
        return [each.topic.removeprefix("/tasks/") for each in self.seen if container.encode() in each.event.value]

    def find(self, topic: str, event: type[M], **fields: Any) -> M:
        """Wait for an event with these fields and return it."""
        found: list[M] = []

        def came() -> bool:
            found[:] = [
                told
                for each in self.seen
                if each.topic == f"/tasks/{topic}"
                for told in [event.FromString(each.event.value)]
                if all(getattr(told, name) == value for name, value in fields.items())
            ]
            return bool(found)

        with self._news:
            assert self._news.wait_for(came, DEADLINE), f"{topic} {fields} did not come: {self.seen}"
        return found[0]

    def close(self) -> None:
        """Listen no more."""
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=[sock], daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, EOFError):
            while True:
                stream, _, data = _frame(sock)
                request = Request.FromString(data)
                assert (request.service, request.method) == ("containerd.services.events.ttrpc.v1.Events", "Forward")
                with self._news:
                    self.seen.append(events_pb2.ForwardRequest.FromString(request.payload).envelope)
                    self._news.notify_all()
                answer = Response(payload=Empty().SerializeToString()).SerializeToString()
                sock.sendall(_HEADER.pack(len(answer), stream, _RESPONSE, 0) + answer)


class Streams:
    """Fifos of a process, each served by a thread that opens it as engines do: it waits for the other end."""

    def __init__(self, directory: Path, *, stdin: bytes | None = None, terminal: bool = False) -> None:
        """Make them in ``directory``; ``stdin`` is written, and not closed before ``close_stdin``."""
        self._directory, self._terminal, self._stdin = directory, terminal, stdin
        self._output: dict[str, bytes] = {}
        self._news = threading.Condition()
        self._writer = -1
        directory.mkdir(parents=True)
        self._threads = []
        for name in self._names():
            os.mkfifo(directory / name, 0o700)
            target = self._write if name == "stdin" else self._read
            self._threads.append(threading.Thread(target=target, args=[name], daemon=True))
            self._threads[-1].start()

    def _names(self) -> list[str]:
        outputs = ["stdout"] if self._terminal else ["stdout", "stderr"]
        return outputs if self._stdin is None else ["stdin", *outputs]

    @property
    def fields(self) -> Mapping[str, Any]:
        """What Create and Exec say of them."""
        return {"terminal": self._terminal, **{name: str(self._directory / name) for name in self._names()}}

    def type(self, data: bytes) -> None:
        """Write some more to standard input."""
        with self._news:
            assert self._news.wait_for(lambda: self._writer >= 0, DEADLINE)
        os.write(self._writer, data)

    def close_stdin(self) -> None:
        """Close this end; the shim has its own, and hears of it by CloseIO."""
        with self._news:
            assert self._news.wait_for(lambda: self._writer >= 0, DEADLINE)
        os.close(self._writer)
        self._writer = -1

    def expect(self, text: bytes) -> None:
        """Wait until ``text`` was in the output."""
        with self._news:
            assert self._news.wait_for(lambda: text in self._output.get("stdout", b""), DEADLINE), self._output

    def end(self) -> tuple[str, str]:
        """Wait until nobody writes any more, remove the fifos and return what came."""
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive(), f"{self._directory} has no end"
        for name in self._names():
            (self._directory / name).unlink()
        return self._output.get("stdout", b"").decode(), self._output.get("stderr", b"").decode()

    def _read(self, name: str) -> None:
        # A process that never came to be opens no other end: this waits on, and a signal that the test process gets
        # has the kernel look the name up anew, which is removed by then.
        with contextlib.suppress(FileNotFoundError), (self._directory / name).open("rb", buffering=0) as file:
            while data := file.read(65536):
                with self._news:
                    self._output[name] = self._output.get(name, b"") + data
                    self._news.notify_all()

    def _write(self, name: str) -> None:
        try:
            fd = os.open(self._directory / name, os.O_WRONLY)
        except FileNotFoundError:
            return
        assert self._stdin is not None
        view = memoryview(self._stdin)
        while view:
            view = view[os.write(fd, view) :]
        with self._news:
            self._writer = fd
            self._news.notify_all()


@dataclass
class Program:
    """How an engine calls the shim's program; ``address`` and ``publisher`` are the engine's own."""

    namespace: str
    address: str
    publisher: str
    env: Mapping[str, str]
    debug: bool = False
    log: bytes = b""
    connections: list[Connection] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def flags(self, container: str) -> list[str]:
        """Return the flags that each call has."""
        named = ["-namespace", self.namespace, "-address", self.address, "-publish-binary", self.publisher]
        return [*named, "-id", container]

    def run(
        self, *args: str, cwd: Path, stdin: bytes = b"", seconds: float = DEADLINE
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end, which is when nobody has its output open any more; both outputs are one."""
        return subprocess.run(
            [SHIM, *args],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(self.env),
            timeout=seconds,
        )

    def start(self, container: str, bundle: Path, stdin: bytes = b"") -> str:
        """Start the shim of a container, and take all that is printed for its address. Raises Refused."""
        os.mkfifo(bundle / "log", 0o700)
        log = os.open(bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
        threading.Thread(target=self._drain, args=[log], daemon=True).start()
        self.started.append(container)
        debug = ["-debug"] if self.debug else []
        done = self.run(*self.flags(container), *debug, "start", cwd=bundle, stdin=stdin)
        if done.returncode:
            raise Refused(done.returncode, done.stdout.decode())
        return done.stdout.decode().strip()

    def connect(self, address: str, service: str = TASK_V2) -> Connection:
        """Connect to what ``start`` has printed."""
        self.connections.append(Connection(address, service))
        return self.connections[-1]

    def await_log(self, text: bytes) -> None:
        """Wait until the shim has logged ``text``."""
        with self._news:
            assert self._news.wait_for(lambda: text in self.log, DEADLINE), self.log

    def close(self) -> None:
        """Close all connections."""
        for connection in self.connections:
            connection.close()

    def _drain(self, fd: int) -> None:
        """Take the shim's log into this engine's, until it has no writer any more."""
        ready = select.poll()
        ready.register(fd, select.POLLIN)
        while ready.poll(DEADLINE * 1000) and (data := os.read(fd, 65536)):
            with self._news:
                self.log += data
                self._news.notify_all()
        os.close(fd)


@contextlib.contextmanager
def namespaces(directory: Path, *kinds: str) -> Iterator[dict[str, Path]]:
    """Have namespaces of these kinds (ipc, uts), kept by files as CRI-O's are, and two of networks that are connected.

    ``net`` is a pod's, where ``eth0`` has ADDRESS, and ``host`` stands for the host's.
    """
    paths = {kind: directory / f"{kind}ns" for kind in ("net", "host", *kinds)}
    try:
        for kind, path in paths.items():
            path.touch()
            subprocess.run(["unshare", f"--{'net' if kind == 'host' else kind}={path}", "true"], check=True)
        for commands, kind in ((_POD, "net"), (_HOST, "host")):
            for command in commands:
                argv = ["nsenter", f"--net={paths[kind]}", "--", "ip", *command.format(host=paths["host"]).split()]
                subprocess.run(argv, check=True)
        yield paths
    finally:
        for path in paths.values():
            subprocess.run(["umount", path], check=False)
