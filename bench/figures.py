"""What was measured: series of values, their medians and spread, and how they relate to what was measured beside them.

Every value is a cost, in seconds or bytes, so that a ratio always says how many times as much something costs. A
series names the series of its group that it stands beside; both come from one run on one machine, in turns, so that
their ratio means something elsewhere, which the seconds do not.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple


class BenchError(Exception):
    """The bench cannot go on; its text is fit for a user."""


class Unit(StrEnum):
    """What the values of a series count."""

    SECONDS = "s"
    BYTES = "bytes"


class Summary(NamedTuple):
    """Median and spread; ``lower`` and ``upper`` are the quartiles."""

    runs: int
    minimum: float
    lower: float
    median: float
    upper: float
    maximum: float


def summarize(values: Sequence[float]) -> Summary:
    """Return median and spread of at least one value."""
    if len(values) == 1:
        return Summary(1, *(values[0],) * 5)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(len(values), min(values), lower, median, upper, max(values))


@dataclass(frozen=True)
class Series:
    """Values of one thing, measured again and again. ``moved`` is how many bytes each of them moved, 0 if none."""

    group: str
    name: str
    unit: Unit
    values: tuple[float, ...]
    beside: str | None = None
    moved: int = 0

    @property
    def key(self) -> str:
        """What tells this series from all others."""
        return f"{self.group}: {self.name}"


def ratios(series: Series, reference: Series) -> list[float]:
    """Return how many times as much as ``reference`` each value of ``series`` is.

    Those measured in the same rounds are compared round by round, which takes a machine's drift out.
    """
    others: Sequence[float] = reference.values
    if len(others) != len(series.values):
        others = [statistics.median(others)] * len(series.values)
    return [value / other for value, other in zip(series.values, others, strict=True) if other > 0]


def ratio(series: Series, others: Sequence[Series]) -> Summary | None:
    """Return the ratio of ``series`` to the one it stands beside, None where that is itself or was not measured."""
    for other in others:
        if other is not series and (other.group, other.name) == (series.group, series.beside):
            found = ratios(series, other)
            return summarize(found) if found else None
    return None


def format_value(value: float, unit: str, moved: int) -> str:
    """Return a value as people read it: of what moves bytes, how many a second."""
    if unit == Unit.BYTES:
        return f"{value / (1 << 20):.1f} MiB"
    if moved:
        return f"{_digits(moved / value / 1e6)} MB/s" if value > 0 else "no time"
    return f"{_digits(value * 1000)} ms" if value < 1 else f"{value:.2f} s"


def format_ratio(value: float) -> str:
    """Return a ratio as people read it."""
    return _digits(value) if value >= 0.1 else f"{value:.3f}"


def _digits(value: float) -> str:
    """Return a number with three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass
class _Values:
    unit: Unit
    beside: str | None
    moved: int
    values: list[float] = field(default_factory=list)


class Recorder:
    """Collects the values of one group as they come, and says each on stderr."""

    def __init__(self, group: str) -> None:
        self.group = group
        self.notes: list[str] = []
        self._named: dict[str, _Values] = {}

    def add(
        self, name: str, value: float, *, beside: str | None = None, unit: Unit = Unit.SECONDS, moved: int = 0
    ) -> None:
        """Add a value to the series ``name``, which stands beside another one of that group."""
        self._named.setdefault(name, _Values(unit, beside, moved)).values.append(value)
        if ": " not in name:  # a part of what was said
            progress(f"{self.group}: {name}: {format_value(value, unit, moved)}")

    def note(self, text: str) -> None:
        """Say what no series does, such as what was left out and why; it is part of the report."""
        self.notes.append(f"{self.group}: {text}")
        progress(self.notes[-1])

    def series(self) -> list[Series]:
        """Return what was collected, in the order in which it first came."""
        return [
            Series(self.group, name, found.unit, tuple(found.values), found.beside, found.moved)
            for name, found in self._named.items()
        ]


def progress(text: str) -> None:
    """Say on stderr what has been done."""
    print(text, file=sys.stderr, flush=True)
