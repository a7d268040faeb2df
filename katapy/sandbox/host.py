"""What the host does for a container beside its VM: its stand-in, its cgroup, its hooks.

The sandbox says when. Source of the order: runtime-spec 1.2, runtime.md, "Lifecycle".
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from katapy.cgroups.layout import Layout, find_layout
from katapy.cgroups.limits import NO_LIMIT, HostLimits
from katapy.cgroups.path import Driver
from katapy.config import Config
from katapy.errors import KatapyError, Timeout
from katapy.hypervisor.accel import Kind, probe, require
from katapy.oci.hooks import Hook
from katapy.oci.linux import Resources
from katapy.oci.pod import MANAGER
from katapy.oci.process import RLIMITS, Rlimit
from katapy.sandbox.container import Container
from katapy.sandbox.hooks import run_hook
from katapy.sandbox.host_cgroup import HostCgroup, boot_limits, pod_limits, run_limits, update_limits
from katapy.sandbox.process import GuestProcess
from katapy.sandbox.sizing import Size
from katapy.state import DEFAULT_ROOT, Status, state_json

log = logging.getLogger(__name__)

# What the guest's kernel lets a process open at most (fs.nr_open); the host's may let it open more.
_FILES_MAX: Final = 1 << 20
# Whoever creates a container has its stand-in ready.
_ANNOUNCE_DEADLINE: Final = 60.0


@dataclass(frozen=True)
class Host:
    """Where a pod was started.

    ``mounts`` is a descriptor of the host's mount namespace, ``driver`` who makes cgroups, ``creator`` the pid of the
    command that made the pod, which may stand for a container without being one of the pod's own processes, ``root``
    the directory of the state directories.
    Made before this process moves into a cgroup of its own: relative paths start where it is now.
    """

    mounts: int
    driver: Driver
    creator: int
    root: Path
    layout: Layout = field(default_factory=find_layout)

    async def prepare(self, container: Container) -> None:
        """Run the hooks that come before the container is made. Raises Unavailable or Timeout."""
        hooks = container.bundle.spec.hooks
        await self.run_hooks(container, "prestart", hooks.prestart)
        await self.run_hooks(container, "createRuntime", hooks.create_runtime)

    async def finish(self, container: Container) -> None:
        """Do what comes after the container was made and before it runs. Raises Unavailable or Timeout."""
        spec = container.bundle.spec
        await self.run_hooks(container, "createContainer", spec.hooks.create_container)
        if container.cgroup is not None:
            if spec.is_sandbox:
                limits = pod_limits(spec.pod_resources, self.layout)
            else:
                limits = run_limits(spec.linux.resources, self.layout)
            await asyncio.to_thread(container.cgroup.update, limits)

    async def update(self, container: Container, before: Resources, after: Resources) -> None:
        """Change the container's limits on the host. Raises KatapyError."""
        if container.cgroup is None:
            return
        limits = update_limits(after, self.layout)
        if before.cpu and before.cpu.quota and not (after.cpu and after.cpu.quota):
            limits = replace(limits, cpu_quota=NO_LIMIT)
        await asyncio.to_thread(container.cgroup.update, limits)

    def tell_oom(self, container: Container) -> None:
        """Leave the file by which podman and CRI-O know that memory ran out: their conmon sees a cgroup of the host."""
        if MANAGER not in container.bundle.spec.annotations:
            return
        # podman 5 looks in the second place.
        for directory in (container.bundle.path, _persist_directory(container.init.host_pid)):
            path = f"{directory}/oom"
            try:
                if directory:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
            except OSError as error:
                log.warning("%s: cannot make %s: %s", container.id, path, error.strerror)

    async def run_hooks(self, container: Container, point: str, hooks: Sequence[Hook]) -> None:
        """Run the hooks of one ``point`` of the container's life; the first failure is raised."""
        for index, hook in enumerate(hooks):
            await self._run_hook(container, f"hooks.{point}[{index}]", hook, state_json(container.record.state))

    async def run_poststop_hooks(self, container: Container) -> None:
        """Run each, whatever becomes of the others; after a create that failed too, to undo what its hooks did."""
        state = {**state_json(container.record.state), "status": Status.STOPPED.value, "pid": 0}
        for index, hook in enumerate(container.bundle.spec.hooks.poststop):
            try:
                await self._run_hook(container, f"hooks.poststop[{index}]", hook, state)
            except KatapyError as error:
                log.warning("%s: %s", container.id, error)

    async def _run_hook(self, container: Container, name: str, hook: Hook, state: Mapping[str, Any]) -> None:
        bundle = container.bundle.path
        await run_hook(name, hook, state=state, mount_namespace=self.mounts, bundle=bundle)

    async def make_pod_cgroup(self, container: Container, size: Size, config: Config) -> HostCgroup:
        """Make the cgroup of the pod, which its first container names, and move this process into it.

        Raises KatapyError where it cannot be made.
        """
        acceleration = require(await probe(), config.hypervisor)
        limits = boot_limits(
            container.bundle.spec,
            vcpus=size.vcpus,
            memory_bytes=size.memory_bytes,
            emulated=acceleration.kind is not Kind.KVM,
            layout=self.layout,
        )
        cgroup = await self._make_cgroup(container, limits, os.getpid())
        if self._stands_alone(container.init):
            await asyncio.to_thread(cgroup.add, container.init.host_pid)
        return cgroup

    async def make_member_cgroup(self, container: Container) -> None:
        """Make the cgroup of a further container: its stand-in is in it, and what it may use is the pod's.

        Raises KatapyError where it cannot be made.
        """
        if self._stands_alone(container.init):
            await self._make_cgroup(container, HostLimits(), container.init.host_pid)

    async def _make_cgroup(self, container: Container, limits: HostLimits, pid: int) -> HostCgroup:
        def make() -> HostCgroup:
            spec, save, name = container.bundle.spec, container.record.cgroup, self._cgroup_name(container)
            return HostCgroup.create(name, spec, limits, driver=self.driver, layout=self.layout, pid=pid, save=save)

        making = asyncio.create_task(asyncio.to_thread(make))
        try:
            container.cgroup = await asyncio.shield(making)
        except asyncio.CancelledError:
            # The thread goes on, and nobody else would know of what it makes.
            with suppress(KatapyError):
                await remove_cgroup(await making)
            raise
        return container.cgroup

    def _cgroup_name(self, container: Container) -> str:
        """Return the name of a cgroup that the configuration does not name: ids are unique below one root only."""
        if str(self.root) == DEFAULT_ROOT:
            return container.id
        return f"{hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]}-{container.id}"

    def _stands_alone(self, process: GuestProcess) -> bool:
        return process.host_pid not in (0, self.creator)


def inherited_limits() -> list[Rlimit]:
    """Return this process's resource limits, which are its caller's: what a container has where it is told nothing."""
    found = []
    for name in RLIMITS:
        if (number := getattr(resource, name, None)) is not None:
            # -1 is no limit.
            soft, hard = (value & (1 << 64) - 1 for value in resource.getrlimit(number))
            most = _FILES_MAX if name == "RLIMIT_NOFILE" else hard
            found.append(Rlimit(name, min(soft, most), min(hard, most)))
    return found


def _persist_directory(pid: int) -> str:
    """Return where the conmon whose child ``pid`` is was told to leave what it notes; empty for none."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        parent = next(line.removeprefix("PPid:").strip() for line in lines if line.startswith("PPid:"))
        arguments = iter(Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0"))
        if b"--persist-dir" in arguments:
            return os.fsdecode(next(arguments))
    return ""


async def await_stand_in(process: GuestProcess) -> None:
    """Wait until it is known which process of the host stands for ``process``, if any shall. Raises Timeout."""
    if process.stdio.names():
        try:
            await asyncio.wait_for(process.announced.wait(), _ANNOUNCE_DEADLINE)
        except TimeoutError as error:
            raise Timeout(f"nobody came for the streams of {process.container_id}") from error


async def remove_cgroup(cgroup: HostCgroup | None) -> None:
    """Remove a cgroup; one that cannot be removed is left behind with a warning."""
    if cgroup is not None:
        try:
            await asyncio.to_thread(cgroup.remove)
        except KatapyError as error:
            log.warning("%s", error)
