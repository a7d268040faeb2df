"""Fixtures that run the real command line against real virtual machines.

``host`` asserts after each test that nothing of it is left: no process, mount, directory, socket or cgroup. The test
process is the subreaper of everything it starts, so an orphan cannot hide.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import cri as kubernetes
import pytest
from arena import Arena
from arena import arena as make_arena
from containerd_daemon import IMAGE, Containerd, start_containerd
from ctr import sockets
from harness import (
    DEADLINE,
    KATAPY,
    SLOWNESS,
    Edit,
    Katapy,
    MakeBundle,
    await_ends,
    descendants,
    make_bundle,
    make_busybox,
)

from katapy import Sandbox
from katapy.cgroups.directory import MARK

_GONE_WITHIN = 30.0 * SLOWNESS
_PR_SET_CHILD_SUBREAPER = 36


# Those of templates say for themselves how their VMs start; of engines one is enough, since all call the same.
_STARTS_OF_THEIR_OWN = (
    "test_restored.py",
    "test_containerd.py",
    "test_containerd_kills.py",
    "test_cri.py",
    "test_cri_kills.py",
    "test_cri_streaming.py",
    "test_docker.py",
    "test_played_engines.py",
    "test_installed_engines.py",
)
# Where the boot itself is part of what is tested. What comes after it hardly depends on how a VM came to serve: the
# rest is booted by `make soak`.
_OFTEN_COLD = ("test_hardware.py", "test_kills.py", "test_run.py")
_COLD = "[hypervisor]\ntemplate = false\n"


def pytest_addoption(parser: pytest.Parser) -> None:
    how = "restored from templates (warm), or booted each time (cold)"
    parser.addoption("--starts", choices=["warm", "cold"], default="warm", help=f"VMs are {how}")
    parser.addoption("--seldom", action="store_true", help="with --starts cold: only what is seldom so")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    cold = config.getoption("--starts") == "cold"
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.root)
            name = item.path.name
            out = name in _STARTS_OF_THEIR_OWN or (name in _OFTEN_COLD) is config.getoption("--seldom")
            (left_out if cold and out else chosen).append(item)
        else:
            chosen.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = chosen


@pytest.fixture(scope="session", autouse=True)
def _starts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have every command line that is run start VMs as the tests were asked to."""
    if request.config.getoption("--starts") == "warm":
        yield
        return
    named = os.environ.get("KATAPY_CONFIG")
    text = Path(named).read_text() if named else ""
    own = tmp_path_factory.mktemp("config") / "katapy.toml"
    own.write_text(text.replace("[hypervisor]\n", _COLD) if "[hypervisor]\n" in text else text + _COLD)
    # Some tests are another user's.
    for path in (own, *list(own.parents)[:3]):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KATAPY_CONFIG", str(own))
        yield


@pytest.fixture(scope="session", autouse=True)
def _subreaper() -> None:
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


@pytest.fixture(scope="session", autouse=True)
def _ready_host() -> None:
    """Fail here, with the reason, where katapy cannot run; `check` also says what each run would warn of once."""
    checked = subprocess.run([KATAPY, "check"], capture_output=True, text=True, timeout=DEADLINE)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _mounts() -> list[str]:
    return [line.split(" ", 3)[3] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _cgroups(top: str = "/sys/fs/cgroup") -> set[str]:
    """Return the directories at and below ``top``; they may be deeper than Python recurses."""
    found, pending = set(), [top]
    while pending:
        path = pending.pop()
        found.add(path)
        # One that goes away meanwhile, with all below it, is none.
        with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
            pending += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return found


def _left_cgroups(known: set[str]) -> set[str]:
    """Return new cgroups of katapy's that nothing is in: other tests may run at the same time, and use theirs.

    None of our processes is left when this is called. What others make is empty for a moment at each end.
    """
    deadline = time.monotonic() + _GONE_WITHIN
    left = _cgroups() - known
    while left := {path for path in left if _is_katapys(path) and not _in_use(path)}:
        if time.monotonic() > deadline:
            break
    return left


def _is_katapys(cgroup: str) -> bool:
    """Tell whether katapy has made it. Where the kernel keeps no mark, anybody's is taken for that."""
    try:
        os.getxattr(cgroup, MARK)
    except OSError as error:
        return error.errno == errno.EOPNOTSUPP
    return True


def _in_use(cgroup: str) -> bool:
    with contextlib.suppress(OSError):
        return any(Path(path, "cgroup.procs").read_text() for path in _cgroups(cgroup))
    return True


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
    processes, mounts, cgroups = descendants(), _mounts(), _cgroups()
    yield
    left = await_ends(processes, _GONE_WITHIN)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    _reap_adopted()
    assert not left, "processes left behind"
    assert [mount for mount in _mounts() if mount not in mounts] == [], "mounts left behind"
    assert _left_cgroups(cgroups) == set(), "cgroups left behind"


@pytest.fixture
def katapy(tmp_path: Path, host: None) -> Iterator[Katapy]:
    """The command line; afterwards its state directory must be empty."""
    runner = Katapy(tmp_path / "run")
    yield runner
    left = _left_states(runner.root)
    for name in left:
        log = runner.root / name / "shim.log"
        if log.is_file():
            print(f"--- {log}\n{log.read_text(errors='replace')}")
        runner("delete", "--force", name)
    assert not left, "state left behind"


def _left_states(root: Path) -> list[str]:
    """Return what is left in a state directory. What a shim removes at its end may be about to go."""
    deadline = time.monotonic() + _GONE_WITHIN
    while (left := sorted(os.listdir(root)) if root.exists() else []) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system of Debian's static busybox, shared by all tests: read-only to them."""
    return make_busybox(tmp_path_factory.mktemp("busybox") / "rootfs")


@pytest.fixture
def bundle(tmp_path: Path, busybox: Path) -> MakeBundle:
    """Make a bundle: ``bundle(["sh", "-c", "…"], edit=lambda spec: …)``; its rootfs is the shared, read-only one."""
    count = 0

    def make(args: Sequence[str], *, edit: Edit | None = None, rootfs: Path | None = None) -> Path:
        nonlocal count
        count += 1
        directory = tmp_path / f"bundle{count}"
        return make_bundle(directory, rootfs or busybox, args, edit=edit, readonly=rootfs is None)

    return make


@pytest.fixture(scope="module")
def ctr_daemon(busybox: Path) -> Iterator[Containerd]:
    """A containerd with an image."""
    with (
        tempfile.TemporaryDirectory(prefix="katapy-") as name,
        start_containerd(Path(name), busybox) as containerd,
    ):
        # What unpacking an image starts and mounts is not a test's.
        containerd.run("--rm", IMAGE, "first", "true")
        yield containerd


@pytest.fixture
def containerd(ctr_daemon: Containerd, host: None) -> Iterator[Containerd]:
    """A containerd; afterwards it has no container, and the shims have left nothing."""
    yield ctr_daemon
    left = ctr_daemon("containers", "ls", "--quiet").out.split()
    for name in left:
        ctr_daemon("task", "kill", "--signal", "KILL", name, check=False)
        ctr_daemon("task", "rm", "--force", name, check=False)
        ctr_daemon("containers", "rm", name, check=False)
    assert not left, "containers left behind"
    assert list(ctr_daemon.root.iterdir()) == [], "state left behind"
    assert sockets(ctr_daemon) == [], "sockets left behind"
    assert list(ctr_daemon.bundles.iterdir()) == []


@pytest.fixture(scope="module")
def cri_daemon(busybox: Path) -> Iterator[Containerd]:
    """containerd with its CRI plugin."""
    with tempfile.TemporaryDirectory(prefix="katapy-") as name, kubernetes.start_plugin(Path(name), busybox) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def cri_messages(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The messages of that plugin."""
    return kubernetes.load_messages(tmp_path_factory.mktemp("cri"))


@pytest.fixture
def cri(cri_daemon: Containerd, cri_messages: object, host: None) -> Iterator[kubernetes.Cri]:
    """A client of that plugin."""
    with kubernetes.connect(cri_daemon, cri_messages) as client:
        yield client


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """Where the sandboxes of a module are attacked."""
    with make_arena(tmp_path_factory.mktemp("arena")) as made:
        yield made


@pytest.fixture
def victim(arena: Arena, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A sandbox to attack; afterwards nobody else has noticed, and the host is as it was."""
    sandbox = arena.victim()
    # What was started up to now is there afterwards.
    request.getfixturevalue("host")
    yield sandbox
    arena.check()
