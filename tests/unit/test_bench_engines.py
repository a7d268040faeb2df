"""The bench of engines reads what containerd's CRI plugin writes."""

from __future__ import annotations

import engines
import pytest
from figures import BenchError


def test_the_first_line_of_a_log() -> None:
    log = "1970-01-01T01:00:02.500000001+01:00 stdout F here\n1970-01-01T01:00:09+01:00 stdout F more\n"
    assert engines.parse_first_line(log) == 2.5
    assert engines.parse_first_line("1970-01-01T00:00:03.25Z stdout F here\n") == 3.25


@pytest.mark.parametrize("log", ["", "\n", "here\n", "1970-01-01T00:00:03Z stdout F there\n", "now stdout F here\n"])
def test_no_such_line(log: str) -> None:
    with pytest.raises(BenchError):
        engines.parse_first_line(log)
