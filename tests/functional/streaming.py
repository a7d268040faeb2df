"""A client of the streaming server that containerd has for Kubernetes: exec, attach and port-forward over WebSocket.

A message is the number of a channel, one byte, and data (k8s.io/kubelet/pkg/cri/streaming, v4.channel.k8s.io).
"""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from cni import Namespace
from cri import Cri
from harness import DEADLINE
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

# Channels of exec and attach, and of a port-forward.
STDIN, STDOUT, STDERR, STATUS, RESIZE = range(5)
DATA, ERROR = range(2)
_PROTOCOL = Subprotocol("v4.channel.k8s.io")


class Stream:
    """A connection, and what has been received on each of its channels."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.received: defaultdict[int, bytes] = defaultdict(bytes)

    def send(self, channel: int, data: bytes) -> None:
        """Send one message."""
        self._connection.send(bytes([channel]) + data)

    def resize(self, *, rows: int, columns: int) -> None:
        """Set the size of the terminal."""
        self.send(RESIZE, json.dumps({"Width": columns, "Height": rows}).encode())

    def until(self, channel: int, text: bytes) -> None:
        """Receive until there is this text on a channel."""
        while text not in self.received[channel]:
            self._receive()

    def finish(self) -> None:
        """Receive until the server ends the connection."""
        try:
            while True:
                self._receive()
        except ConnectionClosed:
            pass

    def exit_status(self) -> int:
        """Receive until the end and return the exit status of the process."""
        self.finish()
        status = json.loads(self.received[STATUS])
        if status["status"] == "Success":
            return 0
        assert status["reason"] == "NonZeroExitCode", status
        return int(next(each["message"] for each in status["details"]["causes"] if each["reason"] == "ExitCode"))

    def _receive(self) -> None:
        message = self._connection.recv(timeout=DEADLINE)
        assert isinstance(message, bytes)
        self.received[message[0]] += message[1:]


@contextmanager
def open_stream(namespace: Namespace, url: str, query: str = "") -> Iterator[Stream]:
    """Connect to a URL that containerd, in a network namespace, has given."""
    place = urlsplit(url)
    with namespace.entered():
        sock = socket.create_connection((place.hostname, place.port), timeout=DEADLINE)
    target = f"ws://{place.netloc}{place.path}{query}"
    with connect(target, sock=sock, subprotocols=[_PROTOCOL], compression=None, proxy=None) as connection:
        yield Stream(connection)


@contextmanager
def execute(
    cri: Cri, namespace: Namespace, container: str, *command: str, tty: bool = False, stdin: bool = True
) -> Iterator[Stream]:
    """Run a command in a container, as `kubectl exec` does."""
    request = cri.messages.ExecRequest(
        container_id=container, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty
    )
    with open_stream(namespace, cri.call("Exec", request).url) as stream:
        yield stream


@contextmanager
def attach(cri: Cri, namespace: Namespace, container: str) -> Iterator[Stream]:
    """Attach to a container that has an input, as `kubectl attach` does."""
    request = cri.messages.AttachRequest(container_id=container, stdin=True, stdout=True, stderr=True)
    with open_stream(namespace, cri.call("Attach", request).url) as stream:
        yield stream


@contextmanager
def forward(cri: Cri, namespace: Namespace, pod: str, port: int) -> Iterator[Stream]:
    """Connect to a port of a pod, as `kubectl port-forward` does for each connection that it accepts."""
    request = cri.messages.PortForwardRequest(pod_sandbox_id=pod, port=[port])
    with open_stream(namespace, cri.call("PortForward", request).url, f"?port={port}") as stream:
        for channel in (DATA, ERROR):
            # It comes first on both, and in a message of its own.
            said = port.to_bytes(2, "little")
            stream.until(channel, said)
            stream.received[channel] = stream.received[channel].removeprefix(said)
        yield stream
