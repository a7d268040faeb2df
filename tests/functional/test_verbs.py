"""The verbs on a running container: pause, resume, update, events, ps; a pod's second container; startContainer hooks.

A VM takes seconds to boot, so each test asks one VM for many things.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE, Edit, Katapy, MakeBundle


@pytest.fixture
def bundle(bundle: MakeBundle) -> MakeBundle:
    """As all tests have it, with cgroups that meet those of no other run."""
    count = 0

    def make(args: Sequence[str], *, edit: Edit | None = None, rootfs: Path | None = None) -> Path:
        nonlocal count
        count += 1

        def with_cgroup(spec: dict[str, Any]) -> None:
            spec["linux"]["cgroupsPath"] = f"/katapy-test-{os.getpid()}-{count}"
            if edit is not None:
                edit(spec)

        return bundle(args, edit=with_cgroup, rootfs=rootfs)

    return make


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait for what the command line cannot wait for itself."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def refused(done: subprocess.CompletedProcess[bytes], text: str) -> None:
    assert done.returncode == 1, done
    assert text in done.stderr.decode(), done.stderr


def output_of(katapy: Katapy, name: str, script: str) -> str:
    return katapy("exec", name, *sh(script), check=True).stdout.decode()


def test_pause_and_resume(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    output = tmp_path / "output"
    ticking = sh("trap 'echo term' TERM; i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done")
    katapy.detach("create", "--bundle", bundle(ticking), "c1", output=output)
    refused(katapy("pause", "c1"), "cannot pause container c1: it is created")
    refused(katapy("resume", "c1"), "cannot resume container c1: it is created")
    katapy("start", "c1", check=True)
    refused(katapy("resume", "c1"), "cannot resume container c1: it is running")

    katapy("pause", "c1", check=True)
    state = katapy.state("c1")
    assert state["status"] == "paused"
    assert state["pid"] > 0

    def silent() -> bool:
        before = output.read_bytes()
        time.sleep(0.5)  # ten ticks
        return output.read_bytes() == before

    # What was written before may still be on its way; one that goes on is never silent.
    eventually(silent, "it goes on")
    seen = output.read_bytes()
    refused(katapy("pause", "c1"), "cannot pause container c1: it is paused")
    refused(katapy("start", "c1"), "cannot start container c1: it is paused")
    refused(katapy("exec", "c1", "true"), "cannot execute a process in container c1: it is paused")
    refused(katapy("delete", "c1"), "cannot delete container c1 that is not stopped: paused")
    katapy("kill", "c1", "TERM", check=True)
    waiting = katapy.start("exec", "--ignore-paused", "c1", "/bin/echo", "woken", stdout=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    assert b"term" not in output.read_bytes()

    katapy("resume", "c1", check=True)
    assert katapy.state("c1")["status"] == "running"
    assert waiting.communicate(timeout=DEADLINE)[0] == b"woken\n"
    eventually(lambda: b"term" in output.read_bytes(), "the signal did not arrive")
    eventually(lambda: output.read_bytes().count(b"\n") > seen.count(b"\n") + 5, "it does not go on")

    katapy("pause", "c1", check=True)
    katapy("kill", "c1", "KILL", check=True)
    eventually(lambda: katapy.state("c1")["status"] == "stopped", "a paused container was not killed")
    refused(katapy("resume", "c1"), "cannot resume container c1: it is stopped")
    katapy("delete", "c1", check=True)


def test_delete_force_of_a_paused_container(katapy: Katapy, bundle: MakeBundle) -> None:
    katapy.detach("run", "--detach", "--bundle", bundle(sh("sleep 1000 & sleep 1000")), "c1")
    katapy("pause", "c1", check=True)
    katapy("delete", "--force", "c1", check=True)


def test_update(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"] |= {
            "memory": {"limit": 64 << 20},
            "cpu": {"quota": 50_000, "period": 100_000},
            "pids": {"limit": 50},
        }

    def files(*names: str) -> list[str]:
        return output_of(katapy, "c1", f"cd /sys/fs/cgroup && cat {' '.join(names)}").splitlines()

    def quota_on_host() -> str:
        paths = json.loads((katapy.root / "c1/state.json").read_text())["cgroup"]["paths"].values()
        files = [Path(path, name) for path in paths for name in ("cpu.cfs_quota_us", "cpu.max")]
        return next(file for file in files if file.exists()).read_text().split()[0]

    katapy.detach("create", "--bundle", bundle(sh("sleep 1000"), edit=edit), "c1")
    assert quota_on_host() == "75000"  # a quarter of a CPU for QEMU itself
    katapy("update", "--pids-limit", "40", "c1", check=True)
    katapy("start", "c1", check=True)
    assert files("pids.max") == ["40"]
    flags = ("--memory", "96M", "--memory-reservation", "1048576", "--cpu-share", "2048", "--cpuset-cpus", "0")
    katapy("update", *flags, "--cpu-quota", "20000", "--pids-limit", "-1", "c1", check=True)
    names = ("memory.max", "memory.low", "cpu.weight", "cpuset.cpus", "cpu.max", "pids.max")
    assert files(*names) == [str(96 << 20), "1048576", "79", "0", "20000 100000", "max"]
    document = {"cpu": {"period": 50_000}, "unified": {"memory.high": str(80 << 20)}, "memory": {"limit": 0}}
    katapy("update", "--resources", "-", "--memory", "1", "c1", stdin=json.dumps(document).encode(), check=True)
    assert quota_on_host() == "32500"
    assert files("cpu.max", "memory.high", "memory.max") == ["20000 50000", str(80 << 20), str(96 << 20)]
    path = tmp_path / "resources.json"
    path.write_text(json.dumps({"memory": {"limit": 80 << 20}}))
    katapy("pause", "c1", check=True)
    katapy("update", "--resources", path, "c1", check=True)
    katapy("resume", "c1", check=True)
    assert files("memory.max") == [str(80 << 20)]

    # Beyond the VM.
    refused(katapy("update", "--memory", "100g", "c1"), f"memory limit {100 << 30}: its VM has 1 vCPUs and ")
    refused(katapy("update", "--cpu-quota", "1000000", "c1"), "CPU quota 1000000 of a period of 50000: its VM has 1")
    refused(katapy("update", "--cpuset-cpus", "0-7", "c1"), "CPUs 0-7: its VM has 1 vCPUs")
    # What cannot change, by name; and nothing of what came with it has changed.
    rules = [{"allow": True, "access": "rwm"}]
    for change, text in (
        ({"devices": rules}, "devices cannot be changed"),
        ({"cpu": {"realtimeRuntime": 1000}}, "realtimeRuntime"),
        ({"memory": {"kernel": 1 << 20}}, "kernel"),
        ({"memory": {"limit": 4096, "checkBeforeUpdate": True}}, "memory limit 4096 is not above what is in use"),
        ({"unified": {"memory.nonsense": "1"}}, "memory.nonsense"),
        ({"cpu": {"mems": "7"}}, "cpuset.mems"),
        ({"pids": {"limit": "many"}}, "resources: pids.limit: expected an integer"),
    ):
        whole = {"pids": {"limit": 7}, **change}
        refused(katapy("update", "-r", "-", "c1", stdin=json.dumps(whole).encode()), text)
        assert files("pids.max") == ["max"], change
    refused(katapy("update", "--l3-cache-schema", "L3:0=f", "c1"), "resctrl")
    assert files(*names) == [str(80 << 20), "1048576", "79", "0", "20000 50000", "max"]
    assert quota_on_host() == "32500"

    katapy("update", "--pids-limit", "8", "--cpu-quota", "-1", "c1", check=True)
    assert files("cpu.max") == ["max 50000"]
    assert quota_on_host() in ("-1", "max")
    assert "can't fork" in katapy("exec", "c1", *sh("for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done")).stderr.decode()
    katapy("kill", "c1", "KILL", check=True)
    eventually(lambda: katapy.state("c1")["status"] == "stopped", "it was not killed")
    refused(katapy("update", "--pids-limit", "8", "c1"), "cannot update container c1: it is stopped")
    katapy("delete", "c1", check=True)


def test_events_and_processes(katapy: Katapy, bundle: MakeBundle) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"] |= {"memory": {"limit": 64 << 20}, "pids": {"limit": 50}}

    katapy.detach("run", "--detach", "--bundle", bundle(sh("while :; do sleep 1; done"), edit=edit), "c1")
    report = json.loads(katapy("events", "--stats", "c1", check=True).stdout)
    assert (report["type"], report["id"]) == ("stats", "c1")
    data = report["data"]
    usage = data["cpu"]["usage"]
    # Nanoseconds: a shell takes more than a microsecond and less than a minute.
    assert 1_000_000 < usage["total"] < 60_000_000_000
    assert usage["user"] + usage["kernel"] <= usage["total"] * 1.01
    assert data["memory"]["usage"]["limit"] == 64 << 20
    assert 0 < data["memory"]["usage"]["usage"] < 64 << 20
    assert 0 < data["memory"]["raw"]["anon"] < 64 << 20
    assert data["pids"] == {"current": data["pids"]["current"], "limit": 50}
    assert data["pids"]["current"] >= 1
    refused(katapy("events", "--interval", "5", "c1"), "is not a duration")

    ready = katapy.start("exec", "c1", *sh("echo ready; sleep 1000"), stdout=subprocess.PIPE)
    assert ready.stdout is not None
    assert ready.stdout.readline() == b"ready\n"
    pids = json.loads(katapy("ps", "--format", "json", "c1", check=True).stdout)
    assert sorted(pids) == sorted([katapy.state("c1")["pid"], ready.pid])
    header, *lines = katapy("ps", "c1", "-ef", check=True).stdout.decode().splitlines()
    assert header.split() == ["UID", "PID", "EXEC", "CMD"]
    assert "while :; do sleep 1; done" in lines[0]
    assert lines[0].split()[:3] == ["0", "1", "-"]
    [executed] = [line.split() for line in lines if "sleep 1000" in line]
    assert executed[2] != "-"
    ready.kill()
    ready.communicate()

    following = katapy.start("events", "--interval", "1s", "c1", stdout=subprocess.PIPE)
    assert following.stdout is not None
    first = [json.loads(following.stdout.readline())["type"] for _ in range(2)]
    assert first == ["stats", "stats"]
    assert katapy("exec", "c1", *sh("tail /dev/zero")).returncode == 137
    kinds: list[str] = []
    while "oom" not in kinds:
        kinds.append(json.loads(following.stdout.readline())["type"])
    # At once: the stats in between are those that came while the memory filled.
    katapy("kill", "c1", "KILL", check=True)
    following.communicate(timeout=DEADLINE)
    assert following.returncode == 0
    refused(katapy("events", "c1"), "container with id c1 is not running")
    assert json.loads(katapy("ps", "--format", "json", "c1", check=True).stdout) == []
    katapy("delete", "c1", check=True)


def _hook(script: str, **members: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **members}


def test_start_container_hooks(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """In the container, before its program and with what that has: as under runc, measured against 1.1.5."""
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o777)
    facts = "cat > state; (pwd; id -u; echo $0 $A-$B; readlink /proc/self/ns/pid; grep -i -e CapEff -e Seccomp: \
/proc/self/status) > facts; chmod 777 facts || echo refused >> facts"

    def edit(spec: dict[str, Any]) -> None:
        spec["process"] |= {"cwd": "/volume", "user": {"uid": 1000, "gid": 1000}}
        spec["process"]["env"] += ["A=program"]
        spec["process"]["capabilities"] = {}
        spec["mounts"].append({"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind"]})
        spec["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}],
        }
        spec["annotations"] = {"colour": "green"}
        spec["hooks"] = {
            "startContainer": [
                {"path": "/bin/sh", "args": ["sh", "-c", facts, "own-name"]},
                _hook("/bin/pwd > second; echo $A-$B >> second", env=["B=hook"], timeout=60),
            ]
        }

    directory = bundle(sh("cat facts second; readlink /proc/self/ns/pid; ls > last"), edit=edit)
    output = tmp_path / "output"
    katapy.detach("create", "--bundle", directory, "c1", output=output)
    assert list(volume.iterdir()) == []
    katapy("start", "c1", check=True)
    eventually(lambda: katapy.state("c1")["status"] == "stopped", "it does not end")
    cwd, uid, names, pid_namespace, *rest = output.read_text().splitlines()
    assert (cwd, uid, names) == ("/volume", "1000", "own-name program-")
    assert rest[:3] == ["CapEff:\t0000000000000000", "Seccomp:\t2", "refused"]
    assert rest[3:] == ["/volume", "-hook", pid_namespace]
    assert json.loads((volume / "state").read_text()) == {
        "ociVersion": json.loads((directory / "config.json").read_text())["ociVersion"],
        "id": "c1",
        "status": "created",
        "pid": 1,
        "bundle": str(directory),
        "annotations": {"colour": "green"},
    }
    katapy("delete", "c1", check=True)


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (_hook("echo out; echo err >&2; exit 3"), "ended with status 3: out | err"),
        (_hook("sleep 1000", timeout=1), "did not end within 1 s"),
        ({"path": "/bin/nonsense"}, "ended with status 127: no such file or directory"),
    ],
)
def test_a_start_container_hook_that_fails(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, hook: dict[str, Any], text: str
) -> None:
    def edit(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"startContainer": [hook]}

    output = tmp_path / "output"
    katapy.detach("create", "--bundle", bundle(sh("echo program"), edit=edit), "c1", output=output)
    refused(katapy("start", "c1"), f"hooks.startContainer[0]: {hook['path']}: {text}")
    eventually(lambda: katapy.state("c1")["status"] == "stopped", "it goes on")
    assert output.read_bytes() == b""
    katapy("delete", "c1", check=True)


class PodOfTwo:
    """A pod whose sandbox is ``s1``; ``run`` puts another container into its VM."""

    # SIGTERM ends it, also as the init of a PID namespace. It does not fork again: until such a child has become
    # another program, it is listed as its parent.
    WAITING = sh("trap 'exit 9' TERM; sleep 1000 & wait")

    def __init__(self, katapy: Katapy, bundle: MakeBundle) -> None:
        self._katapy = katapy
        self._bundle = bundle

        def sandbox(spec: dict[str, Any]) -> None:
            spec["hostname"] = "pod"
            spec["annotations"] = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "s1"}

        katapy.detach("run", "--detach", "--bundle", bundle(self.WAITING, edit=sandbox), "s1")

    def bundle(self, *shared: str) -> Path:
        """Return a bundle of a container that shares these namespaces with the sandbox."""

        def edit(spec: dict[str, Any]) -> None:
            spec.pop("hostname")
            spec["annotations"] = {
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "s1",
            }
            for namespace in spec["linux"]["namespaces"]:
                if namespace["type"] in shared:
                    name = {"network": "net"}.get(namespace["type"], namespace["type"])
                    namespace["path"] = f"/proc/{self._katapy.state('s1')['pid']}/ns/{name}"

        return self._bundle(self.WAITING, edit=edit)

    def run(self, name: str, *shared: str) -> None:
        """Run a container that shares these namespaces with the sandbox."""
        self._katapy.detach("run", "--detach", "--bundle", self.bundle(*shared), name)

    def seen(self, name: str, script: str) -> str:
        """Return what a script prints in a container."""
        return output_of(self._katapy, name, script).strip()

    def ends(self, name: str) -> None:
        """Wait until a container has."""
        eventually(lambda: self._katapy.state(name)["status"] == "stopped", "it does not end")


@pytest.fixture
def pod(katapy: Katapy, bundle: MakeBundle) -> PodOfTwo:
    return PodOfTwo(katapy, bundle)


def test_a_pod_of_two(katapy: Katapy, pod: PodOfTwo) -> None:
    """Containers in the VM of a first: what they share, and that the end of one is not the other's."""
    kinds = ("ipc", "uts", "pid", "net", "mnt", "cgroup")
    look = f"""cat /proc/sys/kernel/random/boot_id; hostname; ps | grep -c '[t]rap'
        for kind in {" ".join(kinds)}; do readlink /proc/self/ns/$kind; done"""
    pod.run("m1", "ipc", "uts", "network")
    pod.run("m2", "ipc", "uts", "pid", "network")
    found = {}
    for name in ("s1", "m1", "m2"):
        boot_id, hostname, inits, *links = pod.seen(name, look).splitlines()
        found[name] = (boot_id, hostname, int(inits), dict(zip(kinds, links, strict=True)))
    (_, _, _, first), (_, _, _, second), (_, _, _, third) = found.values()
    assert {kind for kind in first if first[kind] == second[kind]} == {"ipc", "uts", "net"}
    assert {kind for kind in first if first[kind] == third[kind]} == {"ipc", "uts", "net", "pid"}
    assert {boot_id for boot_id, *_ in found.values()} == {found["s1"][0]}
    assert {hostname for _, hostname, *_ in found.values()} == {"pod"}
    # m2's init is one process of the sandbox's namespace; they see each other.
    assert [inits for _, _, inits, _ in found.values()] == [2, 1, 2]

    # As it is not pid 1 of a namespace of its own, its children are not the kernel's to kill.
    katapy.detach("exec", "--detach", "m2", "/bin/sleep", "4321")
    katapy("kill", "m2", "KILL", check=True)
    pod.ends("m2")
    eventually(lambda: "4321" not in pod.seen("s1", "ps"), "its processes survive it")
    assert katapy.state("s1")["status"] == katapy.state("m1")["status"] == "running"
    katapy("kill", "m1", "TERM", check=True)
    pod.ends("m1")
    for name in ("m2", "m1"):
        katapy("delete", name, check=True)
    assert pod.seen("s1", "hostname") == "pod"
    katapy("delete", "--force", "s1", check=True)


def test_the_end_of_a_pod_s_sandbox(katapy: Katapy, pod: PodOfTwo) -> None:
    """Its PID namespace ends with it, nobody comes after it, and its VM stays for who is still there."""
    pod.run("m1", "pid")
    katapy("kill", "s1", "KILL", check=True)
    pod.ends("s1")
    # The kernel kills what is in the PID namespace of the init that has ended.
    pod.ends("m1")
    refused(katapy("create", "--bundle", pod.bundle("ipc"), "m2"), "s1 is stopped")
    refused(katapy("delete", "s1"), "cannot delete s1: its VM is shared by m1")
    assert katapy.state("m1")["status"] == "stopped"
    katapy("delete", "m1", check=True)
    katapy("delete", "s1", check=True)
