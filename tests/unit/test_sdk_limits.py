"""What a sandbox may use, as a caller says it."""

from __future__ import annotations

from typing import Any

import pytest

from katapy.errors import InvalidArgument
from katapy.sdk.limits import MIB, Limits, check_seconds, make_limits, parse_size

GIVEN: dict[str, Any] = {
    "memory": "64M",
    "cpus": 1,
    "processes": 4,
    "disk": "8M",
    "inodes": 100,
    "output": 0,
    "open_files": 16,
    "file_size": None,
}


def test_limits() -> None:
    """A file may be as large as the disk, unless something else is said."""
    limits = make_limits(**GIVEN)
    assert limits == Limits(
        memory=64 * MIB,
        cpus=1.0,
        processes=4,
        disk=8 * MIB,
        inodes=100,
        output=0,
        open_files=16,
        file_size=8 * MIB,
    )
    assert make_limits(**GIVEN | {"file_size": 0, "cpus": 0.5}).file_size == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("memory", "15M"),
        ("memory", -1),
        ("memory", "lots"),
        ("memory", None),
        ("memory", True),
        ("memory", 1.5),
        ("memory", "2000T"),
        ("cpus", 0),
        ("cpus", 65),
        ("cpus", float("nan")),
        ("cpus", float("inf")),
        ("cpus", "2"),
        ("cpus", True),
        ("processes", 0),
        ("processes", 30001),
        ("processes", 1.0),
        ("processes", True),
        ("disk", "1023K"),
        ("inodes", 63),
        ("output", -1),
        ("open_files", 15),
        ("file_size", "-1"),
        ("file_size", ""),
    ],
)
def test_bad_limits(name: str, value: object) -> None:
    """The error names the limit."""
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        make_limits(**GIVEN | {name: value})


@pytest.mark.parametrize(("value", "size"), [(5, 5), ("5", 5), ("4K", 4096), ("2M", 2 * MIB), ("1G", 1024 * MIB)])
def test_sizes(value: int | str, size: int) -> None:
    assert parse_size(value, "x", at_least=5) == size


@pytest.mark.parametrize(("value", "seconds"), [(None, None), (1, 1.0), (0.5, 0.5)])
def test_seconds(value: float | None, seconds: float | None) -> None:
    assert check_seconds(value, "timeout") == seconds


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "1"])
def test_bad_seconds(value: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^timeout: .* is not a number of seconds above 0"):
        check_seconds(value, "timeout")
