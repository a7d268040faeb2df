"""The host's cgroups, on whichever layout this machine has: made, filled, read back, changed, removed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy.cgroups.cgroup import Cgroup, plan_record
from katapy.cgroups.directory import Record, kill, processes, reap, remove
from katapy.cgroups.layout import Hierarchy, Layout, find_layout
from katapy.cgroups.limits import DeviceValue, HostLimits
from katapy.cgroups.path import Driver, parse_cgroups_path
from katapy.errors import (
    AlreadyExists,
    InvalidArgument,
    InvalidState,
    KatapyError,
    NotFound,
    Timeout,
    Unavailable,
    Unsupported,
)
from katapy.sandbox.host_cgroup import HostCgroup

pytestmark = pytest.mark.root
MIB = 1 << 20


def snapshot() -> set[str]:
    """Return every cgroup of this host that could be ours."""
    found = set()
    for hierarchy in find_layout().hierarchies:
        for path, _, _ in os.walk(hierarchy.mount):
            if "katapy" in path:
                found.add(path)
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left(top: str) -> Iterator[None]:
    """Of what these tests make; others may be making theirs."""
    yield
    assert [path for path in snapshot() if top in path or "katapy-test-x" in path] == []


@pytest.fixture
def layout() -> Layout:
    found = find_layout()
    if not any(hierarchy.writable for hierarchy in found.hierarchies):
        pytest.skip("this machine has no cgroup that can be written")
    return found


@pytest.fixture
def top() -> str:
    return f"/katapy-test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def make(layout: Layout, path: str, limits: HostLimits | None = None, pid: int | None = None) -> Cgroup:
    parsed = parse_cgroups_path(path, Driver.CGROUPFS, "c1")
    return Cgroup.create(parsed, limits or HostLimits(), layout=layout, pid=pid)


def end(cgroup: Cgroup, process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    remove(cgroup.record)


def value(cgroup: Cgroup, controller: str, v1: str, v2: str) -> str:
    hierarchy = cgroup.layout.find(controller)
    assert hierarchy is not None
    directory = cgroup.record.paths[hierarchy.name or "unified"]
    return Path(directory, v1 if hierarchy.version == 1 else v2).read_text().strip()


def limit_of(cgroup: Cgroup, memory: str = "limit_in_bytes") -> int:
    return int(value(cgroup, "memory", f"memory.{memory}", "memory.max"))


def test_a_process_is_in_every_hierarchy_and_all_is_removed(
    layout: Layout, top: str, sleeper: subprocess.Popen[bytes]
) -> None:
    cgroup = make(layout, f"{top}/pod/c1", pid=sleeper.pid)
    writable = [hierarchy for hierarchy in layout.hierarchies if hierarchy.writable]
    assert len(cgroup.record.paths) == len(writable)
    lines = Path(f"/proc/{sleeper.pid}/cgroup").read_text().splitlines()
    assert sum(line.endswith(f":{top}/pod/c1") for line in lines) == len(writable)
    assert processes(cgroup.record) == [sleeper.pid]
    assert cgroup.oom_kills() == 0
    end(cgroup, sleeper)
    remove(cgroup.record)  # again: nothing to do
    assert not any(top in path for path in snapshot())


def test_limits_are_in_force_and_change(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    limits = HostLimits(
        memory_bytes=64 * MIB,
        cpu_shares=512,
        cpu_quota=20_000,
        cpu_period=50_000,
        cpuset_cpus="0",
        pids=20,
        hugetlb=(("2MB", 2 * MIB),) if layout.find("hugetlb") else (),
    )
    cgroup = make(layout, top, limits, sleeper.pid)
    assert limit_of(cgroup) == 64 * MIB
    assert value(cgroup, "cpu", "cpu.shares", "cpu.weight") in ("512", "20")
    assert value(cgroup, "cpuset", "cpuset.cpus", "cpuset.cpus") == "0"
    assert value(cgroup, "pids", "pids.max", "pids.max") == "20"
    assert os.sched_getaffinity(sleeper.pid) == {0}
    # Up and down again: in v1 the order of the two writes differs.
    for memory in (256 * MIB, 32 * MIB):
        cgroup.update(HostLimits(memory_bytes=memory, memory_swap_bytes=2 * memory, pids=-1))
        assert limit_of(cgroup) == memory
    assert value(cgroup, "pids", "pids.max", "pids.max") == "max"
    cgroup.update(HostLimits(memory_bytes=-1, cpu_quota=-1))
    assert value(cgroup, "memory", "memory.limit_in_bytes", "memory.max") in ("max", "9223372036854771712")
    assert value(cgroup, "cpu", "cpu.cfs_quota_us", "cpu.max") in ("-1", "max 50000")
    end(cgroup, sleeper)


def block_device() -> DeviceValue | None:
    for path in Path("/sys/block").iterdir():
        if not path.name.startswith(("loop", "ram", "zram")):
            major, minor = (path / "dev").read_text().strip().split(":")
            return DeviceValue(int(major), int(minor), 10 * MIB)
    return None


def test_block_io_is_throttled(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    device = block_device()
    if device is None:
        pytest.skip("this machine has no disk")
    limits = HostLimits(read_bps=(device,), write_bps=(device,), read_iops=(device,))
    cgroup = make(layout, top, limits, sleeper.pid)
    kind = "io" if layout.find("io") else "blkio"
    assert str(10 * MIB) in value(cgroup, kind, "blkio.throttle.read_bps_device", "io.max")
    cgroup.update(HostLimits(read_bps=(device._replace(value=0),)))
    shown = value(cgroup, kind, "blkio.throttle.read_bps_device", "io.max")
    assert f"rbps={10 * MIB}" not in shown
    assert kind == "io" or shown == ""
    end(cgroup, sleeper)


EATER = "import sys; sys.stdin.read(1); held = b'x' * ({} << 20); print('full', flush=True); sys.stdin.read(1)"


def start_eater(mebibytes: int) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", EATER.format(mebibytes)], stdin=pipe, stdout=pipe)


def talk(eater: subprocess.Popen[bytes]) -> bytes:
    assert eater.stdin is not None
    assert eater.stdout is not None
    eater.stdin.write(b"x")
    eater.stdin.flush()
    return eater.stdout.readline()


def test_an_out_of_memory_kill_is_counted(layout: Layout, top: str) -> None:
    with start_eater(100) as eater:
        cgroup = make(layout, top, HostLimits(memory_bytes=32 * MIB, memory_swap_bytes=32 * MIB), eater.pid)
        assert talk(eater) == b""
        assert eater.wait() == -signal.SIGKILL
    assert cgroup.oom_kills() == 1
    remove(cgroup.record)


def test_no_limit_below_what_is_in_use(layout: Layout, top: str) -> None:
    """v2's kernel would kill the VM to make the limit hold."""
    with start_eater(64) as eater:
        cgroup = make(layout, top, HostLimits(memory_bytes=128 * MIB, memory_swap_bytes=128 * MIB), eater.pid)
        assert talk(eater) == b"full\n"
        with pytest.raises(InvalidState, match=r"in use"):
            cgroup.update(HostLimits(memory_bytes=32 * MIB, memory_swap_bytes=32 * MIB))
        assert eater.poll() is None
        assert cgroup.oom_kills() == 0
        end(cgroup, eater)


def test_a_limit_that_the_kernel_refuses_leaves_nothing(
    layout: Layout, top: str, sleeper: subprocess.Popen[bytes]
) -> None:
    before = Path(f"/proc/{sleeper.pid}/cgroup").read_text()
    for limits in (
        HostLimits(cpu_quota=5, cpu_period=5),
        HostLimits(read_bps=(DeviceValue(4000, 4000, 1),)),
    ):
        with pytest.raises(InvalidArgument, match=rf"^cannot set .* of cgroup .*{top}"):
            make(layout, f"{top}/a/b", limits, sleeper.pid)
        assert not any(top in path for path in snapshot())
    assert Path(f"/proc/{sleeper.pid}/cgroup").read_text() == before


def test_no_such_file_is_unsupported(layout: Layout, top: str) -> None:
    if layout.find("hugetlb") is None:
        pytest.skip("this machine has no hugetlb controller")
    with pytest.raises(Unsupported, match="the kernel has no such file"):
        make(layout, top, HostLimits(hugetlb=(("3MB", 0),)))


def test_a_process_that_has_ended(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(NotFound, match="has ended"):
        make(layout, top, pid=sleeper.pid)


def test_removal_waits_for_what_is_ending(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    cgroup = make(layout, top, pid=sleeper.pid)
    with pytest.raises(
        Timeout, match=rf"cannot remove cgroup .*{top}: processes {sleeper.pid} still in it after 0.1 s"
    ):
        remove(cgroup.record, timeout=0.1)
    assert sleeper.poll() is None
    timer = threading.Timer(0.3, sleeper.kill)
    timer.start()
    remove(cgroup.record, timeout=60)
    timer.join()


def test_leaving_for_a_cgroup_that_is_gone(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    """A session that has ended: the shim stayed in the pod's cgroup, which could not be removed, and never was."""
    session = make(layout, f"{top}-session", pid=sleeper.pid)
    cgroup = make(find_layout(sleeper.pid), top)
    cgroup.add(sleeper.pid)
    remove(session.record)
    cgroup.leave(sleeper.pid)
    remove(cgroup.record)
    assert sleeper.poll() is None


def test_a_pid_that_is_another_process_s_by_now(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    """It is where it was: a stranger was taken out of its own cgroup at the removal of a pod's."""
    cgroup, pods = make(layout, f"{top}/other", pid=sleeper.pid), make(layout, f"{top}/pod")
    own = HostCgroup(pods)
    own._guests.append(sleeper.pid)
    own.remove()
    assert processes(cgroup.record) == [sleeper.pid]
    end(cgroup, sleeper)


def test_a_cgroup_that_others_remove_while_it_is_waited_for(
    layout: Layout, top: str, sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As systemd removes a scope that is empty: a file that was open before cannot be read then."""
    cgroup = make(layout, top, pid=sleeper.pid)
    places = [Path(path) for path in cgroup.record.paths.values()]
    waited: list[None] = []

    class Poll:
        def register(self, *_: object) -> None:
            pass

        def poll(self, _timeout: float) -> None:
            waited.append(None)
            sleeper.kill()
            sleeper.wait()
            for path in places:
                path.rmdir()

    if not any((path / "cgroup.events").exists() for path in places):
        end(cgroup, sleeper)
        pytest.skip("this machine has no cgroup v2, where there is something to wait for")
    with monkeypatch.context() as patch:
        patch.setattr(select, "poll", Poll)
        remove(cgroup.record)
    assert len(waited) == 1


def test_kill_ends_all_but_the_caller(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    cgroup = make(layout, top, pid=sleeper.pid)
    cgroup.add(os.getpid())
    try:
        kill(cgroup.record, timeout=60)
        assert sleeper.wait() == -signal.SIGKILL
        assert processes(cgroup.record) == [os.getpid()]
    finally:
        cgroup.leave(os.getpid())
    remove(cgroup.record)


def test_what_does_not_end_by_itself_is_killed(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    """A hook's child, for one, that outlives a killed shim; it held up the removal, and stayed."""
    cgroup = make(layout, top, pid=sleeper.pid)
    began = time.monotonic()
    reap(cgroup.record, patience=0.2)
    assert time.monotonic() - began >= 0.2
    assert sleeper.wait() == -signal.SIGKILL
    assert not any(top in path for path in snapshot())


def test_nothing_is_killed_in_a_cgroup_that_was_there_before(
    layout: Layout, top: str, sleeper: subprocess.Popen[bytes]
) -> None:
    """The plan of an owner that was killed before it saw that somebody is in it."""
    others = make(layout, top, pid=sleeper.pid)
    planned = plan_record(layout, parse_cgroups_path(top, Driver.CGROUPFS, "c1"))
    with pytest.raises(Timeout, match="still in it"):
        reap(planned, patience=0.1)
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()
    remove(others.record)


def test_leave_goes_back_to_where_the_caller_was(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    before = Path(f"/proc/{sleeper.pid}/cgroup").read_text()
    cgroup = make(layout, top, pid=sleeper.pid)
    assert Path(f"/proc/{sleeper.pid}/cgroup").read_text() != before
    cgroup.leave(sleeper.pid)
    assert Path(f"/proc/{sleeper.pid}/cgroup").read_text() == before
    remove(cgroup.record)


def test_what_was_there_before_stays(layout: Layout, top: str) -> None:
    parents = [Path(f"{hierarchy.mount}{top}") for hierarchy in layout.hierarchies if hierarchy.writable]
    for parent in parents:
        (parent / "pod").mkdir(parents=True)
    try:
        inner, existing = make(layout, f"{top}/new/c1"), make(layout, f"{top}/pod")
        remove(inner.record)
        remove(existing.record)
        assert all(sorted(child.name for child in parent.iterdir() if child.is_dir()) == ["pod"] for parent in parents)
    finally:
        for parent in parents:
            (parent / "pod").rmdir()
            parent.rmdir()


def test_the_last_of_two_pods_removes_the_parent_that_the_first_made(layout: Layout, top: str) -> None:
    first, second = make(layout, f"{top}/a"), make(layout, f"{top}/b")
    remove(first.record)
    assert any(path.endswith(f"{top}/b") for path in snapshot())
    remove(second.record)
    assert not any(top in path for path in snapshot())


def test_a_cgroup_in_use_is_not_shared(layout: Layout, top: str, sleeper: subprocess.Popen[bytes]) -> None:
    cgroup = make(layout, top, pid=sleeper.pid)
    for pid in (None, sleeper.pid):
        with pytest.raises(AlreadyExists, match="with processes in it"):
            make(layout, top, pid=pid)
    assert processes(cgroup.record) == [sleeper.pid]
    end(cgroup, sleeper)


def test_a_cgroup_that_somebody_made_below_is_not_removed(layout: Layout, top: str) -> None:
    cgroup = make(layout, top)
    child = Path(next(iter(cgroup.record.paths.values())), "child")
    child.mkdir()
    with pytest.raises(Timeout, match="cgroup child is still in it"):
        remove(cgroup.record, timeout=0.1)
    child.rmdir()
    remove(cgroup.record)


@pytest.mark.parametrize("text", ["/cgroup.procs/x", "/katapy-test-x/cgroup.procs", "/katapy-test-x/cgroup.procs/y"])
def test_a_path_over_a_file_of_the_hierarchy(layout: Layout, text: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot make cgroup"):
        make(layout, text)


def test_a_relative_path_is_below_or_beside_the_caller(layout: Layout, top: str) -> None:
    cgroup = make(layout, top.strip("/"))
    for hierarchy in layout.hierarchies:
        own = hierarchy.own if hierarchy.version == 1 else os.path.dirname(hierarchy.own)
        path = f"{hierarchy.mount}{own.rstrip('/')}{top}"
        assert cgroup.record.paths.get(hierarchy.name or "unified", path) == path
    remove(cgroup.record)


@pytest.fixture
def v2_parent(layout: Layout, top: str) -> Iterator[Path]:
    """A cgroup in the v2 hierarchy that is not ours; skips where v2 carries no controller to limit with."""
    hierarchy = layout.find("hugetlb")
    if hierarchy is None or hierarchy.version == 1:
        pytest.skip("no hugetlb controller in cgroup v2")
    path = Path(f"{hierarchy.mount}{top}")
    path.mkdir()
    yield path
    path.rmdir()


def test_v2_parent_with_processes_cannot_limit(
    layout: Layout, top: str, v2_parent: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """Enabling what could be enabled made the parent a threaded domain, and with that its children of no use."""
    (v2_parent / "cgroup.procs").write_text(str(sleeper.pid))
    with pytest.raises(Unavailable, match=rf"cannot limit hugetlb in cgroup .*{top}: has processes of its own$"):
        make(layout, f"{top}/c1", HostLimits(hugetlb=(("2MB", 0),)))
    remove(make(layout, f"{top}/c1").record)  # without that limit, it can be made
    assert (v2_parent / "cgroup.type").read_text() == "domain\n"
    sleeper.kill()
    sleeper.wait()


def test_v2_parent_that_is_threaded(layout: Layout, top: str, v2_parent: Path) -> None:
    (v2_parent / "inner").mkdir()
    (v2_parent / "inner/cgroup.type").write_text("threaded")
    try:
        with pytest.raises(Unavailable, match=r"its type is 'domain invalid', a parent is threaded"):
            make(layout, f"{top}/inner/c1")
    finally:
        (v2_parent / "inner").rmdir()


CRASH = """
import json, os, signal, sys
from katapy.cgroups.cgroup import Cgroup, plan_record
from katapy.cgroups.layout import find_layout
from katapy.cgroups.limits import HostLimits
from katapy.cgroups.path import Driver, parse_cgroups_path
layout, path = find_layout(), parse_cgroups_path(sys.argv[1], Driver.CGROUPFS, "c1")
print(json.dumps(plan_record(layout, path)._asdict()), flush=True)
Cgroup.create(path, HostLimits(), layout=layout, pid=os.getpid())
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_owner_left_is_removed_by_the_plan(layout: Layout, top: str) -> None:
    """The record that was saved before anything was made is enough."""
    done = subprocess.run([sys.executable, "-c", CRASH, f"{top}/a/c1"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(path.endswith(f"{top}/a/c1") for path in snapshot())
    remove(Record.parse(json.loads(done.stdout)))
    assert not any(top in path for path in snapshot())


def test_a_record_reaches_nothing_but_cgroups(layout: Layout, tmp_path: Path) -> None:
    """Even one that was tampered with."""
    (tmp_path / "empty").mkdir()
    mount = layout.hierarchies[0].mount
    remove(Record({"memory": str(tmp_path / "empty"), "x": mount}, (str(tmp_path / "empty"), mount)))
    assert (tmp_path / "empty").is_dir()


@pytest.mark.parametrize(
    "document",
    [
        None,
        {"paths": {}, "made": []},
        {"paths": {"memory": "/a/../b"}, "made": [], "unit": ""},
        {"paths": {"memory": "a"}, "made": [], "unit": ""},
        {"paths": {}, "made": ["/"], "unit": ""},
        {"paths": {}, "made": [7], "unit": ""},
        {"paths": [], "made": [], "unit": ""},
        {"paths": {}, "made": [], "unit": None},
    ],
)
def test_a_damaged_record_is_refused(document: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^cgroup: "):
        Record.parse(document)


def test_simultaneous_pods_below_one_parent(layout: Layout, top: str) -> None:
    """A parent goes with its last child while the next one is being made in it."""
    failures: list[KatapyError] = []

    def churn(name: str) -> None:
        try:
            for _ in range(30):
                remove(make(layout, f"{top}/{name}").record)
        except KatapyError as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(f"c{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not any(top in path for path in snapshot())


class TestWithoutCgroups:
    """Inside of a container that sees no cgroup, or only read-only ones."""

    @pytest.fixture(params=["none", "read-only"])
    def bare(self, request: pytest.FixtureRequest) -> Layout:
        if request.param == "none":
            return Layout(())
        return Layout((Hierarchy(1, "/sys/fs/cgroup/memory", "/", ("memory",), writable=False),))

    def test_nothing_asked(self, bare: Layout) -> None:
        path = parse_cgroups_path("", Driver.CGROUPFS, "c1")
        cgroup = Cgroup.create(path, HostLimits(), layout=bare, pid=os.getpid())
        assert cgroup.record == Record({}, (), "")
        assert plan_record(bare, path) == Record({}, (), "")
        assert cgroup.oom_kills() == 0
        remove(cgroup.record)

    def test_a_path_asked(self, bare: Layout) -> None:
        path = parse_cgroups_path("/x", Driver.CGROUPFS, "c1")
        with pytest.raises(Unavailable, match="cannot make cgroup"):
            Cgroup.create(path, HostLimits(), layout=bare)

    def test_a_limit_asked(self, bare: Layout) -> None:
        path = parse_cgroups_path("", Driver.CGROUPFS, "c1")
        with pytest.raises(Unsupported, match="cannot limit memory on this host"):
            Cgroup.create(path, HostLimits(memory_bytes=MIB), layout=bare)
