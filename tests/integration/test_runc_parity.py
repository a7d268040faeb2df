"""What engines parse of runc's output has the same form here: compared with the real runc, or with what it printed.

The recorded facts are those of Debian's runc 1.1.5; where runc is installed they are compared with it, too.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katapy.state import State, StateDir, Status

pytestmark = pytest.mark.root

KATAPY = Path(sys.executable).with_name("katapy")
RUNC = shutil.which("runc")
STATE_KEYS = ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"]
COLUMNS = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
LOG_LINE = r'time="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z" level=error msg=.+'


class Runtime:
    """A runtime's command line on a state directory of its own, with one created container ``c1`` in it."""

    def __init__(self, program: str, root: Path) -> None:
        self.program, self.root = program, root

    def __call__(self, *args: str | Path, root: Path | None = None) -> subprocess.CompletedProcess[str]:
        argv = [self.program, "--root", str(root or self.root), *map(str, args)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


@pytest.fixture
def katapy(tmp_path: Path) -> Runtime:
    state = State(
        *("c1", "/bundles/one", "/bundles/one/rootfs", "c1", Status.CREATED, "2026-01-02T03:04:05.123456789Z", "1.2.0"),
        owner=0,
        annotations={"a": "b"},
        accelerator="tcg",
    )
    StateDir.create(str(tmp_path / "katapy"), state).close()
    return Runtime(str(KATAPY), tmp_path / "katapy")


@pytest.fixture
def runc(tmp_path: Path) -> Iterator[Runtime]:
    if RUNC is None:
        pytest.skip("no runc here: only the recorded facts were compared")
    bundle = tmp_path / "bundle"
    (bundle / "rootfs/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", bundle / "rootfs/bin/sh")
    subprocess.run([RUNC, "spec", "--bundle", bundle], check=True)
    document = json.loads((bundle / "config.json").read_text())
    document["annotations"] = {"a": "b"}
    document["process"].update(terminal=False, rlimits=[])
    (bundle / "config.json").write_text(json.dumps(document))
    runtime = Runtime(RUNC, tmp_path / "runc")
    argv = [RUNC, "--root", str(runtime.root), "create", "--bundle", str(bundle), "c1"]
    made = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60)
    if made.returncode:
        pytest.skip("runc makes no container here: only the recorded facts were compared")
    yield runtime
    assert runtime("delete", "--force", "c1").returncode == 0


def katapy_keys(document: dict[str, Any]) -> list[str]:
    assert document.pop("accelerator") == "tcg"  # ours alone
    return list(document)


def test_state_and_list_as_recorded(katapy: Runtime) -> None:
    assert katapy_keys(json.loads(katapy("state", "c1").stdout)) == STATE_KEYS
    [listed] = json.loads(katapy("list", "--format", "json").stdout)
    assert katapy_keys(listed) == STATE_KEYS
    assert listed["owner"] == "root"
    assert katapy("list").stdout.splitlines() == [
        "ID          PID         STATUS      BUNDLE         CREATED                          OWNER",
        "c1          0           created     /bundles/one   2026-01-02T03:04:05.123456789Z   root",
    ]
    assert katapy("list", "-q").stdout == "c1\n"


def test_state_and_list_as_runc(runc: Runtime) -> None:
    assert list(json.loads(runc("state", "c1").stdout)) == STATE_KEYS
    [listed] = json.loads(runc("list", "-f", "json").stdout)
    assert list(listed) == STATE_KEYS
    head, line = runc("list").stdout.splitlines()
    assert (head.split(), line.split()[0]) == (COLUMNS, "c1")
    # Where the columns begin: at least 12 wide, three spaces between.
    widths = [max(12, len(cell) + 3) for cell in line.split()[:-1]]
    assert head == "".join(name.ljust(width) for name, width in zip(COLUMNS, widths, strict=False)) + "OWNER"


def test_nothing_to_list(katapy: Runtime, tmp_path: Path) -> None:
    """Go's JSON of no containers is null, and runc's table has its header."""
    programs = [katapy] if RUNC is None else [katapy, Runtime(RUNC, tmp_path)]
    for program in programs:
        assert program("list", "--format", "json", root=tmp_path / "empty").stdout.strip() == "null"
        assert program("list", "--quiet", root=tmp_path / "empty").stdout == ""
        [head] = program("list", root=tmp_path / "empty").stdout.splitlines()
        assert head == "ID          PID         STATUS      BUNDLE      CREATED     OWNER"


def test_version(katapy: Runtime) -> None:
    for program, name in ((str(KATAPY), "katapy"), *([(RUNC, "runc")] if RUNC else [])):
        for option in ("--version", "-v"):
            lines = subprocess.run([program, option], capture_output=True, text=True, check=True).stdout.splitlines()
            assert re.fullmatch(rf"{name} version \d+\.\d+\.\d+\S*", lines[0])
            assert any(re.fullmatch(r"spec: 1\.\d+\.\d+\S*", line) for line in lines[1:])


@pytest.mark.parametrize("arguments", [("state", "nonesuch"), ("state",)])
def test_the_log_tells_the_error(katapy: Runtime, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """containerd and conmon show the user the last line of this file."""
    programs = [katapy] if RUNC is None else [katapy, Runtime(RUNC, tmp_path / "runc")]
    for number, program in enumerate(programs):
        as_json, as_text = tmp_path / f"{number}.json", tmp_path / f"{number}.text"
        assert program("--log", as_json, "--log-format", "json", *arguments).returncode > 0
        [line] = as_json.read_text().splitlines()
        assert line.startswith('{"level":"error","msg":"')
        assert list(json.loads(line)) == ["level", "msg", "time"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", json.loads(line)["time"])
        assert program("--log", as_text, *arguments).returncode > 0
        assert re.fullmatch(LOG_LINE, as_text.read_text().strip())
        # Engines look for these words (containerd's go-runc, podman).
        assert arguments == ("state",) or "does not exist" in line


def test_spec(katapy: Runtime, tmp_path: Path) -> None:
    """Both options write a document with the same members, and neither writes over one."""
    programs = [katapy] if RUNC is None else [katapy, Runtime(RUNC, tmp_path / "runc")]
    for options in ([], ["--rootless"]):
        shapes = []
        for program in programs:
            bundle = tmp_path / f"{len(options)}{Path(program.program).name}"
            bundle.mkdir()
            assert program("spec", "--bundle", bundle, *options).returncode == 0
            assert program("spec", "--bundle", bundle, *options).returncode == 1
            document = json.loads((bundle / "config.json").read_text())
            shapes.append({name: set(document[name]) for name in ("process", "root", "linux")} | {"": set(document)})
        assert shapes[0] == shapes[-1]
        assert ("uidMappings" in shapes[0]["linux"]) is bool(options)


def test_features(katapy: Runtime, tmp_path: Path) -> None:
    ours = json.loads(katapy("features").stdout)
    assert ours.keys() >= {"ociVersionMin", "ociVersionMax", "hooks", "mountOptions", "linux", "annotations"}
    assert ours["linux"].keys() >= {"namespaces", "capabilities", "cgroup", "seccomp", "apparmor", "selinux"}
    if RUNC is None:
        return
    theirs = json.loads(Runtime(RUNC, tmp_path / "runc")("features").stdout)
    assert ours.keys() >= theirs.keys()
    assert ours["linux"].keys() >= theirs["linux"].keys()
    for part in ("cgroup", "seccomp"):
        assert ours["linux"][part].keys() >= theirs["linux"][part].keys()
    assert (ours["hooks"], ours["ociVersionMin"]) == (theirs["hooks"], theirs["ociVersionMin"])
    assert set(ours["linux"]["capabilities"]) == set(theirs["linux"]["capabilities"])


def test_rootless(katapy: Runtime) -> None:
    for value in ("auto", "false", "0"):
        assert katapy("--rootless", value, "--systemd-cgroup", "state", "c1").returncode == 0
    done = katapy("--rootless", "true", "state", "c1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "katapy: --rootless true is not supported: katapy needs root\n"
