"""What a pod's supervisor knows of one container."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from katapy.oci.bundle import Bundle
from katapy.sandbox.host_cgroup import HostCgroup
from katapy.sandbox.process import GuestProcess
from katapy.sandbox.record import Record


@dataclass(eq=False)
class Container:
    """A container of the pod. ``binds`` names what is shared with its guest; ``exec_specs`` are JSON, by exec id."""

    bundle: Bundle
    init: GuestProcess
    record: Record
    binds: list[str] = field(default_factory=list)
    execs: dict[str, GuestProcess] = field(default_factory=dict)
    exec_specs: dict[str, bytes] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    cgroup: HostCgroup | None = None

    @property
    def id(self) -> str:
        """The container's id."""
        return self.init.container_id

    def processes(self) -> list[GuestProcess]:
        """Return init and the others."""
        return [self.init, *self.execs.values()]
