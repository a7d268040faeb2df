"""The writable layer that annotations ask for, with `katapy run`: bounded by the host, and gone with the pod."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from harness import Edit, Katapy, MakeBundle, make_busybox

from katapy.oci.layer import INODES, SIZE

MIB = 1 << 20


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A root file system that a container could change."""
    root = make_busybox(tmp_path / "rootfs")
    (root / "etc/kept").write_text("as it was\n")
    return root


def _layered(size: int | str, inodes: int | str) -> Edit:
    def edit(spec: dict[str, Any]) -> None:
        spec["annotations"] = {SIZE: str(size), INODES: str(inodes)}

    return edit


def _facts(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return what there is, and would show a change."""
    paths = (Path(directory, name) for directory, below, files in os.walk(root) for name in (*below, *files))
    return {
        str(path): (status.st_ino, status.st_size, status.st_mtime_ns) for path in paths for status in [path.lstat()]
    }


def test_what_is_written_is_bounded_and_the_root_untouched(katapy: Katapy, bundle: MakeBundle, rootfs: Path) -> None:
    """Changed, removed and new files are all in the layer: the root below is as it was, to the last time stamp."""
    before = _facts(rootfs)
    script = """
        echo changed > /etc/kept && rm /etc/passwd && mkdir /new && echo new > /new/file || exit 90
        cat /etc/kept /new/file
        dd if=/dev/zero of=/fill bs=64k count=64 2>&1 | grep -o 'No space left on device'
        stat -c %s /fill
        rm /fill && echo again > /again && cat /again
    """
    done = katapy("run", "--bundle", bundle(["sh", "-c", script], rootfs=rootfs, edit=_layered(2 * MIB, 1000)), "c1")
    assert done.returncode == 0, done.stderr
    changed, new, error, size, again = done.stdout.decode().splitlines()
    assert (changed, new, error, again) == ("changed", "new", "No space left on device", "again")
    assert MIB < int(size) < 2 * MIB
    assert _facts(rootfs) == before
    assert (rootfs / "etc/kept").read_text() == "as it was\n"


def test_files_are_bounded(katapy: Katapy, bundle: MakeBundle, rootfs: Path) -> None:
    script = """
        n=0; mkdir /d
        while true > /d/$n; do n=$((n+1)); done
        echo $n; rm /d/0 && true > /d/again && echo again
    """
    ran = bundle(["sh", "-c", f"({script}) 2>&1"], rootfs=rootfs, edit=_layered(16 * MIB, 40))
    done = katapy("run", "--bundle", ran, "c1")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    assert "No space left on device" in text
    found = re.search(r"^(\d+)\nagain$", text, re.MULTILINE)
    assert found, text
    assert 32 <= int(found[1]) <= 44


def test_a_layer_ends_with_its_pod(katapy: Katapy, bundle: MakeBundle, rootfs: Path) -> None:
    """Also when the shim is killed; the fixtures assert that no mount is left, and no directory."""
    edit = _layered(2 * MIB, 100)
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"], rootfs=rootfs, edit=edit), "c1")
    katapy("exec", "c1", "sh", "-c", "echo secret > /secret", check=True)
    assert katapy("exec", "c1", "cat", "/secret", check=True).stdout == b"secret\n"
    katapy("delete", "--force", "c1", check=True)
    second = bundle(["ls", "/secret"], rootfs=rootfs, edit=edit)
    done = katapy("run", "--bundle", second, "c1")
    assert (done.returncode, done.stdout) == (1, b"")
    assert not (rootfs / "secret").exists()


@pytest.mark.parametrize(("size", "inodes", "named"), [("1M", 100, SIZE), (4096, 1, INODES)])
def test_bad_bounds_are_refused(katapy: Katapy, bundle: MakeBundle, size: int | str, inodes: int, named: str) -> None:
    done = katapy("run", "--bundle", bundle(["true"], edit=_layered(size, inodes)), "c1")
    assert done.returncode == 1
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1
    assert named in done.stderr.decode()
