"""Two network namespaces joined by veths: a pod's, and the wire's, where the test sees what leaves the pod."""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest
from own_children import children

from katapy import linux
from katapy.devices import Nic
from katapy.interfaces import Interface, Network
from katapy.network.netlink import Netlink
from katapy.network.pod import Helper, PodNetwork, Settings, close_nic

DEADLINE: Final = 20.0
VNET_HEADER: Final = bytes(10)
ETH_P_ALL: Final = 3
T = TypeVar("T")
WITHOUT_VHOST: Final = Settings(vhost=False)
ROOT: Final = Path(__file__).parents[2]
# Connects, says so, and waits to be killed.
OWNER: Final = """
import asyncio, logging, os, sys
from katapy.network.pod import Helper, PodNetwork, Settings
logging.basicConfig(level=logging.DEBUG)
async def main():
    network = PodNetwork(os.open(sys.argv[1], os.O_RDONLY), Settings(vhost=False, egress_rate=int(sys.argv[2])))
    await network.connect(Helper())
    print("connected", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


def run(*argv: str) -> str:
    """Run a program and return what it prints."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


def in_namespace(name: str, function: Callable[[], T]) -> T:
    """Call a function in a thread that is in this network namespace."""
    found: list[T] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
            try:
                linux.setns(fd, linux.CLONE_NEWNET)
            finally:
                os.close(fd)
            found.append(function())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


class Lab:
    """The namespaces; everything is gone when ``stack`` is closed."""

    def __init__(self, stack: ExitStack, *, model: str = "tcfilter") -> None:
        self.stack, self.model = stack, model
        self.pod, self.wire = (self.namespace(each) for each in ("pod", "wire"))
        # What arrives from there is the test's.
        run("ip", "netns", "exec", self.wire, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")

    def namespace(self, suffix: str) -> str:
        name = f"katapy-test-{os.getpid()}-{suffix}"
        run("ip", "netns", "add", name)
        self.stack.callback(run, "ip", "netns", "delete", name)

        def quiet() -> None:
            # An address is there at once, and nothing is sent to find out whether another host has it.
            for each in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{each}/accept_dad").write_text("0")

        in_namespace(name, quiet)
        return name

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.pod

    def ip(self, command: str, *, namespace: str | None = None) -> str:
        return run("ip", "-n", namespace or self.pod, *command.split())

    def batch(self, commands: str) -> None:
        """Run many commands of ip(8), one a line."""
        subprocess.run(["ip", "-n", self.pod, "-batch", "-"], input=commands, text=True, check=True)

    def tc(self, command: str) -> str:
        return run("tc", "-n", self.pod, *command.split())

    def veth(
        self, name: str = "eth0", peer: str = "p0", *addresses: str, mac: str = "02:00:00:aa:bb:01", mtu: int = 1500
    ) -> None:
        self.ip(f"link add name {name} mtu {mtu} address {mac} type veth peer name {peer} mtu {mtu} netns {self.wire}")
        for each in addresses:
            self.ip(f"addr add {each} dev {name}")
        self.ip(f"link set dev {name} up")
        self.ip(f"link set dev {peer} up", namespace=self.wire)
        self.until(lambda: self.is_ready(name))

    def is_ready(self, name: str) -> bool:
        """Whether all that the kernel does of itself when an interface is up has been done."""
        shown = self.ip(f"addr show dev {name}")
        return "state UP" in shown and "inet6 fe80:" in shown and "tentative" not in shown

    def link(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.ip(f"-j link show dev {name}"))
        return found[0]

    def names(self) -> set[str]:
        return {each["ifname"] for each in json.loads(self.ip("-j link"))} - {"lo"}

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so in the pod's namespace, looking again whenever its network changes."""

        def watch() -> socket.socket:
            netlink = Netlink()
            try:
                return netlink.watch()
            finally:
                netlink.close()

        with in_namespace(self.pod, watch) as watching:
            end = time.monotonic() + DEADLINE
            while not condition():
                assert select.select([watching], [], [], max(end - time.monotonic(), 0))[0], "nothing more happens"
                watching.recv(1 << 16)

    def capture(self, name: str, namespace: str | None = None) -> socket.socket:
        """Return a socket that gets and sends whole frames at an interface of the wire."""

        def open_socket() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
            sock.bind((name, ETH_P_ALL))
            return sock

        return self.stack.enter_context(in_namespace(namespace or self.wire, open_socket))

    def snapshot(self) -> dict[str, object]:
        """Return all that the pod's namespace is made of; nothing in it counts or ages."""
        links = sorted(self.names() | {"lo"})

        def sysctls() -> dict[str, str]:
            return {
                str(each): each.read_text()
                for family in ("ipv4", "ipv6")
                for kind in ("conf", "neigh")
                for each in Path(f"/proc/sys/net/{family}/{kind}").glob("*/*")
                # Kept secret, or written only.
                if each.name != "stable_secret" and os.access(each, os.R_OK)
            }

        return {
            "links": self.ip("-d link"),
            "addresses": self.ip("addr"),
            "routes": self.ip("-4 route show table all"),
            "routes of IPv6": self.ip("-6 route show table all"),
            "rules": self.ip("rule"),
            "neighbours": self.ip("neigh show nud permanent"),
            "qdiscs": re.sub("direct_packets_stat [0-9]+", "", self.tc("qdisc")),
            "filters": {
                # Where a filter is, is shown one time so and one time so.
                (name, place): re.sub("filter (ingress |parent ffff: )", "filter ", shown)
                for name in links
                for place in ("ingress", "egress", "root")
                for shown in [self.tc(f"filter show dev {name} {place}")]
            },
            "sysctls": in_namespace(self.pod, sysctls),
        }

    def counters(self) -> dict[str, int]:
        """Return how much the pod's own network stack has received."""

        def read() -> dict[str, int]:
            keys, values = (
                line.split()[1:]
                for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
                if line.startswith("Ip:")
            )
            found = {"ipv4": int(dict(zip(keys, values, strict=True))["InReceives"])}
            for line in Path("/proc/thread-self/net/snmp6").read_text().splitlines():
                key, value = line.split()
                if key in ("Ip6InReceives", "Icmp6InMsgs"):
                    found[key] = int(value)
            return found

        return in_namespace(self.pod, read)

    def require_model(self) -> None:
        """Skip the test where the kernel does not have what the model needs."""
        if self.model == "macvtap":
            probe = ["ip", "-n", self.pod, "link", "add", "probe", "link", "eth0", "type", "macvtap"]
            done = subprocess.run(probe, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"this kernel has no macvtap: {done.stderr.strip()}")
            self.ip("link delete probe")

    def owner(self, *wrapper: str, egress_rate: int = 0) -> subprocess.Popen[str]:
        """Start a process that connects the pod, and wait until it has; ``wrapper`` is what it is started by."""
        process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", OWNER, str(self.path), str(egress_rate)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

        def end() -> None:
            process.kill()
            process.communicate()

        self.stack.callback(end)
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        return process

    async def connect(self, settings: Settings = WITHOUT_VHOST) -> Connection:
        """Connect the pod; undone at the end of the test."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            connection = Connection(PodNetwork(fd, settings._replace(model=self.model)))
        finally:
            os.close(fd)
        self.stack.callback(connection.close)
        connection.nics = list(await connection.pod.connect(Helper()))
        return connection


class Connection:
    """A pod's connection, and its descriptors in QEMU's place."""

    def __init__(self, pod: PodNetwork) -> None:
        self.pod = pod
        self.nics: list[Nic] = []

    @property
    def network(self) -> Network:
        return self.pod.network

    def interface(self, name: str = "eth0") -> Interface:
        return next(each for each in self.network.interfaces if each.name == name)

    def tap(self, name: str = "eth0") -> int:
        return next(nic.tap_fds[0] for nic in self.nics if nic.device == self.interface(name).device)

    def vm_ends(self) -> None:
        for nic in self.nics:
            close_nic(nic)
        self.nics = []

    def close(self) -> None:
        self.vm_ends()
        self.pod.close()


def send(tap: int, *frames: bytes) -> None:
    """Send as the guest."""
    for frame in frames:
        assert os.write(tap, VNET_HEADER + frame) == len(VNET_HEADER) + len(frame)


def frames_at(source: int | socket.socket) -> Iterator[bytes]:
    """Give the frames that arrive at a tap or on the wire; fails when none comes for long."""
    fd = source if isinstance(source, int) else source.fileno()
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    end = time.monotonic() + DEADLINE
    while poller.poll(max(end - time.monotonic(), 0) * 1000):
        if isinstance(source, int):
            yield os.read(fd, 1 << 17)[len(VNET_HEADER) :]
        else:
            data, address = source.recvfrom(1 << 17)
            if address[2] != socket.PACKET_OUTGOING:
                yield data
    raise AssertionError("no frame")


def until_frame(source: int | socket.socket, last: bytes) -> list[bytes]:
    """Return what arrives before the frame ``last``."""
    found: list[bytes] = []
    for frame in frames_at(source):
        if frame == last:
            return found
        found.append(frame)
    raise AssertionError


@contextmanager
def nothing_left() -> Iterator[None]:
    """What runs inside leaves no descriptor, no child process, no network namespace and no interface."""

    # A test's end of a veth on the host; those of another run are not ours.
    named = f"katapyt{os.getpid() % 10**7}"

    def state() -> tuple[object, ...]:
        namespaces = [each.name for each in Path("/run/netns").glob(f"katapy-test-{os.getpid()}-*")]
        names = [name for _, name in socket.if_nameindex() if name.startswith("katapy")]
        own = sorted(name for name in names if name == named or not name.startswith("katapyt"))
        return os.listdir("/proc/self/fd"), children(), namespaces, own

    before = state()
    yield
    after = state()
    assert after == before, (before, after)
