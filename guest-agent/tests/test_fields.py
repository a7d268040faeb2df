"""Fields of config.json whose effect no other test shows: docs/oci.md names the test of each field."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from container_lab import Lab, open_lab
from katapy_agent import cgroups, config, linux, privileges, resources, schema, seccomp


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with open_lab(tmp_path) as made:
        yield made


def test_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is asked for: a deadline needs bandwidth that the machine of the test may not have."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(linux, "sched_setattr", lambda *arguments: asked.append(arguments))
    for document in (
        {"policy": "SCHED_RR", "priority": 7, "flags": ["SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_DL_OVERRUN"]},
        {"policy": "SCHED_DEADLINE", "runtime": 10, "deadline": 20, "period": 30},
    ):
        privileges.set_scheduler(schema.decode(config.Scheduler, document))
    assert asked == [(2, 0x1 | 0x4, 0, 7, (0, 0, 0)), (6, 0, 0, 0, (10, 20, 30))]


def test_io_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(linux, "ioprio_set", lambda *arguments: asked.append(arguments))
    privileges.set_io_priority(schema.decode(config.IOPriority, {"class": "IOPRIO_CLASS_BE", "priority": 5}))
    assert asked == [(2, 5)]


def test_block_io() -> None:
    device = {"major": 8, "minor": 16}
    found = schema.decode(
        resources.Resources,
        {
            "blockIO": {
                "weight": 100,
                "weightDevice": [{**device, "weight": 200}],
                "throttleReadBpsDevice": [{**device, "rate": 1}],
                "throttleWriteBpsDevice": [{**device, "rate": 2}],
                "throttleReadIOPSDevice": [{**device, "rate": 3}],
                "throttleWriteIOPSDevice": [{**device, "rate": 4}],
            }
        },
    )
    assert cgroups.plan_limits(found) == [
        ("io.bfq.weight", "100"),
        ("io.bfq.weight", "8:16 200"),
        ("io.max", "8:16 rbps=1"),
        ("io.max", "8:16 wbps=2"),
        ("io.max", "8:16 riops=3"),
        ("io.max", "8:16 wiops=4"),
    ]


def test_seccomp_numbers() -> None:
    """The errno of the default action and the second value of a masked comparison are in the program."""

    def program(errno: int, second: int) -> bytes:
        argument = {"index": 0, "value": 0xFF, "valueTwo": second, "op": "SCMP_CMP_MASKED_EQ"}
        rule = {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [argument]}
        document = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno, "syscalls": [rule]}
        return seccomp.compile_filter(schema.decode(config.Seccomp, document))

    first = program(38, 0x12)
    assert (0x00050000 | 38).to_bytes(4, "little") in first
    assert (0x12).to_bytes(4, "little") in first
    assert len({first, program(39, 0x12), program(38, 0x13)}) == 3


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_personality(lab: Lab) -> None:
    (lab.rootfs / "bin/uname").symlink_to("busybox")
    for domain, machine in (("LINUX", "x86_64"), ("LINUX32", "i686")):

        def change(document: dict[str, Any], domain: str = domain) -> None:
            document["linux"]["personality"] = {"domain": domain}

        assert lab.run("uname -m", change) == (0, f"{machine}\n")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_time_offsets(lab: Lab) -> None:
    def change(document: dict[str, Any]) -> None:
        document["linux"]["namespaces"].append({"type": "time"})
        document["linux"]["timeOffsets"] = {"monotonic": {"secs": 5, "nanosecs": 6}, "boottime": {"nanosecs": 7}}

    _, output = lab.run("cat /proc/1/timens_offsets", change)
    assert output.split() == ["monotonic", "5", "6", "boottime", "0", "7"]
