"""What Kubernetes streams: exec, attach and port-forward, by containerd's streaming server."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cni import Namespace
from containerd_daemon import Containerd
from cri import EXITED, MISSING, SLEEP, Cri, pod, state
from harness import DEADLINE, await_true
from streaming import DATA, ERROR, STDERR, STDIN, STDOUT, Stream, attach, execute, forward

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
MIB = 1 << 20
CHUNK = 64 << 10
# A web server at 127.0.0.1 only, which sends back what it is sent, and a counter of what comes until its end.
WEB = """
mkdir -p /tmp/www/cgi-bin
printf '#!/bin/sh\\necho\\nexec cat\\n' >/tmp/www/cgi-bin/echo
chmod +x /tmp/www/cgi-bin/echo
nc -ll -p 9000 -e wc -c &
exec httpd -f -p 127.0.0.1:80 -h /tmp/www
"""
READY = "until wget -qO- http://127.0.0.1:{}/{}; do sleep 0.1; done"


@pytest.fixture
def daemon_network(cri_daemon: Containerd) -> Namespace:
    """Where containerd listens for clients."""
    return Namespace(Path("/run/netns") / cri_daemon.network)


@pytest.fixture
def web(cri: Cri, tmp_path: Path) -> Iterator[tuple[str, str, Any]]:
    """A pod, its container, which serves, and the pod's configuration."""
    with pod(cri, tmp_path) as (sandbox, config):
        container = cri.start(sandbox, config, "web", "sh", "-c", WEB)
        assert cri.execute(container, "sh", "-c", READY.format(80, "cgi-bin/echo"))[0] == 0
        yield sandbox, container, config


def request(body: bytes) -> bytes:
    return b"POST /cgi-bin/echo HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def fetch(stream: Stream, body: bytes) -> bytes:
    """Have a body sent back through a forwarded port, and return it."""
    data = request(body)

    def send() -> None:
        for start in range(0, len(data), CHUNK):
            stream.send(DATA, data[start : start + CHUNK])

    sending = threading.Thread(target=send)
    sending.start()
    stream.finish()
    sending.join()
    assert stream.received[ERROR] == b""
    return stream.received[DATA].partition(b"\n\n")[2]


def everything(connection: socket.socket) -> bytes:
    data = bytearray()
    while more := connection.recv(CHUNK):
        data += more
    return bytes(data)


def test_exec(cri: Cri, daemon_network: Namespace, tmp_path: Path) -> None:
    """With input, both outputs, an exit status, and a terminal whose size changes."""
    with pod(cri, tmp_path) as (sandbox, config):
        container = cri.start(sandbox, config, "c1", *SLEEP)
        script = "read line; echo out $line; echo err >&2; exit 3"
        with execute(cri, daemon_network, container, "sh", "-c", script) as stream:
            stream.send(STDIN, b"hello\n")
            assert stream.exit_status() == 3
            assert (stream.received[STDOUT], stream.received[STDERR]) == (b"out hello\n", b"err\n")
        with execute(cri, daemon_network, container, "head", "-c", str(MIB), "/dev/zero", stdin=False) as stream:
            assert stream.exit_status() == 0
            assert stream.received[STDOUT] == bytes(MIB)
        # Not while it reads: a shell that is told just before that would tell nobody.
        script = "trap 'stty size; read line; exit 5' WINCH; tty; while sleep 0.1; do :; done"
        with execute(cri, daemon_network, container, "sh", "-c", script, tty=True) as stream:
            stream.until(STDOUT, b"/dev/pts/")
            stream.resize(rows=33, columns=101)
            stream.until(STDOUT, b"33 101\r\n")
            stream.send(STDIN, b"end\n")
            assert stream.exit_status() == 5
            assert stream.received[STDOUT].endswith(b"end\r\n")


def test_attach(cri: Cri, daemon_network: Namespace, tmp_path: Path) -> None:
    """To the input and output of a container that runs, twice; the log has it all."""
    with pod(cri, tmp_path) as (sandbox, config):
        script = 'while read line; do echo "<$line>"; echo "!$line" >&2; done'
        container = cri.start(sandbox, config, "c1", "sh", "-c", script, stdin=True)
        for word in (b"one", b"two"):
            with attach(cri, daemon_network, container) as stream:
                stream.send(STDIN, word + b"\n")
                stream.until(STDOUT, b"<%b>\n" % word)
                stream.until(STDERR, b"!%b\n" % word)
        await_true(lambda: len((tmp_path / "c1.log").read_text().splitlines()) == 4)
        logged = [line.split(" ", 1)[1] for line in (tmp_path / "c1.log").read_text().splitlines()]
        assert sorted(logged) == ["stderr F !one", "stderr F !two", "stdout F <one>", "stdout F <two>"]


def test_port_forward(cri: Cri, daemon_network: Namespace, web: tuple[str, str, Any]) -> None:
    sandbox, _, config = web
    with forward(cri, daemon_network, sandbox, 80) as stream:
        assert fetch(stream, b"hello") == b"hello"
    body = os.urandom(8 * MIB)
    with forward(cri, daemon_network, sandbox, 80) as stream:
        assert fetch(stream, body) == body
    with ExitStack() as stack:
        streams = [stack.enter_context(forward(cri, daemon_network, sandbox, 80)) for _ in range(20)]
        for number, stream in enumerate(streams):
            stream.send(DATA, request(b"%d" % number))
        for number, stream in enumerate(streams):
            stream.finish()
            assert stream.received[DATA].endswith(b"\n\n%d" % number)
    with forward(cri, daemon_network, sandbox, 9999) as stream:
        stream.finish()
        assert b"port 9999" in stream.received[ERROR]
        assert b"reset by peer" in stream.received[ERROR]
    # Another container's, which came later: the network is the pod's.
    other = cri.start(sandbox, config, "other", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/etc")
    assert cri.execute(other, "sh", "-c", READY.format(8080, "group"))[0] == 0
    with forward(cri, daemon_network, sandbox, 8080) as stream:
        stream.send(DATA, b"GET /group HTTP/1.0\r\n\r\n")
        stream.finish()
        assert b"\r\n\r\nroot:" in stream.received[DATA]


def test_the_loopback_on_the_host(
    cri: Cri, cri_daemon: Containerd, daemon_network: Namespace, web: tuple[str, str, Any]
) -> None:
    """Dialled as engines do; of a shim that is killed nothing is left there, though the pod's namespace outlives it."""
    sandbox, container, _ = web

    def dial(host: str, port: int) -> socket.socket:
        return socket.create_connection((host, port), timeout=DEADLINE)

    with Namespace(cri.namespace(sandbox)).entered():
        for host in ("127.0.0.1", "::1", "localhost"):
            with dial(host, 9000) as connection:
                # The end of what is sent is not the end of what is received.
                connection.sendall(bytes(MIB))
                connection.shutdown(socket.SHUT_WR)
                assert everything(connection) == b"%d\n" % MIB
        with dial("127.0.0.1", 9999) as refused, pytest.raises(ConnectionResetError):
            refused.recv(1)
        with forward(cri, daemon_network, sandbox, 80) as stream, dial("127.0.0.1", 80) as connection:
            connection.sendall(b"GET")
            shim = os.pidfd_open(cri_daemon.shim(sandbox))
            signal.pidfd_send_signal(shim, signal.SIGKILL)
            os.close(shim)
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
            stream.finish()
        for host in ("127.0.0.1", "::1"):
            with pytest.raises(ConnectionRefusedError):
                dial(host, 80)
    # Before containerd 1.7 takes them for ended it asks the shim that has died once more, after a second.
    await_true(lambda: state(cri, container)[0] == EXITED)
    # It is containerd that removes what a killed shim has left, and it tells nobody when it has.
    await_true(lambda: not (cri_daemon.root / sandbox).exists())
