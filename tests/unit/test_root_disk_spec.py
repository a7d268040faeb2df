"""A disk that is a root file system: how it is named, what it may be, and what its container cannot have beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from katapy.cgroups.layout import Hierarchy, Layout
from katapy.errors import InvalidArgument, KatapyError, NotFound, Unavailable, Unsupported
from katapy.oci.default import default_spec
from katapy.oci.disk import ROOT_DISK
from katapy.oci.layer import INODES, SIZE
from katapy.oci.spec import Spec, parse_spec
from katapy.sandbox.host_cgroup import boot_limits
from katapy.sandbox.share import check_shareable
from katapy.storage.root_disk import SERIAL, open_root_disk

EROFS = bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(3068)


def _spec(
    path: str | None, annotations: dict[str, str] | None = None, *, mounts: list[dict[str, Any]] | None = None
) -> Spec:
    own = {} if path is None else {ROOT_DISK: path}
    document = {**default_spec(), "annotations": {**own, **(annotations or {})}}
    document["mounts"] = [*document["mounts"], *(mounts or [])]
    return parse_spec(json.dumps(document).encode(), bundle="/b")


def test_a_path_starts_at_the_bundle_or_at_the_root() -> None:
    assert _spec("disks/root.erofs").root_disk == "/b/disks/root.erofs"
    assert _spec("/srv/root.erofs").root_disk == "/srv/root.erofs"
    assert _spec(None).root_disk == ""


@pytest.mark.parametrize("path", ["", "../root.erofs", "/srv/../root.erofs"])
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(InvalidArgument, match=f"annotations.*{ROOT_DISK}"):
        _spec(path)


def test_what_cannot_be_had_with_it() -> None:
    with pytest.raises(Unsupported, match="has no layer of bounded size"):
        _spec("/d", {SIZE: "1048576", INODES: "100"})
    pod = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    with pytest.raises(Unsupported, match="is for the first container of a pod"):
        _spec("/d", pod)


def test_files_of_the_host_are_refused_by_name() -> None:
    bind = {"destination": "/etc/hosts", "type": "bind", "source": "/srv/hosts", "options": ["bind"]}
    with pytest.raises(Unsupported, match=r"cannot create c1: its root is a disk, and mounts\[\d\] binds /srv/hosts"):
        check_shareable(_spec("/d", mounts=[bind]), "c1", pod_root_disk="/d")
    with pytest.raises(Unsupported, match="cannot create c2: the root of its pod is a disk"):
        check_shareable(_spec(None), "c2", pod_root_disk="/d")
    check_shareable(_spec("/d"), "c1", pod_root_disk="/d")
    check_shareable(_spec(None, mounts=[bind]), "c1", pod_root_disk="")


def test_the_template_s_memory_is_added_to_the_limit_of_the_pod() -> None:
    """It counts for the pod that has filled it, which may write to all of its own memory besides."""
    layout = Layout((Hierarchy(2, "/c", "/", ("memory", "cpu", "cpuset", "pids", "io"), writable=True),))
    plain, private = (
        boot_limits(spec, vcpus=1, memory_bytes=256 << 20, emulated=False, layout=layout).memory_bytes
        for spec in (_spec(None), _spec("/d"))
    )
    assert plain is not None
    assert private == plain + (72 << 20)


def test_a_file_is_opened_for_reading(tmp_path: Path) -> None:
    image = tmp_path / "root.erofs"
    image.write_bytes(EROFS)
    with open_root_disk(str(image)) as disk:
        assert (disk.serial, disk.is_block_device) == (SERIAL, False)
        assert os.fstat(disk.fd).st_size == len(EROFS)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(disk.fd, b"x")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "something else"),
        (b"hsqs" + bytes(4092), "squashfs"),
        (bytes(0x438) + b"\x53\xef" + bytes(4096), "ext4"),
        (b"QFI\xfb" + bytes(4092), "qcow2"),
    ],
)
def test_what_is_no_erofs_is_refused_by_name(tmp_path: Path, data: bytes, found: str) -> None:
    image = tmp_path / "root"
    image.write_bytes(data)
    with (
        pytest.raises(Unsupported, match=f"it holds {found}, and must be a raw image of erofs"),
        open_root_disk(str(image)),
    ):
        pass


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(EROFS)
    (tmp_path / "link").symlink_to("image")
    os.mkfifo(tmp_path / "fifo")
    cases: list[tuple[str, type[KatapyError], str]] = [
        ("none", NotFound, "no such file"),
        ("link", InvalidArgument, "it is a symbolic link"),
        ("fifo", InvalidArgument, "neither a regular file nor a block device"),
        (".", InvalidArgument, "neither a regular file nor a block device"),
        # A regular file, of which nothing is mapped at 0: as a device whose medium is bad.
        ("/proc/self/mem", Unavailable, "cannot read root disk /proc/self/mem: input/output error"),
    ]
    for name, kind, problem in cases:
        with pytest.raises(kind, match=problem), open_root_disk(str(tmp_path / name)):
            pass
