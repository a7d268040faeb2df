"""The command line as the functional tests run it, and what they run it on."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from katapy.config import Config
from katapy.oci.default import default_spec
from katapy.transport.vsock import VsockKind, find_kind

KATAPY = Path(sys.executable).with_name("katapy")
# What tells one running kernel from another: a guest's may be of the same release as the host's.
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Generous: the machine may be slow, shared, and without hardware virtualization.
SLOWNESS = 5.0 if "KATAPY_LAB" in os.environ else 1.0
"""How much longer things take here than on a machine without emulation, or with only one."""
DEADLINE = 120.0 * SLOWNESS


Edit = Callable[[dict[str, Any]], None]
MakeBundle = Callable[..., Path]


class Call(subprocess.Popen[bytes]):
    """A command that was started. Who leaves its context by an exception does not wait for it: it may hang."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(describe_processes())
            self.kill()
        super().__exit__(kind, value, trace)


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

    def start(self, *args: str | Path, **options: Any) -> Call:
        """Start a call and return at once."""
        return Call(self.argv(*args), env=self.env, **options)

    def state(self, container_id: str) -> dict[str, Any]:
        """Return what ``state`` prints."""
        answer: dict[str, Any] = json.loads(self("state", container_id, check=True).stdout)
        return answer

    def saved(self, container_id: str) -> dict[str, Any]:
        """Return what is saved of a container."""
        document: dict[str, Any] = json.loads((self.root / container_id / "state.json").read_text())
        return document


def make_bundle(
    directory: Path, rootfs: Path, args: Sequence[str], *, edit: Edit | None = None, readonly: bool = True
) -> Path:
    """Make a bundle that runs ``args`` in ``rootfs``, and return it."""
    directory.mkdir()
    spec = deepcopy(default_spec())
    spec["process"]["terminal"] = False
    spec["process"]["args"] = list(args)
    spec["root"] = {"path": str(rootfs), "readonly": readonly}
    if edit is not None:
        edit(spec)
    (directory / "config.json").write_text(json.dumps(spec))
    return directory


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


def await_ends(known: Collection[int], seconds: float) -> dict[int, str]:
    """Wait until all processes below this one that are not ``known`` have ended; return those that have not in time."""
    deadline = time.monotonic() + seconds
    for pid in set(descendants()) - set(known):
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        os.close(fd)
    return {pid: name for pid, name in descendants().items() if pid not in known}


def vsock_kind() -> VsockKind:
    """Return which vsock device pods get here."""
    return find_kind(Config.load().hypervisor.vsock)


def await_true(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def descendants() -> dict[int, str]:
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


def describe_processes() -> str:
    """Return what the processes below this one do in the kernel, thread by thread: for a test that hangs."""
    lines = []
    for pid, command in descendants().items():
        lines.append(f"{pid}: {command}")
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                calls = [line.split()[1] for line in (thread / "stack").read_text().splitlines()[:4]]
                lines.append(f"    {(thread / 'comm').read_text().strip()} {state} {' < '.join(calls)}")
    return "\n".join(lines)
