"""How large a VM must be for what the container was promised.

Source: runtime-spec 1.2, config-linux.md, "CPU" and "Memory".
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from katapy.config import Config
from katapy.hypervisor.cmdline import VCPUS_MAX
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
    configuration says how large the VM is, all included.
    """
    resources, hypervisor = spec.linux.resources, config.hypervisor
    cpu, memory = (resources.cpu, resources.memory) if resources else (None, None)
    vcpus, total = hypervisor.vcpus, hypervisor.memory
    if cpu and cpu.quota and cpu.quota > 0:
        vcpus = min(-(-cpu.quota // (cpu.period or _DEFAULT_PERIOD)), host_cpus)
    if cpu and cpu.cpus:
        highest = max(int(number) for number in re.split("[,-]", cpu.cpus))
        vcpus = max(vcpus, min(highest + 1, host_cpus))
    if memory and memory.limit and memory.limit > 0:
        total = memory.limit + hypervisor.overhead_memory
    return Size(min(vcpus, VCPUS_MAX), -(-total // _UNIT) * _UNIT)
