"""Fixtures that run the real command line against real virtual machines.

``host`` asserts after each test that nothing of it is left: no process, mount, directory, socket or cgroup. The test
process is the subreaper of everything it starts, so an orphan cannot hide.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from katapy.oci.default import default_spec

KATAPY = Path(sys.executable).with_name("katapy")
# Generous: the machine may be slow, shared, and without hardware virtualization.
DEADLINE = 120.0
_GONE_WITHIN = 10.0
_PR_SET_CHILD_SUBREAPER = 36


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session", autouse=True)
def _subreaper() -> None:
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


@pytest.fixture(scope="session", autouse=True)
def _ready_host() -> None:
    """Fail here, with the reason, where katapy cannot run; `check` also says what each run would warn of once."""
    checked = subprocess.run([KATAPY, "check"], capture_output=True, text=True, timeout=DEADLINE)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _descendants() -> dict[int, str]:
    """Return the command lines of all living processes below this one, by pid."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stat[0] not in "ZX":
                parents[int(entry)] = int(stat[1])
    found: dict[int, str] = {}
    for pid in parents:
        ancestor: int | None = pid
        while ancestor is not None and ancestor != os.getpid():
            ancestor = parents.get(ancestor)
        if ancestor is not None and pid != os.getpid():
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def _mounts() -> list[str]:
    return [line.split(" ", 3)[3] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _cgroups() -> set[str]:
    return {directory for directory, _, _ in os.walk("/sys/fs/cgroup")}


def _reap_adopted() -> None:
    """Collect the orphans that the kernel gave us; the direct children belong to subprocess."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


@pytest.fixture
def host() -> Iterator[None]:
    """Assert that the host ends as it began."""
    processes, mounts, cgroups = _descendants(), _mounts(), _cgroups()
    yield
    left = {pid: name for pid, name in _descendants().items() if pid not in processes}
    for pid in left:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        select.select([fd], [], [], _GONE_WITHIN)
        os.close(fd)
    left = {pid: name for pid, name in _descendants().items() if pid not in processes}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    _reap_adopted()
    assert not left, "processes left behind"
    assert [mount for mount in _mounts() if mount not in mounts] == [], "mounts left behind"
    assert _cgroups() - cgroups == set(), "cgroups left behind"


@dataclass
class Katapy:
    """The command line, with a state directory of its own."""

    root: Path
    ids: list[str] = field(default_factory=list)
    options: tuple[str, ...] = ()
    env: dict[str, str] | None = None

    def argv(self, *args: str | Path) -> list[str]:
        """Return the arguments of a call."""
        return [str(KATAPY), "--root", str(self.root), *self.options, *map(str, args)]

    def __call__(
        self, *args: str | Path, stdin: bytes | None = None, check: bool = False, timeout: float = DEADLINE
    ) -> subprocess.CompletedProcess[bytes]:
        """Run to the end and return what it printed."""
        done = subprocess.run(
            self.argv(*args),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout,
            env=self.env,
        )
        if check:
            assert done.returncode == 0, done.stderr.decode(errors="replace")
        return done

    def detach(self, *args: str | Path, output: Path | None = None, timeout: float = DEADLINE) -> None:
        """Run a call that leaves a process behind which keeps the streams: they go to ``output``, not to a pipe."""
        with (output or Path(os.devnull)).open("wb") as file, (self.root.parent / "errors").open("w+b") as errors:
            done = subprocess.run(
                self.argv(*args), stdin=subprocess.DEVNULL, stdout=file, stderr=errors, timeout=timeout, env=self.env
            )
            errors.seek(0)
            assert done.returncode == 0, errors.read().decode(errors="replace")

    def start(self, *args: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start a call and return at once."""
        return subprocess.Popen(self.argv(*args), env=self.env, **options)

    def state(self, container_id: str) -> dict[str, Any]:
        """Return what ``state`` prints."""
        answer: dict[str, Any] = json.loads(self("state", container_id, check=True).stdout)
        return answer


@pytest.fixture
def katapy(tmp_path: Path, host: None) -> Iterator[Katapy]:
    """The command line; afterwards its state directory must be empty."""
    runner = Katapy(tmp_path / "run")
    yield runner
    left = sorted(str(path.relative_to(runner.root)) for path in runner.root.rglob("*")) if runner.root.exists() else []
    for name in {path.split("/")[0] for path in left}:
        log = runner.root / name / "shim.log"
        if log.is_file():
            print(f"--- {log}\n{log.read_text(errors='replace')}")
        runner("delete", "--force", name)
    assert not left, "state left behind"


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system of Debian's static busybox, shared by all tests: read-only to them."""
    return make_busybox(tmp_path_factory.mktemp("busybox") / "rootfs")


def make_busybox(rootfs: Path) -> Path:
    """Make a busybox root file system and return it."""
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
        (rootfs / name).mkdir(parents=True)
    program = shutil.which("busybox")
    assert program, "busybox-static is not installed"
    shutil.copy(program, rootfs / "bin/busybox")
    for applet in subprocess.check_output([program, "--list"], text=True).split():
        if applet != "busybox":
            (rootfs / "bin" / applet).symlink_to("busybox")
    (rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
    (rootfs / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    return rootfs


Edit = Callable[[dict[str, Any]], None]
MakeBundle = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path, busybox: Path) -> MakeBundle:
    """Make a bundle: ``bundle(["sh", "-c", "…"], edit=lambda spec: …)``; its rootfs is the shared, read-only one."""
    count = 0

    def make(args: Sequence[str], *, edit: Edit | None = None, rootfs: Path | None = None) -> Path:
        nonlocal count
        count += 1
        directory = tmp_path / f"bundle{count}"
        directory.mkdir()
        spec = deepcopy(default_spec())
        spec["process"]["terminal"] = False
        spec["process"]["args"] = list(args)
        spec["root"] = {"path": str(rootfs or busybox), "readonly": rootfs is None}
        if edit is not None:
            edit(spec)
        (directory / "config.json").write_text(json.dumps(spec))
        return directory

    return make
