"""The small verbs of the command line, which engines call often, beside a Python that does nothing."""

from __future__ import annotations

import sys
from typing import Final

from containers import run_timed
from context import Bench
from figures import Recorder

_PYTHON: Final = "python3 -c pass"
_ROUNDS: Final = 3  # for each of the plan's: they take little


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("cli")
    with bench.warm.detached(bench.bundles.make("sleep", "100000")) as container_id:
        calls = {"state": ["state", container_id], "list": ["list"], "--help": ["--help"]}
        for _ in range(bench.plan.runs * _ROUNDS):
            recorder.add(_PYTHON, run_timed([sys.executable, "-c", "pass"]))
            for call, args in calls.items():
                recorder.add(f"katapy {call}", bench.warm.timed(*args), beside=_PYTHON)
            if bench.runc is not None:
                recorder.add("runc list", bench.runc.timed("list"), beside=_PYTHON)
    return recorder
