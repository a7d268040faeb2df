"""Where the time of a start goes: phases with a name, a beginning and an end, over several processes of one host.

Whoever wants to know sets a ``Timeline`` for its context, which its tasks and threads share; ``phase`` adds to that
one, and costs nothing to speak of where there is none. Times are seconds of CLOCK_MONOTONIC, which all processes of a
host read alike. Phases may overlap: what can be done at once is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

_BAR: Final = 40  # characters
_PHASES_MAX: Final = 1000


class Phase(NamedTuple):
    """``start`` and ``end`` in seconds of CLOCK_MONOTONIC."""

    name: str
    start: float
    end: float


class Timeline:
    """Phases of one start, in the order of their ends."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    def add(self, name: str, start: float, end: float) -> None:
        """Note a phase; a pod that lives for long has no more of them than its start."""
        if len(self.phases) < _PHASES_MAX:
            self.phases.append(Phase(name, start, end))


_current: ContextVar[Timeline | None] = ContextVar("timeline", default=None)


def record() -> Timeline:
    """Record the phases of this context from now on."""
    timeline = Timeline()
    _current.set(timeline)
    return timeline


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Note how long what is inside takes, also where it fails."""
    timeline = _current.get()
    if timeline is None:
        yield
        return
    start = time.monotonic()
    try:
        yield
    finally:
        timeline.add(name, start, time.monotonic())


def process_start() -> float:
    """Return when this process began, in seconds of CLOCK_MONOTONIC, to a hundredth (proc(5), stat: starttime)."""
    with open("/proc/self/stat", "rb") as file:  # noqa: PTH123 - pathlib is slow to import
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    suspended = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    return ticks / os.sysconf("SC_CLK_TCK") - suspended


def as_json(phases: Iterable[Phase]) -> dict[str, Any]:
    """Return the phases by their beginnings, in seconds from the first of these, and the ``total``."""
    ordered = sorted(phases, key=lambda each: each.start)
    zero = ordered[0].start if ordered else 0.0
    return {
        "phases": [
            {"name": each.name, "start": round(each.start - zero, 6), "end": round(each.end - zero, 6)}
            for each in ordered
        ],
        "total": round(max((each.end for each in ordered), default=0.0) - zero, 6),
    }


def as_text(phases: Iterable[Phase]) -> str:
    """Return a line for each phase: when it began and how long it took, in milliseconds, and a bar that shows both."""
    document = as_json(phases)
    total = document["total"] or 1.0
    lines = [f"{'at ms':>8} {'took':>8}"]
    for each in document["phases"]:
        before = int(each["start"] / total * _BAR)
        length = max(1, round((each["end"] - each["start"]) / total * _BAR))
        bar = (" " * before + "#" * length)[:_BAR].ljust(_BAR)
        lines.append(f"{each['start'] * 1000:8.1f} {(each['end'] - each['start']) * 1000:8.1f} |{bar}| {each['name']}")
    lines.append(f"{document['total'] * 1000:8.1f} in all")
    return "\n".join(lines)
