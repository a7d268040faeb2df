"""What the guest makes of a container, seen from inside real virtual machines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from harness import Katapy, MakeBundle, make_busybox


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
