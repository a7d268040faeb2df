"""What the guest makes of a container, seen from inside real virtual machines."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from harness import DEADLINE, Katapy, MakeBundle, make_busybox


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_setuid_programs(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """The guest mounted what the host shares nosuid, and a writable root and volumes inherited it."""
    rootfs, volume = make_busybox(tmp_path / "rootfs"), tmp_path / "volume"
    volume.mkdir()
    shutil.copy(rootfs / "bin/busybox", volume / "su")
    for program in (rootfs / "bin/busybox", volume / "su"):
        program.chmod(0o4755)
    (rootfs / "etc/passwd").write_text("root::0:0:root:/root:/bin/sh\n")

    def edit(spec: dict[str, Any]) -> None:
        spec["process"] |= {"user": {"uid": 1000, "gid": 1000}, "noNewPrivileges": False}
        spec["process"]["capabilities"]["bounding"] += ["CAP_SETUID", "CAP_SETGID"]
        for destination, options in (("/volume", ["rbind"]), ("/nosuid", ["rbind", "nosuid"])):
            mount = {"destination": destination, "type": "bind", "source": str(volume), "options": options}
            spec["mounts"].append(mount)

    script = "id -u; /bin/su -c 'id -u'; /volume/su -c 'id -u'; /nosuid/su -c 'id -u' || echo refused"
    done = katapy("run", "--bundle", bundle(sh(script), rootfs=rootfs, edit=edit), "c1")
    assert done.stdout.split() == [b"1000", b"0", b"0", b"refused"], done.stderr


def test_exec_beside_cgroups_of_the_container(katapy: Katapy, bundle: MakeBundle) -> None:
    """An init system in the container moves everything into cgroups below; the kernel keeps exec out of the leaf."""

    def edit(spec: dict[str, Any]) -> None:
        mount = next(mount for mount in spec["mounts"] if mount["destination"] == "/sys/fs/cgroup")
        mount["options"].remove("ro")

    script = """
        cd /sys/fs/cgroup && mkdir -p init/it && echo 0 > init/it/cgroup.procs && echo +pids > cgroup.subtree_control
        echo up; sleep 1000
    """
    with katapy.start("run", "--bundle", bundle(sh(script), edit=edit), "c1", stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        done = katapy("exec", "c1", "cat", "/proc/self/cgroup")
        terminated = katapy("exec", "c1", *sh("kill -TERM $$"))
        katapy("kill", "c1", "KILL", check=True)
        status = process.wait(DEADLINE)
    assert done.stdout == b"0::/init/it\n", done.stderr
    assert (terminated.returncode, status) == (128 + signal.SIGTERM, 128 + signal.SIGKILL)


def test_program_that_cannot_be_executed(katapy: Katapy, bundle: MakeBundle) -> None:
    done = katapy("run", "--bundle", bundle(["/etc/passwd"]), "c1")
    assert done.returncode == 126
    assert b'exec: "/etc/passwd": permission denied' in done.stderr


def test_limits_of_huge_pages_and_of_memory(katapy: Katapy, bundle: MakeBundle) -> None:
    """Huge pages are limited in both of their files, and a pid 1 that the kernel kills for want of memory gives 137."""

    def edit(spec: dict[str, Any]) -> None:
        limit = {"pageSize": "2MB", "limit": 4 << 20}
        spec["linux"]["resources"] |= {"memory": {"limit": 64 << 20}, "hugepageLimits": [limit]}

    script = "cat /sys/fs/cgroup/hugetlb.2MB.max /sys/fs/cgroup/hugetlb.2MB.rsvd.max; exec tail /dev/zero"
    done = katapy("run", "--bundle", bundle(sh(script), edit=edit), "c1")
    assert done.stdout.split() == [b"4194304"] * 2, done.stderr
    assert done.returncode == 128 + signal.SIGKILL


def test_user_namespace(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """On a read-only virtio-fs root: ids are mapped, both ways, and what is the VM's can still be set and used."""
    volume = tmp_path / "volume"
    volume.mkdir()
    os.chown(volume, 100000, 100000)

    def edit(spec: dict[str, Any]) -> None:
        spec["process"]["user"] = {"uid": 7, "gid": 7}
        linux = spec["linux"]
        linux["namespaces"].append({"type": "user"})
        for name in ("uidMappings", "gidMappings"):
            linux[name] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
        linux["sysctl"] = {"net.ipv4.ip_default_ttl": "77", "kernel.msgmax": "4321"}
        mount = {"destination": "/new/volume", "type": "bind", "source": str(volume), "options": ["rbind"]}
        spec["mounts"].append(mount)

    script = """
        echo $(id -u) $(id -g) $(cat /proc/self/uid_map) $(stat -c %u /bin /new/volume)
        touch /x || echo read-only
        cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/msgmax
        echo stdout > /dev/stdout; echo null > /dev/null
        ls /sys/fs/cgroup/cgroup.procs
        echo up; sleep 1000
    """
    with katapy.start("run", "--bundle", bundle(sh(script), edit=edit), "c1", stdout=subprocess.PIPE) as process:
        assert process.stdout
        lines = list(itertools.takewhile(lambda line: line != b"up\n", process.stdout))
        written = katapy("exec", "--user", "0:0", "c1", *sh("echo root > /dev/stdout; echo x > /new/volume/file"))
        katapy("kill", "c1", "KILL", check=True)
        process.wait(DEADLINE)
    assert lines == [
        *(b"7 7 0 100000 65536 65534 0\n", b"read-only\n", b"77\n", b"4321\n", b"stdout\n"),
        b"/sys/fs/cgroup/cgroup.procs\n",
    ]
    assert (written.returncode, written.stdout) == (0, b"root\n"), written.stderr
    status = (volume / "file").stat()
    assert (status.st_uid, status.st_gid) == (100000, 100000)


def test_mounts_inside_a_read_only_root(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """An overlay covers such a root, and whatever was mounted in it was "Object is remote"."""
    rootfs = make_busybox(tmp_path / "rootfs")
    (rootfs / "srv").mkdir(mode=0o711)
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "file").write_text("volume")
    places = [rootfs / "data", rootfs / "data/in", rootfs / "data-x", rootfs / "srv/a b"]

    def edit(spec: dict[str, Any]) -> None:
        spec["root"]["readonly"] = True
        mount = {"destination": "/data/volume", "type": "bind", "source": str(volume), "options": ["rbind"]}
        spec["mounts"] += [mount, {"destination": "/new/place", "type": "tmpfs", "source": "tmpfs"}]

    script = """
        cat /data/file /data/in/file /data-x/file "/srv/a b/file" /data/volume/file; touch /new/place/x
        for path in / /data /data/in "/srv/a b" /data-x /srv /new; do touch "$path/x"; done 2>&1 | grep -c Read-only
        stat -c %a /srv; ls /
    """
    try:
        for place in places:
            place.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
            (place / "file").write_text(f"{place.name}\n")
        (rootfs / "data/volume").mkdir()
        done = katapy("run", "--bundle", bundle(sh(script), rootfs=rootfs, edit=edit), "c1")
    finally:
        for place in reversed(places):
            if place.is_mount():
                subprocess.run(["umount", place], check=True)
    lines = done.stdout.decode().splitlines()
    assert lines[:4] == ["data", "in", "data-x", "a b"], done.stderr
    assert lines[4:7] == ["volume7", "711", "bin"], done.stderr
