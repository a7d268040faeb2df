"""podman and buildah as the functional tests run them: with katapy, and the same with runc.

Everything that they keep (images, containers, locks, logs) is below one directory of the test, and their cgroups are
below one of the test's own.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from harness import DEADLINE, KATAPY

# The second table is for machines that take the right to raise limits away from root.
CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{directory}/tmp"
volume_path = "{directory}/volumes"
[engine.runtimes]
katapy = ["{directory}/katapy"]
runc = ["{directory}/runc"]
[network]
network_config_dir = "{directory}/networks"
"""
STORAGE_CONF = """
[storage]
driver = "vfs"
graphroot = "{directory}/graph"
runroot = "{directory}/run"
"""
# Engines call a runtime with next to no environment, and name no state directory.
WRAPPER = """#!/bin/sh
{exports}exec {program} --root {root} "$@"
"""
RUNC = Path("/usr/sbin/runc")

# After its container, in its cgroup.
CONMON_SECONDS = 30.0


class Done(NamedTuple):
    """What a command returned and printed."""

    status: int
    out: str
    err: str


@dataclass
class Engine:
    """The programs of podman's family on a directory of their own."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> Engine:
        """Write the configuration below ``directory``, which is made."""
        directory.mkdir()
        (directory / "containers.conf").write_text(CONTAINERS_CONF.format(directory=directory))
        (directory / "storage.conf").write_text(STORAGE_CONF.format(directory=directory))
        config = os.environ.get("KATAPY_CONFIG")
        exports = {KATAPY.name: f"export KATAPY_CONFIG={config}\n" if config else ""}
        for program in (KATAPY, RUNC):
            wrapper = directory / program.name
            root = directory / f"{program.name}.state"
            text = WRAPPER.format(exports=exports.get(program.name, ""), program=program, root=root)
            wrapper.write_text(text)
            wrapper.chmod(0o755)
        return cls(directory)

    @property
    def cgroup(self) -> str:
        """The cgroup below which containers are put."""
        return f"/katapy-engines-{os.getpid()}"

    @property
    def rootfs(self) -> str:
        """The root file system that the tests run on."""
        return str(self.directory / "rootfs")

    @property
    def env(self) -> dict[str, str]:
        """The environment of every command."""
        return {
            "PATH": f"{KATAPY.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.directory),
            "TMPDIR": str(self.directory),
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",  # podman 5 says so on stderr each time
        }

    def __call__(
        self, *argv: str | Path, stdin: str | int | None = None, check: bool = True, timeout: float = DEADLINE
    ) -> Done:
        """Run a program to its end; ``stdin`` is text, or a descriptor that becomes the output too."""
        given = stdin if isinstance(stdin, str) else None
        source = stdin if isinstance(stdin, int) else None if given is not None else subprocess.DEVNULL
        target = stdin if isinstance(stdin, int) else subprocess.PIPE
        done = subprocess.run(
            list(map(str, argv)),
            input=given,
            stdin=source,
            stdout=target,
            stderr=target,
            text=True,
            timeout=timeout,
            env=self.env,
            cwd=self.directory,
        )
        assert not check or done.returncode == 0, f"{argv}: status {done.returncode}: {done.stderr}"
        return Done(done.returncode, done.stdout or "", done.stderr or "")

    def podman(self, *args: str | Path, stdin: str | int | None = None, check: bool = True) -> Done:
        """Run podman with katapy."""
        return self("podman", "--runtime", "katapy", *args, stdin=stdin, check=check)

    def create(self, verb: str, *args: str | Path, runtime: str = "katapy") -> list[str]:
        """Return podman's arguments to ``run`` or ``create`` a container, by itself without a network."""
        network = () if "--network" in args else ("--network", "none")
        common = (verb, *network, "--cgroup-parent", self.cgroup)
        return ["podman", "--runtime", runtime, *common, *map(str, args)]

    def run(self, *args: str | Path, stdin: str | int | None = None, check: bool = True) -> Done:
        """Run ``podman run`` with katapy."""
        return self(*self.create("run", *args), stdin=stdin, check=check)

    def remove_cgroup(self) -> None:
        """Remove what the engine itself leaves of its cgroups; one that is in use stays, for the caller to find."""
        for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
            # The second is podman's own choice.
            for name in (f"{self.cgroup}/conmon", self.cgroup, "/libpod_parent/conmon", "/libpod_parent"):
                with contextlib.suppress(OSError):
                    Path(f"{top}{name}").rmdir()

    def containers(self) -> Iterator[str]:
        """Yield the names of the containers that are left."""
        yield from self("podman", "ps", "--all", "--format", "{{.Names}}", check=False).out.split()
