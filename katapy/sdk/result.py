"""What a run gives back, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import AnyStr, Generic

from katapy.errors import KatapyError
from katapy.verdict import KilledBy, Verdict


class RunFailed(KatapyError):
    """A run that was to succeed did not; only ``Result.check`` raises it. ``result`` is the run's."""

    def __init__(self, result: Result[str] | Result[bytes]) -> None:
        verdict = result.verdict
        how = "was ended"
        if verdict.exit_code is not None:
            how = f"ended with status {verdict.exit_code}"
        elif verdict.signal is not None:
            how = f"ended with signal {verdict.signal}"
        by = "" if verdict.killed_by is KilledBy.NONE else f" ({verdict.killed_by})"
        super().__init__(f"{result.args[0][:100]!r} {how}{by}")
        self.result = result


@dataclass(frozen=True)
class Usage:
    """``wall_seconds`` and ``host_cpu_seconds`` are measured on the host; the others in the run's cgroup in the guest.

    None where it could not be measured, since the guest did not answer.
    """

    wall_seconds: float
    host_cpu_seconds: float | None
    cpu_seconds: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Result(Generic[AnyStr]):
    """How a command ended. ``truncated`` says that it printed more than it may: the rest is lost."""

    args: tuple[str, ...]
    stdout: AnyStr
    stderr: AnyStr
    verdict: Verdict
    truncated: bool

    @property
    def exit_code(self) -> int | None:
        """The exit status, None where a signal ended it."""
        return self.verdict.exit_code

    @property
    def signal(self) -> int | None:
        """The signal that ended it, None where it ended by itself."""
        return self.verdict.signal

    @property
    def killed_by(self) -> KilledBy:
        """The limit that ended it, or what else did."""
        return self.verdict.killed_by

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with status 0."""
        return self.verdict.exit_code == 0 and self.verdict.killed_by is KilledBy.NONE

    @property
    def usage(self) -> Usage:
        """What it took."""
        verdict = self.verdict
        return Usage(verdict.wall_seconds, verdict.host_cpu_seconds, verdict.cpu_seconds, verdict.peak_memory_bytes)

    def check(self) -> Result[AnyStr]:
        """Return this result. Raises RunFailed unless it is ``ok``."""
        if not self.ok:
            raise RunFailed(self)
        return self
