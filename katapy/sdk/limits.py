"""What a sandbox may use: parsed once, refused with one clear error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from katapy import config
from katapy.errors import InvalidArgument

MIB: Final = 1 << 20
# Below that neither a guest's kernel nor a program has room to start.
_MEMORY_MIN: Final = 16 * MIB
_BOUND: Final = 1 << 50


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bytes of ``memory``, number of ``cpus`` (a fraction is a share of one), ``processes``, and so on.

    ``disk`` is what may be written in bytes and ``inodes`` the files that may be made, both for as long as the sandbox
    lives; ``output`` is the bytes that one run may print, ``open_files`` and ``file_size`` (bytes) are a process's.
    """

    memory: int = 256 * MIB
    cpus: float = 1.0
    processes: int = 64
    disk: int = 256 * MIB
    inodes: int = 65536
    output: int = 16 * MIB
    open_files: int = 1024
    file_size: int = 256 * MIB


def make_limits(
    *,
    memory: int | str,
    cpus: float,
    processes: int,
    disk: int | str,
    inodes: int,
    output: int | str,
    open_files: int,
    file_size: int | str | None,
) -> Limits:
    """Check what a caller gave; sizes are bytes or texts such as ``"256M"``. Raises InvalidArgument."""
    disk_bytes = parse_size(disk, "disk", at_least=MIB)
    if isinstance(cpus, bool) or not isinstance(cpus, int | float) or not math.isfinite(cpus) or not 0.05 <= cpus <= 64:
        raise InvalidArgument(f"cpus: {cpus!r} is not a number from 0.05 to 64")
    return Limits(
        memory=parse_size(memory, "memory", at_least=_MEMORY_MIN),
        cpus=float(cpus),
        processes=_whole(processes, "processes", 1, 30000),
        disk=disk_bytes,
        inodes=_whole(inodes, "inodes", 64, 1 << 30),
        output=parse_size(output, "output", at_least=0),
        open_files=_whole(open_files, "open_files", 16, 1 << 20),
        file_size=disk_bytes if file_size is None else parse_size(file_size, "file_size", at_least=0),
    )


def parse_size(value: int | str, what: str, *, at_least: int) -> int:
    """Return a number of bytes, given as such or as a text such as 256M. Raises InvalidArgument."""
    try:
        size = config.parse_size(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InvalidArgument(f"{what}: {error}") from error
    if isinstance(size, bool) or not isinstance(size, int):
        raise InvalidArgument(f"{what}: {value!r} is neither a number of bytes nor a text such as '256M'")
    if not at_least <= size <= _BOUND:
        raise InvalidArgument(f"{what}: {str(value)[:40]} is not between {at_least} bytes and 1 PiB")
    return size


def check_seconds(value: float | None, what: str) -> float | None:
    """Return a number of seconds above 0, None for no limit. Raises InvalidArgument."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InvalidArgument(f"{what}: {value!r} is not a number of seconds above 0")
    return float(value)


def _whole(value: int, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgument(f"{what}: {value!r} is not a whole number from {low} to {high}")
    return value
