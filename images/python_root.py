"""A root file system around Debian's Python: what the guest's (rootfs.py) and that of sandboxes (default-root/) share.

Owns the layout of its directories, the unpacking of packages and the compiling. What goes in is the others' choice.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from steps import call

PYTHON: Final = "usr/bin/python3.11"

_LINKS: Final = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64", "sbin": "usr/sbin"}


def make_root(root: Path) -> None:
    """Make the new directory ``root`` with Debian's merged directories."""
    root.mkdir()
    for name, target in _LINKS.items():
        (root / target).mkdir(parents=True)
        (root / name).symlink_to(target)


def extract(archive: Path, root: Path, kept: re.Pattern[str]) -> None:
    """Unpack of the packages in the tar file ``archive`` the files whose whole name matches ``kept``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            # Debian's packages of this release still use both names of the merged directories.
            if name.partition("/")[0] in _LINKS:
                name = f"usr/{name}"
            if not kept.fullmatch(name) or member.isdir():
                continue
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.issym():
                path.symlink_to(member.linkname)
            else:
                file = tar.extractfile(member)
                assert file is not None, "Debian's packages of Python hold files and symbolic links only"
                path.write_bytes(file.read())
                path.chmod(member.mode)


def compile_modules(root: Path, jobs: Iterable[Sequence[str]]) -> None:
    """Compile modules by the root's own Python; ``jobs`` run at the same time, each with these arguments of compileall.

    Unchecked hashes instead of time stamps: equal sources give equal bytes, and nothing is compared when importing.
    Raises BuildError.
    """
    # -B: what the compiler itself imports must not be kept with its time stamp.
    python: list[str | Path] = ["chroot", root, f"/{PYTHON}", "-B"]
    compiler = [*python, "-S", "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash"]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: call([*compiler, *job]), jobs))
