"""The cgroup on the host of a container, or of a whole pod: what its configuration means for QEMU and its helpers.

The limits inside of the guest are the agent's. Here the host makes sure of them: a guest that its tenant has taken
over still has no more than the VM's memory, the container's CPU time and its rate of block I/O. ``cgroups`` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from katapy.cgroups import directory
from katapy.cgroups.cgroup import Cgroup, plan_record
from katapy.cgroups.directory import Record
from katapy.cgroups.layout import Layout
from katapy.cgroups.limits import DeviceValue, HostLimits, pod_memory
from katapy.cgroups.path import Driver, parse_cgroups_path
from katapy.oci.linux import Resources, ThrottleDevice
from katapy.oci.pod_resources import PodResources
from katapy.oci.spec import Spec

_DEFAULT_PERIOD: Final = 100_000  # microseconds, the kernel's
# Of one CPU, on top of the container's quota, for QEMU's own work, virtiofsd and the supervisor.
_OVERHEAD_CPU: Final = 0.25
# Threads of QEMU and its helpers: far above what they start, far below what could harm the host.
_THREADS: Final = 1024
# The template's memory, which is the first pod's that maps it privately and not written to; it grows with the VM's.
_TEMPLATE: Final = 64 << 20
_TEMPLATE_SHIFT: Final = 5
# For what has been killed already, in seconds. Engines wait for five for a shim to end.
_PATIENCE: Final = 2.0


def boot_limits(spec: Spec, *, vcpus: int, memory_bytes: int, emulated: bool, layout: Layout) -> HostLimits:
    """Return what holds from the start of a VM of ``vcpus`` and ``memory_bytes``.

    What the host's cgroups cannot limit is left to the guest and to the size of the VM, except for block I/O, which
    is limited nowhere else. CPU time comes later (``run_limits``): a boot that is throttled helps nobody.
    """
    resources = spec.linux.resources
    # What is in a writable layer is memory of the host's.
    layer = 0 if spec.layer is None else spec.layer.size_bytes
    template = _TEMPLATE + (memory_bytes >> _TEMPLATE_SHIFT) if spec.root_disk else 0
    memory = pod_memory(memory_bytes, emulated=emulated) + layer + template
    limits = HostLimits(memory_bytes=memory, pids=_THREADS + vcpus)
    if resources is not None and resources.cpu is not None:
        limits = replace(limits, cpuset_cpus=resources.cpu.cpus, cpuset_mems=resources.cpu.mems)
    return _possible(_with_block_io(limits, resources), layout)


def run_limits(resources: Resources | None, layout: Layout) -> HostLimits:
    """Return what is added when the container is about to run, or is changed by `update`."""
    if resources is None or resources.cpu is None:
        return HostLimits()
    cpu = resources.cpu
    period = cpu.period or (_DEFAULT_PERIOD if cpu.quota else None)
    quota = cpu.quota
    if quota is not None and quota > 0:
        quota += int((period or _DEFAULT_PERIOD) * _OVERHEAD_CPU)
    return _possible(HostLimits(cpu_shares=cpu.shares, cpu_quota=quota, cpu_period=period), layout)


def pod_limits(resources: PodResources, layout: Layout) -> HostLimits:
    """Return what is added for a pod's VM: the weight of its containers, not that of the one which holds the pod.

    Not their quota: it is the sum over those that have one, and the others have none. The cgroup around the pod's own
    is limited by who makes pods, where all of them have one.
    """
    return _possible(HostLimits(cpu_shares=resources.shares if resources.shares > 0 else None), layout)


def update_limits(resources: Resources, layout: Layout) -> HostLimits:
    """Return what `update` changes on the host; the VM's memory is what it is."""
    cpu = resources.cpu
    limits = _with_block_io(run_limits(resources, layout), resources)
    if cpu is not None:
        limits = replace(limits, cpuset_cpus=cpu.cpus, cpuset_mems=cpu.mems)
    return _possible(limits, layout)


def _possible(limits: HostLimits, layout: Layout) -> HostLimits:
    """Return the limits for which the host has a controller that can be used."""
    if not _has(layout, "memory"):
        limits = replace(limits, memory_bytes=None)
    if not _has(layout, "pids"):
        limits = replace(limits, pids=None)
    if not _has(layout, "cpu"):
        limits = replace(limits, cpu_shares=None, cpu_quota=None, cpu_period=None)
    if not _has(layout, "cpuset"):
        limits = replace(limits, cpuset_cpus="", cpuset_mems="")
    return limits


def _has(layout: Layout, controller: str) -> bool:
    hierarchy = layout.find(controller)
    return hierarchy is not None and hierarchy.writable


def _with_block_io(limits: HostLimits, resources: Resources | None) -> HostLimits:
    block_io = None if resources is None else resources.block_io
    if block_io is None:
        return limits
    weights = tuple(DeviceValue(each.major, each.minor, each.weight) for each in block_io.weight_devices)
    return replace(
        limits,
        io_weight=block_io.weight or None,
        io_weight_devices=weights,
        read_bps=_rates(block_io.read_bps),
        write_bps=_rates(block_io.write_bps),
        read_iops=_rates(block_io.read_iops),
        write_iops=_rates(block_io.write_iops),
    )


def _rates(devices: Iterable[ThrottleDevice]) -> tuple[DeviceValue, ...]:
    return tuple(DeviceValue(each.major, each.minor, each.rate) for each in devices)


class HostCgroup:
    """A cgroup with processes in it that must leave it, and not end, when it is removed."""

    def __init__(self, cgroup: Cgroup) -> None:
        self._cgroup = cgroup
        self._guests: list[int] = []

    @classmethod
    def create(
        cls,
        name: str,
        spec: Spec,
        limits: HostLimits,
        *,
        driver: Driver,
        layout: Layout,
        pid: int,
        save: Callable[[Record], None],
    ) -> HostCgroup:
        """Make the cgroup that ``spec`` names, else one called ``name``, and put the process ``pid`` into it.

        ``save`` is told of it before it is made, and again when it is, for whoever must remove it if this process
        cannot. Raises what ``Cgroup.create`` raises.
        """
        path = parse_cgroups_path(spec.linux.cgroups_path, driver, name)
        save(plan_record(layout, path))
        own = cls(Cgroup.create(path, limits, layout=layout, pid=pid))
        own._guests.append(pid)
        save(own._cgroup.record)
        return own

    def add(self, pid: int) -> None:
        """Put one more process in, which will leave it alive. Raises NotFound where it has ended."""
        self._cgroup.add(pid)
        self._guests.append(pid)

    def update(self, limits: HostLimits) -> None:
        """Change limits."""
        if not limits.is_empty:
            self._cgroup.update(limits)

    def oom_kills(self) -> int:
        """Return how many processes the host has killed in it for want of memory."""
        return self._cgroup.oom_kills()

    def remove(self) -> None:
        """Take this process and its stand-ins out, and remove the cgroup, with what has not ended in it.

        Raises Timeout where others stay in one that katapy has not made, or are stuck in the kernel.
        """
        # By now a pid may be that of a process which has never been in it.
        within = directory.processes(self._cgroup.record)
        for pid in self._guests:
            if pid in within:
                self._cgroup.leave(pid)
        directory.reap(self._cgroup.record, patience=_PATIENCE)
