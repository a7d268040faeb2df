"""Pods as Kubernetes makes them: containerd's CRI plugin with katapy as a runtime handler, and CNI's plugins."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from containerd_daemon import Containerd
from cri import EXITED, MISSING, RUNNING, SLEEP, Cri, pod, state
from harness import await_true

from katapy.cgroups.limits import pod_memory

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def test_a_pod_s_life(cri: Cri, tmp_path: Path) -> None:
    """Two containers in one VM, which share its network."""
    with pod(cri, tmp_path) as (sandbox, config):
        address = cri.pod("PodSandboxStatus", sandbox).status.network.ip
        assert address.startswith("10.79.0.")
        web = cri.start(sandbox, config, "web", "httpd", "-f", "-p", "80", "-h", "/etc")
        other = cri.start(sandbox, config, "other", "sh", "-c", "echo out; echo err >&2; exec sleep 1000")
        assert cri.execute(other, "wget", "-q", "-O-", "http://127.0.0.1/group")[1].startswith("root:")
        assert cri.execute(other, "hostname")[1] == "p1\n"
        assert f"inet {address}/" in cri.execute(web, "ip", "addr", "show", "eth0")[1]
        boots = {cri.execute(each, "cat", "/proc/sys/kernel/random/boot_id")[1] for each in (web, other)}
        assert len(boots) == 1
        assert cri.execute(web, "sh", "-c", "echo o; echo e >&2; exit 3") == (3, "o\n", "e\n")
        await_true(lambda: len((tmp_path / "other.log").read_text().splitlines()) == 2)
        logged = [line.split(" ", 1)[1] for line in (tmp_path / "other.log").read_text().splitlines()]
        assert sorted(logged) == ["stderr F err", "stdout F out"]
        everything = cri.call("ListContainerStats", cri.messages.ListContainerStatsRequest()).stats
        assert {each.attributes.id for each in everything} == {web, other}
        for stats in (cri.container("ContainerStats", web).stats, *everything):
            assert stats.memory.working_set_bytes.value > 1 << 16
            assert stats.cpu.usage_core_nano_seconds.value > 0
        cri.stop(other)
        assert state(cri, other) == (EXITED, 137)
        cri.container("RemoveContainer", other)
        assert state(cri, web) == (RUNNING, 0)


def test_a_container_that_is_started_again(cri: Cri, tmp_path: Path) -> None:
    """In a pod that lives: an init container first, and one that fails."""
    with pod(cri, tmp_path) as (sandbox, config):
        for number in range(3):
            container = cri.start(sandbox, config, f"c{number}", "sh", "-c", f"exit {number}")
            await_true(lambda container=container: state(cri, container)[0] == EXITED)  # type: ignore[misc]
            assert state(cri, container) == (EXITED, number)
            cri.container("RemoveContainer", container)


def test_stop_takes_its_time(cri: Cri, tmp_path: Path) -> None:
    """SIGTERM first; a program that heeds it ends with what it likes, and one that does not is killed in the end."""
    with pod(cri, tmp_path) as (sandbox, config):
        deaf = cri.start(sandbox, config, "c2", "sh", "-c", "trap '' TERM; echo ready; while true; do sleep 0.1; done")
        await_true(lambda: "ready" in (tmp_path / "c2.log").read_text())
        began = time.monotonic()
        cri.stop(deaf, 2)
        assert time.monotonic() - began >= 2
        assert state(cri, deaf) == (EXITED, 137)
        script = "trap 'exit 5' TERM; echo ready; while true; do sleep 0.1; done"
        container = cri.start(sandbox, config, "c1", "sh", "-c", script)
        await_true(lambda: "ready" in (tmp_path / "c1.log").read_text())
        cri.stop(container, 30)
        assert state(cri, container) == (EXITED, 5)


def test_a_log_that_is_rotated(cri: Cri, tmp_path: Path) -> None:
    """What comes after the kubelet has said so is in the new file, and nothing is lost between the two."""
    count = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.02; done"
    with pod(cri, tmp_path) as (sandbox, config):
        container = cri.start(sandbox, config, "c1", "sh", "-c", count)
        log, old = tmp_path / "c1.log", tmp_path / "c1.log.1"
        await_true(lambda: len(log.read_text().splitlines()) > 5)
        log.rename(old)
        cri.container("ReopenContainerLog", container)
        await_true(lambda: len(log.read_text().splitlines()) > 5)
        cri.stop(container)
    numbers = [line.split()[-1] for path in (old, log) for line in path.read_text().splitlines()]
    assert numbers == [str(number + 1) for number in range(len(numbers))]


def test_memory_limits(cri: Cri, tmp_path: Path) -> None:
    """Changed while it runs; and a container that needs more is killed, which containerd hears of."""
    with pod(cri, tmp_path) as (sandbox, config):
        container = cri.start(sandbox, config, "c1", *SLEEP, memory=64 << 20)
        pb = cri.messages
        change = pb.LinuxContainerResources(memory_limit_in_bytes=32 << 20)
        cri.call("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=container, linux=change))
        assert cri.execute(container, "cat", "/sys/fs/cgroup/memory.max")[1] == f"{32 << 20}\n"
        hungry = cri.start(sandbox, config, "c2", "sh", "-c", "x=x; while true; do x=$x$x; done", memory=16 << 20)
        await_true(lambda: state(cri, hungry)[0] == EXITED)
        found = cri.container("ContainerStatus", hungry).status
        assert (found.exit_code, found.reason) == (137, "OOMKilled")


PYTHON = ("/usr:/usr", "/usr/lib:/lib", "/usr/lib64:/lib64")
# Each of the two waits for the other's number in a mapping that both hold open all the time.
PING_PONG = """
import mmap, os, sys
mine, other = int(sys.argv[1]), int(sys.argv[2])
fd = os.open("/dev/shm/table", os.O_RDWR | os.O_CREAT, 0o666)
os.ftruncate(fd, mmap.PAGESIZE)
table = mmap.mmap(fd, mmap.PAGESIZE)
for number in range(1, 101):
    if mine:
        while table[other] != number:
            os.sched_yield()
    table[mine] = number
    if not mine:
        while table[other] != number:
            os.sched_yield()
print("done", flush=True)
"""
SEGMENT = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.shmget(0x6b61, 4096, 0o1666) >= 0, flush=True)
"""


def test_what_the_containers_of_a_pod_share(cri: Cri, tmp_path: Path) -> None:
    """Memory, POSIX and System V, as if they were on one machine; their processes, where the pod says so; its name.

    A /dev/shm that was the host's directory showed each container what the other had mapped as it had been before.
    """
    config = cri.pod_config("p1", tmp_path)
    config.linux.security_context.namespace_options.pid = 0
    with pod(cri, tmp_path, config=config) as (sandbox, config):
        first = cri.start(sandbox, config, "c1", "/usr/bin/python3", "-IS", "-c", PING_PONG, "0", "1", mounts=PYTHON)
        second = cri.start(sandbox, config, "c2", *SLEEP, mounts=PYTHON)
        await_true(lambda: cri.execute(second, "ls", "/dev/shm")[1] == "table\n")
        assert cri.execute(second, "/usr/bin/python3", "-IS", "-c", PING_PONG, "1", "0") == (0, "done\n", "")
        await_true(lambda: state(cri, first) == (EXITED, 0))
        size = cri.execute(second, "df", "-k", "/dev/shm")[1].splitlines()[1].split()
        assert (size[0], size[1]) == ("shm", "65536")

        assert cri.execute(second, "/usr/bin/python3", "-IS", "-c", SEGMENT)[1] == "True\n"
        third = cri.start(sandbox, config, "c3", *SLEEP)
        assert f" {0x6B61} " in cri.execute(third, "cat", "/proc/sysvipc/shm")[1]
        assert cri.execute(third, "cat", "/dev/shm/table")[0] == 0
        assert cri.execute(third, "hostname")[1] == "p1\n"
        commands = cri.execute(third, "ps", "-o", "args")[1].splitlines()
        # The pod's own, which is init, and two of them.
        assert commands.count("sleep 1000") == 3
    assert list((tmp_path).glob("**/table")) == []


def test_the_size_of_a_pod(cri: Cri, cri_daemon: Containerd, tmp_path: Path) -> None:
    """What its containers need together, which is known when it is made; and the host holds all of it to that."""
    pb = cri.messages
    config = cri.pod_config("p1", tmp_path)
    config.linux.cgroup_parent = f"/katapy-pods-{os.getpid()}/pod1"
    resources = {"cpu_period": 100_000, "cpu_quota": 150_000, "cpu_shares": 512, "memory_limit_in_bytes": 200 << 20}
    config.linux.resources.CopyFrom(pb.LinuxContainerResources(**resources))
    config.linux.overhead.CopyFrom(pb.LinuxContainerResources(memory_limit_in_bytes=320 << 20))
    with pod(cri, tmp_path, config=config) as (sandbox, config):
        container = cri.start(sandbox, config, "c1", *SLEEP, memory=200 << 20)
        assert cri.execute(container, "nproc")[1] == "2\n"
        total = int(cri.execute(container, "awk", "/MemTotal/ {print $2}", "/proc/meminfo")[1]) << 10
        assert 270 << 20 < total <= 328 << 20
        change = pb.LinuxContainerResources(cpu_quota=50_000, cpu_period=100_000)
        cri.call("UpdateContainerResources", pb.UpdateContainerResourcesRequest(container_id=container, linux=change))
        assert cri.execute(container, "cat", "/sys/fs/cgroup/cpu.max")[1] == "50000 100000\n"

        # The plugin reads them of the cgroup around the pod's own: VM and helpers, not the containers alone.
        whole = cri.pod("PodSandboxStats", sandbox).stats.linux
        assert whole.memory.working_set_bytes.value > 64 << 20
        assert [each.attributes.id for each in whole.containers] == [container]

        saved = cri_daemon.saved(sandbox)
        places = {name: Path(place) for name, place in saved["cgroup"]["paths"].items()}
        assert all(str(place).endswith(f"{config.linux.cgroup_parent}/{sandbox}") for place in places.values())
        processes = {saved["shim"]["pid"], *(helper["pid"] for helper in saved["helpers"])}
        assert len(processes) >= 3
        for place in places.values():
            assert processes <= set(map(int, (place / "cgroup.procs").read_text().split()))
        limit = int(_limit(places, "memory", "memory.max", "memory.limit_in_bytes"))
        assert limit == pod_memory(328 << 20, emulated=saved["accelerator"] == "tcg")
        assert _limit(places, "cpu", "cpu.weight", "cpu.shares") in ("20", "512")


def _limit(places: dict[str, Path], controller: str, v2: str, v1: str) -> str:
    """Return a limit of the pod's cgroup, in whichever hierarchy this host has its controller."""
    for name, place in places.items():
        if controller in name.split(","):
            return (place / v1).read_text().strip()
    return (places["unified"] / v2).read_text().strip()
