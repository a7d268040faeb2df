"""What runs in the lab, as a service of its systemd: sets the project up where it was, and does the job.

The project's disk is read-only at /lab, the third disk is a tar file, and the fourth has templates. What is printed,
what tests do and what is left of them go out by virtio's ports. When this ends, the lab does.
"""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_HANDED: Final = "/dev/vdc"
_SCRATCH: Final = "/dev/vdd"
_DATA_DIR: Final = "/var/lib/katapy"
_JOB: Final = Path("/run/lab.json")
_PORTS: Final = Path("/sys/class/virtio-ports")
_RESULTS: Final = Path("/run/lab-results")
_SHELL_TTY: Final = "/dev/hvc0"
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A VM takes ten times as long to start here as on hardware.
_TIMEOUT: Final = 600


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _port(name: str) -> Path:
    """Return the device of the port that QEMU calls ``name``."""
    return next(Path("/dev", path.parent.name) for path in _PORTS.glob("*/name") if path.read_text().strip() == name)


def _set_up() -> dict[str, Any]:
    Path(_DATA_DIR).mkdir(parents=True)
    _mount("-t", "ext4", _SCRATCH, _DATA_DIR)
    with tarfile.open(_HANDED) as tar:
        tar.extractall("/")
    job: dict[str, Any] = json.loads(_JOB.read_text())
    # The virtual environment names its place.
    project = Path(job["project"])
    project.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "changes", "/mnt")
    for name in ("upper", "work"):
        Path("/mnt", name).mkdir()
    _mount("-t", "overlay", "-o", "lowerdir=/lab,upperdir=/mnt/upper,workdir=/mnt/work", "project", str(project))
    return job


class _Port:
    """A port of virtio, which only one may have open: lines of many go out by it, each as a whole."""

    def __init__(self, name: str) -> None:
        self._file = _port(name).open("wb", buffering=0)
        self._lock = threading.Lock()

    def write(self, line: bytes) -> None:
        """Write a line."""
        with self._lock:
            self._file.write(line)


@contextmanager
def _fifo(path: Path, port: _Port) -> Iterator[Path]:
    """Give a FIFO whose lines go out by ``port``, all of them when this ends."""
    os.mkfifo(path)
    # A writer of our own, so that it has no end before that one is closed.
    reader, writer = os.open(path, os.O_RDONLY | os.O_NONBLOCK), os.open(path, os.O_WRONLY)
    os.set_blocking(reader, True)
    thread = threading.Thread(target=_pass_lines, args=[reader, port, b""])
    thread.start()
    try:
        yield path
    finally:
        os.close(writer)
        thread.join()


def _pass_lines(fd: int, port: _Port, prefix: bytes) -> None:
    with open(fd, "rb") as file:
        for line in file:
            port.write(prefix + line)


def _do(project: str, run: dict[str, Any], output: _Port, events: _Port) -> int:
    """Do one run of pytest or the bench and return its status."""
    name = run["name"]
    config = Path("/run", f"katapy-{name}.toml")
    config.write_text(run["config"])
    results = _RESULTS / name
    if "bench" in run:
        argv = [".venv/bin/python", "bench/run.py", *run["bench"], "--output", str(results)]
    else:
        pytest = [".venv/bin/pytest", "-v", "-p", "no:cacheprovider", "-o", f"timeout={_TIMEOUT}"]
        pytest += ["-o", "timeout_method=signal", f"--junit-xml={results}.xml", "--durations=15"]
        argv = ["unshare", "--mount", "--propagation", "private", *pytest, *run["tests"]]
    with _fifo(Path("/run", f"events-{name}"), events) as record:
        environment = {
            "PATH": _PATH,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            "KATAPY_LAB": name,
            "KATAPY_RECORD": str(record),
            "KATAPY_CONFIG": str(config),
        }
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(
            argv, cwd=project, env=environment, stdin=null, stdout=pipe, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            _pass_lines(os.dup(process.stdout.fileno()), output, f"{name}: ".encode())
    if "bench" in run and process.returncode == 0:
        # What comes out has no directories.
        for path in results.iterdir():
            path.rename(_RESULTS / f"{name}-{path.name}")
    return process.returncode


def _work(job: dict[str, Any]) -> None:
    _RESULTS.mkdir()
    output, events = _Port("output"), _Port("events")
    statuses: list[int] = []

    def do(runs: list[dict[str, Any]]) -> None:
        for run in runs:
            status = 1
            try:
                status = _do(job["project"], run, output, events)
            finally:
                statuses.append(status)

    do(job["alone"])
    lanes = [threading.Thread(target=do, args=[runs]) for runs in job["lanes"]]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    with (_RESULTS / "journal.log").open("wb") as journal:
        subprocess.run(["journalctl", "--boot", "--no-pager"], stdout=journal)
    with _port("results").open("wb") as port, tarfile.open(fileobj=port, mode="w|") as tar:
        tar.add(_RESULTS, "results")
    # The last word: with it, all that was before has arrived.
    events.write(json.dumps({"status": max(statuses)}).encode() + b"\n")


def _shell(job: dict[str, Any]) -> None:
    columns, rows = job["shell"]
    environment = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": job["term"], "KATAPY_LAB": "shell"}
    subprocess.run(["stty", "-F", _SHELL_TTY, "sane", "cols", str(columns), "rows", str(rows)], check=True)
    with open(_SHELL_TTY, "r+b", buffering=0) as terminal:  # noqa: PTH123
        argv = ["setsid", "--ctty", "bash"]
        subprocess.run(argv, stdin=terminal, stdout=terminal, stderr=terminal, cwd=job["project"], env=environment)


def main() -> None:
    """Do the job."""
    job = _set_up()
    if "shell" in job:
        _shell(job)
    else:
        _work(job)


if __name__ == "__main__":
    main()
