"""What every group is given: how much to measure, and what to measure with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bare import BareVm
from containers import Bundles, Runtime


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``runs`` are rounds, ``long_runs`` those of what takes long; the rest speaks for itself."""

    runs: int = 10
    long_runs: int = 5
    at_once: tuple[int, ...] = (1, 4, 16)
    pods: tuple[int, ...] = (1, 10, 50)
    engine_pods: tuple[int, ...] = (1, 20)
    stream_bytes: int = 256 << 20
    file_bytes: int = 64 << 20
    reads: int = 4096
    round_trips: int = 2000


QUICK = Plan(
    runs=3,
    long_runs=2,
    at_once=(1, 2),
    pods=(1, 3, 5),
    engine_pods=(1, 3),
    stream_bytes=64 << 20,
    file_bytes=32 << 20,
    reads=2048,
    round_trips=500,
)


@dataclass(frozen=True)
class Bench:
    """``warm`` and ``cold`` are katapy, restoring VMs from templates and booting each; ``runc`` is None without one."""

    plan: Plan
    directory: Path
    bundles: Bundles
    bare: BareVm
    warm: Runtime
    cold: Runtime
    runc: Runtime | None

    @property
    def runtimes(self) -> list[Runtime]:
        """All that there are, katapy's first."""
        return [self.cold, self.warm, *([self.runc] if self.runc else [])]

    @property
    def peers(self) -> list[tuple[str, Runtime]]:
        """katapy and runc by name, where it does not matter how the VM has started."""
        return [("katapy", self.warm), *([("runc", self.runc)] if self.runc else [])]
