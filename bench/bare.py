"""The floor: a VM of the same QEMU, kernel, size and options as katapy's, with nothing of katapy in it.

Its root is an erofs of the same busybox as the containers have. A kernel of modules (Debian's) boots with katapy's own
initramfs, which loads them; to its first process it boots without any.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from figures import BenchError

sys.path.append(str(Path(__file__).resolve().parents[1] / "images"))

import initramfs
from programs import say_ready

from katapy.assets.guest import Kernel
from katapy.config import Config
from katapy.devices import Disk, Nic
from katapy.hypervisor import VmConfig
from katapy.hypervisor.accel import Acceleration
from katapy.hypervisor.qemu import start_vm
from katapy.network.pod import QUEUES_MAX
from katapy.network.tap import open_tap, open_vhost
from katapy.storage.virtiofs import find_virtiofsd, start_virtiofsd

_TAG: Final = "bench"
_DEADLINE: Final = 600.0
# What the guest prints goes to the share: a serial port is slow.
_INIT: Final = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t tmpfs tmpfs /tmp
$b mount -t virtiofs {_TAG} /work
cd /work
$b sh /work/workload.sh > /work/output 2>&1
$b poweroff -f
"""
_HARDWARE_ADDRESS: Final = "02:00:00:00:00:01"
# It can be plugged into once this has said that it is ready.
_SERVING_INIT: Final = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t tmpfs tmpfs /tmp
[ -c /dev/ttyS1 ] || $b mount -t devtmpfs devtmpfs /dev
echo ready > /dev/ttyS1
until $b ip link set eth0 up 2>/dev/null; do $b sleep 0.1; done
$b ip address add {address} dev eth0
export PATH=/bin:/usr/bin
{commands}
"""


_T = TypeVar("_T")


def _run(work: Coroutine[Any, Any, _T], run: Callable[[Coroutine[Any, Any, _T]], _T] = asyncio.run) -> _T:
    """Run ``work`` to its end, or cancel it on Ctrl-C: asyncio does that itself where the default handler is set."""
    previous: Any = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run(work)
    except KeyboardInterrupt:
        previous = signal.SIG_IGN  # what is cleaned up now must not be cut short
        raise
    finally:
        signal.signal(signal.SIGINT, previous)


class BareVm:
    """Starts such VMs; ``directory`` is for their files, ``rootfs`` the containers' root file system."""

    def __init__(
        self, config: Config, kernel: Kernel, acceleration: Acceleration, directory: Path, rootfs: Path
    ) -> None:
        self._config = config
        self._directory = directory
        hypervisor = config.hypervisor
        self._vm = VmConfig(
            qemu=hypervisor.qemu,
            acceleration=acceleration,
            vcpus=hypervisor.vcpus,
            memory_bytes=hypervisor.memory,
            kernel=kernel.kernel,
            initramfs=kernel.initramfs,
            kernel_params=hypervisor.kernel_params,
        )
        self._tiny = self._with_tiny_init()
        self._working = replace(self._vm, devices=(self._make_disk("work", rootfs, _INIT.encode()),))

    def boot(self, idle: Callable[[int], None] = lambda _pid: None) -> float:
        """Boot to the first process and return the seconds from QEMU's start until that one's first byte.

        ``idle`` is called with QEMU's pid while the guest does nothing.
        """
        return _run(self._boot(idle))

    def work(self, share: Path) -> str:
        """Run ``workload.sh`` of the directory ``share``, mounted by virtio-fs, and return what it printed."""
        _run(self._work(share))
        return (share / "output").read_text()

    @contextmanager
    def serving(self, rootfs: Path, address: str, commands: str, *, tap: str) -> Iterator[None]:
        """Run ``commands`` on the root file system ``rootfs`` until the context ends, with a NIC like katapy's: eth0.

        ``address`` is its own, with the prefix; ``tap`` is the name of what is made for it on the host.
        """
        init = _SERVING_INIT.format(address=address, commands=commands).encode()
        config = replace(self._vm, devices=(self._make_disk("serving", rootfs, init),))
        with asyncio.Runner() as runner:
            stack = AsyncExitStack()
            try:
                _run(self._serve(config, tap, stack), runner.run)
                yield
            finally:
                runner.run(stack.aclose())

    async def _serve(self, config: VmConfig, tap: str, stack: AsyncExitStack) -> None:
        console = self._directory / "console.log"
        vm = await stack.enter_async_context(start_vm(config, name="bench", console_path=console))
        await vm.wait_ready(_DEADLINE)
        queues = min(config.vcpus, QUEUES_MAX)
        with ExitStack() as ours:
            taps = open_tap(tap, queues=queues, stack=ours)
            vhosts = open_vhost(queues, ours) if self._config.network.vhost else []
            await vm.plug([Nic(_HARDWARE_ADDRESS, tuple(taps), tuple(vhosts))])

    async def _boot(self, idle: Callable[[int], None]) -> float:
        began = time.monotonic()
        async with start_vm(self._tiny, name="bench", console_path=self._directory / "console.log") as vm:
            await vm.wait_ready(_DEADLINE)
            took = time.monotonic() - began
            idle(vm.process.pid)
            return took

    async def _work(self, share: Path) -> None:
        program = find_virtiofsd(self._config.storage.virtiofsd_paths)
        async with AsyncExitStack() as stack:
            daemon = await stack.enter_async_context(start_virtiofsd(program, share, self._directory, _TAG))
            config = replace(self._working, devices=(*self._working.devices, daemon.device))
            console = self._directory / "console.log"
            vm = await stack.enter_async_context(start_vm(config, name="bench", console_path=console))
            try:
                async with asyncio.timeout(_DEADLINE):
                    await vm.process.wait()
            except TimeoutError as error:
                raise BenchError(f"the bare VM does not end; its console: {vm.console.tail(10)}") from error
            if not (share / "output").exists():
                raise BenchError(f"the bare VM has not run its work; its console: {vm.console.tail(10)}")

    def _with_tiny_init(self) -> VmConfig:
        if self._vm.initramfs is None:
            return replace(self._vm, devices=(self._make_disk("tiny", None, say_ready()),))
        archive = self._directory / "tiny.cpio"
        archive.write_bytes(initramfs.newc([initramfs.Entry("init", 0o100755, say_ready())]))
        return replace(self._vm, initramfs=archive)

    def _make_disk(self, name: str, rootfs: Path | None, init: bytes) -> Disk:
        """Make an erofs of ``rootfs``, if any, with this program as its first process."""
        tree, image = self._directory / name, self._directory / f"{name}.erofs"
        for directory in ("dev", "sbin"):
            (tree / directory).mkdir(parents=True)
        if rootfs is not None:
            shutil.copytree(rootfs, tree, symlinks=True, dirs_exist_ok=True, ignore=lambda _path, _names: {"init"})
        (tree / "sbin/init").write_bytes(init)
        (tree / "sbin/init").chmod(0o755)
        subprocess.run(["mkfs.erofs", "--quiet", "-x-1", "--all-root", image, tree], check=True, capture_output=True)
        return Disk(image, name)
