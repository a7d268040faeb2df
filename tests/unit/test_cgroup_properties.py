"""Limits as properties of a systemd unit, and what the small verbs import."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from katapy.cgroups.limits import HostLimits
from katapy.cgroups.systemd import plan_limits, plan_properties

UNLIMITED = (1 << 64) - 1


@pytest.mark.parametrize(
    ("limits", "v1", "v2"),
    [
        ({}, {}, {}),
        ({"memory_bytes": 100}, {"MemoryLimit": 100}, {"MemoryMax": 100}),
        ({"memory_bytes": -1}, {"MemoryLimit": UNLIMITED}, {"MemoryMax": UNLIMITED}),
        (
            {"memory_bytes": 100, "memory_swap_bytes": 150},
            {"MemoryLimit": 100},
            {"MemoryMax": 100, "MemorySwapMax": 50},
        ),
        ({"cpu_shares": 1024}, {"CPUShares": 1024}, {"CPUWeight": 39}),
        ({"cpu_quota": 50_000}, {"CPUQuotaPerSecUSec": 500_000}, {"CPUQuotaPerSecUSec": 500_000}),
        ({"cpu_quota": -1}, {"CPUQuotaPerSecUSec": UNLIMITED}, {"CPUQuotaPerSecUSec": UNLIMITED}),
        (
            {"cpu_quota": 33_333, "cpu_period": 200_000},
            {"CPUQuotaPerSecUSec": 170_000, "CPUQuotaPeriodUSec": 200_000},
            {"CPUQuotaPerSecUSec": 170_000, "CPUQuotaPeriodUSec": 200_000},
        ),
        ({"pids": 7}, {"TasksMax": 7}, {"TasksMax": 7}),
    ],
)
def test_limits(limits: dict[str, Any], v1: dict[str, int], v2: dict[str, int]) -> None:
    for version, expected in ((1, v1), (2, v2)):
        found = plan_limits(HostLimits(**limits), version=version)
        assert {name: value for name, (_, value) in found} == expected
        assert {signature for _, (signature, _) in found} <= {"t"}


def test_a_scope_is_delegated_and_holds_the_process() -> None:
    properties = dict(plan_properties("a.slice", 42, HostLimits(), version=2))
    assert properties["Slice"] == ("s", "a.slice")
    assert properties["PIDs"] == ("au", [42])
    assert properties["Delegate"] == ("b", True)
    assert properties["DefaultDependencies"] == ("b", False)
    assert properties["IOAccounting"] == ("b", True)


def test_removal_imports_little() -> None:
    """`katapy delete` removes cgroups: neither a D-Bus library nor an event loop is loaded for it."""
    code = "import sys; from katapy.cgroups import directory; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"asyncio", "dataclasses", "jeepney", "subprocess", "ctypes", "pathlib", "logging"} & set(loaded)
