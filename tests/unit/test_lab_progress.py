"""A lab that hangs says where: also when what it says arrives in pieces, or makes no sense."""

from __future__ import annotations

import pytest
from outcomes import LabError
from progress import Progress

TEST = "tests/functional/test_run.py::test_limits_hold"


def test_where_a_lab_is() -> None:
    progress = Progress()
    assert progress.place() == "before the first test"
    progress.take(b'{"host": {}}\n{"beg')
    assert progress.place() == "between two tests"
    progress.take(b'an": "%s"}\n' % TEST.encode())
    assert progress.place() == f"in {TEST}, for 0 s"
    # What it has come to is written before its fixtures end.
    progress.take(b'{"test": "%s", "outcome": "passed"}\n' % TEST.encode())
    assert TEST in progress.place()
    progress.take(b'{"ended": "%s"}\n' % TEST.encode())
    assert (progress.place(), progress.status) == ("between two tests", None)
    progress.take(b'nonsense\n[]\n"began"\n{"status": "none"}\n{"status": 1')
    assert progress.status is None
    progress.take(b"}\n")
    assert progress.status == 1


def test_a_lab_that_never_stops_is_given_up() -> None:
    progress = Progress()
    progress.take(b"x" * (15 << 20))
    with pytest.raises(LabError, match="more of its tests than there is to say"):
        progress.take(b"x" * (2 << 20))
