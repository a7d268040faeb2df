"""Removal of a state directory with something mounted in it, in a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

SCRIPT = """
import os, sys
from katapy import linux
from katapy.errors import InvalidState, Unavailable
from katapy.state import State, StateDir, Status

linux.unshare(linux.CLONE_NEWNS)
linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
root, precious = sys.argv[1:]
state = State("c1", "/b", "/b/rootfs", "c1", Status.STOPPED, "2024-01-01T00:00:00Z", "1.2.0", 0)
directory = StateDir.create(root, state)
target = directory.path + "/shared dir/c1/rootfs"
os.makedirs(target)
linux.mount(precious, target, None, linux.MS_BIND)
with directory.lock():
    try:
        directory.remove()
    except InvalidState as error:
        assert str(error) == f"cannot remove c1: {target} is still mounted", error
    else:
        raise SystemExit("removed under a mount")
    assert directory.load() == state
    assert os.listdir(target) == ["file"]
    linux.umount(target)
    directory.remove()
assert os.listdir(root) == [] and os.listdir(precious) == ["file"]

# A mount that comes after the check is refused by the kernel.
from katapy import tree
os.makedirs(root + "/top/a/b/m")
linux.mount(precious, root + "/top/a/b/m", None, linux.MS_BIND)
fd = os.open(root + "/top", os.O_RDONLY)
try:
    tree.empty_directory(fd)
except OSError as error:
    assert error.errno == 16, error
else:
    raise SystemExit("emptied a mount")
assert os.listdir(precious) == ["file"]
"""


def test_removal_stops_at_a_mount(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(tmp_path / "precious")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
