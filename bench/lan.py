"""A small network to measure in: a bridge, and namespaces with a leg each on it.

All of it is in network namespaces of its own, the host's end included. Each lives as long as a process that waits for
the end of its input, which comes at the latest when the bench dies: then the kernel removes what is in it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from containers import read_some, started
from figures import BenchError

from katapy import linux

# What RFC 2544 and RFC 5180 have set aside for measuring, so that no host has them in use.
_IPV4: Final = "198.18.0.{}"
_IPV6: Final = "2001:2::{}"
_BRIDGE: Final = "bench0"
_HOST: Final = 1


@contextmanager
def new_namespace() -> Iterator[Path]:
    """Give a new network namespace."""
    with started(["unshare", "--net", "cat"], pipes=True) as process:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        read_some(process)  # by now it is in there
        yield Path(f"/proc/{process.pid}/ns/net")
        process.stdin.close()


@contextmanager
def bridge() -> Iterator[None]:
    """Be in a new namespace that has the bridge, with the first address on it; what is started meanwhile is, too."""
    with new_namespace() as namespace, _entered(namespace):
        _ip("link set lo up", f"link add {_BRIDGE} type bridge", *_up(_BRIDGE, _HOST))
        yield


@contextmanager
def _entered(namespace: Path) -> Iterator[None]:
    previous = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(namespace)
        yield
    finally:
        linux.setns(previous, linux.CLONE_NEWNET)
        os.close(previous)


def _enter(namespace: Path) -> None:
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(fd, linux.CLONE_NEWNET)
    finally:
        os.close(fd)


def address(host: int) -> str:
    """Return the IPv4 address of the one with this number, from 2 on; the network's prefix has 24 bits."""
    return _IPV4.format(host)


def join(namespace: Path, host: int) -> None:
    """Give a namespace an interface on the bridge that we are at, ``eth0``, with this number's addresses."""
    leg, pid = f"leg{host}", namespace.parts[2]
    _ip(f"link add {leg} type veth peer name eth0 netns {pid}")
    plug_in(leg)
    _ip("link set lo up", *_up("eth0", host), within=namespace)


def plug_in(link: str) -> None:
    """Make an interface a port of the bridge that we are at."""
    _ip(f"link set {link} master {_BRIDGE} up")


def _up(link: str, host: int) -> list[str]:
    """Return what sets an interface up. Nobody else has its addresses, so that it need not wait to find out."""
    return [
        f"address add {_IPV4.format(host)}/24 dev {link}",
        f"address add {_IPV6.format(host)}/64 dev {link} nodad",
        f"link set {link} up",
    ]


def _ip(*commands: str, within: Path = Path("/proc/self/ns/net")) -> None:
    argv = ["nsenter", f"--net={within}", "ip", "-batch", "-"]
    done = subprocess.run(argv, input="\n".join(commands), capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"cannot set up a network: {done.stderr.strip()}")
