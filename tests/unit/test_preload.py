"""A shim that waits for its arguments, whatever the program that starts it does with signals."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import signal
from katapy import preload
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
waiting = preload.take()
with open(f"/proc/{waiting.pid}/status") as file:
    print(*(line.strip() for line in file if line.startswith(("SigBlk", "SigIgn"))))
waiting.drop()
"""


def test_it_blocks_and_ignores_what_it_wants_itself() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    _, blocked, _, ignored = done.stdout.split()
    assert int(blocked, 16) == 0
    assert not int(ignored, 16) & 1 << (17 - 1)  # SIGCHLD
