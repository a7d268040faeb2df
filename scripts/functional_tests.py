"""Runs the tests on virtual machines, restored ones and booted ones at once, as neither keeps two cores busy.

functional_tests.py [ARGUMENT OF PYTEST...]. Each of the two sees its own mounts alone; what the second one prints comes
last. The exit status is 0 where both pass. What each test did is in build/results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

SOURCE = Path(__file__).resolve().parents[1]
COLD_LOG = SOURCE / "build/functional-cold.log"
RESULTS = SOURCE / "build/results"
PYTEST = ["unshare", "--mount", "--propagation", "private", ".venv/bin/pytest", "-q", "tests/functional"]


def main() -> int:
    """Run the tests."""
    arguments = sys.argv[1:] or ["-m", "not soak"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with COLD_LOG.open("wb") as log:
        warm = subprocess.Popen([*PYTEST, *arguments], cwd=SOURCE, env=_recorded("warm"))
        booted = [*PYTEST, *arguments, "--starts", "cold"]
        cold = subprocess.Popen(booted, cwd=SOURCE, stdout=log, stderr=log, env=_recorded("cold"))

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        # Which lets them end what they have started. A terminal has told both already.
        for process in (warm, cold):
            process.send_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, lambda *_: None)
    statuses = [warm.wait(), cold.wait()]
    print("tests/functional --starts cold:", flush=True)
    with COLD_LOG.open("rb") as printed:
        shutil.copyfileobj(printed, sys.stdout.buffer)
    return int(any(statuses))


def _recorded(starts: str) -> dict[str, str]:
    file = RESULTS / f"functional-{starts}.jsonl"
    file.unlink(missing_ok=True)
    return {**os.environ, "KATAPY_RECORD": str(file)}


if __name__ == "__main__":
    sys.exit(main())
