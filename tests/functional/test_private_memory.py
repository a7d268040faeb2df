"""Pods that share a template's memory, each with what it writes to itself: those with a root that is a disk, where the
vsock device is the kernel's, so that nobody but QEMU maps a guest's memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import Katapy, MakeBundle, await_true, vsock_kind

from katapy.hypervisor.held_memory import RECORD
from katapy.hypervisor.qemu import QEMU
from katapy.oci.disk import ROOT_DISK
from katapy.transport.vsock import VsockKind

pytestmark = pytest.mark.skipif(
    vsock_kind() is not VsockKind.KERNEL, reason="katapy's own vsock device maps the guest's memory, too"
)
MIB = 1 << 20


class Mapping(NamedTuple):
    """How a QEMU maps its guest's memory; ``pss`` and ``shared`` in bytes."""

    mode: str
    pss: int
    shared: int


@pytest.fixture
def disk_bundle(bundle: MakeBundle, busybox: Path, tmp_path: Path) -> Path:
    image = tmp_path / "root.erofs"
    subprocess.run(["mkfs.erofs", "--quiet", image, busybox], check=True, capture_output=True)

    def edit(spec: dict[str, Any]) -> None:
        spec["annotations"] = {ROOT_DISK: str(image)}

    return bundle(["sleep", "100000"], edit=edit)


def _mapping(katapy: Katapy, name: str) -> Mapping:
    """Return how the memory of a pod's guest is mapped: of all files in memory it is the largest by far."""
    pid = next(each["pid"] for each in katapy.saved(name)["helpers"] if each["name"] == QEMU)
    found: list[tuple[int, Mapping]] = []
    mode, values = "", dict[str, int]()
    for line in [*Path(f"/proc/{pid}/smaps").read_text().splitlines(), "0-0 end"]:
        key, *rest = line.split()
        if key.endswith(":") and rest and rest[0].isdigit():
            values[key] = int(rest[0]) << 10
        elif "-" in key:
            if mode:
                shared = values["Shared_Clean:"] + values["Shared_Dirty:"]
                found.append((values["Size:"], Mapping(mode, values["Pss:"], shared)))
            mode = rest[0] if "memfd:" in line else ""
    return max(found)[1]


def _held(katapy: Katapy, name: str) -> Path:
    """Return a path of the memory that a pod's shim holds."""
    record = json.loads((katapy.root / name / RECORD).read_text())
    return Path(f"/proc/{record['pid']}/fd/{record['fd']}")


def _sum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while data := file.read(MIB):
            found = zlib.crc32(data, found)
    return found


def test_pods_share_a_template_and_nothing_else(katapy: Katapy, bundle: MakeBundle, disk_bundle: Path) -> None:
    """The second takes the first one's, which stays as it was whatever they write; and outlives the first's shim."""
    # The template is made, if it has to be, and then there is a pod with a copy.
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "100000"]), "copied")
    for name in ("c1", "c2"):
        katapy.detach("run", "--detach", "--bundle", disk_bundle, name)
    first, second, copied = (_mapping(katapy, name) for name in ("c1", "c2", "copied"))
    print(f"mapped: first {first}, second {second}, copied {copied}")
    assert (first.mode, second.mode, copied.mode) == ("rw-p", "rw-p", "rw-s")
    assert os.path.samestat(_held(katapy, "c1").stat(), _held(katapy, "c2").stat())
    assert second.shared > 8 * MIB
    assert second.pss < 0.85 * copied.pss

    held = _held(katapy, "c2")
    before = _sum(held)
    for name in ("c1", "c2"):
        script = f"echo {name} > /dev/shm/name && dd if=/dev/urandom of=/dev/shm/fill bs=1M count=4 && sync"
        katapy("exec", name, "sh", "-c", script, check=True)
    for name in ("c1", "c2"):
        assert katapy("exec", name, "cat", "/dev/shm/name", check=True).stdout.decode() == f"{name}\n"
    assert _sum(held) == before

    shim = katapy.saved("c1")["shim"]["pid"]
    os.kill(shim, signal.SIGKILL)
    await_true(lambda: katapy.state("c1")["status"] == "stopped")
    assert katapy("exec", "c2", "cat", "/dev/shm/name", check=True).stdout == b"c2\n"
    assert _sum(held) == before
    # The one that was killed is passed over: who still holds it hands it on.
    katapy.detach("run", "--detach", "--bundle", disk_bundle, "c3")
    assert os.path.samestat(_held(katapy, "c3").stat(), held.stat())
    for name in ("c1", "c2", "c3", "copied"):
        katapy("delete", "--force", name, check=True)
