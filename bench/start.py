"""Starting: containers of katapy and runc beside a bare VM of the same kernel, one by one and many at once.

Of katapy there are two: "warm" restores a template, "cold" boots.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from containers import Runtime
from context import Bench
from figures import BenchError, Recorder, progress

BARE: Final = "bare VM to its first process"


class Phase(NamedTuple):
    """A phase of a start, in seconds from the first one's beginning."""

    name: str
    start: float
    end: float


def parse_phases(text: str) -> tuple[list[Phase], float]:
    """Return the phases that ``katapy run --timing-json`` wrote, and the total in seconds. Raises BenchError."""
    try:
        document: dict[str, Any] = json.loads(text)
        phases = [Phase(str(each["name"]), float(each["start"]), float(each["end"])) for each in document["phases"]]
        return phases, float(document["total"])
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"cannot read the phases of a start: {error!r}") from error


def measure(bench: Bench) -> Recorder:
    """Measure the group ``start``."""
    recorder = Recorder("start")
    true, echo, sleep = (bench.bundles.make(*args) for args in (["true"], ["echo", "here"], ["sleep", "100000"]))
    for runtime in bench.runtimes:
        # The first start of a shape makes its template, and reads from the disk what is in memory afterwards.
        took = runtime.run(true)
        progress(f"start: the first of {runtime.name}: {took:.1f} s")
    for _ in range(bench.plan.runs):
        recorder.add(BARE, bench.bare.boot())
        for runtime in bench.runtimes:
            recorder.add(f"run true, {runtime.name}", runtime.run(true), beside=BARE)
            recorder.add(f"first byte of output, {runtime.name}", runtime.first_byte(echo), beside=BARE)
            _verbs(recorder, runtime, sleep)
    # On one CPU they only wait for each other.
    for _ in range(min(bench.plan.runs, 3) if (os.cpu_count() or 1) > 1 else 0):
        for runtime in bench.runtimes:
            _at_once(recorder, runtime, true, bench.plan.at_once)
    return recorder


def _verbs(recorder: Recorder, runtime: Runtime, bundle: Path) -> None:
    """Measure the verbs one by one, as an engine calls them."""
    name = runtime.name
    with runtime.container() as container_id:
        began = time.monotonic()
        runtime.timed("create", "--bundle", bundle, container_id)
        runtime.timed("start", container_id)
        recorder.add(f"create and start, {name}", time.monotonic() - began, beside=BARE)
        recorder.add(f"exec true, {name}", runtime.timed("exec", container_id, "true"), beside="exec true, runc")
        deleted = runtime.timed("delete", "--force", container_id)
        recorder.add(f"delete --force, {name}", deleted, beside="delete --force, runc")


def _at_once(recorder: Recorder, runtime: Runtime, bundle: Path, counts: tuple[int, ...]) -> None:
    for count in counts:
        took = runtime.together(bundle, count)
        beside = f"{counts[0]} at once, {runtime.name}"
        recorder.add(f"{count} at once, {runtime.name}", took, beside=beside)
        if count > 1:
            recorder.add(f"{count} at once, {runtime.name}, each", took / count, beside=beside)


def measure_phases(bench: Bench) -> Recorder:
    """Measure where the time of a warm start goes; the phases overlap, so their shares add up to more than one."""
    recorder = Recorder("phases")
    bundle = bench.bundles.make("true")
    bench.warm.run(bundle)
    file = bench.directory / "phases.json"
    for _ in range(bench.plan.runs):
        bench.warm.run(bundle, "--timing-json", file)
        phases, total = parse_phases(file.read_text())
        recorder.add("total", total)
        for phase in phases:
            recorder.add(phase.name, phase.end - phase.start, beside="total")
    return recorder
