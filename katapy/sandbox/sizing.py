"""How large a VM must be for what the container was promised.

Source: runtime-spec 1.2, config-linux.md, "CPU" and "Memory".
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from katapy.config import Config
from katapy.errors import InvalidArgument
from katapy.hypervisor.cmdline import VCPUS_MAX
from katapy.oci.linux import Resources
from katapy.oci.spec import Spec

_UNIT: Final = 2 << 20  # bytes; a guest's memory is a whole number of huge pages
_DEFAULT_PERIOD: Final = 100_000  # microseconds, the kernel's


class Size(NamedTuple):
    """``vcpus`` of the VM, ``memory_bytes`` of its RAM."""

    vcpus: int
    memory_bytes: int


def vm_size(config: Config, spec: Spec, *, host_cpus: int) -> Size:
    """Return the size of a VM that can hold ``spec``, with no more vCPUs than the host has CPUs to run them.

    A set of CPUs needs all up to its highest: in the guest they have the same numbers. With a memory limit, the
    guest's own overhead comes on top of it, so that a container can use all that it was given; without one, the
    configuration says how large the VM is, all included. A pod's VM is never smaller than that: what is known of its
    containers' limits says nothing of those that have none.
    """
    resources, hypervisor = spec.linux.resources, config.hypervisor
    cpu, memory = (resources.cpu, resources.memory) if resources else (None, None)
    vcpus, total = hypervisor.vcpus, hypervisor.memory
    if cpu and cpu.quota and cpu.quota > 0:
        vcpus = min(-(-cpu.quota // (cpu.period or _DEFAULT_PERIOD)), host_cpus)
    if cpu and cpu.cpus:
        vcpus = max(vcpus, min(_count(cpu.cpus), host_cpus))
    if memory and memory.limit and memory.limit > 0:
        total = memory.limit + hypervisor.overhead_memory
    pod = spec.pod_resources
    if pod.quota > 0:
        vcpus = max(vcpus, min(-(-pod.quota // (pod.period if pod.period > 0 else _DEFAULT_PERIOD)), host_cpus))
    if pod.memory > 0:
        total = max(total, pod.memory + hypervisor.overhead_memory)
    return Size(min(vcpus, VCPUS_MAX), -(-total // _UNIT) * _UNIT)


def check_fits(size: Size, before: Resources, after: Resources) -> None:
    """Raise InvalidArgument where limits are raised above what the VM has, which keeps the size that it began with."""
    has = f"its VM has {size.vcpus} vCPUs and {size.memory_bytes} bytes of memory, and keeps them"
    old, new = before.memory, after.memory
    if new and new.limit and new.limit > size.memory_bytes and not (old and new.limit == old.limit):
        raise InvalidArgument(f"memory limit {new.limit}: {has}")
    was, cpu = before.cpu, after.cpu
    if cpu and cpu.vcpus and cpu.vcpus > size.vcpus and not (was and cpu.vcpus == was.vcpus):
        raise InvalidArgument(f"CPU quota {cpu.quota} of a period of {cpu.period or _DEFAULT_PERIOD}: {has}")
    if cpu and cpu.cpus and _count(cpu.cpus) > size.vcpus and not (was and cpu.cpus == was.cpus):
        raise InvalidArgument(f"CPUs {cpu.cpus[:64]}: {has}, from 0 on")


def _count(cpus: str) -> int:
    """Return how many CPUs there must be for a list of them such as 0-3,8."""
    return 1 + max(int(number) for number in re.split("[,-]", cpus))
