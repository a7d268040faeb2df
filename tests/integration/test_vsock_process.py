"""The userspace vsock device as a process: what it may do, and how its end is noticed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from katapy.devices import UserVsock
from katapy.errors import InvalidArgument, Timeout, Unavailable
from katapy.transport.vsock import Vsock, VsockKind, start_vsock

pytestmark = pytest.mark.root

SET_OWNER = struct.pack("<III", 3, 1, 0)
GET_FEATURES = struct.pack("<III", 1, 1, 0)


def qemu_end(vsock: Vsock) -> socket.socket:
    assert isinstance(vsock.device, UserVsock)
    return socket.socket(fileno=os.dup(vsock.device.socket_fd))


def pid_of(vsock: Vsock) -> int:
    assert vsock.process is not None
    return vsock.process.pid


async def serving(vsock: Vsock) -> dict[str, str]:
    """Wait until the process serves, return its /proc/pid/status."""
    with qemu_end(vsock) as qemu:
        qemu.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(qemu, SET_OWNER + GET_FEATURES)
        await loop.sock_recv(qemu, 100)
    status = Path(f"/proc/{pid_of(vsock)}/status").read_text()
    return dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)


async def test_it_has_no_privileges_and_is_small() -> None:
    async with start_vsock(VsockKind.USER) as first, start_vsock(VsockKind.USER) as second:
        statuses = await serving(first), await serving(second)
        for status in statuses:
            assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapInh"], 16) == 0
            assert (status["NoNewPrivs"], status["Groups"].strip()) == ("1", "")
            assert len(set(status["Uid"].split())) == 1
            assert int(status["VmRSS"].split()[0]) < 16 * 1024
        assert statuses[0]["Uid"] != statuses[1]["Uid"]
        limits = Path(f"/proc/{pid_of(first)}/limits").read_text().splitlines()
        assert {
            line[:26].strip(): line[26:].split()[0] for line in limits if "processes" in line or "core" in line
        } == {
            "Max core file size": "0",
            "Max processes": "0",
        }
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid_of(first)}/fd").iterdir()]
        assert sum(link.startswith("socket:") for link in links) == 3  # QEMU's, the owner's, and stderr
    assert not Path(f"/proc/{pid_of(first)}").exists()


async def test_connecting_has_a_deadline_and_leaves_nothing() -> None:
    async with start_vsock(VsockKind.USER) as vsock:
        await serving(vsock)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Timeout, match="port 1024"):
            await vsock.connect(1024, timeout=0.05)
        assert len(os.listdir("/proc/self/fd")) <= before
        with pytest.raises(InvalidArgument):
            await vsock.connect(1 << 32, timeout=1)


async def test_its_death_fails_waiting_and_later_connections() -> None:
    async with start_vsock(VsockKind.USER) as vsock:
        await serving(vsock)
        waiting = [asyncio.ensure_future(vsock.connect(1024, timeout=30)) for _ in range(3)]
        await asyncio.sleep(0)
        os.kill(pid_of(vsock), signal.SIGKILL)
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, Unavailable)
        with pytest.raises(Unavailable, match="has ended"):
            await vsock.connect(1024, timeout=30)
        assert vsock.process is not None
        assert await vsock.process.wait() == -signal.SIGKILL


async def test_it_ends_when_qemu_leaves() -> None:
    async with start_vsock(VsockKind.USER) as vsock:
        await serving(vsock)
        with qemu_end(vsock) as qemu:
            qemu.shutdown(socket.SHUT_RDWR)
        assert vsock.process is not None
        assert await vsock.process.wait() == 0


async def test_it_ends_with_one_line_when_the_rules_are_broken() -> None:
    """The line went to the shim's log, and whoever had asked for the container was not told."""
    async with start_vsock(VsockKind.USER) as vsock:
        with qemu_end(vsock) as qemu:
            qemu.send(struct.pack("<III", 77, 1, 0))
        assert vsock.process is not None
        assert await vsock.process.wait() == 1
        assert vsock.output is not None
        assert vsock.output.tail(10) == "katapy vsock device: vhost-user request 77 is not supported"
