"""Memory: what one idle pod costs on the host, part by part, when it is alone and when it is one of many.

PSS counts a page that N processes share as 1/N of a page in each, so the parts add up. Also how long a start takes
beside so many pods.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from containers import Runtime
from context import Bench
from figures import Recorder, Unit

from katapy.state import StateDir

BARE: Final = "bare VM"
WHOLE: Final = "whole pod"
# A pod goes on for a moment after it has said that its container runs. There is no event that says it is idle.
SETTLE: Final = 3.0
_RESERVE: Final = 2 << 30  # bytes that stay the host's


def parse_pss(smaps_rollup: str) -> int:
    """Return the PSS in bytes: /proc/PID/smaps_rollup, proc(5)."""
    return next(int(line.split()[1]) << 10 for line in smaps_rollup.splitlines() if line.startswith("Pss:"))


def assign_parts(parents: Mapping[int, int], roots: Mapping[int, str]) -> dict[int, str]:
    """Return the part of each process that is one of ``roots`` or below one: that of the nearest above it.

    ``parents`` has the parent of each process of the host.
    """
    parts = {}
    for pid in parents:
        above: int | None = pid
        while above is not None and above not in roots:
            above = parents.get(above)
        if above is not None:
            parts[pid] = roots[above]
    return parts


def pod_memory(root: Path, container_id: str) -> Counter[str]:
    """Return the PSS in bytes of each part of a pod."""
    with StateDir.open(str(root), container_id) as directory:
        state = directory.load()
    roots = {helper.pid: helper.name for helper in state.helpers} | {state.pid: "stand-in"}
    if state.shim is not None:
        roots[state.shim.pid] = "shim"
    return tree_memory(roots)


def tree_memory(roots: Mapping[int, str]) -> Counter[str]:
    """Return the PSS in bytes of ``roots`` and of all that is below them, by the names that they have there."""
    memory: Counter[str] = Counter()
    for pid, part in assign_parts(_parents(), roots).items():
        memory[part] += _pss(pid)
    return memory


def _pss(pid: int) -> int:
    return parse_pss(Path(f"/proc/{pid}/smaps_rollup").read_text())


def _parents() -> dict[int, int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            parents[int(entry.name)] = int(fields[1])
    return parents


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("memory")
    for _ in range(min(bench.plan.runs, 3)):
        bench.bare.boot(lambda pid: recorder.add(BARE, _pss(pid), unit=Unit.BYTES))
    _measure_pods(recorder, bench, bench.cold, bench.plan.pods[:1])
    _measure_pods(recorder, bench, bench.warm, bench.plan.pods)
    return recorder


def _measure_pods(recorder: Recorder, bench: Bench, runtime: Runtime, counts: tuple[int, ...]) -> None:
    sleep, true = bench.bundles.make("sleep", "100000"), bench.bundles.make("true")
    name = f"run true, {runtime.name}"
    runtime.run(true)
    for _ in range(min(bench.plan.runs, 5)):
        recorder.add(f"{name}, no pod alive", runtime.run(true))
    with ExitStack() as stack:
        ids: list[str] = []
        for count in counts:
            while len(ids) < count:
                ids.append(stack.enter_context(runtime.detached(sleep)))
                if not _has_room(count - len(ids), runtime, ids[0]):
                    recorder.note(f"only {len(ids)} pods of {count}: the host's memory would not do")
                    return
            time.sleep(SETTLE)
            _record_memory(recorder, runtime, ids)
            for _ in range(min(bench.plan.runs, 5)):
                recorder.add(f"{name}, {_alive(count)}", runtime.run(true), beside=f"{name}, no pod alive")


def _record_memory(recorder: Recorder, runtime: Runtime, ids: list[str]) -> None:
    """Add what each of the pods takes; the last one has seen all others start."""
    prefix = f"{runtime.name}, {_alive(len(ids))}"
    for container_id in ids:
        memory = pod_memory(runtime.root, container_id)
        recorder.add(f"{prefix}, {WHOLE}", memory.total(), beside=BARE, unit=Unit.BYTES)
        for part, size in sorted(memory.items()):
            recorder.add(f"{prefix}: {part}", size, beside=f"{prefix}, {WHOLE}", unit=Unit.BYTES)


def _alive(count: int) -> str:
    return f"{count} pod{'s' if count > 1 else ''} alive"


def _has_room(more: int, runtime: Runtime, container_id: str) -> bool:
    """Whether the host has the memory for so many more pods as ``container_id`` is."""
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable:"))
    return available > more * pod_memory(runtime.root, container_id).total() + _RESERVE
