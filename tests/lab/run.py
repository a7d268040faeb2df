"""The lab: a host with KVM, vhost-vsock, vhost-net, cgroup v2 and systemd, emulated; tests run in it as they do here.

run.py [--deadline SECONDS] [TEST...]   boot it, run the selection of tests/features.py in it, or what is named
run.py --bench                          the bench in it, by vsock device: only its ratios mean something
run.py --shell                          a shell in it

QEMU's TCG emulates AMD's SVM, so a Debian in it has a working /dev/kvm. The selection runs in two labs side by side,
the lanes of lanes.py. What the tests print is printed here while they run; build/lab-results, with a directory for each
lane, holds that, the consoles, what each test did, and what the lab hands out at its end. The exit status is that of
the tests, and 1 for a lab that ends without one or has to be ended. --release trixie makes it a Debian 13.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import termios
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Final

import debian
import lanes
import recipe
from outcomes import Interrupted, LabError, Outcomes, Run, run_until_passed
from progress import Progress
from steps import BuildError, call, run_main, step

from katapy.assets.asset import DEFAULT_DATA_DIR

SOURCE: Final = Path(__file__).resolve().parents[2]
_BUILD: Final = SOURCE / "build"
_RESULTS: Final = _BUILD / "lab-results"
"""Of a lane: in a directory of its name."""
# Of the project's directory: what has no use in the lab.
_LEFT_OUT: Final = r"^(build|dist|\.git|\.(mypy|pytest|ruff|import_linter)_cache|\.hypothesis)(/|$)"
# A lab takes 25 to 40 minutes where it does not die.
_DEADLINE: Final = 60 * 60.0
# A test has 10 minutes, and then its fixtures.
_SILENCE: Final = 20 * 60.0
_MEMORY: Final = "5G"
_CPUS: Final = 2
# Two VMs on two emulated CPUs kill the host sooner or later; and two labs of one CPU do more than one of two.
_TESTS_CPUS: Final = 1
# String instructions and SMAP are what TCG emulates slowly: see katapy.hypervisor.cmdline.
_CPU: Final = "max,+svm,-erms,-fsrm,-smap"
# Linux takes the TSCs of two of AMD's CPUs for unsynchronized, and an emulated HPET is a slow clock.
_PARAMS: Final = "quiet panic=-1 no_timer_check tsc=reliable clearcpuid=112 mitigations=off systemd.unit=lab.target"
_SCRATCH: Final = "6G"
_RESULTS_MAX: Final = 256 << 20
_CONSOLE_LINES: Final = 25
_CHUNK: Final = 1 << 16
# Of the virtual environment: large, and no test in the lab needs it.
_NOT_IN_THE_LAB: Final = {"grpcio-tools", "import-linter", "grimp", "mypy", "ruff"}
_PACKAGES: Final = "/opt/packages"

# Of the guests in the lab: they are emulated all the same, so what spares time under TCG does here.
_CONFIG: Final = """[hypervisor]
accel = "{accel}"
vsock = "{vsock}"
kernel_params = ["mitigations=off", "clearcpuid=112"]
[runtime]
boot_timeout = 600
"""
# What is measured with which vsock device: the kernel's or katapy's own.
_STREAMS: Final = (("streams", "kernel"), ("streams", "user"), ("sharing", "kernel"))
# How many rounds of starts with which accelerator. Each takes many minutes with TCG, and one is like another where the
# clock counts instructions.
_STARTS: Final = (("kvm", 3), ("tcg", 1))
_BENCH_DEADLINE: Final = 4 * 3600.0


def _config(accel: str = "auto", vsock: str = "auto") -> str:
    return _CONFIG.format(accel=accel, vsock=vsock)


def plan_benches(*, counted: bool) -> list[dict[str, object]]:
    """Return the runs of the bench in a lab, each with a name, its options and katapy's configuration.

    Each is a bench of its own, so that a lab that dies has lost one. Those of a lab whose clock counts instructions are
    the starts.
    """
    if counted:
        return [_plan_bench("start", accel, _config(accel), rounds) for accel, rounds in _STARTS]
    return [_plan_bench(group, f"{vsock}-vsock", _config("kvm", vsock), 3) for group, vsock in _STREAMS]


def _plan_bench(group: str, condition: str, config: str, rounds: int) -> dict[str, object]:
    options = ["--quick", f"--only={group}", f"--runs={rounds}"]
    return {"name": f"{group}-{condition}", "bench": options, "config": config}


def plan(lane: str, tests: Sequence[str]) -> list[dict[str, object]]:
    """Return the runs of pytest in a lab, each with a name, its arguments and katapy's configuration."""
    if tests:
        return [{"name": "named", "tests": list(tests), "config": _config()}]
    return [
        {"name": name, "tests": selected, "config": _config(vsock=vsock)}
        for name, vsock, selected in lanes.runs_of(lane)
    ]


def _fetch_packages(directory: Path, python: str) -> None:
    """Have pip put what the virtual environment has into ``directory``, in the same versions, for another Python."""
    pip: list[str | Path] = [SOURCE / ".venv/bin/python", "-m", "pip", "--disable-pip-version-check"]
    installed = call([*pip, "freeze", "--exclude-editable"]).splitlines()
    wanted = [each for each in installed if each.partition("==")[0] not in _NOT_IN_THE_LAB]
    platforms = [f"--platform={name}_x86_64" for name in ("manylinux_2_28", "manylinux2014")]
    options = ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", f"--python-version={python}", *platforms]
    call([*pip, "install", *options, "--target", directory, *wanted])


@dataclass(frozen=True)
class Lab:
    """What a lab is made of: its memory as QEMU takes it, and where what comes out of it is kept."""

    image: recipe.HostImage
    release: str
    cpus: int
    memory: str
    results: Path
    counted: bool = False
    """Whether an instruction is a nanosecond to it. Else its time is ours, and a VM that TCG emulates within it was not
    seen to boot: one timer's interrupt seems to take longer there than lies between two."""


@contextmanager
def _disks(lab: Lab, job: Mapping[str, object]) -> Iterator[tuple[Path, Path, Path]]:
    """Yield the disks: the project with its virtual environment, a tar file of the guest's assets and the job, and one
    to write on. Templates are there: in the lab's own root, which is memory, they would count against the limit of the
    pod that makes them. For a release with another Python the tar file has its packages, too.
    """
    directory = lab.results / "disks"
    directory.mkdir()
    project, handed, scratch = (directory / name for name in ("project.erofs", "handed.tar", "scratch.ext4"))
    try:
        with step("the project, for the lab"):
            call(["mkfs.erofs", "--quiet", f"--exclude-regex={_LEFT_OUT}", project, SOURCE])
            with tarfile.open(handed, "w") as tar:
                for name in ("image", "kernel"):
                    path = DEFAULT_DATA_DIR / name
                    tar.add(path, str(path.relative_to("/")))
                if lab.release != debian.CODENAME:
                    _fetch_packages(directory / "packages", recipe.RELEASES[lab.release].python)
                    tar.add(directory / "packages", _PACKAGES)
                document = json.dumps(job).encode()
                member = tarfile.TarInfo("run/lab.json")
                member.size = len(document)
                tar.addfile(member, io.BytesIO(document))
            call(["mkfs.ext4", "-q", scratch, _SCRATCH])
        yield project, handed, scratch
    finally:
        shutil.rmtree(directory)


def _argv(lab: Lab, disks: Sequence[Path], ports: dict[str, int]) -> list[str]:
    """Return QEMU's arguments; ``ports`` are the descriptors of the console and of virtio's ports by their names."""
    argv = ["qemu-system-x86_64", "-machine", "q35,hpet=off", "-cpu", _CPU]
    argv += ["-accel", "tcg,thread=single", "-icount", "shift=0"] if lab.counted else ["-accel", "tcg,thread=multi"]
    argv += ["-smp", str(lab.cpus), "-m", lab.memory]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-kernel", str(lab.image.kernel), "-initrd", str(lab.image.initramfs)]
    argv += ["-append", f"console=ttyS0 {_PARAMS}", "-device", "virtio-serial-pci"]
    for number, path in enumerate((lab.image.root, *disks)):
        # Nobody needs what is on the scratch disk once the lab has ended.
        options = "cache=unsafe" if path.suffix == ".ext4" else "readonly=on"
        argv += ["-drive", f"file={path},if=none,id=disk{number},format=raw,{options}"]
        argv += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    for name, fd in ports.items():
        argv += ["-chardev", f"socket,id={name},fd={fd}"]
        if name == "console":
            argv += ["-serial", f"chardev:{name}"]
        else:
            argv += ["-device", f"{'virtconsole' if name == 'shell' else 'virtserialport'},chardev={name},name={name}"]
    return argv


@contextmanager
def _start(lab: Lab, disks: Sequence[Path], names: Sequence[str]) -> Iterator[dict[str, socket.socket]]:
    """Run the lab; yield our ends of its ports. It is gone afterwards, whatever happens."""
    with ExitStack() as stack:
        pairs = {name: socket.socketpair() for name in names}
        for ours, theirs in pairs.values():
            stack.enter_context(ours)
            stack.enter_context(theirs)
        ports = {name: theirs.fileno() for name, (_, theirs) in pairs.items()}
        argv = ["setpriv", "--pdeathsig=KILL", "--", *_argv(lab, disks, ports)]
        with (lab.results / "qemu.log").open("wb") as log:
            # A group of its own: what interrupts us must not end it before we have said where it is.
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=ports.values(), process_group=0
            )
        stack.callback(process.wait)
        stack.callback(process.kill)
        for _, theirs in pairs.values():
            theirs.close()
        yield {name: ours for name, (ours, _) in pairs.items()}


def _listen(ports: dict[str, socket.socket], takers: Mapping[str, Callable[[bytes], object]], deadline: float) -> bool:
    """Give what comes to its taker until the lab has ended; return whether it did.

    It has not where ``deadline`` has passed, or nothing has come for too long.
    """
    with selectors.DefaultSelector() as selector:
        for name, taker in takers.items():
            selector.register(ports[name], selectors.EVENT_READ, taker)
        while selector.get_map():
            ready = selector.select(max(0.0, min(_SILENCE, deadline - monotonic())))
            if not ready:
                return False
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(_CHUNK)
                if data:
                    key.data(data)
                else:
                    selector.unregister(key.fileobj)
    return True


def _bounded(file: io.FileIO, limit: int) -> Callable[[bytes], None]:
    """Return what writes to ``file`` and forgets what is more than ``limit`` bytes."""

    def write(data: bytes) -> None:
        if file.tell() + len(data) <= limit:
            file.write(data)

    return write


def test(lab: Lab, runs: Sequence[Run], deadline: float) -> int:
    """Run tests and return their exit status. Raises LabError."""
    ends = monotonic() + deadline

    def once(runs: Sequence[Run], outcomes: Outcomes) -> int:
        progress = Progress(outcomes)
        try:
            return work(lab, runs, ends - monotonic(), progress)
        except LabError:
            progress.died()
            raise

    return run_until_passed(runs, once, ends)


def bench(lab: Lab, deadline: float) -> int:
    """Run the bench in two labs, one after the other; return the exit status. Raises LabError."""
    ends = monotonic() + deadline
    status = work(lab, plan_benches(counted=False), deadline, Progress())
    counted = replace(lab, cpus=1, counted=True)
    return work(counted, plan_benches(counted=True), ends - monotonic(), Progress()) or status


def work(lab: Lab, runs: Sequence[Run], deadline: float, progress: Progress) -> int:
    """Run tests or benches in a lab; return their exit status. Raises LabError where it has none."""
    job = {"project": str(SOURCE), "runs": runs}
    with ExitStack() as stack:
        disks = stack.enter_context(_disks(lab, job))
        console, output, events = (
            # Unbuffered: somebody may look at them meanwhile. What a lab before this one has said stays.
            stack.enter_context((lab.results / name).open("ab", buffering=0))
            for name in ("console.log", "output.log", "events.jsonl")
        )
        results = stack.enter_context((lab.results / "results.tar").open("wb", buffering=0))
        keep = _bounded(output, _RESULTS_MAX)

        def show(data: bytes) -> None:
            keep(data)
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

        def note(data: bytes) -> None:
            events.write(data)
            progress.take(data)

        takers = {
            "console": _bounded(console, _RESULTS_MAX),
            "output": show,
            "events": note,
            "results": _bounded(results, _RESULTS_MAX),
        }
        began = monotonic()
        with _start(lab, disks, list(takers)) as ports:
            ended = _listen(ports, takers, began + deadline)
        if not ended:
            took = monotonic() - began
            raise LabError(f"the lab was ended after {took:.0f} s: it hung {progress.place()}{_last_words(lab)}")
        _unpack(lab.results / "results.tar")
        if progress.status is None:
            raise LabError(f"the lab has ended by itself {progress.place()}{_last_words(lab)}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = f"{monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU"
    print(f"lab: status {progress.status} after {times}; more in {lab.results}", flush=True)
    return progress.status


def _last_words(lab: Lab) -> str:
    lines = [line for name in ("qemu.log", "console.log") for line in _lines(lab.results / name)]
    return "\n    ".join(["\nlast lines of its console:", *lines[-_CONSOLE_LINES:]])


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").replace("\r", "").splitlines()


def _unpack(archive: Path) -> None:
    """Unpack the plain files of the lab's results, by their last names."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    (archive.parent / Path(member.name).name).write_bytes(file.read())
    except tarfile.TarError as error:
        print(f"lab: its results are damaged: {error}", file=sys.stderr)
    else:
        archive.unlink()


def shell(lab: Lab) -> int:
    """Give a shell in the lab; it ends with it."""
    job = {"project": str(SOURCE), "shell": list(os.get_terminal_size(0)), "term": os.environ.get("TERM", "linux")}
    with ExitStack() as stack:
        disks = stack.enter_context(_disks(lab, job))
        console = stack.enter_context((lab.results / "console.log").open("wb"))
        ports = stack.enter_context(_start(lab, disks, ["console", "shell"]))
        saved = termios.tcgetattr(0)
        stack.callback(termios.tcsetattr, 0, termios.TCSADRAIN, saved)
        tty.setraw(0)
        with selectors.DefaultSelector() as selector:
            selector.register(0, selectors.EVENT_READ, ports["shell"].sendall)
            selector.register(ports["shell"], selectors.EVENT_READ, lambda data: os.write(1, data))
            selector.register(ports["console"], selectors.EVENT_READ, console.write)
            while True:
                for key, _ in selector.select():
                    data = os.read(key.fd, _CHUNK)
                    if not data:
                        return 0
                    key.data(data)


def _interrupted(number: int, _frame: object) -> None:
    raise Interrupted(f"interrupted by signal {number}")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="run tests on an emulated host with KVM")
    parser.add_argument("--shell", action="store_true", help="a shell instead of tests")
    parser.add_argument("--bench", action="store_true", help="the bench instead of tests")
    parser.add_argument("--deadline", type=float, help="seconds for all of it")
    parser.add_argument("--memory", default=_MEMORY, help="of a lab, as QEMU takes it")
    parser.add_argument("--release", choices=recipe.RELEASES, default=debian.CODENAME, help="of Debian")
    parser.add_argument("--lane", choices=lanes.LANES, help="only this part of the selection")
    parser.add_argument("tests", nargs="*", help="node ids or options of pytest, after --")
    return parser.parse_args()


def _run(options: argparse.Namespace) -> int:
    """Return the exit status. Raises LabError and BuildError."""
    image = recipe.provide(_BUILD / "lab", options.release)
    selection = not (options.shell or options.bench or options.tests)
    if selection and options.lane is None:
        return lanes.run_beside([sys.executable, sys.argv[0]], sys.argv[1:])
    results = _RESULTS / (options.lane or "")
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    tests = not (options.shell or options.bench)
    lab = Lab(image, options.release, _TESTS_CPUS if tests else _CPUS, options.memory, results)
    if options.shell:
        return shell(lab)
    if options.bench:
        return bench(lab, options.deadline or _BENCH_DEADLINE)
    return test(lab, plan(options.lane, options.tests), options.deadline or _DEADLINE)


def main() -> None:
    """Do what the command line says."""
    options = _parse_options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    if options.lane is None:
        shutil.rmtree(_RESULTS, ignore_errors=True)
    try:
        sys.exit(_run(options))
    except (LabError, BuildError) as error:
        sys.exit(f"lab: {error}")


if __name__ == "__main__":
    run_main(main)
