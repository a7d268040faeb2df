"""What of Debian's packages gets into the guest's root, and what does not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import python_root
import rootfs


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("usr/bin/python3.11", True),
        ("usr/lib/x86_64-linux-gnu/libc.so.6", True),
        ("usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30", True),
        ("usr/lib64/ld-linux-x86-64.so.2", True),
        ("usr/lib/python3.11/asyncio/tasks.py", True),
        ("usr/lib/python3.11/token.py", True),  # begins like nothing that is left out
        ("usr/lib/python3.11/testing.py", True),  # begins like test
        ("usr/lib/python3.11/lib-dynload/_ctypes.cpython-311-x86_64-linux-gnu.so", True),
        ("usr/lib/python3.11/lib-dynload/_ctypes_test.cpython-311-x86_64-linux-gnu.so", False),
        ("usr/lib/python3.11/test/support.py", False),
        ("usr/lib/python3.11/pydoc.py", False),
        ("usr/lib/x86_64-linux-gnu/libcrypto.so.3", False),
        ("usr/lib/x86_64-linux-gnu/libcrypt.so.1", False),
        ("usr/bin/dpkg", False),
        ("usr/bin/python3.11-config", False),
        ("usr/share/doc/libc6/copyright", False),
        ("etc/passwd", False),
    ],
)
def test_selection(name: str, kept: bool) -> None:
    assert bool(rootfs._KEPT.fullmatch(name)) is kept


def test_both_names_of_the_merged_directories_end_in_one_place(tmp_path: Path) -> None:
    archive = tmp_path / "debian.tar"
    with tarfile.open(archive, "w") as tar:
        for name, target in (("./lib/x86_64-linux-gnu/libz.so.1", "libz.so.1.2.13"), ("./usr/bin/dpkg", "x")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        program = tarfile.TarInfo("./usr/bin/python3.11")
        program.size, program.mode = 3, 0o755
        tar.addfile(program, io.BytesIO(b"elf"))
    python_root.extract(archive, tmp_path / "root", rootfs._KEPT)
    files = {str(path.relative_to(tmp_path / "root")) for path in (tmp_path / "root").rglob("*") if not path.is_dir()}
    assert files == {"usr/lib/x86_64-linux-gnu/libz.so.1", "usr/bin/python3.11"}
    assert (tmp_path / "root/usr/lib/x86_64-linux-gnu/libz.so.1").readlink() == Path("libz.so.1.2.13")
    assert (tmp_path / "root/usr/bin/python3.11").stat().st_mode & 0o777 == 0o755
