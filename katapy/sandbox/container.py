"""What a pod's supervisor knows of one container, and those who wait for news of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from katapy.oci.bundle import Bundle
from katapy.sandbox.host_cgroup import HostCgroup
from katapy.sandbox.process import GuestProcess
from katapy.sandbox.record import Record


@dataclass(eq=False)
class Container:
    """A container of the pod. ``rootfs`` is its root file system, with its writable layer where it has one, ``binds``
    names what is shared with its guest; ``exec_specs`` are JSON, by exec id.

    ``resources`` are its limits now, as plain JSON, ``ooms`` says how often its memory has run out, and ``killed`` that
    it was sent SIGKILL.
    """

    bundle: Bundle
    init: GuestProcess
    record: Record
    binds: list[str] = field(default_factory=list)
    execs: dict[str, GuestProcess] = field(default_factory=dict)
    exec_specs: dict[str, bytes] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    cgroup: HostCgroup | None = None
    rootfs: str = field(init=False)
    resources: dict[str, Any] = field(init=False)
    ooms: int = 0
    killed: bool = False
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.rootfs = self.bundle.rootfs
        self.resources = self.bundle.spec.resources

    @property
    def id(self) -> str:
        """The container's id."""
        return self.init.container_id

    def processes(self) -> list[GuestProcess]:
        """Return init and the others."""
        return [self.init, *self.execs.values()]

    def changed(self) -> None:
        """Wake up whoever waits for news: its status, or ``ooms``, is another now."""
        self._news.set()
        self._news = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, which is asked after each ``changed``."""
        while not condition():
            await self._news.wait()
