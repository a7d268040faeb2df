"""What is seen of a container's files from the mount namespace of its stand-in, and from there alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from katapy.oci.default import default_spec

pytestmark = pytest.mark.root

# cat is the stand-in; who looks enters its mount namespace, as podman does.
PROGRAM = """
import ast, os, subprocess, sys
from pathlib import Path
from katapy import linux
from katapy.client.view import view_of
from katapy.oci.bundle import load_bundle

own, here = os.readlink("/proc/self/ns/mnt"), os.getcwd()
with view_of(load_bundle("bundle")):
    stand_in = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
assert (os.readlink("/proc/self/ns/mnt"), os.getcwd()) == (own, here)
assert os.path.samestat(os.stat("/"), os.stat(f"/proc/{stand_in.pid}/root"))
# Nothing is loaded any more once this process has another root.
codes = [compile(each, "look", "eval") for each in ast.literal_eval(sys.argv[1])]
linux.setns(os.open(f"/proc/{stand_in.pid}/ns/mnt", os.O_RDONLY), linux.CLONE_NEWNS)
found = []
for code in codes:
    try:
        found.append(eval(code))
    except OSError as error:
        found.append(error.strerror)
print(found)
stand_in.communicate()
"""


def look(tmp_path: Path, *expressions: str, mounts: list[dict[str, Any]], read_only: bool = False) -> list[Any]:
    """Evaluate expressions in the view of a bundle whose root is ``rootfs``; an OSError's text is its value."""
    spec = deepcopy(default_spec())
    spec["root"] = {"path": str(tmp_path / "rootfs"), "readonly": read_only}
    spec["mounts"] = [{"destination": "/proc", "type": "proc", "source": "proc"}, *mounts]
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/config.json").write_text(json.dumps(spec))
    argv = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", PROGRAM, repr(expressions)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    found: list[Any] = ast.literal_eval(done.stdout)
    return found


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    return {"type": "bind", "source": str(source), "destination": destination, "options": ["rbind", *options]}


TMPFS = {"type": "tmpfs", "source": "tmpfs", "destination": "/tmp"}


def test_root_and_volumes(tmp_path: Path) -> None:
    """Both can be written to, unless they are read-only; what only the guest has is empty, and is so always."""
    for name in ("rootfs/tmp", "volume"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rootfs/tmp/beneath").touch()
    (tmp_path / "volume/file").write_text("volume")
    found = look(
        tmp_path,
        "sorted(os.listdir('/'))",
        "Path('/made').write_text('m')",
        "Path('/new/place/made').write_text('v')",
        "Path('/kept/made').write_text('k')",
        "Path('/kept/file').read_text()",
        "os.listdir('/tmp')",
        "Path('/tmp/made').write_text('t')",
        "[bool(os.statvfs(path).f_flag & os.ST_NOEXEC) for path in ('/', '/new/place', '/kept', '/tmp')]",
        mounts=[bind(tmp_path / "volume", "/new/place"), bind(tmp_path / "volume", "/kept", "ro"), TMPFS],
    )
    read_only = "Read-only file system"
    assert found == [["kept", "new", "proc", "tmp"], 1, 1, read_only, "volume", [], read_only, [True] * 4]
    assert (tmp_path / "rootfs/made").read_text() == "m"
    assert (tmp_path / "volume/made").read_text() == "v"
    assert sorted(path.name for path in (tmp_path / "rootfs/tmp").iterdir()) == ["beneath"]


def test_a_read_only_root(tmp_path: Path) -> None:
    """Nothing is made in it, not even where something is to be mounted."""
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "volume").mkdir()
    mounts = [bind(tmp_path / "volume", "/volume"), TMPFS]
    assert look(tmp_path, "os.listdir('/')", "os.mkdir('/x')", mounts=mounts, read_only=True) == [
        [],
        "Read-only file system",
    ]
    assert list((tmp_path / "rootfs").iterdir()) == []


def test_links_of_the_container_lead_nowhere_else(tmp_path: Path) -> None:
    """Its image can have any where a volume is to be, and what the kernel's files are mounted on."""
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/file").touch()
    for name in ("absolute", "proc", "tmp"):
        (tmp_path / "rootfs" / name).symlink_to(tmp_path / "outside")
    (tmp_path / "rootfs/relative").symlink_to("../outside")
    mounts = [bind(tmp_path / "volume", "/absolute"), bind(tmp_path / "volume", "/relative/inner"), TMPFS]
    look(tmp_path, "os.listdir('/')", mounts=mounts)
    assert list((tmp_path / "outside").iterdir()) == []
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(tmp_path) in line]
