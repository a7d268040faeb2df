"""`katapy install` as root: owners, read-only places, and a host whose file system is mounted below a directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.root
KATAPY = Path(sys.executable).with_name("katapy")
# Of a daemon that this machine need not have. It takes what is TOML, with a table of its own where there is none.
CONTAINERD = """#!/bin/sh
[ "$1" = --version ] && exec echo 'containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4'
[ "$3 $4" = "config dump" ] && echo "$2" >> /asked && exec cat "$2"
exit 1
"""


def install(*options: str | Path, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, KATAPY, "install", *options], capture_output=True, text=True)


def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    file.write_text("{}")
    shutil.chown(file, 1234, 2345)
    assert install("--docker", "--config", file).returncode == 0
    for path in (file, tmp_path / "daemon.json.katapy-1.bak"):
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


def test_a_file_system_that_is_read_only(tmp_path: Path) -> None:
    """One line says so, and all is as it was."""
    file = tmp_path / "daemon.json"
    file.write_text("{}")
    script = f'mount --bind --options ro {tmp_path} {tmp_path} && exec "$@"'
    done = install("--docker", "--config", file, prefix=("unshare", "--mount", "sh", "-euc", script, "sh"))
    assert done.returncode == 1
    assert done.stderr == f"katapy: cannot write {file}: read-only file system\n"
    assert [path.name for path in tmp_path.iterdir()] == ["daemon.json"]
    assert file.read_text() == "{}"


def test_another_host(tmp_path: Path) -> None:
    """Its daemon is asked in its own file system, and what is asked about is gone again."""
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is not installed"
    for name in ("bin", "usr/bin", "usr/local/bin", "tmp"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("busybox", "sh", "cat"):
        shutil.copy(busybox, tmp_path / "bin" / name)
    programs = {
        "usr/bin/containerd": CONTAINERD,
        "usr/local/bin/katapy": "",
        "usr/local/bin/containerd-shim-katapy-v2": "",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = install("--containerd", "--root", tmp_path)
    assert done.returncode == 0, done.stderr
    written = tomllib.loads((tmp_path / "etc/containerd/config.toml").read_text())
    assert written["version"] == 3
    runtimes = written["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"]
    assert runtimes["katapy"]["runtime_path"] == "/usr/local/bin/containerd-shim-katapy-v2"
    assert (tmp_path / "asked").read_text().startswith("/tmp/katapy-")
    assert list((tmp_path / "tmp").iterdir()) == []
