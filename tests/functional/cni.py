"""What is around a pod's network in the tests: namespaces, CNI plugins called as an engine calls them, stations.

The host of these tests is a network namespace of their own (`own_host`): they change its bridges, addresses and
firewall, and what they leave behind goes with it. A namespace is a file that it is mounted on, as with every engine.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import station
from harness import DEADLINE, Katapy

from katapy import linux

PLUGINS = Path("/usr/lib/cni")
_ETH_P_ALL = 3
_OUTGOING = 4  # PACKET_OUTGOING, linux/if_packet.h
_TIMER = re.compile(r"\S+_timer +\S+ ")  # of a bridge
_CLONE_FS = 0x200
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_SIOCETHTOOL = 0x8946
# ETHTOOL_S…: checksums, scatter and gather, segmentation by the card and by the kernel, and its reversal. A getter's
# number is one less.
_OFFLOADS = (0x17, 0x19, 0x1F, 0x24, 0x2C)


@contextmanager
def own_host() -> Iterator[None]:
    """Be in namespaces of one's own, which are "the host" to all that is started meanwhile: of network and of mounts.

    The second, because a namespace's file is a mount, and whoever else tests here looks for mounts that are left.
    """
    kinds = {"net": linux.CLONE_NEWNET, "mnt": linux.CLONE_NEWNS}
    before = {name: os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in kinds}
    directory = Path.cwd()
    try:
        linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS)
        linux.mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        ip("link set lo up")
        _trust_addresses()
        yield
    finally:
        linux.unshare(_CLONE_FS)  # threads that were started meanwhile share it, and only one's own can be moved
        for name, fd in before.items():
            linux.setns(fd, kinds[name])
            os.close(fd)
        os.chdir(directory)


def _trust_addresses() -> None:
    """Have addresses of IPv6 be usable at once: plugins wait a second for somebody who has them already."""
    Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0")


def ip(arguments: str) -> str:
    """Run ip(8) on the host and return what it prints."""
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Namespace:
    """A network namespace."""

    path: Path

    @classmethod
    @contextmanager
    def made(cls, path: Path) -> Iterator[Self]:
        """Make one, and take it away in the end."""
        path.touch()
        subprocess.run(["unshare", f"--net={path}", "true"], check=True)
        try:
            namespace = cls(path)
            with namespace.entered():
                _trust_addresses()
            yield namespace
        finally:
            subprocess.run(["umount", path], check=True)
            path.unlink()

    def __call__(self, *argv: str | Path, check: bool = True) -> str:
        """Run a command in it and return what it prints."""
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=DEADLINE)
        assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def ip(self, arguments: str) -> str:
        """Run ip(8) in it and return what it prints."""
        return self("ip", *arguments.split())

    def command(self, *argv: str | Path) -> list[str]:
        """Return a command that runs another one in it."""
        return ["nsenter", f"--net={self.path}", *map(str, argv)]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in it; sockets that are made meanwhile stay there."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            linux.setns(fd, linux.CLONE_NEWNET)
            yield
        finally:
            linux.setns(before, linux.CLONE_NEWNET)
            os.close(fd)
            os.close(before)

    def links(self) -> list[str]:
        """Return the names of its interfaces."""
        return [each["ifname"] for each in json.loads(self.ip("-json link"))]

    def look(self) -> list[str]:
        """Return all that the kernel tells of its network."""
        with self.entered():
            return look()

    def counters(self) -> dict[str, list[str]]:
        """Return the counters of what its interfaces have sent and received."""
        lines = self("cat", "/proc/net/dev").splitlines()[2:]
        return {line.split(":")[0].strip(): line.split(":")[1].split() for line in lines}


def look() -> list[str]:
    """Return all that the kernel tells of the host's network, once no address is tentative any more."""
    deadline = time.monotonic() + DEADLINE
    while "tentative" in ip("addr"):
        assert time.monotonic() < deadline
    commands = ["ip -details link", "ip addr", "ip route show table all", "ip -6 route show table all", "tc qdisc"]
    for each in json.loads(ip("-json link")):
        commands += [f"tc filter show dev {each['ifname']} {place}" for place in ("root", "ingress")]
    found = []
    for each in commands:
        # A place for filters that is not there is an error, and none.
        told = subprocess.run(each.split(), capture_output=True, text=True).stdout
        found += [f"{each}: {_TIMER.sub('', line).rstrip()}" for line in told.splitlines()]
    return found


def firewall() -> str:
    """Return the host's rules of packet filters and translation, without counters and dates."""
    rules = "".join(subprocess.check_output([each], text=True) for each in ("iptables-save", "ip6tables-save"))
    return "".join(line for line in rules.splitlines(keepends=True) if not line.startswith((":", "#")))


def count_received(interface: str) -> int:
    """Return how many packets an interface of the host has received."""
    (found,) = json.loads(ip(f"-json -statistics link show dev {interface}"))
    return int(found["stats64"]["rx"]["packets"])


def set_offloads(interface: str, on: bool) -> None:
    """Switch all that a network card can do for the kernel on or off, in the namespace that this thread is in."""
    for command in _OFFLOADS:
        _ethtool(interface, command, on)
        assert _ethtool(interface, command - 1, False) == on, f"{interface}: {command:#x} stays {not on}"


def _ethtool(interface: str, command: int, value: bool) -> bool:
    """Do an ETHTOOL_S… or ETHTOOL_G… with a struct ethtool_value."""
    given = array.array("I", [command, value])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", interface.encode(), given.buffer_info()[0]))
    return bool(given[1])


@dataclass
class Network:
    """A list of CNI plugins, which are called one after the other as libcni does (CNI specification 1.0, section 3)."""

    name: str
    plugins: Sequence[Mapping[str, Any]]
    results: dict[tuple[Path, str], dict[str, Any]] = field(default_factory=dict)

    def add(self, namespace: Namespace, interface: str = "eth0", **capabilities: Any) -> dict[str, Any]:
        """Give a namespace an interface of this network and return the result. Capabilities are of the runtime's."""
        result: dict[str, Any] | None = None
        for plugin in self.plugins:
            result = self._call("ADD", plugin, namespace, interface, capabilities, result)
        assert result is not None
        self.results[namespace.path, interface] = result
        return result

    def delete(self, namespace: Namespace, interface: str = "eth0", **capabilities: Any) -> None:
        """Take it away again."""
        result = self.results.pop((namespace.path, interface))
        for plugin in reversed(self.plugins):
            self._call("DEL", plugin, namespace, interface, capabilities, result)

    def _call(
        self,
        command: str,
        plugin: Mapping[str, Any],
        namespace: Namespace,
        interface: str,
        capabilities: Mapping[str, Any],
        result: Mapping[str, Any] | None,
    ) -> dict[str, Any] | None:
        config = {"cniVersion": "1.0.0", "name": self.name, **plugin}
        wanted = {name: capabilities[name] for name in plugin.get("capabilities", {}) if name in capabilities}
        if wanted:
            config["runtimeConfig"] = wanted
        if result is not None:
            config["prevResult"] = result
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": namespace.path.name,
            "CNI_NETNS": str(namespace.path),
            "CNI_IFNAME": interface,
            "CNI_PATH": str(PLUGINS),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        done = subprocess.run(
            [PLUGINS / plugin["type"]],
            input=json.dumps(config),
            env=env,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, f"{plugin['type']} {command}: {done.stdout}{done.stderr}"
        return dict(json.loads(done.stdout)) if done.stdout else None


def addresses_of(result: Mapping[str, Any]) -> list[str]:
    """Return the IP addresses that plugins have given, without prefixes."""
    return [each["address"].partition("/")[0] for each in result["ips"]]


class Station:
    """A process that runs `station.py`."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.process, self.name = process, name
        self._read = b""
        assert self._next() == [True, "ready"]

    @classmethod
    @contextmanager
    def here(cls, name: str, namespace: Namespace | None = None) -> Iterator[Self]:
        """Run one on the host, or in a namespace of it."""
        argv: list[str] = [sys.executable, station.__file__]
        if namespace is not None:
            argv = namespace.command(*argv)
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as process:
            try:
                yield cls(process, name)
            finally:
                process.kill()

    @classmethod
    @contextmanager
    def in_vm(cls, katapy: Katapy, bundle: Path, name: str) -> Iterator[Self]:
        """Run one as the container of a pod, in the foreground; afterwards it must have ended well."""
        pipe = subprocess.PIPE
        with katapy.start("run", "--bundle", bundle, name, stdin=pipe, stdout=pipe, bufsize=0) as process:
            try:
                yield cls(process, name)
                assert process.stdin is not None
                process.stdin.close()
                assert process.wait(DEADLINE) == 0
            except BaseException:
                katapy("delete", "--force", name)
                process.kill()
                raise

    def __call__(self, name: str, *arguments: Any, **keywords: Any) -> Any:
        """Give an order and return the answer; an order that fails is a failed assertion."""
        done, answer = self.attempt(name, *arguments, **keywords)
        assert done, f"{self.name}: {name} {arguments}: {answer}"
        return answer

    def attempt(self, name: str, *arguments: Any, **keywords: Any) -> tuple[bool, Any]:
        """Give an order and return whether it could be done, and the answer, or why not."""
        assert self.process.stdin is not None
        data = json.dumps([name, arguments, keywords]).encode() + b"\n"
        while data:
            data = data[self.process.stdin.write(data) :]
        done, answer = self._next()
        return bool(done), answer

    def sh(self, script: str) -> str:
        """Run a script that must succeed and return what it prints."""
        status, output = self("sh", script)
        assert status == 0, f"{self.name}: {script}: status {status}: {output}"
        return str(output)

    def _next(self) -> Any:
        assert self.process.stdout is not None
        deadline = time.monotonic() + DEADLINE
        while b"\n" not in self._read:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.process.stdout], [], [], left)[0], f"{self.name} does not answer"
            data = self.process.stdout.read(1 << 16)
            assert data, f"{self.name} has ended"
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)


class Capture:
    """What comes in at an interface of the host from where it leads to, frame by frame."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self._socket.bind((interface, _ETH_P_ALL))
        self._socket.settimeout(DEADLINE)
        self.frames: list[bytes] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def until(self, marker: bytes) -> list[bytes]:
        """Wait for a frame that has ``marker`` in it, and return all that have come since the capture began."""
        while not any(marker in frame for frame in self.frames):
            frame, (_, _, kind, *_) = self._socket.recvfrom(1 << 16)
            if kind != _OUTGOING:
                self.frames.append(frame)
        return self.frames
