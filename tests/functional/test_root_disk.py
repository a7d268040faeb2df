"""Containers whose root file system is a disk, with `katapy`: no file of the host is shared with their VM."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Edit, Katapy, MakeBundle

from katapy.oci.disk import ROOT_DISK


@pytest.fixture(scope="module")
def image(busybox: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erofs of busybox's root."""
    path = tmp_path_factory.mktemp("disk") / "root.erofs"
    subprocess.run(["mkfs.erofs", "--quiet", path, busybox], check=True, capture_output=True)
    return path


def on_disk(image: Path, *, read_only: bool = True, change: Callable[[dict[str, Any]], None] | None = None) -> Edit:
    """Give the container this image as its root."""

    def edit(spec: dict[str, Any]) -> None:
        spec.setdefault("annotations", {})[ROOT_DISK] = str(image)
        spec["root"]["readonly"] = read_only
        if change is not None:
            change(spec)

    return edit


def _helpers(katapy: Katapy, name: str) -> set[str]:
    return {each["name"] for each in katapy.saved(name)["helpers"]}


def test_a_read_only_root(katapy: Katapy, bundle: MakeBundle, image: Path) -> None:
    """The disk is what the container sees, and neither it nor anybody else writes to it."""
    before = image.read_bytes()
    script = "ls /bin/busybox; touch /new 2>&1; grep -c virtiofs /proc/mounts; cat /sys/block/vdb/ro; echo end"
    done = katapy("run", "--bundle", bundle(["sh", "-c", script], edit=on_disk(image)), "c1", check=True)
    listed, error, shares, device, end = done.stdout.decode().splitlines()
    assert (listed, shares, device, end) == ("/bin/busybox", "0", "1", "end")
    assert "Read-only file system" in error
    assert image.read_bytes() == before


def test_a_writable_root_and_its_life(katapy: Katapy, bundle: MakeBundle, image: Path) -> None:
    """What is written is in the guest's memory; exec, kill, events and delete are as with any other root."""
    before = image.read_bytes()
    script = "echo written > /etc/new; rm /etc/passwd; cat /etc/new; sleep 1000"
    path = bundle(["sh", "-c", script], edit=on_disk(image, read_only=False))
    katapy.detach("run", "--detach", "--bundle", path, "c1")
    assert "virtiofsd" not in _helpers(katapy, "c1")
    seen = katapy("exec", "c1", "sh", "-c", "cat /etc/new; test -e /etc/passwd || echo gone; id -u", check=True)
    assert seen.stdout.decode().split() == ["written", "gone", "0"]
    assert b"c1" in katapy("events", "--stats", "c1", check=True).stdout
    katapy("kill", "c1", "KILL", check=True)
    katapy("delete", "--force", "c1", check=True)
    assert image.read_bytes() == before


def test_a_vm_that_is_booted_has_it_too(katapy: Katapy, bundle: MakeBundle, image: Path, tmp_path: Path) -> None:
    config = tmp_path / "cold.toml"
    config.write_text("[hypervisor]\ntemplate = false\n")
    config.chmod(0o600)
    cold = Katapy(katapy.root, options=("--config", str(config)))
    done = cold(
        "run", "--bundle", bundle(["ls", "/bin/busybox"], edit=on_disk(image, read_only=False)), "c1", check=True
    )
    assert done.stdout == b"/bin/busybox\n"


def test_what_is_refused(katapy: Katapy, bundle: MakeBundle, image: Path, tmp_path: Path) -> None:
    """By name, with what to do instead, before a VM is started."""

    def bound(spec: dict[str, Any]) -> None:
        spec["mounts"].append({"destination": "/mnt", "type": "bind", "source": str(tmp_path), "options": ["bind"]})

    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"hsqs" + bytes(8192))
    cases = [
        (on_disk(image, change=bound), "put it into the disk"),
        (on_disk(wrong), "it holds squashfs, and must be a raw image of erofs"),
        (on_disk(tmp_path / "none"), "no such file"),
    ]
    for edit, problem in cases:
        done = katapy("run", "--bundle", bundle(["true"], edit=edit), "c1")
        assert done.returncode != 0
        assert problem in done.stderr.decode(), done.stderr
        assert done.stderr.decode().count("\n") == 1


@pytest.fixture
def block_device(image: Path) -> Iterator[Path]:
    attached = subprocess.run(
        ["losetup", "--find", "--show", "--read-only", image], capture_output=True, text=True, check=False
    )
    if attached.returncode != 0:
        pytest.skip(f"no loop device can be had here: {attached.stderr.strip()}")
    device = Path(attached.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def test_a_block_device(katapy: Katapy, bundle: MakeBundle, block_device: Path) -> None:
    done = katapy("run", "--bundle", bundle(["ls", "/bin/busybox"], edit=on_disk(block_device)), "c1", check=True)
    assert done.stdout == b"/bin/busybox\n"


def test_a_pod_with_a_disk_has_one_container(katapy: Katapy, bundle: MakeBundle, image: Path) -> None:
    """The second one is refused by name, and the first goes on."""

    def sandbox(spec: dict[str, Any]) -> None:
        spec["annotations"] |= {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "c1"}

    def member(spec: dict[str, Any]) -> None:
        own = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "c1"}
        spec.setdefault("annotations", {}).update(own)

    first = bundle(["sleep", "1000"], edit=on_disk(image, change=sandbox))
    katapy.detach("run", "--detach", "--bundle", first, "c1")
    cases = [
        (member, "such a pod has one container"),
        (on_disk(image, change=member), "for the first container of a pod"),
    ]
    for edit, problem in cases:
        done = katapy("run", "--bundle", bundle(["true"], edit=edit), "c2")
        assert done.returncode != 0
        assert problem in done.stderr.decode(), done.stderr
    assert katapy("exec", "c1", "echo", "alive", check=True).stdout == b"alive\n"
    katapy("delete", "--force", "c1", check=True)
