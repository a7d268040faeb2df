"""`make` and scripts/setup: what they do on hosts that are not quite right, and that they do it once.

The checkout is a small copy of the real one, in which the programs that would take minutes are stand-ins.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]
LISTS_LOCK = Path("/var/lib/apt/lists/lock")
FAKES = {
    "id": "echo 0",
    "df": "echo Avail; echo 99999",
    "dpkg-query": "exit 1",
    # The mirror has what the lists name once these are new. As the real one, it does not wait for the lists' lock.
    "apt-get": f"""
        echo "$*" >> apt-get.log
        case "$*" in
        *--simulate*) [ ! -e no-lists ] ;;
        *install*) [ -e new-lists ] ;;
        *update) {sys.executable} -c '
import fcntl, sys
fcntl.lockf(open("{LISTS_LOCK}", "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)' && touch new-lists && rm -f no-lists ;;
        esac""",
    # Stands for the host's Python and, copied, for that of the virtual environment.
    "python": """
        echo "$*" >> python.log
        case "$*" in
        "-m venv --clear .venv")
            rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python
            echo "#!$PWD/.venv/bin/python3" > .venv/bin/pip ;;
        *--editable*) touch .venv/bin/katapy ;;
        esac""",
}
# Notes what the recipe called it for; the environment's programs are there afterwards, as far as make looks.
SETUP = """
echo "$1" >> setup.log
mkdir -p build
[ "$1" = packages ] || {
    mkdir -p .venv/bin
    echo "#!$PWD/.venv/bin/python3" > .venv/bin/pip
    printf '#!/bin/sh\\necho "$*" >> setup.log\\n' > .venv/bin/katapy
    chmod 755 .venv/bin/katapy
}"""


def _write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class Host:
    """A checkout, and programs that stand for apt-get and Python."""

    def __init__(self, directory: Path) -> None:
        self.checkout, self.programs = directory / "checkout", directory / "programs"
        self.os_release = directory / "os-release"
        self.os_release.write_text('ID=debian\nVERSION_ID="12"\n')
        (self.checkout / "scripts").mkdir(parents=True)
        shutil.copy(SOURCE / "scripts/setup", self.checkout / "scripts")
        for name, text in FAKES.items():
            _write_program(self.programs / name, text)

    def setup(self, what: str) -> subprocess.CompletedProcess[str]:
        """Run scripts/setup."""
        path = f"{self.programs}:{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "PYTHON": str(self.programs / "python"), "OS_RELEASE": str(self.os_release)}
        return subprocess.run([self.checkout / "scripts/setup", what], env=env, capture_output=True, text=True)

    def calls(self, program: str) -> list[str]:
        """Return the arguments that apt-get, python or scripts/setup was called with, and forget them."""
        log = self.checkout / f"{program}.log"
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def project(host: Host) -> Host:
    """A checkout in which `make setup` and `make run` have done their work."""
    _write_program(host.checkout / "scripts/setup", SETUP)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(SOURCE / name, host.checkout)
    for name in ("images", "default-root", "guest-agent", "examples"):
        made = shutil.ignore_patterns("__pycache__", "rootfs", "config.json")
        shutil.copytree(SOURCE / name, host.checkout / name, ignore=made)
    for asset in ("image", "kernel", "root"):
        (host.checkout / "data" / asset / "1").mkdir(parents=True)
        (host.checkout / "data" / asset / f"1/{asset}.json").touch()
    _make(host, "run")
    assert host.calls("setup") == ["packages", "venv", "image build", "run --bundle examples/hello hello"]
    return host


def _edit(host: Host, name: str) -> None:
    """Make a file newer than all others: the kernel's clock for them is too coarse for that."""
    for path in host.checkout.rglob("*"):
        status = path.lstat()
        os.utime(path, (status.st_atime, status.st_mtime - 10), follow_symlinks=False)
    os.utime(host.checkout / name)


def _make(host: Host, *args: str) -> str:
    argv = ["make", "PROGRAMS=", f"DATA_DIR={host.checkout}/data", *args]
    # Not the make that may run these tests.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(argv, cwd=host.checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_lists_that_name_versions_that_are_gone_are_fetched_anew(host: Host) -> None:
    """On a machine made from an old image the simulation succeeded, and the download then got a 404."""
    done = host.setup("packages")
    assert done.returncode == 0, done.stderr
    simulation, failed, update, again = host.calls("apt-get")
    assert simulation == f"{failed} --simulate"
    assert update.endswith("update")
    assert again == failed


def test_lists_that_are_not_there_are_fetched_first(host: Host) -> None:
    (host.checkout / "no-lists").touch()
    assert host.setup("packages").returncode == 0
    assert [call.endswith("update") for call in host.calls("apt-get")] == [False, True, False]


def test_an_installation_under_way_is_waited_for(host: Host) -> None:
    """A fresh machine in a cloud installs its updates, and apt-get failed at once: it could not get dpkg's lock."""
    host.setup("packages")
    assert {"DPkg::Lock::Timeout=300" in call for call in host.calls("apt-get") if "install" in call} == {True}


@pytest.mark.parametrize(("what", "package"), [("packages", "virtiofsd"), ("test-tools", "netavark")])
def test_later_releases_have_packages_of_their_own(host: Host, what: str, package: str) -> None:
    """On Debian 13 there was no virtiofsd."""
    assert host.setup(what).returncode == 0
    assert not any(package in call.split() for call in host.calls("apt-get"))
    host.os_release.write_text('ID=debian\nVERSION_ID="13"\n')
    assert host.setup(what).returncode == 0
    assert any(package in call.split() for call in host.calls("apt-get"))


@pytest.mark.root
def test_an_update_under_way_is_waited_for(host: Host) -> None:
    """apt-get does not wait for the lock of its lists, whatever it is told."""
    with LISTS_LOCK.open("ab") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        timer = threading.Timer(1.0, fcntl.lockf, (lock, fcntl.LOCK_UN))
        timer.start()
        done = host.setup("packages")
        timer.join()
    assert done.returncode == 0, done.stderr


def test_the_environment_of_a_moved_checkout_is_made_anew(host: Host) -> None:
    """Its Python worked; pip, pytest and katapy named the Python of a directory that was no longer there."""
    assert host.setup("venv").returncode == 0
    assert "-m venv --clear .venv" in host.calls("python")
    assert host.setup("venv").returncode == 0
    assert "-m venv --clear .venv" not in host.calls("python")
    host.checkout = host.checkout.rename(host.checkout.with_name("moved"))
    assert host.setup("venv").returncode == 0
    assert "-m venv --clear .venv" in host.calls("python")


def test_the_second_make_does_nothing(project: Host) -> None:
    assert _make(project, "setup") == "make: Nothing to be done for 'setup'.\n"
    _make(project, "run")
    assert project.calls("setup") == ["run --bundle examples/hello hello"]
    assert _make(project, "--just-print", "run").splitlines() == [".venv/bin/katapy run --bundle examples/hello hello"]


def test_make_notices_that_the_checkout_was_moved(project: Host) -> None:
    project.checkout = project.checkout.rename(project.checkout.with_name("moved"))
    _make(project, "setup")
    assert project.calls("setup") == ["venv", "image build"]
    assert _make(project, "setup") == "make: Nothing to be done for 'setup'.\n"


@pytest.mark.parametrize(
    "name", ["guest-agent/katapy_agent/oom.py", "images/requirements.txt", "default-root/default_root.py"]
)
def test_the_image_is_built_again_without_a_file_that_was_removed(project: Host, name: str) -> None:
    """Only files that were there were compared with the image: it kept a module that was removed from the agent."""
    (project.checkout / name).unlink()
    _make(project, "setup")
    assert project.calls("setup") == ["image build"]
    assert _make(project, "setup") == "make: Nothing to be done for 'setup'.\n"


@pytest.mark.parametrize("asset", ["image", "kernel", "root"])
def test_what_was_removed_is_built_again(project: Host, asset: str) -> None:
    shutil.rmtree(project.checkout / "data" / asset)
    _make(project, "setup")
    assert project.calls("setup") == ["image build"]


def test_what_python_leaves_beside_the_sources_builds_no_image(project: Host) -> None:
    for directory in ("images", "default-root", "guest-agent/katapy_agent"):
        (project.checkout / directory / "__pycache__").mkdir(exist_ok=True)
        (project.checkout / directory / "__pycache__/new.pyc").touch()
    assert _make(project, "setup") == "make: Nothing to be done for 'setup'.\n"


def test_the_example_is_prepared_when_something_of_it_has_changed(project: Host) -> None:
    """It was prepared at every run: 400 links for busybox."""
    hello = project.checkout / "examples/hello"
    config = (hello / "config.json").read_text()
    assert os.uname().release in config
    (hello / "config.json").write_text(config.replace(os.uname().release, "5.10.0-the-kernel-before"))
    _make(project, "run")
    assert (hello / "config.json").read_text() == config
    for name in ("prepare", "hello.sh", "config.json.in"):
        _edit(project, f"examples/hello/{name}")
        assert "examples/hello/prepare" in _make(project, "--just-print", "run")
        _make(project, "run")
    shutil.rmtree(hello / "rootfs")
    _make(project, "run")
    assert (hello / "rootfs/bin/hello").exists()
    assert "prepare" not in _make(project, "--just-print", "run")
