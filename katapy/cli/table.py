"""How lists show sizes and times, and their columns."""

from __future__ import annotations

import time
from collections.abc import Sequence

import click


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in columns that are as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def utc(seconds: float) -> str:
    """Return a time since the epoch as RFC 3339 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def size(count: int) -> str:
    """Return a number of bytes in MiB."""
    return f"{count / (1 << 20):.1f} MiB"


def age(since: float) -> str:
    """Return how long ago it was, in the largest unit of which there are two."""
    seconds = max(0, int(time.time() - since))
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} seconds"
