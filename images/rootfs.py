"""The guest's root file system: Debian's Python, the agent and what it imports. Nothing else is taken over.

Owns what goes in, and where. Finding packages is debian.py's, unpacking and compiling them python_root.py's, making
an image of the tree build.py's.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Final

import debian
from python_root import PYTHON, compile_modules, extract, make_root
from steps import call

PACKAGES: Final = ("python3.11-minimal", "libpython3.11-stdlib", "libseccomp2", "libstdc++6")

_SITE: Final = "usr/lib/python3/dist-packages"
_LIBRARIES: Final = (
    "ld-linux-x86-64 libc libm libdl libpthread librt libz libexpat libffi libgcc_s libseccomp libstdc++"
)
# Of the standard library: tests, user interfaces, build tools, and modules whose libraries are left out.
_UNUSED: Final = """
    EXTERNALLY-MANAGED LICENSE.txt __phello__ _distutils_system_mod.py _pydecimal.py antigravity.py cgi.py cgitb.py
    crypt.py curses dbm distutils doctest.py email/mime ensurepip ftplib.py idlelib imaplib.py lib2to3 mailbox.py
    nntplib.py pdb.py pickletools.py pydoc.py pydoc_data site-packages sitecustomize.py smtpd.py smtplib.py sqlite3
    telnetlib.py test this.py tkinter turtle.py turtledemo unittest venv wsgiref xmlrpc
"""
_UNUSED_MODULES: Final = """
    _bz2 _codecs_cn _codecs_hk _codecs_iso2022 _codecs_jp _codecs_kr _codecs_tw _crypt _ctypes_test _curses
    _curses_panel _dbm _hashlib _lzma _sqlite3 _ssl _testbuffer _testcapi _testclinic _testimportmultiple
    _testinternalcapi _testmultiphase _uuid _xxsubinterpreters _xxtestfuzz audioop nis ossaudiodev readline xxlimited
    xxlimited_35
"""
_KEPT: Final = re.compile(
    rf"{PYTHON}"
    r"|usr/lib64/ld-linux-x86-64\.so\.2"
    rf"|usr/lib/x86_64-linux-gnu/(?:{'|'.join(map(re.escape, _LIBRARIES.split()))})\.so[0-9.]*"
    rf"|usr/lib/python3\.11/(?!(?:{'|'.join(map(re.escape, _UNUSED.split()))})(?:/|$))"
    rf"(?!lib-dynload/(?:{'|'.join(_UNUSED_MODULES.split())})\.cpython-311-).*"
)

_MOUNT_POINTS: Final = ("dev", "proc", "run", "sys", "tmp")
_FILES: Final = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/hostname": "katapy\n",
}


def download_debian(archive: Path) -> list[str]:
    """Write Debian's part, all of PACKAGES and what they depend on, to the tar file ``archive``.

    Returns the packages as name_version_architecture. Raises BuildError. Needs root, but no mount and no loop device.
    """
    listing = archive.with_suffix(".list")
    options = [f"--include={','.join(PACKAGES)}", "--aptopt=APT::Install-Recommends false"]
    hook = f'--extract-hook=ls "$1/var/cache/apt/archives" > {listing}'
    command = ["mmdebstrap", "--mode=root", "--variant=extract", "--skip=chroot/mount", "--format=tar", *options, hook]
    call([*command, debian.CODENAME, archive, "-"], stdin=debian.archives().encode())
    return sorted(line.removesuffix(".deb") for line in listing.read_text().splitlines() if line.endswith(".deb"))


def download_wheels(requirements: Path, directory: Path) -> None:
    """Unpack the wheels that ``requirements`` pins, for the guest's Python, into ``directory``. Raises BuildError."""
    platforms = (f"--platform={tag}_x86_64" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014"))
    # Pinned with their hashes and complete: pip resolves nothing.
    options = [
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--only-binary=:all:",
        "--require-hashes",
        "--python-version=3.11",
    ]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    call([*pip, *options, *platforms, f"--target={directory}", f"--requirement={requirements}"])
    for unused in directory.glob("*.dist-info"):
        shutil.rmtree(unused)


def assemble(root: Path, *, archive: Path, wheels: Path, agent: Path) -> None:
    """Make the new tree ``root`` of Debian's part, the wheels and the agent's sources, and compile it.

    ``agent`` is the directory guest-agent of the repository. Raises BuildError, also when the agent cannot be
    imported in the finished tree.
    """
    make_root(root)
    for name in _MOUNT_POINTS:
        (root / name).mkdir()
    for name, text in _FILES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    extract(archive, root, _KEPT)
    shutil.copytree(wheels, root / _SITE)
    sources = shutil.ignore_patterns("__pycache__", ".*", "*.pyi")
    shutil.copytree(agent / "katapy_agent", root / _SITE / "katapy_agent", ignore=sources)
    shutil.copy(agent / "init", root / "usr/sbin/init")
    # All of it: Debian's packages carry no bytecode, and a start is its cost.
    compile_modules(root, [["/usr/lib/python3.11"], [f"/{_SITE}"]])
    _normalize_modes(root)
    call(
        [
            "chroot",
            root,
            f"/{PYTHON}",
            "-I",
            "-c",
            "import katapy_agent.init, katapy_agent.server, katapy_agent.seccomp",
        ]
    )


def _normalize_modes(root: Path) -> None:
    """Give each file one of two modes: they would depend on umasks."""
    programs = {root / PYTHON, root / "usr/sbin/init"}
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path in programs or ".so" in path.suffixes else 0o644)
