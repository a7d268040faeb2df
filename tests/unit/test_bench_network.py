"""What the bench's group of networks reads of others' output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from figures import BenchError
from network import Transfer, parse_busy, parse_ldd, parse_transfer


def said(**received: object) -> str:
    return json.dumps({"start": {}, "end": {"sum_sent": {"bytes": 9, "seconds": 9}, "sum_received": received}})


def test_what_arrived_counts() -> None:
    assert parse_transfer(said(bytes=1000, seconds=2.5)) == Transfer(1000, 2.5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"start": {}, "error": "the server is busy"}', "iperf3: the server is busy"),
        ("", "cannot read"),
        ("[]", "cannot read"),
        ('{"end": {}}', "cannot read"),
        (said(bytes=1), "cannot read"),
        (said(bytes=0, seconds=2.5), "moved nothing"),
        (said(bytes=1, seconds=0), "moved nothing"),
    ],
)
def test_transfers_that_failed(text: str, reason: str) -> None:
    with pytest.raises(BenchError, match=reason):
        parse_transfer(text)


def test_guests_and_idle_time_are_not_counted_again() -> None:
    """A guest's time is in ``user`` already; what the hypervisor below us took is nobody's work."""
    stat = "cpu  1 20 300 4000 50000 600000 7000000 80000000 1 20\ncpu0 9 9 9 9 9 9 9 9 9 9\nintr 1\n"
    assert parse_busy(stat) == 7600321


def test_libraries() -> None:
    text = (
        "\tlinux-vdso.so.1 (0x00007f2d)\n"
        "\tlibiperf.so.0 => /lib/x86_64-linux-gnu/libiperf.so.0 (0x00007f2d)\n"
        "\t/lib64/ld-linux-x86-64.so.2 (0x00007f2d)\n"
    )
    assert parse_ldd(text) == [Path("/lib/x86_64-linux-gnu/libiperf.so.0"), Path("/lib64/ld-linux-x86-64.so.2")]
