"""Root file systems as engines describe them, mounted in a mount namespace of the test's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

PROGRAM = """
import os, sys
from katapy.storage.rootfs import RootMount, mount_rootfs, unmount_rootfs
from katapy.errors import InvalidArgument
"""


def run(tmp_path: Path, code: str) -> str:
    """Run code in a new mount namespace and return what it prints."""
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", PROGRAM + code]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bind(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/file").touch()
    code = """
mount_rootfs([RootMount("bind", os.path.abspath("source"), ("rbind", "ro"))], os.path.abspath("target"))
print(os.listdir("target"), *(os.statvfs(name).f_flag & os.ST_RDONLY for name in ("target", "source")))
unmount_rootfs(os.path.abspath("target"), 1)
print(os.listdir("target"))
"""
    assert run(tmp_path, code) == "['file'] 1 0\n[]\n"


def test_an_image_of_many_layers(tmp_path: Path) -> None:
    """Their names do not fit into the page that mount(2) takes."""
    layers = [tmp_path / "snapshots" / str(number) / "fs" for number in range(100)]
    for number, layer in enumerate(layers):
        layer.mkdir(parents=True)
        (layer / str(number)).touch()
    for name in ("tmpfs", "target"):
        (tmp_path / name).mkdir()
    code = f"""
from katapy import linux
linux.mount("tmpfs", "tmpfs", "tmpfs", 0)
os.mkdir("tmpfs/upper"), os.mkdir("tmpfs/work")
top = os.path.abspath("tmpfs")
options = (f"workdir={{top}}/work", f"upperdir={{top}}/upper", "lowerdir={":".join(map(str, layers))}")
mount_rootfs([RootMount("overlay", "overlay", options)], os.path.abspath("target"))
print(len(os.listdir("target")))
open("target/new", "w").close()
print(os.listdir("tmpfs/upper"))
"""
    assert run(tmp_path, code) == "100\n['new']\n"


def test_what_cannot_be_mounted(tmp_path: Path) -> None:
    """Nothing is left of what could."""
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "source/file").touch()
    code = """
bind = RootMount("bind", os.path.abspath("source"), ("rbind", "rw"))
try:
    mount_rootfs([bind, RootMount("nothing", "none", ())], os.path.abspath("target"))
except InvalidArgument as error:
    print(str(error).partition(" on ")[0], os.listdir("target"))
"""
    assert run(tmp_path, code) == "cannot mount nothing none []\n"
