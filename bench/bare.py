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
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from figures import BenchError

sys.path.append(str(Path(__file__).resolve().parents[1] / "images"))

import initramfs
from programs import say_ready

from katapy.assets import Kernel
from katapy.config import Config
from katapy.devices import Disk
from katapy.hypervisor import VmConfig
from katapy.hypervisor.accel import Acceleration
from katapy.hypervisor.qemu import start_vm
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


_T = TypeVar("_T")


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run ``work`` to its end, or cancel it on Ctrl-C: asyncio does that itself where the default handler is set."""
    previous: Any = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return asyncio.run(work)
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
