"""The staging tree against real mounts, each test in a process with a mount namespace of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
# The host's mounts are shared, as systemd makes them; the tree's owner is a slave of them, as the shim is.
PROLOGUE = """
import errno, os, sys
from pathlib import Path
from katapy import linux
from katapy.errors import Unavailable
from katapy.storage.shared_dir import SharedBind, SharedTree, enter_private_mounts
from katapy.tree import mounts_below

top = Path(sys.argv[1])
sandbox, source = top / "sandbox", top / "source"
for directory in (sandbox, source, source / "below"):
    directory.mkdir()
linux.unshare(linux.CLONE_NEWNS)
linux.mount(None, "/", None, linux.MS_REC | linux.MS_SHARED)

def flags(path):
    lines = [line.split() for line in open("/proc/self/mountinfo")]
    return set([line[5] for line in lines if line[4] == str(path)][-1].split(","))

def refused(path):
    try:
        path.write_text("x")
    except OSError as error:
        return error.errno == errno.EROFS
    return False
"""


def run(directory: Path, script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(script), str(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recursive", [False, True])
def test_what_the_host_mounts_later_stays_the_hosts(tmp_path: Path, recursive: bool) -> None:
    """A mount that the host made below a volume later came into the tree: writable, with devices and setuid."""
    script = f"""
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.read(reader, 1)
            linux.mount("late", str(source / "below"), "tmpfs", 0)
            (source / "below" / "late").touch()
            os._exit(0)
        enter_private_mounts()
        tree = SharedTree(sandbox)
        tree.add("c1", SharedBind("volume", str(source), read_only=True, recursive={recursive}))
        os.write(writer, b".")
        assert os.wait()[1] == 0
        assert (source / "below" / "late").exists()
        below = tree.export / "c1" / "volume" / "below"
        assert list(below.iterdir()) == [], "the mount came through"
        assert refused(below / "file")
    """
    run(tmp_path, script)


def test_a_read_only_bind_is_read_only_on_the_host(tmp_path: Path) -> None:
    """What is mounted below the source as well; virtiofsd needs no flag of its own to be refused."""
    script = """
        enter_private_mounts()
        linux.mount("inner", str(source / "below"), "tmpfs", 0)
        (source / "file").touch()
        tree = SharedTree(sandbox)
        assert tree.add("c1", SharedBind("volume", str(source), read_only=True, recursive=True)).endswith("/c1/volume")
        tree.add("c1", SharedBind("file", str(source / "file"), read_only=True, recursive=False))
        tree.add("c1", SharedBind("writable", str(source), read_only=False, recursive=False))
        exported = tree.export / "c1"
        for path in (exported / "volume", exported / "volume" / "below", exported / "file"):
            assert {"ro", "nosuid", "nodev", "noexec"} <= flags(path), (path, flags(path))
            assert refused(path if path.name == "file" else path / "new"), path
        assert {"rw", "nosuid", "nodev", "noexec"} <= flags(exported / "writable")
        (exported / "writable" / "new").touch()
        assert refused(tree.export / "name")
    """
    run(tmp_path, script)


def test_binds_reach_whoever_serves_the_tree(tmp_path: Path) -> None:
    """virtiofsd has a mount namespace of its own, made before the first container is."""
    script = """
        enter_private_mounts()
        tree = SharedTree(sandbox)
        (source / "file").touch()
        ready, go = os.pipe(), os.pipe()
        if os.fork() == 0:
            enter_private_mounts()
            os.write(ready[1], b".")
            os.read(go[0], 1)
            assert (tree.export / "c1" / "volume" / "file").exists()
            os.write(ready[1], b".")
            os.read(go[0], 1)
            assert not (tree.export / "c1").exists()
            os._exit(0)
        os.read(ready[0], 1)
        tree.add("c1", SharedBind("volume", str(source), read_only=True, recursive=True))
        os.write(go[1], b".")
        os.read(ready[0], 1)
        tree.remove("c1", ["volume"])
        os.write(go[1], b".")
        assert os.wait()[1] == 0
    """
    run(tmp_path, script)


def test_removal_leaves_nothing_and_stops_at_nothing(tmp_path: Path) -> None:
    """A bind that had failed half-way made the removal fail, and every container left its mount points behind."""
    script = """
        enter_private_mounts()
        tree = SharedTree(sandbox)
        (source / "file").touch()
        for name, path in (("volume", source), ("file", source / "file")):
            tree.add("c1", SharedBind(name, str(path), read_only=True, recursive=True))
        tree.add("c2", SharedBind("volume", str(source), read_only=True, recursive=True))
        # As add() leaves it where move_mount() fails.
        (sandbox / "staging/rw/c1/unmounted").mkdir()
        tree.remove("c1", ["volume", "file", "unmounted", "never made"])
        assert os.listdir(tree.export) == ["c2"], os.listdir(tree.export)
        assert (source / "file").exists() and (tree.export / "c2/volume/file").exists()
        tree.remove("c1", ["volume"])
        tree.close()
        assert mounts_below(str(sandbox)) == []
    """
    run(tmp_path, script)


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
def test_a_tree_that_cannot_be_made_leaves_no_mount(tmp_path: Path, fails: int) -> None:
    """The tmpfs stayed mounted where a later step failed, so the sandbox's directory could not be removed."""
    script = f"""
        enter_private_mounts()
        calls, mount = [], linux.mount
        def failing(*arguments):
            calls.append(arguments)
            if len(calls) == {fails}:
                raise OSError(errno.ENOMEM, "no memory")
            mount(*arguments)
        linux.mount = failing
        try:
            SharedTree(sandbox)
        except Unavailable as error:
            assert "no memory" in str(error)
        else:
            raise SystemExit("made")
        assert mounts_below(str(sandbox)) == []
    """
    run(tmp_path, script)
