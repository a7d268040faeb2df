"""Pods as Kubernetes makes them: containerd's CRI plugin with katapy as a runtime handler, and CNI's plugins."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from containerd_daemon import Containerd
from cri import MISSING, SLEEP, Cri, await_true, pod

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
RUNNING, EXITED = 1, 2


def state(cri: Cri, container: str) -> tuple[int, int]:
    """Return a container's state and exit code."""
    found = cri.container("ContainerStatus", container).status
    return found.state, found.exit_code


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
        stats = cri.container("ContainerStats", web).stats
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
    """SIGTERM first; a program that heeds it ends with what it likes."""
    with pod(cri, tmp_path) as (sandbox, config):
        script = "trap 'exit 5' TERM; echo ready; while true; do sleep 0.1; done"
        container = cri.start(sandbox, config, "c1", "sh", "-c", script)
        await_true(lambda: "ready" in (tmp_path / "c1.log").read_text())
        cri.stop(container, 30)
        assert state(cri, container) == (EXITED, 5)


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


def test_killed_shim(cri: Cri, cri_daemon: Containerd, tmp_path: Path) -> None:
    """All of the pod has ended, and can be removed; another pod never notices."""
    with pod(cri, tmp_path, "p2") as (other, config):
        witness = cri.start(other, config, "c1", *SLEEP)
        with pod(cri, tmp_path) as (sandbox, config):
            containers = [cri.start(sandbox, config, name, *SLEEP) for name in ("c2", "c3")]
            os.kill(cri_daemon.shim(sandbox), signal.SIGKILL)
            for container in containers:
                await_true(lambda container=container: state(cri, container)[0] == EXITED)  # type: ignore[misc]
        assert cri.execute(witness, "echo", "alive")[1] == "alive\n"
