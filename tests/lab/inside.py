"""What runs in the lab, as a service of its systemd: sets the project up where it was, and does the job.

The project's disk is read-only at /lab, the third disk is a tar file, and the fourth has templates. What is printed,
what tests do and what is left of them go out by virtio's ports. When this ends, the lab does.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_HANDED: Final = "/dev/vdc"
_SCRATCH: Final = "/dev/vdd"
_DATA_DIR: Final = "/var/lib/katapy"
_JOB: Final = Path("/run/lab.json")
# For a Python that is not the one of the virtual environment.
_PACKAGES: Final = Path("/opt/packages")
_PROGRAMS: Final = ("containerd-shim-katapy-v2", "katapy", "pytest")
_PORTS: Final = Path("/sys/class/virtio-ports")
_RESULTS: Final = Path("/run/lab-results")
_SHELL_TTY: Final = "/dev/hvc0"
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# A VM takes ten times as long to start here as on hardware.
_TIMEOUT: Final = 600
_CLOCK: Final = "/dev/rtc0"
_RTC_UIE_ON: Final = 0x7003  # linux/rtc.h


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _port(name: str) -> Path:
    """Return the device of the port that QEMU calls ``name``."""
    return next(Path("/dev", path.parent.name) for path in _PORTS.glob("*/name") if path.read_text().strip() == name)


def _tell(**event: object) -> None:
    _port("events").write_text(json.dumps(event) + "\n")


def _set_up() -> dict[str, Any]:
    Path(_DATA_DIR).mkdir(parents=True)
    _mount("-t", "ext4", _SCRATCH, _DATA_DIR)
    with tarfile.open(_HANDED) as tar:
        tar.extractall("/")
    job: dict[str, Any] = json.loads(_JOB.read_text())
    # The virtual environment names its place.
    project = Path(job["project"])
    project.mkdir(parents=True, exist_ok=True)
    # containerd's snapshots have overlays, which cannot be on the overlay that the root is.
    _mount("-t", "tmpfs", "tmp", "/tmp")
    _mount("-t", "tmpfs", "changes", "/mnt")
    for name in ("upper", "work"):
        Path("/mnt", name).mkdir()
    _mount("-t", "overlay", "-o", "lowerdir=/lab,upperdir=/mnt/upper,workdir=/mnt/work", "project", str(project))
    if _PACKAGES.exists():
        _set_up_python(project)
    return job


def _set_up_python(project: Path) -> None:
    """Make the virtual environment anew, with the lab's own Python; it has the same programs."""
    environment = project / ".venv"
    programs = {environment / "bin" / name: (environment / "bin" / name).read_bytes() for name in _PROGRAMS}
    subprocess.run(["python3", "-m", "venv", "--clear", "--without-pip", environment], check=True)
    for path, text in programs.items():
        path.write_bytes(text)
        path.chmod(0o755)
    (site,) = environment.glob("lib/python3.*/site-packages")
    (site / "lab.pth").write_text(f"{_PACKAGES}\n{project}\n")


def _do(project: str, run: dict[str, Any]) -> int:
    """Do one run of pytest or the bench and return its status."""
    config = Path("/run", f"katapy-{run['name']}.toml")
    config.write_text(run["config"])
    environment = {
        "PATH": _PATH,
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "KATAPY_LAB": run["name"],
        "KATAPY_RECORD": str(_port("events")),
        "KATAPY_CONFIG": str(config),
    }
    print(f"lab: {run['name']}", flush=True)
    _tell(run=run["name"])
    if "bench" in run:
        output = _RESULTS / run["name"]
        bench = [".venv/bin/python", "bench/run.py", *run["bench"], "--output", str(output)]
        status = subprocess.run(bench, cwd=project, env=environment, stdin=subprocess.DEVNULL).returncode
        if status == 0:
            print((output / "performance.md").read_text(), flush=True)
            # What comes out has no directories.
            for path in output.iterdir():
                path.rename(_RESULTS / f"{run['name']}-{path.name}")
        return status
    pytest = [".venv/bin/pytest", "-v", "-p", "no:cacheprovider", "-o", f"timeout={_TIMEOUT}"]
    pytest += ["-o", "timeout_method=signal", f"--junit-xml={_RESULTS}/{run['name']}.xml", "--durations=15"]
    argv = ["unshare", "--mount", "--propagation", "private", *pytest, *run["tests"]]
    return subprocess.run(argv, cwd=project, env=environment, stdin=subprocess.DEVNULL).returncode


def _work(job: dict[str, Any]) -> None:
    _RESULTS.mkdir()
    output = os.open(_port("output"), os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 0
    for run in job["runs"]:
        status = _do(job["project"], run) or status
    with (_RESULTS / "journal.log").open("wb") as journal:
        subprocess.run(["journalctl", "--boot", "--no-pager"], stdout=journal)
    with _port("results").open("wb") as port, tarfile.open(fileobj=port, mode="w|") as tar:
        tar.add(_RESULTS, "results")
    # The last word: with it, all that was before has arrived.
    _tell(status=status)


@contextmanager
def _pulse() -> Iterator[None]:
    """Have the CMOS clock interrupt each second.

    Where QEMU emulates SVM it changes the set of a CPU's pending interrupts from two threads without a lock, and now
    and then one is forgotten. If that is the timer's of an idle CPU, nothing wakes it any more but another interrupt,
    and that brings the forgotten one back.
    """
    with open(_CLOCK, "rb") as clock:  # noqa: PTH123
        fcntl.ioctl(clock, _RTC_UIE_ON)
        yield


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
    with _pulse():
        if "shell" in job:
            _shell(job)
        else:
            _work(job)


if __name__ == "__main__":
    main()
