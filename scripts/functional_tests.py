"""Runs the tests on virtual machines in two lanes at once, as neither keeps two cores busy.

functional_tests.py [ARGUMENT OF PYTEST...]. In one are the tests of engines and networks, and of sandboxes; in the
other those of the runtime itself, with VMs that are restored from templates and then with VMs that are booted. Each run
sees its own mounts alone; what the second lane prints comes last. The exit status is 0 where all pass. What each test
did is in build/results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

SOURCE = Path(__file__).resolve().parents[1]
LOG = SOURCE / "build/functional.log"
RESULTS = SOURCE / "build/results"
PYTEST = ["unshare", "--mount", "--propagation", "private", ".venv/bin/pytest", "-q"]
TESTS = SOURCE / "tests/functional"
ENGINES = ("test_containerd*.py", "test_cri*.py", "test_docker.py", "test_*engines.py", "test_pod_network.py")
SANDBOXES = ("test_sandbox*.py",)
NO_TESTS = 5


def main() -> int:
    """Run the tests."""
    arguments = sys.argv[1:] or ["-m", "not soak"]
    engines, sandboxes = _find(ENGINES), _find(SANDBOXES)
    others = sorted({*_find(("test_*.py",))} - {*engines, *sandboxes})
    first = {"engines": [*PYTEST, *engines, *arguments], "sandboxes": [*PYTEST, *sandboxes, *arguments]}
    second = {
        "runtime": [*PYTEST, *others, *arguments],
        "cold": [*PYTEST, *others, *arguments, "--starts", "cold"],
    }
    running: list[subprocess.Popen[bytes]] = []
    interrupted = threading.Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        # Which lets them end what they have started. A terminal has told them already.
        interrupted.set()
        for process in running:
            process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, lambda *_: interrupted.set())

    def run(lane: dict[str, list[str]], output: BinaryIO | None) -> None:
        for name, command in lane.items():
            if interrupted.is_set():
                return
            process = subprocess.Popen(command, cwd=SOURCE, stdout=output, stderr=output, env=_recorded(name))
            running.append(process)
            # Of what is chosen by the arguments a lane may have none.
            if process.wait() not in (0, NO_TESTS):
                failed.set()

    failed = threading.Event()
    RESULTS.mkdir(parents=True, exist_ok=True)
    with LOG.open("wb") as log:
        lane = threading.Thread(target=run, args=(second, log))
        lane.start()
        run(first, None)
        lane.join()
    print("the runtime itself, then with --starts cold:", flush=True)
    with LOG.open("rb") as printed:
        shutil.copyfileobj(printed, sys.stdout.buffer)
    return int(interrupted.is_set() or failed.is_set())


def _find(patterns: Sequence[str]) -> list[str]:
    return sorted(str(path.relative_to(SOURCE)) for pattern in patterns for path in TESTS.glob(pattern))


def _recorded(name: str) -> dict[str, str]:
    file = RESULTS / f"functional-{name}.jsonl"
    file.unlink(missing_ok=True)
    return {**os.environ, "KATAPY_RECORD": str(file)}


if __name__ == "__main__":
    sys.exit(main())
