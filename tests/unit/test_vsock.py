"""Choosing a vsock device, and claiming a CID from the kernel's.

On hosts with /dev/vhost-vsock, as the lab is, tests/integration/test_vsock_kernel.py has the real one, and
tests/functional/test_stdio.py its streams, which need a guest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from katapy.devices import KernelVsock
from katapy.errors import InvalidArgument, Unavailable
from katapy.transport import vsock
from katapy.transport.vsock import VsockKind, find_kind, start_vsock


@pytest.fixture
def vhost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /dev/vhost-vsock; it does not exist yet."""
    path = tmp_path / "vhost-vsock"
    monkeypatch.setattr(vsock, "_VHOST_VSOCK", str(path))
    return path


def test_auto_takes_the_kernels_where_it_can_be_opened(vhost: Path) -> None:
    assert find_kind("auto") is VsockKind.USER
    vhost.mkdir()  # there, but cannot be opened for writing
    assert find_kind("auto") is VsockKind.USER
    vhost.rmdir()
    vhost.touch()
    assert find_kind("auto") is VsockKind.KERNEL
    assert find_kind("user") is VsockKind.USER


def test_demanding_what_is_missing(vhost: Path) -> None:
    with pytest.raises(Unavailable, match="vhost-vsock: No such file"):
        find_kind("kernel")
    with pytest.raises(InvalidArgument, match="'maybe'"):
        find_kind("maybe")


async def test_kernel_device_claims_a_free_cid(vhost: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vhost.touch()
    tried: list[int] = []

    def ioctl(_fd: int, request: int, data: bytes) -> int:
        assert request == 0x4008AF60
        (cid,) = struct.unpack("=Q", data)
        tried.append(cid)
        if len(tried) < 3:
            raise OSError(errno.EADDRINUSE, "taken")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    async with start_vsock(VsockKind.KERNEL) as device:
        assert isinstance(device.device, KernelVsock)
        assert device.device.cid == tried[-1]
        assert len(set(tried)) == 3
        assert all(3 <= cid < 0xFFFF_FFFF for cid in tried)
        os.fstat(device.device.vhost_fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(device.device.vhost_fd)


@pytest.mark.parametrize("code", [errno.EADDRINUSE, errno.EPERM])
async def test_no_cid_to_be_had(vhost: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    vhost.touch()

    def ioctl(_fd: int, _request: int, _data: bytes) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(Unavailable, match="cannot claim a CID"):
        async with start_vsock(VsockKind.KERNEL):
            pytest.fail("started")
    assert not any(entry.exists() and entry.samefile(vhost) for entry in Path("/proc/self/fd").iterdir())
