"""What a sandbox notices of another one that attacks: how long its answers take, and the start of the next one.

The attacker has a command line of its own, so that what is measured shares nothing with it but the machine.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from containers import DEADLINE, await_end
from context import Bench
from figures import BenchError, Recorder

from katapy.sdk.process import Process
from katapy.sdk.sandbox import Sandbox

_ALONE: Final = "a neighbour's answer"
_ECHOES: Final = 200
_ENDLESS: Final = "1T"
_READY: Final = b"ready\n"
_BEGIN: Final = "import os\nos.write(2, b'ready\\n')\n"
# Each goes on until it is ended.
_ATTACKS: Final = {
    "a fork bomb": "while True:\n  try: os.fork()\n  except OSError: pass",
    "a spin": "while True: pass",
    "a memory hog": "hog = bytearray(200 << 20)\nwhile True: hog[::4096] = bytes(len(hog) >> 12)",
    "endless output": "while True: os.write(1, bytes(65536))",
}


def measure(recorder: Recorder, bench: Bench, options: dict[str, Any], start: Callable[[], float], beside: str) -> None:
    """Measure one round. ``start`` returns the seconds of a start, which the series ``beside`` is of."""
    with Sandbox(**options) as sandbox, sandbox.start(["cat"], timeout=None, output=_ENDLESS) as echo:
        _answer(echo)
        recorder.add(_ALONE, _answers(echo))
        for name, code in _ATTACKS.items():
            with _attack(bench, code):
                recorder.add(f"{_ALONE} beside {name}", _answers(echo), beside=_ALONE)
            recorder.add(f"first result, warm, after {name}", start(), beside=beside)


@contextmanager
def _attack(bench: Bench, code: str) -> Iterator[None]:
    """Have a sandbox attack until the context ends, by when it has gone."""
    limits = ["--wall-time", "0", "--output", _ENDLESS]
    argv = bench.warm.argv("sandbox", *limits, "--", "python3", "-c", _BEGIN + code)
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stderr is not None
            said: list[bytes] = []
            while not said or said[-1] != _READY:
                if not (line := process.stderr.readline()):
                    raise BenchError(f"an attack has ended: {b''.join(said).decode(errors='replace')}")
                said.append(line)
            yield
            if process.poll() is not None:
                raise BenchError(f"an attack has ended, with status {process.returncode}")
        finally:
            process.terminate()
            await_end(process)


def _answers(echo: Process) -> float:
    """Return the median of the seconds that a line takes there and back."""
    return statistics.median(_answer(echo) for _ in range(_ECHOES))


def _answer(echo: Process) -> float:
    began = time.monotonic()
    echo.write(b"ping\n")
    chunk = echo.read(DEADLINE)
    if chunk is None or chunk.data != b"ping\n":
        raise BenchError(f"the neighbour has answered {chunk!r}")
    return time.monotonic() - began
