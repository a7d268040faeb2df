"""Runs the command lines of katapy and runc on bundles, with whatever they start gone afterwards.

Each runtime has a state directory of its own; each container exists in a ``with``, and is deleted by force when that
is left, however it is left. Children have sessions of their own: Ctrl-C reaches the bench alone, which then ends them.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Final

from figures import BenchError, progress

from katapy.oci.default import default_spec
from katapy.oci.disk import ROOT_DISK

# Generous: many at once on a slow machine that emulates.
DEADLINE: Final = 900.0
MIB: Final = 1 << 20
_PREFIX: Final = "bench-"
_DIRECTORIES: Final = ("bin", "dev", "etc", "proc", "root", "sbin", "sys", "tmp", "work")


@contextmanager
def started(argv: Sequence[str | Path], *, pipes: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process and end it with the context; with ``pipes`` its input and output are pipes, else /dev/null.

    Raises BenchError where it was left to end by itself and has failed.
    """
    stream = subprocess.PIPE if pipes else subprocess.DEVNULL
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(arg) for arg in argv], stdin=stream, stdout=stream, stderr=errors, start_new_session=True, bufsize=0
        )
        try:
            yield process
            _check(process, errors)
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.kill()
            process.wait()


def await_end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process. Raises BenchError where it does not come."""
    # Not Popen.wait with its timeout: that only looks every so often, up to 50 ms apart.
    pidfd = os.pidfd_open(process.pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(DEADLINE * 1000):
            raise BenchError(f"{process.args!r} has not ended within {DEADLINE:g} s")
    finally:
        os.close(pidfd)


def _check(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    """Wait for the end. Raises BenchError with the end of what it said to ``errors`` where it has failed."""
    await_end(process)
    if process.wait() != 0:
        errors.seek(0)
        said = errors.read().decode(errors="replace")[-2000:].strip()
        raise BenchError(f"{process.args!r} ended with status {process.returncode}: {said}")


def run_timed(argv: Sequence[str | Path]) -> float:
    """Run a program to its end and return the seconds that took. Raises BenchError where it fails."""
    began = time.monotonic()
    with started(argv) as process:
        await_end(process)
        return time.monotonic() - began


class Runtime:
    """A runtime's command line; ``options`` are global ones, ``root`` its own directory of states."""

    _numbers = itertools.count(1)

    def __init__(self, name: str, program: str | Path, root: Path, options: Sequence[str | Path] = ()) -> None:
        self.name = name
        self.root = root
        self.options = options
        self._prefix = [program, "--root", root, *options]

    def argv(self, *args: str | Path) -> list[str | Path]:
        """Return the arguments of a call."""
        return [*self._prefix, *args]

    def timed(self, *args: str | Path) -> float:
        """Make a call and return the seconds that it took."""
        return run_timed(self.argv(*args))

    @contextmanager
    def container(self) -> Iterator[str]:
        """Give a new id; the container of that id is gone afterwards, if there was one."""
        container_id = f"{_PREFIX}{next(self._numbers)}"
        try:
            yield container_id
        finally:
            self.timed("delete", "--force", container_id)

    @contextmanager
    def detached(self, bundle: Path) -> Iterator[str]:
        """Give the id of a running container."""
        with self.container() as container_id:
            self.timed("run", "--detach", "--bundle", bundle, container_id)
            yield container_id

    def delete_all(self) -> None:
        """Delete what an interrupt has left by cutting a deletion short."""
        for directory in self.root.glob(f"{_PREFIX}*"):
            try:
                self.timed("delete", "--force", directory.name)
            except BenchError as error:
                progress(f"left behind: {error}")

    def run(self, bundle: Path, *options: str | Path) -> float:
        """Run a container to its end and return the seconds that took."""
        with self.container() as container_id:
            return self.timed("run", *options, "--bundle", bundle, container_id)

    def first_byte(self, bundle: Path) -> float:
        """Run a container and return the seconds until the first byte of its output was here."""
        with self.container() as container_id:
            began = time.monotonic()
            with started(self.argv("run", "--bundle", bundle, container_id), pipes=True) as process:
                read_some(process)
                return time.monotonic() - began

    def output(self, bundle: Path) -> str:
        """Run a container and return what it prints."""
        with (
            self.container() as container_id,
            started(self.argv("run", "--bundle", bundle, container_id), pipes=True) as process,
        ):
            assert process.stdout is not None
            with open(process.stdout.fileno(), "rb", closefd=False) as stdout:
                return stdout.read().decode(errors="replace")

    def together(self, bundle: Path, count: int) -> float:
        """Run so many containers at once and return the seconds until the last has ended."""
        with ExitStack() as stack:
            ids = [stack.enter_context(self.container()) for _ in range(count)]
            began = time.monotonic()
            argvs = [self.argv("run", "--bundle", bundle, container_id) for container_id in ids]
            processes = [stack.enter_context(started(argv)) for argv in argvs]
            for process in processes:
                await_end(process)
            return time.monotonic() - began


def read_some(process: subprocess.Popen[bytes]) -> bytes:
    """Return the next bytes that a process prints. Raises BenchError where there are none."""
    assert process.stdout is not None
    data = process.stdout.read(1 << 16)
    if not data:
        raise BenchError(f"{process.args!r} has printed too little")
    return data


class Bundles:
    """Bundles below one directory that share one root file system of busybox."""

    def __init__(self, directory: Path) -> None:
        self.rootfs = make_rootfs(directory / "rootfs")
        self._directory = directory
        self._numbers = itertools.count(1)

    def make(
        self,
        *args: str,
        rootfs: Path | None = None,
        disk: Path | None = None,
        work: Path | None = None,
        network: Path | None = None,
    ) -> Path:
        """Return a new bundle whose process has these arguments.

        ``rootfs`` is another root file system than the one that all share, ``disk`` an image of it for katapy.
        ``work`` is to be /work, ``network`` its network namespace; with either, /tmp is in memory.
        """
        bundle = self._directory / f"bundle{next(self._numbers)}"
        bundle.mkdir()
        spec: dict[str, Any] = default_spec()
        spec["process"] |= {"terminal": False, "args": list(args)}
        spec["root"] = {"path": str(rootfs or self.rootfs), "readonly": True}
        if disk is not None:
            spec["annotations"] = {ROOT_DISK: str(disk)}
        if work is not None:
            spec["mounts"] += [
                {"destination": "/work", "type": "bind", "source": str(work), "options": ["rbind", "rw"]},
            ]
        if network is not None:
            namespaces = [each for each in spec["linux"]["namespaces"] if each["type"] != "network"]
            spec["linux"]["namespaces"] = [*namespaces, {"type": "network", "path": str(network)}]
        if work is not None or network is not None:
            spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
        (bundle / "config.json").write_text(json.dumps(spec))
        return bundle


def make_rootfs(rootfs: Path) -> Path:
    """Make a root file system of Debian's static busybox and return it."""
    for name in _DIRECTORIES:
        (rootfs / name).mkdir(parents=True)
    program = shutil.which("busybox")
    if program is None:
        raise BenchError("busybox is missing: apt-get install busybox-static")
    shutil.copy(program, rootfs / "bin/busybox")
    for applet in subprocess.check_output([program, "--list"], text=True).split():
        if applet != "busybox":
            os.symlink("busybox", rootfs / "bin" / applet)
    return rootfs
