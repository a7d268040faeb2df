"""Sandboxes: the SDK's way to the result of ``print(1)``, beside runc and bubblewrap with the same root and Python, and
beside quick-sandbox, which has VMs as well.

A run has its result when its output and its end are here. Of the SDK the time begins with the constructor: what loads
its modules once is not in it. What ends a sandbox is not either, since nobody has to wait for that.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import neighbours
from containers import Runtime, await_end, read_some, started
from context import Bench
from figures import BenchError, Recorder, Unit
from memory import pod_memory, tree_memory

from katapy.assets.root import hold_root
from katapy.config import Config
from katapy.sdk.aio import AsyncSandbox
from katapy.sdk.pool import Pool
from katapy.sdk.sandbox import Sandbox

_PRINT: Final = ("python3", "-c", "print(1)")
_WAIT: Final = ("python3", "-c", "import sys; print(1, flush=True); sys.stdin.read()")
_SECONDS: Final = 600.0
_RUNC: Final = "runc"
_BWRAP: Final = "bubblewrap"
_WARM: Final = "first result, warm"
# In a virtual environment of its own: `scripts/setup bench-tools`.
_QUICK: Final = Path(__file__).resolve().parents[1] / "build/quick-sandbox/bin/python"
# It boots an emulated VM for a minute.
_QUICK_RUNS: Final = 2
# Gives the arguments of a process that runs a command, and removes what that leaves.
_Peer = Callable[[tuple[str, ...]], AbstractContextManager[list[str | Path]]]


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("sandbox")
    with hold_root(Config.load().runtime.data_dir) as root:
        peers = _find_peers(recorder, bench, root.path)
        with Sandbox(**_options(bench.warm)) as sandbox:
            sandbox.run(_PRINT).check()  # the template is made, and all that it takes is in memory
            accelerator = sandbox.accelerator
        for _ in range(bench.plan.runs):
            _measure_first(recorder, bench, peers)
            _measure_served(recorder, bench)
        for count in bench.plan.at_once:
            for _ in range(bench.plan.long_runs):
                _measure_many(recorder, bench, peers, count)
        for _ in range(bench.plan.long_runs):
            _measure_memory(recorder, bench, peers)
            neighbours.measure(recorder, bench, _options(bench.warm), lambda: _first(bench.warm), _WARM)
        for _ in range(min(_QUICK_RUNS, bench.plan.long_runs)):
            _measure_quick_sandbox(recorder, accelerator)
    _note_rates(recorder)
    return recorder


def _options(runtime: Runtime) -> dict[str, Any]:
    """Return the options of a sandbox that is one of this katapy's, and of no pool."""
    return {"config": runtime.options[-1], "state_dir": runtime.root, "timeout": _SECONDS, "pool": ""}


def _find_peers(recorder: Recorder, bench: Bench, rootfs: Path) -> dict[str, _Peer]:
    """Return what there is to compare with."""
    peers: dict[str, _Peer] = {}
    if bench.runc is not None:
        peers[_RUNC] = _Runc(bench.runc, bench, rootfs)
    if (program := shutil.which("bwrap")) is not None:
        peers[_BWRAP] = _Bwrap(program, rootfs)
    else:
        recorder.note(f"{_BWRAP} is not measured: scripts/setup bench-tools")
    return peers


class _Runc:
    def __init__(self, runtime: Runtime, bench: Bench, rootfs: Path) -> None:
        self._runtime = runtime
        commands: tuple[tuple[str, ...], ...] = (_PRINT, _WAIT)
        self._bundles = {args: bench.bundles.make(*args, rootfs=rootfs) for args in commands}

    @contextmanager
    def __call__(self, args: tuple[str, ...]) -> Iterator[list[str | Path]]:
        with self._runtime.container() as container_id:
            yield self._runtime.argv("run", "--bundle", self._bundles[args], container_id)


class _Bwrap:
    def __init__(self, program: str, rootfs: Path) -> None:
        mounts = ["--ro-bind", str(rootfs), "/", "--proc", "/proc", "--dev", "/dev"]
        self._prefix = [program, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", *mounts]

    @contextmanager
    def __call__(self, args: tuple[str, ...]) -> Iterator[list[str | Path]]:
        yield [*self._prefix, "--setenv", "PATH", "/usr/bin:/bin", "--", *args]


def _first(runtime: Runtime) -> float:
    """Return the seconds from the constructor to the first result."""
    began = time.monotonic()
    with Sandbox(**_options(runtime)) as sandbox:
        sandbox.run(_PRINT).check()
        return time.monotonic() - began


def _measure_first(recorder: Recorder, bench: Bench, peers: dict[str, _Peer]) -> None:
    for name, runtime in (("cold", bench.cold), ("warm", bench.warm)):
        began = time.monotonic()
        with Sandbox(**_options(runtime)) as sandbox:
            sandbox.run(_PRINT).check()
            recorder.add(f"first result, {name}", time.monotonic() - began, beside=f"first result, {_RUNC}")
            if runtime is bench.warm:
                began = time.monotonic()
                result = sandbox.run(_PRINT).check()
                took = time.monotonic() - began
                recorder.add("next result in the same VM", took, beside=f"first result, {_RUNC}")
                inside = result.usage.wall_seconds
                recorder.add("next result in the same VM: its process", inside, beside="next result in the same VM")
    for name, peer in peers.items():
        recorder.add(f"first result, {name}", _together(peer, 1), beside=f"first result, {_RUNC}")


def _measure_served(recorder: Recorder, bench: Bench) -> None:
    """Measure one that a pool has ready, which at the same time starts the one that takes its place."""
    options = {**_options(bench.warm), "pool": bench.directory / "pool.sock"}
    with Pool(lambda: Sandbox(**_options(bench.warm)), 1, options["pool"]) as pool:
        pool.await_ready(1)
        began = time.monotonic()
        with Sandbox(**options) as sandbox:
            opened = time.monotonic() - began
            sandbox.run(_PRINT).check()
            recorder.add("first result, served", time.monotonic() - began, beside=f"first result, {_RUNC}")
            recorder.add("first result, served: its start", opened, beside="first result, served")


def _measure_many(recorder: Recorder, bench: Bench, peers: dict[str, _Peer], count: int) -> None:
    name = f"{count} at once, each, {{}}"
    beside = name.format(_RUNC)
    for how, run in (("a VM each", _in_vms), ("in one VM", _in_one_vm)):
        recorder.add(name.format(how), asyncio.run(run(bench, count)) / count, beside=beside)
    for peer_name, peer in peers.items():
        recorder.add(name.format(peer_name), _together(peer, count) / count, beside=beside)


async def _in_vms(bench: Bench, count: int) -> float:
    """Return the seconds until so many sandboxes all had their first result."""
    sandboxes = [AsyncSandbox(**_options(bench.warm)) for _ in range(count)]
    try:
        began = time.monotonic()
        for result in await asyncio.gather(*(sandbox.run(_PRINT) for sandbox in sandboxes)):
            result.check()
        return time.monotonic() - began
    finally:
        await asyncio.gather(*(sandbox.close() for sandbox in sandboxes))


async def _in_one_vm(bench: Bench, count: int) -> float:
    """Return the seconds that so many runs take at once in a started sandbox, which has memory for all."""
    async with AsyncSandbox(**_options(bench.warm), memory="1G") as sandbox:
        (await sandbox.run(_PRINT)).check()
        began = time.monotonic()
        for result in await asyncio.gather(*(sandbox.run(_PRINT) for _ in range(count))):
            result.check()
        return time.monotonic() - began


def _together(peer: _Peer, count: int) -> float:
    """Return the seconds until so many runs of a peer have ended, all started at once."""
    with ExitStack() as stack:
        argvs = [stack.enter_context(peer(_PRINT)) for _ in range(count)]
        began = time.monotonic()
        processes = [stack.enter_context(started(argv, pipes=True)) for argv in argvs]
        for process in processes:
            await_end(process)
        took = time.monotonic() - began
        for process in processes:
            if (said := read_some(process)) != b"1\n":
                raise BenchError(f"{process.args!r} has printed {said[:100]!r}")
        return took


def _measure_memory(recorder: Recorder, bench: Bench, peers: dict[str, _Peer]) -> None:
    """Add what is taken of the host while Python waits in it; of runc and bubblewrap with their own processes."""
    beside = f"memory, {_RUNC}"
    with Sandbox(**_options(bench.warm)) as sandbox, sandbox.start(_WAIT) as running:
        if running.read() is None:
            raise BenchError("Python has not started in a sandbox")
        size = pod_memory(bench.warm.root, sandbox.id).total()
        recorder.add("memory, a sandbox", size, beside=beside, unit=Unit.BYTES)
    for name, peer in peers.items():
        with peer(_WAIT) as argv, started(argv, pipes=True) as process:
            read_some(process)
            size = tree_memory({process.pid: name}).total()
            recorder.add(f"memory, {name}", size, beside=beside, unit=Unit.BYTES)
            assert process.stdin is not None
            process.stdin.close()


def _measure_quick_sandbox(recorder: Recorder, accelerator: str) -> None:
    if not _QUICK.exists():
        recorder.note("quick-sandbox is not measured: scripts/setup bench-tools")
        return
    program = Path(__file__).with_name("quick_sandbox.py")
    with started([_QUICK, program, accelerator], pipes=True) as process:
        took = json.loads(read_some(process))
        for name, beside in (("first", _WARM), ("next", "next result in the same VM")):
            recorder.add(f"{name} result of echo 1, quick-sandbox", took[name], beside=beside)
        size = tree_memory({process.pid: "quick-sandbox"}).total()
        recorder.add("memory, quick-sandbox that does nothing", size, beside="memory, a sandbox", unit=Unit.BYTES)
        assert process.stdin is not None
        process.stdin.close()


def _note_rates(recorder: Recorder) -> None:
    """Say the runs a second of what was measured at once."""
    cores = len(os.sched_getaffinity(0))
    for series in recorder.series():
        if " at once, each, " in series.name:
            rate = 1 / statistics.median(series.values)
            what = series.name.replace(" at once, each, ", " at once, ")
            recorder.note(f"{what}: {rate:.3g} runs per second, {rate / cores:.3g} per core")
