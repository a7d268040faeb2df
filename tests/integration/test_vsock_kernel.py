"""The kernel's vsock device: addresses are unique on the host, whoever holds them, for as long as anybody does."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katapy.devices import KernelVsock
from katapy.errors import Timeout, Unavailable
from katapy.transport.vsock import VsockKind, start_vsock

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not Path("/dev/vhost-vsock").exists(), reason="this kernel has no vhost-vsock"),
]

# A shim that claims the lowest CID, and its QEMU, which has the descriptor too.
SHIM = """
import asyncio, secrets, subprocess
from katapy.transport import vsock
secrets.randbelow = lambda _limit: 0
async def main():
    async with vsock.start_vsock(vsock.VsockKind.KERNEL) as found:
        qemu = subprocess.Popen(["sleep", "1000"], pass_fds=[found.device.vhost_fd], stdout=subprocess.DEVNULL)
        print(found.device.cid, qemu.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""

Draws = Callable[..., None]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    """Have the CIDs that are tried be those given, and then no more."""

    def make(*cids: int) -> None:
        left = iter(cids)
        monkeypatch.setattr(secrets, "randbelow", lambda _limit: next(left) - 3)

    return make


async def claim() -> int:
    """Return the CID that a device gets."""
    async with start_vsock(VsockKind.KERNEL) as found:
        assert isinstance(found.device, KernelVsock)
        return found.device.cid


@pytest.fixture
def shim() -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A shim in a process of its own, which holds CID 3, and the pid of its QEMU."""
    with subprocess.Popen([sys.executable, "-c", SHIM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        cid, qemu = process.stdout.readline().split()
        assert int(cid) == 3
        pidfd = os.pidfd_open(int(qemu))
        yield process, pidfd
        process.kill()
        if not select.select([pidfd], [], [], 0)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)


async def test_a_cid_of_another_process_is_not_taken(draws: Draws, shim: tuple[subprocess.Popen[bytes], int]) -> None:
    draws(3, 3, 4)
    assert await claim() == 4
    draws(*[3] * 16)
    with pytest.raises(Unavailable, match="16 were taken"):
        await claim()


async def test_a_dead_shims_cid_is_taken_while_its_qemu_lingers(
    draws: Draws, shim: tuple[subprocess.Popen[bytes], int]
) -> None:
    """What is written to a guest must not reach the next one that has its address."""
    process, qemu = shim
    process.kill()
    process.wait()
    draws(3, 4)
    assert await claim() == 4
    signal.pidfd_send_signal(qemu, signal.SIGKILL)
    assert select.select([qemu], [], [], 30)[0]
    draws(3)
    assert await claim() == 3


async def test_many_at_once_have_their_own() -> None:
    claimed = []
    for _ in range(50):
        device = start_vsock(VsockKind.KERNEL)
        claimed.append((device, await device.__aenter__()))
    cids = {found.device.cid for _, found in claimed if isinstance(found.device, KernelVsock)}
    for device, _ in claimed:
        await device.__aexit__(None, None, None)
    assert len(cids) == 50


async def test_connecting_has_a_deadline_and_leaves_nothing() -> None:
    """The kernel itself gives up after 2 s, and is asked again for as long as the caller wants to wait."""
    before = len(os.listdir("/proc/self/fd"))
    async with start_vsock(VsockKind.KERNEL) as found:
        with pytest.raises(Timeout, match=r"port 1024: the guest did not answer in 3 s"):
            await found.connect(1024, timeout=3)
    assert len(os.listdir("/proc/self/fd")) == before
