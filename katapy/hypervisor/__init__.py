"""Runs virtual machines: what a VM is given (``VmConfig``) and what its owner may do with it (``Vm``).

Owns QEMU, its command line, its control socket and the guest's console. What the devices connect to is made by
``storage`` and ``transport``; what happens inside the guest is the agent's. ``qemu.start_vm`` starts one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from katapy.devices import Device, Disk, Nic
from katapy.hypervisor.accel import Acceleration
from katapy.run import Process


@dataclass(frozen=True)
class VmConfig:
    """All that decides how a VM is started.

    ``kernel_params`` follow the ones that every VM gets; ``devices`` are attached in this order, so that the first
    Disk is the guest's /dev/vda.
    """

    qemu: Path
    acceleration: Acceleration
    vcpus: int
    memory_bytes: int
    kernel: Path
    initramfs: Path | None = None
    kernel_params: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The disks among the devices; all others can be plugged in while the VM runs."""
        return tuple(device for device in self.devices if isinstance(device, Disk))


class GuestConsole(Protocol):
    """What the guest's kernel and early user space print."""

    def tail(self, lines: int) -> str:
        """Return the last lines as printable text; empty if nothing was printed."""


class Vm(Protocol):
    """A running virtual machine."""

    @property
    def process(self) -> Process:
        """The process whose end is the machine's end."""

    @property
    def console(self) -> GuestConsole:
        """The guest's console."""

    async def heard_out(self) -> None:
        """Wait until all has been heard of a machine whose process has ended."""

    def shutdown_reason(self) -> str | None:
        """Return why the machine has stopped by itself, such as guest-reset, where that is known."""

    async def wait_ready(self, timeout: float) -> None:
        """Wait until the guest says that it serves; raises Timeout after ``timeout`` s, Unavailable if it dies."""

    async def plug(self, nics: Sequence[Nic]) -> None:
        """Plug in NICs; their descriptors stay the caller's. Raises Unavailable, Timeout, InvalidArgument."""

    async def unplug(self, device: str) -> None:
        """Take out the NIC with this permanent hardware address. Raises Timeout, Unavailable."""

    async def stop(self) -> None:
        """End the machine; returns at once if it has ended."""
