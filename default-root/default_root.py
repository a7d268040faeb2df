"""Builds the root file system of a sandbox that is given none: default_root.py DIRECTORY CACHE.

Debian's whole Python, and busybox for a shell and the usual commands. Writes into the existing, empty directory
DIRECTORY:

    root/rootfs/        the tree, owned by root but for the home of the user sandbox (1000)
    root/facts.json     {"packages": ["name_version_architecture", ...]}

CACHE is that of images/build.py, whose packages these are, too: where it is there, nothing is downloaded. The same
inputs give the same bytes, owners, modes and times. Needs root, mmdebstrap, and Debian's static busybox. What has been
built, and where it is kept, is the business of katapy.assets.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final

# Any Python 3.11 may run this: what it imports is found beside it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "images"))

import debian
import rootfs
from python_root import PYTHON, compile_modules, extract, make_root
from steps import BuildError, call, require_space, run_main, step

_BUSYBOX: Final = Path("/bin/busybox")
_SPACE: Final = 300 << 20
_SANDBOX: Final = 1000  # uid and gid

_LIBRARIES: Final = """
    ld-linux-x86-64 libc libm libmvec libdl libpthread librt libutil libresolv libnss_dns libnss_files libbz2 libcrypt
    libcrypto libexpat libffi libgcc_s liblzma libncursesw libpanelw libreadline libsqlite3 libssl libstdc++ libtinfo
    libuuid libz
"""
# Modules whose libraries are left out, or that only Python's own tests import.
_UNUSED_MODULES: Final = """
    _ctypes_test _dbm _testbuffer _testcapi _testclinic _testimportmultiple _testinternalcapi _testmultiphase nis
    _xxtestfuzz xxlimited xxlimited_35
"""
_KEPT: Final = re.compile(
    rf"{PYTHON}"
    r"|etc/mime\.types|etc/python3\.11/.*"
    r"|usr/lib64/ld-linux-x86-64\.so\.2"
    rf"|usr/lib/x86_64-linux-gnu/(?:{'|'.join(map(re.escape, _LIBRARIES.split()))})\.so[0-9.]*"
    r"|usr/lib/x86_64-linux-gnu/lib(?:crypto|readline|ssl)\.so\.[0-9.]+"
    rf"|usr/lib/python3\.11/(?!lib-dynload/(?:{'|'.join(_UNUSED_MODULES.split())})\.cpython-311-).*"
)
# One module for each library: an import of each shows that nothing is missing.
_TRIED: Final = (
    "_curses_panel, _uuid, asyncio, bz2, crypt, ctypes, curses, decimal, hashlib, json, lzma, math, multiprocessing, "
    "pyexpat, re, readline, sqlite3, ssl, subprocess, venv, zlib"
)

_DIRECTORIES: Final = {
    **dict.fromkeys(("dev", "etc", "home", "mnt", "opt", "proc", "run", "srv", "sys", "usr/local/bin"), 0o755),
    **dict.fromkeys(("tmp", "var/tmp"), 0o1777),
    **dict.fromkeys(("home/sandbox", "root"), 0o700),
}
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    f"sandbox:x:{_SANDBOX}:{_SANDBOX}:sandbox:/home/sandbox:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "etc/group": f"root:x:0:\ntty:x:5:\nsandbox:x:{_SANDBOX}:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/os-release": 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n'
    'VERSION_ID="12"\nVERSION_CODENAME=bookworm\nID=debian\n',
}


def assemble(root: Path, *, archive: Path, busybox: Path) -> None:
    """Make the new tree ``root`` of Debian's packages in ``archive`` and of ``busybox``. Raises BuildError."""
    make_root(root)
    for name in _DIRECTORIES:
        (root / name).mkdir(parents=True)
    for name, text in _FILES.items():
        (root / name).write_text(text)
    extract(archive, root, _KEPT)
    (root / "usr/bin/python3").symlink_to("python3.11")
    (root / "usr/bin/python").symlink_to("python3.11")
    _install_busybox(root, busybox)
    _compile(root)
    _normalize(root)


def _install_busybox(root: Path, busybox: Path) -> None:
    shutil.copy(busybox, root / "usr/bin/busybox")
    for name in call([busybox, "--list"]).split():
        if not os.path.lexists(root / "usr/bin" / name):
            (root / "usr/bin" / name).symlink_to("busybox")


def _compile(root: Path) -> None:
    """Compile the standard library, and import what shows that nothing is missing."""
    library = Path("usr/lib/python3.11")
    packages = [path.name for path in (root / library).iterdir() if path.is_dir() and path.name != "__pycache__"]
    jobs = [["-l", f"/{library}"], [f"/{library}/{name}" for name in sorted(packages)]]
    compile_modules(root, jobs)
    # Not above: in a tree without bytecode it would take seconds.
    call(["chroot", root, f"/{PYTHON}", "-B", "-I", "-c", f"import {_TRIED}"])


def _normalize(root: Path) -> None:
    """Give everything its owner, its mode and one time: they would depend on umasks and clocks."""
    programs = {root / PYTHON, root / "usr/bin/busybox"}
    for path in (*root.rglob("*"), root):
        name = str(path.relative_to(root))
        owner = _SANDBOX if name == "home/sandbox" else 0
        os.chown(path, owner, owner, follow_symlinks=False)
        if path.is_dir() and not path.is_symlink():
            path.chmod(_DIRECTORIES.get(name, 0o755))
        elif not path.is_symlink():
            path.chmod(0o755 if path in programs or path.name.startswith("ld-linux") else 0o644)
        os.utime(path, (0, 0), follow_symlinks=False)


def main() -> None:
    """Build into the directory that the command line names."""
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} DIRECTORY CACHE")
    directory, cache = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    require_space(directory, _SPACE)
    if not _BUSYBOX.exists():
        raise BuildError(f"{_BUSYBOX} is missing; run: apt-get install busybox-static")
    built, work = directory / "root", directory / "work"
    built.mkdir()
    work.mkdir()
    # What programs leave in their temporary directories goes with it, too.
    os.environ["TMPDIR"] = str(work)
    archive = cache / "debian.tar"
    if archive.exists():
        packages = (cache / "packages").read_text().splitlines()
    else:
        archive = work / "debian.tar"
        with step("Debian packages of the default root"):
            packages = debian.with_current_lists(lambda: rootfs.download_debian(archive))
    with step("default root, compiled"):
        assemble(built / "rootfs", archive=archive, busybox=_BUSYBOX)
    (built / "facts.json").write_text(json.dumps({"packages": packages}, indent=1) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    run_main(main)
