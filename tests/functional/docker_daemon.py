"""Docker as the functional tests run it: a daemon of its own, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from containerd_daemon import SHIM
from engine import Done
from harness import DEADLINE, KATAPY, descendants

DOCKERD = Path("/usr/sbin/dockerd")
DOCKER = Path("/usr/bin/docker")
IMAGE = "busybox:test"
# katapy has its configuration from the environment, of which containerd's shim leaves nothing.
WRAPPER = """#!/bin/sh
{exports}exec {program} "$@"
"""


@dataclass
class Docker:
    """A daemon that runs, and everything that it keeps, below one directory."""

    directory: Path
    namespace: str

    @property
    def env(self) -> dict[str, str]:
        """The environment of every command."""
        path = f"{DOCKER.parent}:{KATAPY.parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": str(self.directory), "DOCKER_HOST": f"unix://{self.directory}/docker.sock"}

    def on_host(
        self, *argv: str | Path, stdin: str | None = None, check: bool = True, timeout: float = DEADLINE
    ) -> Done:
        """Run a program where the daemon is at home, as far as networks go."""
        command = ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *map(str, argv)]
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.env,
            cwd=self.directory,
        )
        assert not check or done.returncode == 0, f"{argv}: status {done.returncode}: {done.stderr}"
        return Done(done.returncode, done.stdout, done.stderr)

    def __call__(self, *args: str | Path, stdin: str | None = None, check: bool = True) -> Done:
        """Run ``docker`` to its end."""
        return self.on_host(DOCKER, *args, stdin=stdin, check=check)

    def run(self, *args: str | Path, runtime: str = "katapy", stdin: str | None = None, check: bool = True) -> Done:
        """Run ``docker run``."""
        return self("run", "--runtime", runtime, *args, stdin=stdin, check=check)


@contextlib.contextmanager
def start_docker(directory: Path, rootfs: Path) -> Iterator[Docker]:
    """Run a daemon with an image of ``rootfs``, IMAGE; nothing of it is left afterwards.

    Raises RuntimeError with the last words of a daemon that does not start.
    """
    docker = Docker(directory, f"katapy-docker-{os.getpid()}")
    wrapper = directory / "katapy"
    config = os.environ.get("KATAPY_CONFIG")
    wrapper.write_text(WRAPPER.format(exports=f"export KATAPY_CONFIG={config}\n" if config else "", program=KATAPY))
    wrapper.chmod(0o755)
    (directory / SHIM.name).symlink_to(SHIM)
    settings = directory / "daemon.json"
    settings.write_text(
        json.dumps(
            {
                "data-root": f"{directory}/data",
                "exec-root": f"{directory}/exec",
                "pidfile": f"{directory}/docker.pid",
                "hosts": [docker.env["DOCKER_HOST"]],
                "storage-driver": "vfs",
                "bip": "10.77.0.1/24",
                "default-address-pools": [{"base": "10.78.0.0/16", "size": 24}],
            }
        )
    )
    install: list[str | Path] = [KATAPY, "install", "--docker", "--config", settings, "--programs", directory]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:
        subprocess.run(["ip", "netns", "add", docker.namespace], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "delete", docker.namespace], check=True)
        subprocess.run(["ip", "-n", docker.namespace, "link", "set", "lo", "up"], check=True)
        known = descendants()
        with (directory / "docker.log").open("wb") as log:
            # Not `ip netns exec`, which hides /sys/fs/cgroup.
            command = ["nsenter", f"--net=/run/netns/{docker.namespace}", "--", str(DOCKERD)]
            command += ["--config-file", f"{directory}/daemon.json"]
            daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=docker.env)
        stack.callback(_stop, daemon, known)
        _await(docker, daemon)
        tar = subprocess.run(["tar", "--create", "--directory", str(rootfs), "."], capture_output=True, check=True)
        subprocess.run(
            [DOCKER, "import", "-", IMAGE], input=tar.stdout, env=docker.env, check=True, capture_output=True
        )
        yield docker
    for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
        with contextlib.suppress(OSError):
            (top / "docker").rmdir()
    for mounted in ("exec", "data"):
        shutil.rmtree(directory / mounted, ignore_errors=True)


def _await(docker: Docker, daemon: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while docker("version", check=False).status:
        if daemon.poll() is not None or time.monotonic() > deadline:
            words = (docker.directory / "docker.log").read_text(errors="replace").splitlines()[-3:]
            raise RuntimeError(f"dockerd does not start: {' | '.join(words)}")
        time.sleep(0.1)


def _stop(daemon: subprocess.Popen[bytes], known: dict[int, str]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    # Its containerd, and the shims of containers that a failed test has left.
    for pid in descendants().keys() - known.keys():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
