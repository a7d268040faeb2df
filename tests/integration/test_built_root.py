"""The default root that `make setup` has built: what is in it, and that another build gives the same."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy.assets import store
from katapy.assets.asset import DEFAULT_DATA_DIR
from katapy.assets.root import hold_root
from katapy.image_build import find_sources

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with hold_root(DEFAULT_DATA_DIR) as found:
        yield found.path


def _run(root: Path, *argv: str, user: str = "root") -> str:
    command = ["/usr/sbin/chroot", f"--userspec={user}", str(root), *argv]
    return subprocess.run(command, env={"PATH": "/usr/bin"}, check=True, capture_output=True, text=True).stdout


def test_python_works_for_root_and_others(root: Path) -> None:
    code = "import json, math, re, sqlite3, ssl, subprocess; print(math.prod(json.loads('[6, 7]')))"
    for user in ("root", "sandbox", "nobody"):
        assert _run(root, "python3", "-c", code, user=user) == "42\n"


def test_a_shell_and_the_usual_commands_are_there(root: Path) -> None:
    script = "cat /etc/hosts | grep -c localhost; sleep 0; ls -d /t*p; id -u"
    assert _run(root, "sh", "-c", script, user="sandbox").split() == ["2", "/tmp", "1000"]


def test_modules_come_compiled(root: Path) -> None:
    """Under emulation, compiling what a small program imports takes longer than all else that it does."""
    for source in (root / "usr/lib/python3.11").rglob("*.py"):
        compiled = source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc"
        # PEP 552: by the source's hash, which is not compared.
        assert compiled.read_bytes()[4:8] == b"\1\0\0\0", source


def test_nothing_in_it_is_set_user_id_or_writable_by_all(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode):
            assert not status.st_mode & (stat.S_ISUID | stat.S_ISGID), path
            assert not status.st_mode & stat.S_IWOTH or status.st_mode & stat.S_ISVTX, path
        assert status.st_uid == status.st_gid == (1000 if path == root / "home/sandbox" else 0)


def test_links_stay_inside(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_symlink():
            target = os.path.normpath(path.parent / path.readlink().as_posix().removeprefix("/"))
            assert target.startswith(f"{root}/"), path


def test_another_build_gives_the_same(root: Path, tmp_path: Path) -> None:
    sources = find_sources()
    (cache,) = (DEFAULT_DATA_DIR / "cache").iterdir()
    recipe = sources / "default-root/default_root.py"
    # Whoever builds has another umask.
    umask = os.umask(0o077)
    try:
        subprocess.run([sys.executable, recipe, tmp_path, cache], check=True)
    finally:
        os.umask(umask)
    assert store._tree_digest(tmp_path / "root/rootfs") == root.parent.name
    assert {path.lstat().st_mtime for path in (tmp_path / "root/rootfs").rglob("*")} == {0.0}
    shutil.rmtree(tmp_path / "root")
