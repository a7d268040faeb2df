"""What a run gives back."""

from __future__ import annotations

from typing import Any

import pytest

from katapy.sdk.result import Result, RunFailed, Usage
from katapy.verdict import KilledBy, Verdict


def result(**changes: Any) -> Result[str]:
    """Return that of a run that has succeeded, but for the changes to its verdict."""
    verdict = {
        "exit_code": 0,
        "signal": None,
        "killed_by": KilledBy.NONE,
        "trusted": True,
        "wall_seconds": 2.0,
        "cpu_seconds": 1.0,
        "peak_memory_bytes": 4096,
        "host_cpu_seconds": 1.5,
        "accelerator": "kvm",
    }
    return Result(("make", "all"), "out", "err", Verdict(**{**verdict, **changes}), truncated=False)


def test_success() -> None:
    good = result()
    assert good.ok
    assert good.check() is good
    assert good.usage == Usage(wall_seconds=2.0, host_cpu_seconds=1.5, cpu_seconds=1.0, peak_memory_bytes=4096)
    assert (good.exit_code, good.signal, good.killed_by) == (0, None, KilledBy.NONE)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"exit_code": 3}, "'make' ended with status 3"),
        ({"exit_code": 1, "killed_by": KilledBy.DISK}, "'make' ended with status 1 (disk)"),
        ({"exit_code": None, "signal": 6, "killed_by": KilledBy.SIGNAL}, "'make' ended with signal 6 (signal)"),
        ({"exit_code": None, "killed_by": KilledBy.WALL}, "'make' was ended (wall)"),
        ({"exit_code": None, "killed_by": KilledBy.VM_DIED}, "'make' was ended (vm_died)"),
    ],
)
def test_failure(changes: dict[str, Any], text: str) -> None:
    bad = result(**changes)
    assert not bad.ok
    with pytest.raises(RunFailed) as caught:
        bad.check()
    assert str(caught.value) == text
    assert caught.value.result is bad
