"""Which VM a pod's is restored from: the template of its shape, made by whoever is the first to need it.

A template is a VM that was booted without any device of a pod, whose agent has done once all that a container's start
does, and that was stopped then. What a VM's memory and devices depend on is in its key, so that whatever changes on
the host makes another template. ``katapy.templates`` keeps the files.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from katapy import templates
from katapy.config import Config
from katapy.errors import KatapyError, Timeout, Unavailable
from katapy.hypervisor import VmConfig
from katapy.hypervisor.accel import Kind
from katapy.hypervisor.cmdline import Descriptors, build_argv
from katapy.hypervisor.qemu import start_vm
from katapy.hypervisor.snapshot import Snapshot
from katapy.timing import phase

log = logging.getLogger(__name__)

# The agent looks for it on the kernel's command line.
_WARM: Final = "katapy.warm"
_ANY_FDS: Final = Descriptors(qmp=3, console=4, ready=5, ram=6, kernel=7, initramfs=8, disks=(9,))
_CPUINFO: Final = Path("/proc/cpuinfo")


def directory(config: Config) -> Path:
    """Return where templates are kept."""
    return config.runtime.data_dir / templates.DIRECTORY


async def find_snapshot(vm_config: VmConfig, config: Config) -> Snapshot | None:
    """Return what a VM like ``vm_config``, whose devices are the root disk alone, is restored from.

    Makes the template where there is none, or none that is intact. None, with a warning, where that fails.
    """
    try:
        template = await find_or_make(vm_config, config)
        ram, state = template.directory / templates.RAM, template.directory / templates.STATE
        return Snapshot(ram, template.runs(), state, template.content)
    except (KatapyError, OSError) as error:
        log.warning("no template can be had, booting: %s", error)
        return None


async def find_or_make(vm_config: VmConfig, config: Config) -> templates.Template:
    """Return the template for ``vm_config``, whose devices are the root disk alone. Raises KatapyError."""
    vm_config = replace(vm_config, kernel_params=(*vm_config.kernel_params, _WARM))
    place, key = directory(config), template_key(vm_config)
    template = await asyncio.to_thread(_find_intact, place, key)
    if template is None:
        # A maker boots a VM and writes its memory.
        async with _locked(place, key, timeout=2 * config.runtime.boot_timeout):
            # Another pod may have made it meanwhile.
            template = await asyncio.to_thread(_find_intact, place, key)
            if template is None:
                template = await _make(vm_config, config, key)
    return template


def _find_intact(place: Path, key: str) -> templates.Template | None:
    try:
        return templates.find(place, key)
    except KatapyError as error:
        log.warning("%s: making it anew", error)
        templates.discard(place, key)
        return None


async def _make(vm_config: VmConfig, config: Config, key: str) -> templates.Template:
    place = directory(config)
    staging = await asyncio.to_thread(templates.prepare, place, key)
    console = staging / "console.log"
    try:
        with phase("make the template"):
            async with start_vm(vm_config, name=f"template-{key[:12]}", console_path=console) as vm:
                await vm.wait_ready(config.runtime.boot_timeout)
                runs = await vm.save(staging / templates.RAM, staging / templates.STATE)
            console.unlink()
        shape = _shape(vm_config)
        template = await asyncio.to_thread(templates.install, place, key, shape=shape, runs=runs)
    except BaseException:
        templates.abandon(place, key)
        raise
    bounds = {"count": config.hypervisor.templates_max, "size_bytes": config.hypervisor.templates_size}
    for gone in await asyncio.to_thread(lambda: templates.prune(place, **bounds)):
        log.debug("template %s made room", gone[:12])
    return template


def template_key(vm_config: VmConfig) -> str:
    """Return the SHA-256 of all that a saved VM depends on. Raises Unavailable where QEMU is missing."""
    try:
        files = [_file_identity(path) for path in (vm_config.qemu, vm_config.kernel, *_paths(vm_config))]
    except OSError as error:
        raise Unavailable(f"cannot find {error.filename}: {error.strerror}") from error
    facts: dict[str, Any] = {"argv": build_argv(vm_config, _ANY_FDS, name="template"), "files": files}
    if vm_config.acceleration.kind is Kind.KVM:
        # The CPU is the host's own, and so is what its kernel shows of it.
        facts["host"] = [os.uname().release, _cpu()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _paths(vm_config: VmConfig) -> list[Path]:
    initramfs = [vm_config.initramfs] if vm_config.initramfs is not None else []
    return [*initramfs, *(disk.path for disk in vm_config.disks)]


def _file_identity(path: Path) -> list[object]:
    """Return what tells a file from any other that had its name; images and kernels are never written again."""
    status = path.stat()
    return [str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _cpu() -> list[str]:
    """Return what /proc/cpuinfo says of the first processor, but for what changes all the time."""
    lines = _CPUINFO.read_text().split("\n\n", 1)[0].splitlines()
    return [line for line in lines if not line.startswith(("cpu MHz", "bogomips"))]


def _shape(vm_config: VmConfig) -> dict[str, Any]:
    return {
        "vcpus": vm_config.vcpus,
        "memory": vm_config.memory_bytes,
        "accelerator": vm_config.acceleration.kind.value,
        "kernel": vm_config.kernel.parent.name,
        "image": next(disk.path.parent.name for disk in vm_config.disks),
        "kernel_params": list(vm_config.kernel_params[:-1]),
        "qemu": str(vm_config.qemu),
    }


@asynccontextmanager
async def _locked(place: Path, key: str, *, timeout: float) -> AsyncIterator[None]:
    """Be the only one that makes the template ``key``. Raises Unavailable, or Timeout after ``timeout`` seconds."""
    path = place / f"{key}.lock"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                await _flock(fd, timeout)
                # Whoever removes a template removes its lock, which then holds nobody off.
                if path.exists() and os.path.samestat(path.stat(), os.fstat(fd)):
                    yield
                    return
            finally:
                os.close(fd)
    except OSError as error:
        raise Unavailable(f"cannot make a template in {place}: {error.strerror}") from error


async def _flock(fd: int, seconds: float) -> None:
    """Wait for the lock of ``fd``, in a thread that nobody waits for: it cannot be interrupted. Raises Timeout."""
    loop = asyncio.get_running_loop()
    locked: asyncio.Future[None] = loop.create_future()
    own = os.dup(fd)

    def tell() -> None:
        if not locked.done():
            locked.set_result(None)

    def wait() -> None:
        try:
            fcntl.flock(own, fcntl.LOCK_EX)
        finally:
            # The lock is the open file's, of which the caller has a descriptor; without one it ends here.
            os.close(own)
        loop.call_soon_threadsafe(tell)

    threading.Thread(target=wait, name="wait for a template's lock", daemon=True).start()
    try:
        async with asyncio.timeout(seconds):
            await locked
    except TimeoutError as error:
        raise Timeout(f"another has been making this template for {seconds:g} s") from error
