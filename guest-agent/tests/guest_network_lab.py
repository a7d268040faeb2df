"""A network namespace of its own for a test, with pairs of interfaces; ip(8) makes them and says what there is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from katapy_agent import linux
from katapy_agent.network import Interface, InterfaceAddress


class Pod:
    """What a test sees of its namespace."""

    def ip(self, *arguments: str) -> str:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stderr)
        return done.stdout

    def plug(self, name: str, mac: str) -> bytes:
        """Make a NIC whose other end is up, and return its hardware address."""
        self.ip("link", "add", name, "address", mac, "type", "veth", "peer", "name", f"far-{name}")
        self.ip("link", "set", f"far-{name}", "up")
        return hardware(mac)

    def link(self, name: str) -> dict[str, Any]:
        (found,) = json.loads(self.ip("-j", "-d", "address", "show", "dev", name))
        return dict(found)

    def names(self) -> set[str]:
        """Return the names of the NICs."""
        return {name for _, name in socket.if_nameindex() if name != "lo" and not name.startswith("far-")}

    def addresses(self, name: str) -> list[str]:
        """Return the addresses but for IPv6 link-locals, with what is not usual about them."""
        return [_address(each) for each in self.link(name)["addr_info"] if not each["local"].startswith("fe80:")]

    def routes(self) -> set[str]:
        """Return the routes that are not the kernel's own, as ip(8) writes them."""
        lines = self.ip("-4", "route", "show", "table", "all").splitlines()
        # An IPv4 route says how it leads on in lines of its own; so does one of IPv6.
        lines += self.ip("-6", "route", "show", "table", "all").splitlines()
        joined = "\n".join(lines).replace("\n\t", " | ").splitlines()
        own = ("table local", "fe80::/64", "far-")
        return {_squeezed(each) for each in joined if not any(part in each for part in own)}

    def sysctl(self, name: str) -> str:
        with open(f"/proc/sys/net/{name}", encoding="ascii") as file:  # noqa: PTH123
            return file.read().strip()


def hardware(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def packed(text: str) -> bytes:
    """Return the bytes of an IP address; of nothing none."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) if text else b""


def address(text: str, *, peer: str = "", broadcast: str = "", scope: int = 0, **more: bool) -> InterfaceAddress:
    """Make one of ``address/prefix_length``."""
    local, _, length = text.partition("/")
    return InterfaceAddress(packed(local), int(length), packed(peer), packed(broadcast), scope, **more)


def interface(mac: bytes, *addresses: InterfaceAddress, name: str = "eth0", **more: Any) -> Interface:
    return Interface(mac, name, more.pop("hardware_address", mac), addresses=addresses, **more)


@contextlib.contextmanager
def open_pod() -> Iterator[Pod]:
    """Put this thread, and what it starts, into a new namespace, and back."""
    if shutil.which("ip") is None:
        pytest.skip("no ip(8) here")
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWNET)
        try:
            pod = Pod()
            pod.ip("link", "set", "lo", "up")
            yield pod
        finally:
            linux.setns(before, linux.CLONE_NEWNET)
    finally:
        os.close(before)


def _address(found: dict[str, Any]) -> str:
    words = [found["local"]]
    if "address" in found:
        words.append(f"peer {found['address']}")
    words[-1] += f"/{found['prefixlen']}"
    words += [f"brd {found['broadcast']}"] if "broadcast" in found else []
    words += [] if found["scope"] == "global" else [f"scope {found['scope']}"]
    return " ".join([*words, *(flag for flag in ("nodad", "tentative", "noprefixroute") if found.get(flag))])


def _squeezed(line: str) -> str:
    return " ".join(line.replace(" pref medium", "").split())
