"""Runs the tests on virtual machines in two lanes at once, as neither keeps two cores busy.

functional_tests.py [ARGUMENT OF PYTEST...]. In one VMs are restored from templates; in the other they are booted, and
then come the tests of sandboxes. Each run sees its own mounts alone; what the second lane prints comes last. The exit
status is 0 where all pass. What each test did is in build/results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import BinaryIO

SOURCE = Path(__file__).resolve().parents[1]
LOG = SOURCE / "build/functional.log"
RESULTS = SOURCE / "build/results"
PYTEST = ["unshare", "--mount", "--propagation", "private", ".venv/bin/pytest", "-q"]
SANDBOXES = "tests/functional/test_sandbox*.py"
NO_TESTS = 5


def main() -> int:
    """Run the tests."""
    arguments = sys.argv[1:] or ["-m", "not soak"]
    sandboxes = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.glob(SANDBOXES))
    most = ["tests/functional", f"--ignore-glob={SANDBOXES}"]
    first = {"warm": [*PYTEST, *most, *arguments]}
    second = {
        "cold": [*PYTEST, *most, *arguments, "--starts", "cold"],
        "sandboxes": [*PYTEST, *sandboxes, *arguments],
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
    print("tests/functional --starts cold, and sandboxes:", flush=True)
    with LOG.open("rb") as printed:
        shutil.copyfileobj(printed, sys.stdout.buffer)
    return int(interrupted.is_set() or failed.is_set())


def _recorded(name: str) -> dict[str, str]:
    file = RESULTS / f"functional-{name}.jsonl"
    file.unlink(missing_ok=True)
    return {**os.environ, "KATAPY_RECORD": str(file)}


if __name__ == "__main__":
    sys.exit(main())
