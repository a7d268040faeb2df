"""What became of one run in a sandbox, and how that is written for judges: as JSON, and as isolate's meta file.

Who decides it, and from which facts, is the sandbox's business.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final


class KilledBy(StrEnum):
    """What ended a run; NONE where the program ended by itself."""

    NONE = "none"
    WALL = "wall"
    CPU = "cpu"
    MEMORY = "memory"
    PIDS = "pids"
    DISK = "disk"
    OUTPUT = "output"
    SIGNAL = "signal"
    VM_DIED = "vm_died"


_MESSAGES: Final = {
    KilledBy.WALL: "Time limit exceeded (wall clock)",
    KilledBy.CPU: "Time limit exceeded",
    KilledBy.MEMORY: "Memory limit exceeded",
    KilledBy.PIDS: "Process limit exceeded",
    KilledBy.DISK: "Disk limit exceeded",
    KilledBy.OUTPUT: "Output limit exceeded",
    KilledBy.VM_DIED: "The virtual machine died",
}
_TIMEOUTS: Final = (KilledBy.WALL, KilledBy.CPU)
# The limits at which the sandbox itself ends a program that goes on; the guest's kernel does it for memory.
_ENDED_BY_SANDBOX: Final = (*_TIMEOUTS, KilledBy.PIDS, KilledBy.DISK, KilledBy.OUTPUT)
_SIGKILL: Final = 9


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a run ended and what it took.

    ``exit_code`` and ``signal`` exclude each other; both are None where the run was ended before its program told.
    ``trusted`` is False where only the guest says what ``killed_by`` says. ``cpu_seconds`` and ``peak_memory_bytes``
    are those of the run's cgroup in the guest, None where the guest did not tell; ``host_cpu_seconds`` is what the VM
    took of the host meanwhile, ``wall_seconds`` the host's clock. ``accelerator`` is what ran the VM: kvm or tcg.
    """

    exit_code: int | None
    signal: int | None
    killed_by: KilledBy
    trusted: bool
    wall_seconds: float
    cpu_seconds: float | None
    peak_memory_bytes: int | None
    host_cpu_seconds: float | None
    accelerator: str

    def __post_init__(self) -> None:
        """Refuse, with ValueError, what cannot be: both ends at once."""
        if self.exit_code is not None and self.signal is not None:
            raise ValueError(f"ended both with status {self.exit_code} and by signal {self.signal}")

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object."""
        return asdict(self)

    def to_meta(self) -> str:
        """Return isolate's meta file (isolate(1), META-FILES): ``key:value`` lines, memory in KiB, times in seconds.

        ``max-rss`` is of the whole run, as ``cg-mem`` is: an upper bound of what its largest process took. ``time``
        is what the host has measured where the guest did not tell. As with isolate, a program that was stopped at a
        time limit has neither exit code nor signal, and one that succeeded has no status.
        """
        lines = {**self._usage(), **self._end()}
        return "".join(f"{key}:{value}\n" for key, value in lines.items())

    def _usage(self) -> dict[str, object]:
        lines: dict[str, object] = {}
        cpu = self.host_cpu_seconds if self.cpu_seconds is None else self.cpu_seconds
        if cpu is not None:
            lines["time"] = f"{cpu:.3f}"
        lines["time-wall"] = f"{self.wall_seconds:.3f}"
        if self.peak_memory_bytes is not None:
            lines["max-rss"] = lines["cg-mem"] = self.peak_memory_bytes >> 10
        if self.killed_by is KilledBy.MEMORY:
            lines["cg-oom-killed"] = 1
        return lines

    def _end(self) -> dict[str, object]:
        lines: dict[str, object] = {}
        signal = self.signal
        if self.exit_code is None and signal is None and self.killed_by is not KilledBy.VM_DIED:
            signal = _SIGKILL
        if self.killed_by in _TIMEOUTS:
            lines["status"] = "TO"
        elif self.killed_by is KilledBy.VM_DIED:
            lines["status"] = "XX"
        elif signal is not None:
            lines |= {"exitsig": signal, "status": "SG"}
        else:
            lines["exitcode"] = self.exit_code
            if self.exit_code:
                lines["status"] = "RE"
        message = self._message(signal)
        if message:
            lines["message"] = message
        if self.killed_by in _TIMEOUTS or (self.killed_by in _ENDED_BY_SANDBOX and self.exit_code is None):
            lines["killed"] = 1
        return lines

    def _message(self, signal: int | None) -> str:
        if self.killed_by in _MESSAGES:
            return _MESSAGES[self.killed_by] + ("" if self.trusted else ", says the guest")
        if signal is not None:
            return f"Caught fatal signal {signal}"
        return f"Exited with error status {self.exit_code}" if self.exit_code else ""
