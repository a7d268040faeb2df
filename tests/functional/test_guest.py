"""What the guest makes of a container, seen from inside real virtual machines."""

from __future__ import annotations

import shutil
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
        katapy("kill", "c1", "KILL", check=True)
        process.wait(DEADLINE)
    assert done.stdout == b"0::/init/it\n", done.stderr


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
