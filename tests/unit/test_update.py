"""`update`: what its options say, how a change is merged into the limits, and what the VM cannot hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from katapy.cli.update import from_flags, parse_size
from katapy.errors import InvalidArgument, Unsupported
from katapy.oci.update import parse_change
from katapy.sandbox.sizing import Size, check_fits

BEFORE = {
    "memory": {"limit": 100, "swap": 200},
    "cpu": {"quota": 50_000, "cpus": "0-1", "burst": 5},
    "hugepageLimits": [{"pageSize": "2MB", "limit": 1}, {"pageSize": "1GB", "limit": 2}],
    "unified": {"memory.high": "1"},
}


def merged(change: dict[str, Any]) -> dict[str, Any]:
    return parse_change(json.dumps(change).encode(), BEFORE).document


def test_what_is_absent_zero_or_empty_stays() -> None:
    nothing = {
        "memory": {"limit": 0, "swap": None},
        "cpu": {"cpus": "", "quota": 0},
        "pids": None,
        "hugepageLimits": [],
    }
    assert {key: value for key, value in merged(nothing).items() if value} == BEFORE


def test_a_change_is_merged() -> None:
    after = merged(
        {
            "memory": {"limit": 150},
            "cpu": {"burst": 0, "period": 20_000},
            "pids": {"limit": -1},
            "hugepageLimits": [{"pageSize": "1GB", "limit": 0}],
            "unified": {"memory.low": "2"},
        }
    )
    assert after["memory"] == {"limit": 150, "swap": 200}
    assert after["cpu"] == {"quota": 50_000, "cpus": "0-1", "burst": 0, "period": 20_000}
    assert after["pids"] == {"limit": -1}
    assert after["hugepageLimits"] == [{"pageSize": "2MB", "limit": 1}, {"pageSize": "1GB", "limit": 0}]
    assert after["unified"] == {"memory.high": "1", "memory.low": "2"}
    assert BEFORE["memory"] == {"limit": 100, "swap": 200}


def test_what_the_guest_gets() -> None:
    """As it was asked for, without what is limited on the host alone."""
    change = parse_change(b'{"pids": {"limit": 5}, "blockIO": {"weight": 100}}', BEFORE)
    assert json.loads(change.request) == {"pids": {"limit": 5}}
    assert change.resources.block_io is not None
    assert change.resources.block_io.weight == 100


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[]", "resources"),
        (b'{"memory": {"limit": "1"}}', "resources: memory.limit: expected an integer"),
        (b'{"cpu": {"quota": 5}}', "resources: cpu.quota: 5 is less than 1000 microseconds"),
        (b'{"cpu": {"cpus": "3-1"}}', "resources: cpu.cpus"),
    ],
)
def test_a_wrong_change(data: bytes, problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_change(data, BEFORE)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"memory": {"limit": 4097}}, "memory limit 4097: its VM has 2 vCPUs and 4096 bytes of memory"),
        ({"memory": {"limit": 4096}}, None),
        ({"memory": {"limit": -1}}, None),
        ({"cpu": {"quota": 200_001}}, "CPU quota 200001 of a period of 100000: its VM has 2 vCPUs"),
        ({"cpu": {"quota": 200_000}}, None),
        ({"cpu": {"period": 20_000}}, "CPU quota 50000 of a period of 20000"),
        ({"cpu": {"cpus": "0,2"}}, "CPUs 0,2: its VM has 2 vCPUs"),
        ({"cpu": {"cpus": "0-1"}}, None),
    ],
)
def test_what_the_vm_cannot_hold(change: dict[str, Any], problem: str | None) -> None:
    before, after = parse_change(b"{}", BEFORE), parse_change(json.dumps(change).encode(), BEFORE)
    if problem is None:
        check_fits(Size(2, 4096), before.resources, after.resources)
        return
    with pytest.raises(InvalidArgument) as caught:
        check_fits(Size(2, 4096), before.resources, after.resources)
    assert str(caught.value).startswith(problem)


def test_what_it_had_before_is_not_refused() -> None:
    """A VM has no more vCPUs than the host has CPUs, whatever the quota; engines repeat that in each change."""
    large = {"cpu": {"quota": 10**7, "cpus": "0-63"}, "memory": {"limit": 1 << 40}}
    before, after = parse_change(b"{}", large), parse_change(json.dumps(large | {"pids": {"limit": 5}}).encode(), large)
    check_fits(Size(2, 4096), before.resources, after.resources)


def test_flags() -> None:
    flags = {
        "cpu_share": 512,
        "cpuset_cpus": "0",
        "memory": "64M",
        "memory_swap": "-1",
        "pids_limit": 0,
        "cpu_quota": None,
    }
    assert from_flags(flags) == {
        "cpu": {"shares": 512, "cpus": "0"},
        "memory": {"limit": 64 << 20, "swap": -1},
        "pids": {"limit": 0},
    }
    with pytest.raises(Unsupported, match="--l3-cache-schema"):
        from_flags({"l3_cache_schema": "L3:0=f"})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1024),
        ("1KB", 1024),
        ("1KiB", 1024),
        ("1.5g", 3 << 29),
        ("-1", -1),
        ("2 t", 2 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "-2", "k", "1x", "1e3", "0x10", "1kk", "\u0661"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(InvalidArgument, match="--memory"):
        parse_size(text, "--memory")
