"""Runs all tests but the long ones in two lanes at once, as neither keeps two cores busy.

all_tests.py [ARGUMENT OF PYTEST...]

The lanes begin with what needs no virtual machine; where some of that fails, the rest is not run. Then, in the first
lane, come the tests of engines and networks, and of sandboxes; in the second one those of the runtime itself, with VMs
that are restored from templates and then with VMs that are booted. Each run sees its own mounts alone. With arguments
there are only the runs that start VMs.

What the first lane prints comes as it is printed, what the second one prints when both are over; build/second-lane.log
has it meanwhile. The exit status is 0 where all pass. What each test did is in build/results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import BinaryIO, Final

SOURCE: Final = Path(__file__).resolve().parents[1]
LOG: Final = SOURCE / "build/second-lane.log"
RESULTS: Final = SOURCE / "build/results"
TESTS: Final = SOURCE / "tests/functional"
ENGINES: Final = ("test_containerd*.py", "test_cri*.py", "test_docker.py", "test_*engines.py", "test_pod_network.py")
SANDBOXES: Final = ("test_sandbox*.py",)
WITH_VMS: Final = ("engines", "sandboxes", "runtime", "cold")
# Many a test looks whether it leaves a mount behind.
PYTEST: Final = ("unshare", "--mount", "--propagation", "private", ".venv/bin/pytest", "-q")
NOT_LONG: Final = ("-m", "not soak")
NO_TESTS: Final = 5

Lane = Mapping[str, Sequence[str]]
"""Commands by name, one after the other."""


def plan_lanes(arguments: Sequence[str]) -> tuple[Lane, Lane]:
    """Return both lanes, given what to hand on to pytest."""
    engines, sandboxes = _find(ENGINES), _find(SANDBOXES)
    others = sorted({*_find(("test_*.py",))} - {*engines, *sandboxes})
    handed = arguments or NOT_LONG
    first = {"engines": [*PYTEST, *engines, *handed], "sandboxes": [*PYTEST, *sandboxes, *handed]}
    second = {
        "runtime": [*PYTEST, *others, *handed],
        "cold": [*PYTEST, *others, *handed, "--starts", "cold"],
    }
    if arguments:
        return first, second
    unit = {"unit": [*PYTEST, "tests/unit", *NOT_LONG], "agent": [*PYTEST, "guest-agent/tests", *NOT_LONG]}
    rest = {"lint": ["make", "--no-print-directory", "lint"], "integration": [*PYTEST, "tests/integration", *NOT_LONG]}
    return {**unit, **first}, {**rest, **second}


class Runner:
    """Runs lanes, and can be told to stop."""

    def __init__(self) -> None:
        self.failed = threading.Event()
        self._stopped = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def begin_nothing(self) -> None:
        """Count as failed, and begin nothing more."""
        self.failed.set()
        self._stopped.set()

    def stop(self) -> None:
        """Begin nothing more, and let what runs end what it has started."""
        self.begin_nothing()
        with self._lock:
            for process in self._running:
                process.send_signal(signal.SIGINT)

    def run(self, lane: Lane, output: BinaryIO | None) -> None:
        """Run a lane to its end; what it prints goes to ``output``, or where ours does.

        Raises OSError where a program cannot be started, which stops both lanes.
        """
        try:
            self._run(lane, output)
        except BaseException:
            self.stop()
            raise

    def _run(self, lane: Lane, output: BinaryIO | None) -> None:
        for name, command in lane.items():
            _say(f"{name}:", output)
            began = monotonic()
            with self._lock:
                if self._stopped.is_set():
                    return
                process = subprocess.Popen(
                    command, cwd=SOURCE, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_recorded(name)
                )
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.remove(process)
            # Of what is chosen by the arguments a lane may have none.
            failed = status not in (0, NO_TESTS)
            if output is not None:
                _say(f"{name}: {'failed' if failed else 'done'} after {monotonic() - began:.0f} s, in the other lane")
            if failed:
                self.failed.set()
                if name not in WITH_VMS:
                    self.stop()


def main() -> None:
    """Run the tests."""
    runner = Runner()
    first, second = plan_lanes(sys.argv[1:])

    def terminated(_number: int, _frame: FrameType | None) -> None:
        # Not here: what is interrupted may hold the lock.
        threading.Thread(target=runner.stop).start()

    signal.signal(signal.SIGTERM, terminated)
    # A terminal has told the tests already.
    signal.signal(signal.SIGINT, lambda *_: runner.begin_nothing())
    RESULTS.mkdir(parents=True, exist_ok=True)
    with LOG.open("wb") as log:
        lane = threading.Thread(target=runner.run, args=(second, log))
        lane.start()
        runner.run(first, None)
        lane.join()
    print("the other lane:", flush=True)
    with LOG.open("rb") as printed:
        shutil.copyfileobj(printed, sys.stdout.buffer)
    sys.exit(runner.failed.is_set())


def _say(text: str, output: BinaryIO | None = None) -> None:
    """Print a line, to where a process may write as well."""
    os.write(1 if output is None else output.fileno(), f"{text}\n".encode())


def _find(patterns: Sequence[str]) -> list[str]:
    return sorted(str(path.relative_to(SOURCE)) for pattern in patterns for path in TESTS.glob(pattern))


def _recorded(name: str) -> dict[str, str]:
    file = RESULTS / f"{name}.jsonl"
    file.unlink(missing_ok=True)
    return {**os.environ, "KATAPY_RECORD": str(file)}


if __name__ == "__main__":
    main()
