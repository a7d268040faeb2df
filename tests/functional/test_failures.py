"""A part dies in the middle of a run: the command ends soon and says which, and nothing is left."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE, SLOWNESS, Katapy, MakeBundle, await_true, descendants, vsock_kind

from katapy.transport.vsock import VsockKind

# "Within 2 s" is the promise; a shared machine may be slow.
SOON = 20.0 * SLOWNESS
# The kernel's vsock device is no process.
PARTS = ["qemu", "virtiofsd", *(["vsock"] if vsock_kind() is VsockKind.USER else []), "shim"]


def _pid_of(katapy: Katapy, container_id: str, part: str) -> int:
    state = json.loads((katapy.root / container_id / "state.json").read_text())
    # Before the shim has taken over, its place is taken by the command that made the state.
    processes = [process for process in (state["shim"], *state["helpers"]) if process is not None]
    return next(int(process["pid"]) for process in processes if part in process["name"].lower())


@pytest.mark.parametrize("part", PARTS)
def test_part_killed_during_a_foreground_run(katapy: Katapy, bundle: MakeBundle, part: str) -> None:
    directory = bundle(["sh", "-c", "echo up; sleep 1000"])
    pipe = subprocess.PIPE
    with katapy.start("run", "--bundle", directory, "c1", stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        began = time.monotonic()
        os.kill(_pid_of(katapy, "c1", part), signal.SIGKILL)
        _, error = process.communicate(timeout=SOON)
        took = time.monotonic() - began
    print(f"{part}: {took:.2f} s: {error.decode()}")
    assert process.returncode not in (0, None)
    assert part in error.decode().lower()
    if part == "qemu":
        assert "console" in error.decode()
    # The run is over, so there is nothing to delete; --force says so without an error.
    assert katapy("delete", "--force", "c1").returncode == 0
    assert katapy("list", "-q").stdout == b""


@pytest.mark.parametrize("part", ["qemu", "shim"])
def test_part_killed_behind_a_detached_container(katapy: Katapy, bundle: MakeBundle, part: str) -> None:
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    pidfd = os.pidfd_open(katapy.state("c1")["pid"])
    os.kill(_pid_of(katapy, "c1", part), signal.SIGKILL)
    # The stand-in ends, so that an engine that waits for it learns of it.
    assert select.select([pidfd], [], [], SOON)[0]
    os.close(pidfd)
    assert katapy.state("c1")["status"] == "stopped"
    failed = katapy("exec", "c1", "true")
    assert failed.returncode != 0
    assert failed.stderr.startswith(b"katapy: ")
    katapy("delete", "--force", "c1", check=True)


@pytest.mark.parametrize("part", PARTS)
def test_part_killed_during_boot(katapy: Katapy, bundle: MakeBundle, part: str) -> None:
    process = katapy.start("run", "--bundle", bundle(["true"]), "c1", stderr=subprocess.PIPE)
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            os.kill(_pid_of(katapy, "c1", part), signal.SIGKILL)
            break
        except (FileNotFoundError, StopIteration):
            assert process.poll() is None, "the run ended before the part was there"
            assert time.monotonic() < deadline
    _, error = process.communicate(timeout=SOON)
    assert process.returncode != 0
    assert part in error.decode().lower()


def test_vsock_device_that_gives_up(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """Why it had ended only went to the shim's log, which goes with the pod."""
    config = tmp_path / "katapy.toml"
    config.write_text('[hypervisor]\nvsock = "user"\n')
    config.chmod(0o600)
    katapy.options = ("--config", str(config))
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    # It can take no descriptor any more, so the next request comes to it without its socket.
    pid = _pid_of(katapy, "c1", "vsock")
    uid = os.stat(f"/proc/{pid}").st_uid
    as_itself = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    subprocess.run([*as_itself, "prlimit", f"--pid={pid}", "--nofile=0:0"], check=True)
    failed = katapy("exec", "c1", "true")
    assert failed.returncode == 1
    assert b"vsock device of c1 died" in failed.stderr
    assert failed.stderr.endswith(b"\nkatapy vsock device: the owner's request is malformed\n")
    katapy("delete", "--force", "c1", check=True)


@pytest.mark.parametrize(("key", "last_words"), [("b", b"sysrq: Resetting"), ("c", b"Kernel panic")])
def test_guest_that_ends_by_itself(katapy: Katapy, bundle: MakeBundle, key: str, last_words: bytes) -> None:
    """QEMU ends without an error then, so why is said."""

    def edit(spec: dict[str, Any]) -> None:
        spec["linux"]["readonlyPaths"] = []

    command = f"echo {key} > /proc/sysrq-trigger; sleep 1000"
    failed = katapy("run", "--bundle", bundle(["sh", "-c", command], edit=edit), "c1")
    assert failed.returncode == 1
    assert b"ended with status 0 (guest-reset)" in failed.stderr
    assert last_words in failed.stderr


def test_guest_that_does_not_answer(katapy: Katapy, bundle: MakeBundle) -> None:
    """A VM that stands still answers no call; it can be removed all the same."""
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    os.kill(_pid_of(katapy, "c1", "qemu"), signal.SIGSTOP)
    katapy("delete", "--force", "c1", check=True)


def test_guest_that_stands_still(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """Whoever waited for it waited for ever."""
    config = tmp_path / "katapy.toml"
    config.write_text("[runtime]\nagent_timeout = 9\n")
    config.chmod(0o600)
    katapy.options = ("--config", str(config))
    pipe = subprocess.PIPE
    with katapy.start(
        "run", "--bundle", bundle(["sh", "-c", "echo up; sleep 1000"]), "c1", stdout=pipe, stderr=pipe
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        os.kill(_pid_of(katapy, "c1", "qemu"), signal.SIGSTOP)
        _, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert b"the VM of c1 was killed: its agent has not answered for 9 s" in error
    assert katapy("list", "-q").stdout == b""


def test_agent_that_does_not_answer(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """The VM goes on, but nobody hears its agent: SIGKILL ends it within its time, and `state` says so."""
    config = tmp_path / "katapy.toml"
    config.write_text('[hypervisor]\nvsock = "user"\n')
    config.chmod(0o600)
    katapy.options = ("--config", str(config))
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    os.kill(_pid_of(katapy, "c1", "vsock"), signal.SIGSTOP)
    katapy("kill", "c1", "TERM", check=True)
    assert katapy.state("c1")["status"] == "running"
    began = time.monotonic()
    katapy("kill", "c1", "KILL", check=True)
    assert time.monotonic() - began < 10 + SOON
    await_true(lambda: katapy.state("c1")["status"] == "stopped")
    katapy("delete", "c1", check=True)


def test_command_killed_during_boot(katapy: Katapy, bundle: MakeBundle) -> None:
    process = katapy.start("run", "--bundle", bundle(["true"]), "c1")
    deadline = time.monotonic() + DEADLINE
    while not any("qemu" in name for name in descendants().values()):
        assert time.monotonic() < deadline
    process.kill()
    process.wait()
    # The shim undoes what nobody waits for; the fixtures see that nothing is left.
    while katapy("list", "-q").stdout:
        assert time.monotonic() < deadline


def test_command_killed_at_once(katapy: Katapy, bundle: MakeBundle) -> None:
    """Killed before it has asked its shim for anything, it leaves a shim that nobody knows of: that one ends too."""
    directory = bundle(["true"])
    for attempt in range(5):
        process = katapy.start("run", "--bundle", directory, f"c{attempt}")
        deadline = time.monotonic() + DEADLINE
        while not (katapy.root / f"c{attempt}").exists():
            assert time.monotonic() < deadline
        process.kill()
        process.wait()
        assert katapy("delete", "--force", f"c{attempt}").returncode == 0


def test_nothing_is_left_of_a_run_whose_pid_file_cannot_be_written(katapy: Katapy, bundle: MakeBundle) -> None:
    """The container stayed, created, with its VM: only what came later was watched over."""
    done = katapy("run", "--pid-file", "/nonexistent/pid", "--bundle", bundle(["true"]), "c1")
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"/nonexistent/pid" in done.stderr
    assert katapy("list", "-q").stdout == b""


def test_command_killed_behind_a_reader_that_stalls(katapy: Katapy, bundle: MakeBundle) -> None:
    """`katapy run … | less`, killed when the container has ended: nobody would have ended the VM."""
    script = "head -c 1000000 /dev/zero"
    with katapy.start("run", "--bundle", bundle(["sh", "-c", script]), "c1", stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.read(1)
        deadline = time.monotonic() + DEADLINE
        while katapy.state("c1")["status"] != "stopped":
            assert time.monotonic() < deadline
        process.kill()
    while katapy("list", "-q").stdout:
        assert time.monotonic() < deadline


def test_qemu_that_cannot_start(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    for name, settings, expected in (
        ("missing", 'qemu = "/nonexistent/qemu"', b"/nonexistent/qemu"),
        ("kernel", 'kernel = "9.9.9-none"', b"9.9.9-none"),
        ("image", f'image = "{"0" * 64}"', b"0000"),
    ):
        config = tmp_path / f"{name}.toml"
        config.write_text(f"[hypervisor]\n{settings}\n")
        config.chmod(0o600)
        done = katapy("--config", config, "run", "--bundle", bundle(["true"]), "c1")
        assert done.returncode == 1
        assert expected in done.stderr
        assert done.stderr.startswith(b"katapy: ")
        assert done.stderr.count(b"\n") == 1, done.stderr.decode()


def test_damaged_image(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """A guest whose root is garbage cannot boot: one message with the console's last words, and nothing left."""
    from katapy.assets import guest

    real = Path("/var/lib/katapy")
    data = tmp_path / "data"
    image, kernel = guest.find_image(real), guest.find_kernel(real, "debian")
    (data / "kernel").mkdir(parents=True)
    (data / "kernel" / kernel.version).symlink_to(kernel.kernel.parent)
    copy = data / "image" / image.digest
    copy.mkdir(parents=True)
    (copy / "image.json").write_bytes((image.path.parent / "image.json").read_bytes())
    with (copy / "root.erofs").open("wb") as file:
        file.truncate(image.size_bytes)
    config = tmp_path / "katapy.toml"
    config.write_text(f'[runtime]\ndata_dir = "{data}"\n[hypervisor]\nkernel = "debian"\n')
    config.chmod(0o600)
    done = katapy("--config", config, "run", "--bundle", bundle(["true"]), "c1")
    assert done.returncode == 1
    assert b"console" in done.stderr
    assert b"root" in done.stderr.partition(b"console")[2]
