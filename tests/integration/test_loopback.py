"""What connects to the loopback of a pod's network namespace, and where it arrives; on a real kernel."""

from __future__ import annotations

import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from network_lab import WITHOUT_VHOST, Connection, Lab, in_namespace, nothing_left

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

SECONDS = 20.0
# Runs a program where bpf(2) is refused, as in a container of docker's.
WITHOUT_BPF = Path(__file__).with_name("without_bpf.py")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with nothing_left(), ExitStack() as stack:
        lab = Lab(stack)
        lab.ip("link set lo up")
        yield lab


def dial(lab: Lab, address: str, port: int) -> socket.socket:
    """Connect in the pod's namespace, as an engine does."""
    return in_namespace(lab.pod, lambda: socket.create_connection((address, port), timeout=SECONDS))


def serve(lab: Lab, address: str, port: int = 0, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Be a process of the host's that listens in the pod's namespace."""

    def listen() -> socket.socket:
        server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        server.bind((address, port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        server.settimeout(SECONDS)
        return server

    return lab.stack.enter_context(in_namespace(lab.pod, listen))


def arrival(connection: Connection) -> socket.socket:
    """Return a connection that has arrived."""
    ready, _, _ = select.select(connection.pod.loopback, [], [], SECONDS)
    assert ready, "nothing arrives"
    accepted: socket.socket = ready[0].accept()[0]
    return accepted


def taken(connection: Connection) -> tuple[str, int]:
    """Return the place to which a connection was made that has arrived."""
    with arrival(connection) as accepted:
        address, port = accepted.getsockname()[:2]
    return address, port


async def test_every_port_leads_to_the_listener(lab: Lab) -> None:
    connection = await lab.connect()
    for address in ("127.0.0.1", "::1"):
        for port in (1, 80, 8080, 65535):
            with dial(lab, address, port):
                assert taken(connection) == (address, port)


async def test_bytes_go_through(lab: Lab) -> None:
    connection = await lab.connect()
    with dial(lab, "127.0.0.1", 80) as client, arrival(connection) as accepted:
        client.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer")
        assert client.recv(100) == b"answer"


async def test_a_loopback_that_comes_up_later(lab: Lab) -> None:
    """With an address then, of either family."""
    lab.ip("link set lo down")
    connection = await lab.connect()
    lab.ip("link set lo up")
    for address in ("127.0.0.1", "::1"):
        with dial(lab, address, 80):
            assert taken(connection) == (address, 80)


async def test_a_namespace_without_ipv6(lab: Lab) -> None:
    """As docker makes them."""
    in_namespace(lab.pod, lambda: Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1"))
    connection = await lab.connect()
    with dial(lab, "127.0.0.1", 80):
        assert taken(connection) == ("127.0.0.1", 80)


async def test_other_addresses_are_left_alone(lab: Lab) -> None:
    """docker's resolver listens at 127.0.0.11; and an address of the pod's own is not the loopback's."""
    lab.veth("eth0", "p0", "10.1.0.2/24", "2001:db8::2/64")
    connection = await lab.connect()
    for address in ("127.0.0.11", "127.0.0.2", "10.1.0.2", "2001:db8::2"):
        server = serve(lab, address)
        with dial(lab, address, server.getsockname()[1]), server.accept()[0] as accepted:
            assert accepted.getsockname()[0] == address
        with pytest.raises(ConnectionRefusedError):
            dial(lab, address, 1)
    for listener in connection.pod.loopback:
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_udp_is_left_alone(lab: Lab) -> None:
    await lab.connect()
    server = serve(lab, "127.0.0.1", kind=socket.SOCK_DGRAM)
    with in_namespace(lab.pod, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
        client.sendto(b"query", server.getsockname())
        assert server.recv(100) == b"query"


async def test_a_listener_of_the_hosts_waits_until_the_pod_ends(lab: Lab) -> None:
    """One that was there before is not asked while the pod runs; connections that it had go on."""
    server = serve(lab, "127.0.0.1")
    place = server.getsockname()
    with dial(lab, *place) as before, server.accept()[0] as its:
        connection = await lab.connect()
        with dial(lab, *place):
            assert taken(connection) == place
        before.sendall(b"still here")
        assert its.recv(100) == b"still here"
    connection.close()
    with dial(lab, *place), server.accept()[0]:
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_an_owner_that_is_killed(lab: Lab, number: int) -> None:
    """Nobody cleans up: the kernel does."""
    process = lab.owner()
    with dial(lab, "127.0.0.1", 80):
        pass
    process.send_signal(number)
    process.wait()
    for address in ("127.0.0.1", "::1"):
        with pytest.raises(ConnectionRefusedError):
            dial(lab, address, 80)


async def test_a_second_pod_in_the_namespace_changes_nothing(lab: Lab) -> None:
    """Where there is no interface, nothing keeps it out."""
    first, second = await lab.connect(), await lab.connect()
    with dial(lab, "127.0.0.1", 80):
        assert taken(first) == ("127.0.0.1", 80)
    first.close()
    with dial(lab, "127.0.0.1", 80):
        assert taken(second) == ("127.0.0.1", 80)


async def test_it_can_be_left_out(lab: Lab) -> None:
    connection = await lab.connect(WITHOUT_VHOST._replace(loopback=False))
    assert connection.pod.loopback == ()
    with pytest.raises(ConnectionRefusedError):
        dial(lab, "127.0.0.1", 80)


def test_a_host_that_refuses_it_connects_the_pod_all_the_same(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    process = lab.owner(sys.executable, str(WITHOUT_BPF))
    assert "katapy0" in lab.names()
    with pytest.raises(ConnectionRefusedError):
        dial(lab, "127.0.0.1", 80)
    process.kill()
    _, errors = process.communicate()
    reason = "cannot make a BPF map of sockets: operation not permitted"
    assert f"connections to the pod's loopback do not reach its guest: {reason}" in errors
