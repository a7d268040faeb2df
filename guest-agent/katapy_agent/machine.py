"""The guest as a machine: its facts, name, clock and entropy. Nothing here knows of containers."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy_agent import __version__
from katapy_agent.errors import InvalidArgument, doing

ENTROPY_MAX: Final = 512
_HOSTNAME_MAX: Final = 64
_RNDADDENTROPY: Final = 0x40085203
_RNDRESEEDCRNG: Final = 0x5207
_IFF_UP: Final = 1
_PID_MAX: Final = Path("/proc/sys/kernel/pid_max")


@dataclass(frozen=True)
class Facts:
    """What the host may want to know of its guest."""

    agent_version: str
    kernel_release: str
    kernel_version: str
    hostname: str
    vcpus: int
    memory_bytes: int
    seccomp: bool
    cgroup_controllers: tuple[str, ...]


def facts() -> Facts:
    """Return the facts as they are now."""
    name = os.uname()
    return Facts(
        agent_version=__version__,
        kernel_release=name.release,
        kernel_version=name.version,
        hostname=name.nodename,
        vcpus=os.sysconf("SC_NPROCESSORS_ONLN"),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        seccomp=Path("/proc/sys/kernel/seccomp").exists(),
        cgroup_controllers=tuple(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()),
    )


def set_hostname(name: str) -> None:
    """Set the host name. Raises KatapyError."""
    if not name.isprintable() or len(name.encode()) > _HOSTNAME_MAX:
        raise InvalidArgument(f"host name must be at most {_HOSTNAME_MAX} printable bytes")
    with doing("set the host name"):
        socket.sethostname(name)


def set_time(nanoseconds: int) -> None:
    """Set the real-time clock, in nanoseconds since the epoch (clock_settime(2)). Raises KatapyError."""
    if nanoseconds < 0:
        raise InvalidArgument(f"no such time: {nanoseconds} ns since the epoch")
    with doing("set the clock"):
        time.clock_settime_ns(time.CLOCK_REALTIME, nanoseconds)


def reseed(data: bytes) -> None:
    """Mix ``data``, credited as full entropy, into the kernel's pool and reseed its generator (random(4)).

    Raises KatapyError.
    """
    if not 0 < len(data) <= ENTROPY_MAX:
        raise InvalidArgument(f"entropy must be 1 to {ENTROPY_MAX} bytes, not {len(data)}")
    with doing("reseed the random generator"), Path("/dev/urandom").open("wb", buffering=0) as device:
        fcntl.ioctl(device, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(device, _RNDRESEEDCRNG)


def raise_pid_max() -> None:
    """Let there be as many processes as this kernel can number: a container's limit is its own. Raises KatapyError.

    A kernel of small tables (CONFIG_BASE_SMALL, as the tuned one) begins with 4096 and refuses the usual maximum.
    """
    with doing("raise kernel.pid_max"):
        try:
            _PID_MAX.write_text("4194304")
        except OSError:
            _PID_MAX.write_text("32768")


def trust_addresses() -> None:
    """Use IPv6 addresses at once: whether anybody else does, the host has asked. Raises KatapyError."""
    path = Path("/proc/sys/net/ipv6/conf/default/accept_dad")
    if path.exists():
        with doing("set net.ipv6.conf.default.accept_dad"):
            path.write_text("0")


def loopback_up() -> None:
    """Bring the loopback interface up (netdevice(7)). Raises KatapyError."""
    with doing("bring loopback up"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as anything:
        fcntl.ioctl(anything, 0x8914, struct.pack("16sh14x", b"lo", _IFF_UP))  # SIOCSIFFLAGS
