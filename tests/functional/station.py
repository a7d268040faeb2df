"""What the tests of networks run at each end of one, in a VM or in a namespace of the host: a server that takes orders.

It serves TCP and UDP on ``PORT`` of every address. Orders are lines of JSON on its stdin, a name and arguments; each is
answered by one line on stdout: ``[true, answer]``, or ``[false, why]``. It ends with its stdin. The standard library's
lightest parts only: in an emulated guest every import is felt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

PORT = 7000
_CHUNK = 1 << 18
_PATIENCE = 60.0
# The server's: who has connected may have more to do before the rest follows.
_IDLE = 600.0
_RESEND = 2.0
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 10, 2
_IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_DO = 23, 2


def _exactly(connection: socket.socket, size: int) -> tuple[bytes, str]:
    """Return the last bytes of ``size``, and the hash of all."""
    seen, digest, data = 0, hashlib.sha256(), b""
    while seen < size:
        data = connection.recv(min(_CHUNK, size - seen))
        if not data:
            raise EOFError(f"the connection ended after {seen} of {size} bytes")
        digest.update(data)
        seen += len(data)
    return data, digest.hexdigest()


def _send_random(connection: socket.socket, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0:
        data = os.urandom(min(_CHUNK, size))
        connection.sendall(data)
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def _serve_connection(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError, EOFError):
        connection.settimeout(_IDLE)
        word, _, line = _read_line(connection).partition(" ")
        if word == "say":
            connection.sendall(line[::-1].encode())
        elif word == "put":
            connection.sendall(_exactly(connection, int(line))[1].encode())
        elif word == "get":
            connection.sendall(_send_random(connection, int(line)).encode())


def _read_line(connection: socket.socket) -> str:
    """Return the first line, and leave what follows it where it is."""
    while True:
        seen = connection.recv(128, socket.MSG_PEEK)
        line, found, _ = seen.partition(b"\n")
        if found:
            return connection.recv(len(line) + 1)[:-1].decode()
        if not seen or len(seen) == 128:
            raise EOFError("no line")


def _serve_tcp(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve_connection, args=[connection], daemon=True).start()


def _serve_udp(server: socket.socket) -> None:
    while True:
        data, sender = server.recvfrom(1 << 16)
        with contextlib.suppress(OSError):
            server.sendto(data[::-1], sender)


def serve() -> None:
    """Serve, in threads that end with the process."""
    # Here and on every address that will come, of IPv4, too.
    listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    threading.Thread(target=_serve_tcp, args=[listener], daemon=True).start()
    server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", PORT))
    threading.Thread(target=_serve_udp, args=[server], daemon=True).start()


def _connect(address: str, port: int, patience: float) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=patience)
    connection.settimeout(_PATIENCE)
    return connection


def tcp(address: str, text: str, port: int = PORT, patience: float = _PATIENCE) -> str:
    """Say ``text`` to a station's server, and return what it answers: the same, backwards."""
    answer = b""
    with _connect(address, port, patience) as connection:
        connection.sendall(f"say {text}\n".encode())
        while data := connection.recv(1 << 16):
            answer += data
    return answer.decode()


def udp(address: str, text: str, port: int = PORT, patience: float = _PATIENCE) -> str:
    """Say ``text`` in a datagram, again and again until there is an answer."""
    deadline = time.monotonic() + patience
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.connect((address, port))
        while True:
            client.settimeout(min(_RESEND, patience))
            try:
                client.send(text.encode())
                return client.recv(1 << 16).decode()
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise


def whole(address: str, size: int, patience: float = _PATIENCE) -> str:
    """Have a datagram of ``size`` bytes come back without being fragmented; tell "too big" where it does not go out."""
    deadline = time.monotonic() + patience
    six = ":" in address
    with socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM) as client:
        if six:
            client.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IPV6_PMTUDISC_DO)
        else:
            client.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        client.connect((address, PORT))
        client.settimeout(_RESEND)
        data = os.urandom(size)
        while True:
            try:
                client.send(data)
                return "intact" if client.recv(1 << 16) == data[::-1] else "damaged"
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    return "too big"
                raise


def put(address: str, size: int) -> tuple[bool, float]:
    """Send so many bytes; tell whether they have arrived as they were, and how many seconds it took."""
    with _connect(address, PORT, _PATIENCE) as connection:
        began = time.monotonic()
        connection.sendall(f"put {size}\n".encode())
        digest = _send_random(connection, size)
        return _answer(connection) == digest, time.monotonic() - began


def get(address: str, size: int) -> tuple[bool, float]:
    """Receive so many bytes; tell whether they have arrived as they were, and how many seconds it took."""
    with _connect(address, PORT, _PATIENCE) as connection:
        began = time.monotonic()
        connection.sendall(f"get {size}\n".encode())
        _, digest = _exactly(connection, size)
        took = time.monotonic() - began
        return _answer(connection) == digest, took


def _answer(connection: socket.socket) -> str:
    """Return the hash that the server tells."""
    found = b""
    while len(found) < 64 and (data := connection.recv(64 - len(found))):
        found += data
    return found.decode()


def many(address: str, count: int) -> list[str]:
    """Make ``count`` connections one after the other, each with its own question; return the wrong answers."""
    wrong = []
    for number in range(count):
        text = f"question {number}"
        try:
            answer = tcp(address, text)
        except OSError as error:
            answer = str(error)
        if answer != text[::-1]:
            wrong.append(f"{number}: {answer}")
    return wrong


def raw(interface: str, frames: list[str]) -> int:
    """Send Ethernet frames, given in hexadecimal, as they are; return how many."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        for frame in frames:
            sender.send(bytes.fromhex(frame))
    return len(frames)


def name_server(address: str, names: dict[str, list[str]]) -> None:
    """Serve DNS from now on at an address: A and AAAA of ``names`` (RFC 1035, section 4)."""
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 53))
    threading.Thread(target=_serve_names, args=[server, names], daemon=True).start()


def _serve_names(server: socket.socket, names: dict[str, list[str]]) -> None:
    while True:
        query, sender = server.recvfrom(512)
        place, labels = 12, []
        while length := query[place]:
            labels.append(query[place + 1 : place + 1 + length].decode())
            place += 1 + length
        kind = int.from_bytes(query[place + 1 : place + 3], "big")
        question = query[12 : place + 5]
        known = names.get(".".join(labels).lower())
        family = {1: socket.AF_INET, 28: socket.AF_INET6}.get(kind)
        found = [each for each in known or [] if family == (socket.AF_INET6 if ":" in each else socket.AF_INET)]
        # A response to a query, authoritative; or no such name.
        answer = query[:2] + bytes((0x84, 0 if known else 3)) + bytes((0, 1, 0, len(found), 0, 0, 0, 0)) + question
        for each in found:
            data = socket.inet_pton(socket.AF_INET6 if ":" in each else socket.AF_INET, each)
            answer += b"\xc0\x0c" + query[place + 1 : place + 5] + (60).to_bytes(4, "big")
            answer += len(data).to_bytes(2, "big") + data
        server.sendto(answer, sender)


def sh(script: str) -> tuple[int, str]:
    """Run a script of the shell; return its status and what it has printed."""
    done = subprocess.run(
        ["/bin/busybox", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, done.stdout.decode(errors="replace")


_ORDERS: dict[str, Callable[..., Any]] = {
    each.__name__: each for each in (tcp, udp, whole, put, get, many, raw, name_server, sh)
}


def main() -> None:
    """Serve, and do what is ordered."""
    serve()
    print(json.dumps([True, "ready"]), flush=True)
    for line in sys.stdin:
        name, arguments, keywords = json.loads(line)
        try:
            answer = [True, _ORDERS[name](*arguments, **keywords)]
        except (OSError, EOFError, ValueError) as error:
            answer = [False, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
