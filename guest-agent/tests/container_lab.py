"""Builds real containers on this machine for the tests: a busybox root, a base config.json, a process that is reaped.

The stand-in for a cgroup is a directory with a file cgroup.procs, for a container joins its cgroup by writing there.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from katapy_agent import child, config, errors

BUSYBOX = Path("/bin/busybox")
_PR_SET_CHILD_SUBREAPER = 36
_SECONDS = 20
_DEFAULT_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"]

BASE: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "root": {"path": "/set-by-the-lab"},
    "hostname": "lab",
    "process": {
        "cwd": "/",
        "args": ["/bin/sh"],
        "env": ["PATH=/bin:/sbin"],
        "user": {"uid": 0, "gid": 0},
        "noNewPrivileges": True,
        "capabilities": {
            "bounding": _DEFAULT_CAPABILITIES,
            "effective": _DEFAULT_CAPABILITIES,
            "permitted": _DEFAULT_CAPABILITIES,
        },
    },
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        },
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "mode=1777"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    ],
    "linux": {
        "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "cgroup")],
        "maskedPaths": ["/proc/kcore", "/proc/scsi", "/proc/absent", "/sys/firmware"],
        "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger", "/proc/absent"],
    },
}


class Process:
    """A process that was forked to follow a plan."""

    def __init__(self, control: socket.socket, output: int | None) -> None:
        self.control = control
        self.output = output
        self.console: int | None = None
        self.pid = 0

    def until_ready(self) -> None:
        """Follow its reports until it waits to be started; raises its error."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.control, 65536, 1)
            message = json.loads(data) if data else {"error": {"kind": "Internal", "message": "the process died"}}
            match message:
                case {"pid": int(pid)}:
                    self.pid = pid
                case {"console": True}:
                    (self.console,) = fds
                case {"ready": True}:
                    return
                case {"error": {"kind": kind, "message": text}}:
                    raise errors.by_name(kind)(text)

    def start(self) -> None:
        """Let it execute its program; raises its error."""
        self.control.send(b'{"start": true}')
        if data := self.control.recv(65536):
            report = json.loads(data)["error"]
            raise errors.by_name(report["kind"])(report["message"])

    def finish(self) -> tuple[int, str]:
        """Return exit status (negative: signal) and output, standard error with it."""
        source = self.console if self.output is None else self.output
        assert source is not None
        text = b""
        # A pty reports EIO, not an end, once nobody has it open.
        with contextlib.suppress(OSError):
            while data := os.read(source, 65536):
                text += data
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status), text.decode()

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.control.close()
        for fd in (self.output, self.console):
            if fd is not None:
                os.close(fd)


class Lab:
    """One root file system and the processes that were started in it."""

    def __init__(self, directory: Path) -> None:
        self.rootfs = directory / "rootfs"
        self.cgroup = directory / "cgroup"
        self.processes: list[Process] = []
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
            (self.rootfs / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, self.rootfs / "bin/busybox")
        for applet in ("sh", "cat", "ls", "id", "sleep", "stat", "grep", "mount", "hostname", "env", "touch", "true"):
            (self.rootfs / "bin" / applet).symlink_to("busybox")
        self.cgroup.mkdir()
        (self.cgroup / "cgroup.procs").touch()

    def spec(self, change: Callable[[dict[str, Any]], object] = lambda _: None) -> config.Spec:
        """Return the base configuration after ``change``."""
        document = copy.deepcopy(BASE)
        document["root"]["path"] = str(self.rootfs)
        change(document)
        return config.parse_spec(json.dumps(document).encode())

    def create(self, spec: config.Spec) -> Process:
        """Build a container; its init waits to be started."""
        return self._launch(child.plan_init(spec, container_id="lab", cgroup=str(self.cgroup), rows=30, columns=90))

    def exec(self, container: Process, spec: config.Spec, **process: Any) -> Process:
        """Prepare one more process in a container."""
        document = {"cwd": "/", "args": ["/bin/true"], "env": ["PATH=/bin"], **process}
        described = config.parse_process(json.dumps(document).encode())
        return self._launch(
            child.plan_exec(described, spec=spec, init_pid=container.pid, cgroup=str(self.cgroup), rows=0, columns=0)
        )

    def run(self, script: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> tuple[int, str]:
        """Run a shell script as the init of a container, with the base configuration after ``change``."""

        def with_script(document: dict[str, Any]) -> None:
            document["process"]["args"] = ["/bin/sh", "-c", script]
            change(document)

        process = self.create(self.spec(with_script))
        process.start()
        return process.finish()

    def _launch(self, plan: dict[str, object]) -> Process:
        encoded = json.dumps(plan)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_SECONDS)
        reading, writing = (None, None) if plan["terminal"] else os.pipe()
        pid = os.fork()
        if pid == 0:
            stdio = None if writing is None else (os.open("/dev/null", os.O_RDONLY), writing, writing)
            _close_all_but({0, 1, 2, theirs.fileno(), *(stdio or ())})
            child.run(json.loads(encoded), theirs.detach(), stdio)
        theirs.close()
        if writing is not None:
            os.close(writing)
        process = Process(ours, reading)
        self.processes.append(process)
        os.waitpid(pid, 0)
        process.until_ready()
        return process


def find_hierarchy() -> Path:
    """Return where this machine has cgroup v2; beside v1 it has no controllers, but takes device programs."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return Path(line.split()[1])
    pytest.skip("no cgroup v2 here")


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with contextlib.suppress(OSError):  # that of the listing itself
                os.close(int(name))


@contextlib.contextmanager
def open_lab(directory: Path) -> Iterator[Lab]:
    """Make a lab, and end all that was started in it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    lab = Lab(directory)
    try:
        yield lab
    finally:
        # An init ends only when all of its namespace are reaped: those that came later go first.
        for process in reversed(lab.processes):
            process.close()
