"""`make run` and `make test` on a fresh host of the Debian after the guest's.

It is a root directory with namespaces of its own: its kernel is the machine's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import debian
import pytest

pytestmark = [pytest.mark.root, pytest.mark.soak, pytest.mark.timeout(3 * 3600)]

SOURCE = Path(__file__).resolve().parents[2]
LATER = "trixie"
_DEADLINE = 2 * 3600.0
# How the network is reached is the machine's own.
_SETTINGS = ("etc/resolv.conf", "etc/hosts", "etc/ssl/certs/ca-certificates.crt")
_NOT_COPIED = shutil.ignore_patterns(
    *("build", "dist", ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis"), "rootfs", "config.json"
)
_ENTER = """
mount --bind "$1" "$1"
cd "$1"
mount --rbind /dev dev
mount --rbind /sys sys
mount -t proc proc proc
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
# Not chroot: who has that for a root makes no user namespace.
pivot_root . .
umount --lazy .
cd /katapy
exec sh -ec "$2"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("later") / "root"
    argv = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include=ca-certificates,make", LATER]
    subprocess.run([*argv, directory, "-"], check=True, input=debian.archives(LATER).encode(), timeout=_DEADLINE)
    for name in _SETTINGS:
        shutil.copy(Path("/", name), directory / name)
    shutil.copytree(SOURCE, directory / "katapy", ignore=_NOT_COPIED)
    yield directory
    shutil.rmtree(directory)


def _run(root: Path, command: str) -> str:
    """Run a command in the project's directory; nothing that it starts or mounts outlives it."""
    namespaces = ["unshare", "--mount", "--propagation=private", "--pid", "--kill-child"]
    argv: list[str | Path] = [*namespaces, "sh", "-ec", _ENTER, "sh", root, command]
    env = {**os.environ, "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_two_minutes_after_a_clone(root: Path) -> None:
    """Twice: what the first time sets up, the second finds. The guest is of its own release all the same."""
    for _ in range(2):
        lines = [" ".join(line.split()) for line in _run(root, "make run").splitlines()]
        assert "Hello from inside a virtual machine." in lines
        (kernel,) = (line for line in lines if line.startswith("guest kernel 6.1."))
    assert kernel.endswith("-cloud-amd64")
    assert ".venv/bin/python3.13" in _run(root, "ls -d .venv/bin/python3.*")
    assert "13." in _run(root, "cat /etc/debian_version")
    # apt's lists of the guest's release were for the build alone.
    assert "bookworm" not in _run(root, "ls /var/lib/apt/lists /tmp")


def test_all_tests(root: Path) -> None:
    """podman, docker and containerd are newer there, and Python is."""
    print(_run(root, "make test"))
