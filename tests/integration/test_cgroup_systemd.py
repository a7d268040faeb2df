"""The systemd driver against a real message bus, with a small systemd on it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_systemd import FakeSystemd

from katapy.cgroups import systemd
from katapy.cgroups.cgroup import Cgroup, plan_record
from katapy.cgroups.directory import Record, processes, reap, remove
from katapy.cgroups.layout import find_layout
from katapy.cgroups.limits import HostLimits
from katapy.cgroups.path import CgroupPath, Driver, parse_cgroups_path
from katapy.errors import AlreadyExists, Internal, InvalidArgument, NotFound, Timeout, Unavailable

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    address = f"unix:path={tmp_path}/bus"
    argv = ["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address={address}", "--print-address=1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline()  # it listens
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        yield address
        daemon.terminate()


@pytest.fixture
def fake(bus: str) -> Iterator[FakeSystemd]:
    """On v1, systemd makes a unit's cgroup in some hierarchies only; the others are left to the runtime."""
    layout = find_layout()
    mounts = [each.mount for name in ("memory", "pids") if (each := layout.find(name)) is not None]
    with FakeSystemd(bus, list(dict.fromkeys(mounts))) as server:
        yield server
    # os.walk goes on where a cgroup of others is gone, rglob does not.
    found = [path for hierarchy in layout.hierarchies for path, _, _ in os.walk(hierarchy.mount)]
    assert not [path for path in found if "katapytest" in path]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def path(request: pytest.FixtureRequest) -> CgroupPath:
    kind = getattr(request, "param", "plain")
    return parse_cgroups_path(f"katapytest.slice:{kind}:{uuid.uuid4().hex[:8]}", Driver.SYSTEMD, "c1")


def test_a_scope_with_its_limits(fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]) -> None:
    layout = find_layout()
    limits = HostLimits(memory_bytes=64 * MIB, cpu_quota=50_000, cpu_period=100_000, pids=9, cpuset_cpus="0")
    planned = plan_record(layout, path)
    cgroup = Cgroup.create(path, limits, layout=layout, pid=sleeper.pid)
    assert cgroup.record.paths == planned.paths
    properties = fake.properties()
    memory = "MemoryMax" if layout.find("io") else "MemoryLimit"
    expected = {"Slice": "katapytest.slice", "PIDs": [sleeper.pid], "Delegate": True, "DefaultDependencies": False}
    expected |= {memory: 64 * MIB, "CPUQuotaPerSecUSec": 500_000, "CPUQuotaPeriodUSec": 100_000, "TasksMax": 9}
    assert expected.items() <= properties.items()
    assert fake.calls[0][0] == "Subscribe"
    # What systemd has not done is done in the delegated cgroup: other hierarchies, and what has no property.
    assert processes(cgroup.record) == [sleeper.pid]
    lines = Path(f"/proc/{sleeper.pid}/cgroup").read_text().splitlines()
    assert all(line.endswith(f":{path.path}") for line in lines if ":0:" not in line)
    assert os.sched_getaffinity(sleeper.pid) == {0}

    cgroup.update(HostLimits(memory_bytes=128 * MIB))
    ((unit, runtime, changed),) = fake.named("SetUnitProperties")
    assert (unit, runtime, dict(changed)) == (path.unit, True, {memory: ("t", 128 * MIB)})
    cgroup.update(HostLimits(cpuset_mems="0"))
    assert len(fake.named("SetUnitProperties")) == 1

    sleeper.kill()
    sleeper.wait()
    remove(Record.parse(json.loads(json.dumps(cgroup.record._asdict()))))
    assert fake.named("StopUnit") == [(path.unit, "replace")]
    remove(cgroup.record)  # again: systemd no longer knows the unit


def test_what_a_killed_owner_left_is_removed_by_the_plan(
    fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]
) -> None:
    planned = plan_record(find_layout(), path)
    Cgroup.create(path, HostLimits(), layout=find_layout(), pid=sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    remove(planned)
    assert fake.units == {}


def test_removal_kills_nobody(fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]) -> None:
    """To stop a scope is to kill what is in it."""
    cgroup = Cgroup.create(path, HostLimits(), layout=find_layout(), pid=sleeper.pid)
    for each in (cgroup.record, cgroup.record._replace(made=())):
        with pytest.raises(Timeout, match=rf"cannot remove {path.unit}: processes {sleeper.pid} still in it"):
            remove(each, timeout=0.1)
    assert fake.named("StopUnit") == []
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()
    remove(cgroup.record)


def test_what_does_not_end_by_itself_is_killed(
    fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]
) -> None:
    """The end of a pod whose shim was killed; but nobody in a scope that was there before."""
    cgroup = Cgroup.create(path, HostLimits(), layout=find_layout(), pid=sleeper.pid)
    with pytest.raises(Timeout, match="still in it"):
        reap(plan_record(find_layout(), path), patience=0.1)
    assert sleeper.poll() is None
    reap(cgroup.record, patience=0.1)
    assert sleeper.wait() == -signal.SIGKILL
    assert fake.named("StopUnit") == [(path.unit, "replace")]


def test_a_failure_after_the_scope_leaves_nothing_and_kills_nobody(
    fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]
) -> None:
    before = Path(f"/proc/{sleeper.pid}/cgroup").read_text()
    with pytest.raises(InvalidArgument):
        Cgroup.create(path, HostLimits(cpuset_cpus="4000"), layout=find_layout(), pid=sleeper.pid)
    assert sleeper.poll() is None
    assert Path(f"/proc/{sleeper.pid}/cgroup").read_text() == before
    # systemd ends a scope that has become empty; this one is told to.
    systemd.stop_unit(path.unit)


@pytest.mark.parametrize("path", ["early"], indirect=True)
def test_a_job_may_end_before_its_number_is_known(
    fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]
) -> None:
    systemd.start_scope(path.unit, path.slice, sleeper.pid, HostLimits(), version=1, timeout=30)
    sleeper.kill()
    sleeper.wait()
    systemd.stop_unit(path.unit)


@pytest.mark.parametrize("path", ["fail"], indirect=True)
def test_a_job_that_fails(fake: FakeSystemd, path: CgroupPath) -> None:
    with pytest.raises(Unavailable, match=rf"^cannot start {path.unit}: systemd's job ended as 'failed'$"):
        systemd.start_scope(path.unit, path.slice, os.getpid(), HostLimits(), version=1)


def test_a_bus_that_greets_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an emulated host it takes more than a second; jeepney gave it one, whatever was asked for."""
    address = tmp_path / "bus"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen()
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={address}")
        began = time.monotonic()
        with pytest.raises(Timeout, match=r"systemd has not answered within 1\.5 s$"):
            systemd.stop_unit("c1.scope", timeout=1.5)
        assert time.monotonic() - began >= 1.5


@pytest.mark.parametrize("path", ["stuck"], indirect=True)
def test_a_job_that_never_ends(fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]) -> None:
    with pytest.raises(Timeout, match=r"^cannot start .*: systemd has not answered within 0\.3 s$"):
        systemd.start_scope(path.unit, path.slice, sleeper.pid, HostLimits(), version=1, timeout=0.3)
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(Timeout, match=r"^cannot stop "):
        systemd.stop_unit(path.unit, timeout=0.3)


def test_a_unit_that_runs_is_anothers(fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]) -> None:
    """The process of the one that was refused was moved out of where it was."""
    cgroup = Cgroup.create(path, HostLimits(), layout=find_layout(), pid=sleeper.pid)
    with pytest.raises(AlreadyExists, match="systemd has a unit of this name"):
        Cgroup.create(path, HostLimits(), layout=find_layout(), pid=sleeper.pid)
    assert processes(cgroup.record) == [sleeper.pid]
    sleeper.kill()
    sleeper.wait()
    remove(cgroup.record)


def test_a_unit_that_has_failed_makes_way(
    fake: FakeSystemd, path: CgroupPath, sleeper: subprocess.Popen[bytes]
) -> None:
    fake.failed.add(path.unit)
    systemd.start_scope(path.unit, path.slice, sleeper.pid, HostLimits(), version=1)
    assert len(fake.named("StartTransientUnit")) == 2
    sleeper.kill()
    sleeper.wait()
    systemd.stop_unit(path.unit)


def test_no_such_unit(fake: FakeSystemd, path: CgroupPath) -> None:
    systemd.stop_unit(path.unit)
    with pytest.raises(NotFound, match="systemd has no such unit"):
        systemd.set_limits(path.unit, HostLimits(pids=1), version=1)


def test_nobody_is_systemd_on_this_bus(bus: str, path: CgroupPath) -> None:
    with pytest.raises(Unavailable, match=r"^cannot start .*org\.freedesktop\.systemd1"):
        systemd.start_scope(path.unit, path.slice, os.getpid(), HostLimits(), version=1)


@pytest.mark.parametrize("address", ["unix:path=/nonexistent/bus", "tcp:host=localhost", "nonsense"])
def test_no_bus(address: str, path: CgroupPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    with pytest.raises(Unavailable, match=r"^cannot stop .*: systemd cannot be reached by D-Bus: "):
        systemd.stop_unit(path.unit)


def test_a_scope_needs_a_process(path: CgroupPath) -> None:
    with pytest.raises(Internal, match="without a process"):
        Cgroup.create(path, HostLimits(), layout=find_layout())
